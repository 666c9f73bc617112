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
        "`reshard_after_forward`, `offload_params`, and `cpu_ram_efficient_loading`: each process reads its own part "
        "of the model's files only.",
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
    deepspeed: str | dict[str, Any] | None = key(
        None,
        "Share the training by DeepSpeed: `zero1`, `zero2` or `zero3`, a JSON file, or its options inline. What the "
        "YAML decides must be `auto` there, or the same.",
        axolotl="There the file decides about precision; here it is `bf16`, over fp32 weights.",
    )
    use_ray: bool = key(
        False,
        "Start the processes as workers of Ray Train, in the cluster that `RAY_ADDRESS` names, else in one that "
        "lives as long as the run. Needs the extra `ray`.",
    )
    ray_num_workers: int | None = key(
        None,
        "Workers; default: one per accelerator of this machine, else one.",
        used_when="use_ray",
        ge=1,
        axolotl="Axolotl's default is 1.",
    )
    resources_per_worker: dict[str, float] | None = key(
        None,
        "What Ray reserves for each worker, such as `{CPU: 8, GPU: 1}`; default: a CPU, and a GPU where the cluster "
        "has any.",
        used_when="use_ray",
        axolotl="Axolotl's default is `{GPU: 1}`, also where there is none.",
    )
    ray_placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = key(
        "PACK", "Whether Ray puts the workers on as few or on as many machines as it can.", used_when="use_ray"
    )
    ray_max_failures: int = key(
        0,
        "How often Ray starts all workers again when one is lost; they continue from the newest checkpoint. -1: "
        "always.",
        used_when="use_ray",
        ge=-1,
    )
    ray_run_name: str | None = key(None, "What Ray calls the run.", used_when="use_ray")
    ray_storage_path: str | None = key(
        None,
        "Where Ray keeps its own notes on the run, on a disk that all machines see; default: `~/ray_results`. "
        "Checkpoints and metrics are in `output_dir`.",
        used_when="use_ray",
    )


RAY_KEYS = (
    "use_ray",
    "ray_num_workers",
    "resources_per_worker",
    "ray_placement_strategy",
    "ray_max_failures",
    "ray_run_name",
    "ray_storage_path",
)


def asks_for_parts(keys: ParallelConfig) -> bool:
    """Whether transformers is to split the model while it loads it, so that each process reads its own part only."""
    return keys.tensor_parallel_size > 1 or bool((keys.fsdp_config or {}).get("cpu_ram_efficient_loading"))
