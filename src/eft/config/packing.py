"""How samples share a row."""

from __future__ import annotations

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
    pad_to_sequence_len: bool = key(
        False,
        "Pad rows to `micro_batch_size` × `sequence_len` tokens. Costs time; only for kernels that need one shape.",
        axolotl="Axolotl switches it on with packing. Rows of eft hold no padding unless asked.",
    )
    curriculum_sampling: bool = key(False, "Keep the order of the samples in every epoch (no shuffle).")
