"""How samples share a row."""

from __future__ import annotations

from typing import Literal

from eft.config.section import Section, key


class PackingConfig(Section):
    """Bins: packed rows of at most `sequence_len` tokens."""

    sample_packing: bool = key(
        False, "Put several samples into one row of `sequence_len` tokens, each seeing itself only."
    )
    eval_sample_packing: bool | None = key(None, "The same for evaluation; default: as `sample_packing`.")
    sample_packing_sequentially: bool = key(
        False, "Fill bins in the order of the samples instead of looking for the best fit.", used_when="sample_packing"
    )
    sample_packing_strategy: Literal["auto", "fit", "stream", "dense"] = key(
        "auto",
        "How samples are put into bins. `fit` and `stream` keep bins random draws; `dense` needs the fewest bins, but "
        "puts samples of like length together; `auto` takes the fullest of the random ones and says why.",
        used_when="sample_packing",
    )
    sample_packing_bin_size: int | None = key(
        None,
        "Most samples in a bin; default: as many as fit.",
        axolotl="Axolotl has at most 200, of a whole micro-batch.",
        ge=1,
    )
    balance_buffer_steps: int | None = key(
        None,
        "Sort bins by cost within this many steps, so that those of one step are alike and ranks wait less for each "
        "other. Steps then differ more in the length of their samples. Default: steps are random draws.",
        ge=2,
    )
    pad_to_sequence_len: bool = key(
        False,
        "Pad rows to `micro_batch_size` × `sequence_len` tokens. Costs time; only for kernels that need one shape.",
        axolotl="Axolotl switches it on with packing. Rows of eft hold no padding unless asked.",
    )
    curriculum_sampling: bool = key(False, "Keep the order of the samples in every epoch (no shuffle).")
