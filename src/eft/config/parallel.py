"""More than one process."""

from __future__ import annotations

from typing import Any, Literal

from eft.config.section import Section, key


class ParallelConfig(Section):
    """How the processes of a run share the work. The weights that come out do not depend on it."""

    ddp_timeout: int = key(1800, "Seconds after which a collective that waits is an error.", ge=1)
    stall_timeout: int = key(
        45,
        "Seconds without a sign of life of some process after which the run ends, naming that rank and the line of "
        "Python where it stopped; 0: never. A long step is no silence.",
        ge=0,
    )
    ddp_find_unused_parameters: bool = key(False, "Let DDP search for parameters without gradient.")
    ddp_bucket_cap_mb: int | None = key(None, "Size of DDP's gradient buckets in MiB.", ge=1)
    fsdp_version: Literal[2] | None = key(
        None,
        "`2`: shard weights, gradients and optimizer state over the processes (FSDP2). Also switched on by "
        "`fsdp_config` or `dp_shard_size`.",
        axolotl="Axolotl also takes 1, which torch is phasing out.",
    )
    fsdp_config: dict[str, Any] | None = key(
        None,
        "Options of FSDP2: `transformer_layer_cls_to_wrap`, `auto_wrap_policy`, `min_num_params`, "
        "`reshard_after_forward`, `offload_params`.",
        axolotl="Without `fsdp_` before the names; the checkpoint's format is always the same, so there is no "
        "`state_dict_type`.",
    )
    dp_shard_size: int | None = key(
        None, "Processes that share one copy of the weights (FSDP2); default with FSDP: all that are left.", ge=1
    )
    dp_replicate_size: int | None = key(
        None, "Copies of the weights: with FSDP that is HSDP (default 1), else plain DDP (default: all).", ge=1
    )
    tensor_parallel_size: int = key(1, "Processes that share each matrix of a layer and see the same batch.", ge=1)
    context_parallel_size: int = key(
        1,
        "Processes that share each row: every one holds a part of the tokens, and of the heads inside attention "
        "(Ulysses). Documents stay apart.",
        ge=1,
        axolotl="Axolotl's is ring attention.",
    )
