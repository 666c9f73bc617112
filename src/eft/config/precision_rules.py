"""Rules that span keys of precision, compilation and kernels, and their neighbours; see `rules`."""

from __future__ import annotations

from eft.config.root import Rule, TrainConfig

LIGER_KEYS = ("liger_rms_norm", "liger_rope", "liger_glu_activation")


def pure_bf16_stands_alone(config: TrainConfig) -> tuple[str, str] | None:
    if not config.bfloat16:
        return None
    if config.fp16 or config.bf16 is False:
        other = "fp16: true" if config.fp16 else "bf16: false"
        return "bfloat16", f"`bfloat16: true` (weights in bf16) and `{other}` contradict each other; keep one of them"
    if config.adapter is not None:
        return (
            "bfloat16",
            f"`bfloat16: true`: not with `adapter: {config.adapter}`, whose few weights stay fp32 while the base model "
            "keeps its checkpoint's dtype; use `bf16: true`",
        )
    return None


def rounding_noise_is_not_averaged(config: TrainConfig) -> tuple[str, str] | None:
    random = config.bf16_update == "stochastic_rounding"
    if not (config.bfloat16 and random and config.optimizer.startswith("schedule_free_")):
        return None
    return (
        "bf16_update",
        f"`bf16_update: stochastic_rounding`: not with `optimizer: {config.optimizer}`, which works its average out of "
        "the weights and would export their rounding noise; use `bf16_update: fp32_master`",
    )


def compile_mode_is_inductors(config: TrainConfig) -> tuple[str, str] | None:
    if config.torch_compile and config.torch_compile_backend != "inductor" and config.torch_compile_mode != "default":
        return (
            "torch_compile_mode",
            f"`torch_compile_mode`: not used because `torch_compile_backend` is `{config.torch_compile_backend}`; "
            "remove one of them",
        )
    return None


def one_kind_of_fused_kernel(config: TrainConfig) -> tuple[str, str] | None:
    wanted = {
        "liger_rms_norm": config.liger_rms_norm,
        "liger_rope": config.liger_rope,
        "liger_glu_activation": config.liger_glu_activation,
    }
    for name, is_on in wanted.items():
        if is_on and config.torch_compile:
            return name, f"`{name}`: `torch_compile` fuses the same operations itself; keep one of them"
    return None


def compiled_layers_are_recomputed_whole(config: TrainConfig) -> tuple[str, str] | None:
    if config.torch_compile and config.selective_checkpointing:
        return (
            "selective_checkpointing",
            "`selective_checkpointing`: not with `torch_compile`, whose kernels are no single operations to choose "
            "from; it keeps what is cheap to keep by itself; remove one of them",
        )
    return None


PRECISION_RULES: tuple[Rule, ...] = (
    pure_bf16_stands_alone,
    rounding_noise_is_not_averaged,
    compile_mode_is_inductors,
    one_kind_of_fused_kernel,
    compiled_layers_are_recomputed_whole,
)
