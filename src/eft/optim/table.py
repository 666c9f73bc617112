"""The optimizers that a config can name, each a row: its class, what it takes, what it keeps, where it runs."""

from __future__ import annotations

from typing import Any

from eft.optim.options import Option
from eft.optim.row import (
    Arguments,
    OptimizerRow,
    StateKind,
    adam,
    ademamix,
    betas,
    decoupled_adam,
    decoupled_ademamix,
    fused_adam,
    no_arguments,
    scheduled_adafactor,
    stable_adam,
    three_betas,
    uncertain_steps,
)

_BETAS = frozenset({"adam_beta1", "adam_beta2"})
_ADAM = _BETAS | {"adam_epsilon"}
SPECIFIC_KEYS = _ADAM | {"adam_beta3"}
"""Keys that only some optimizers use."""

_RATE = {
    "lr": Option("number", "", use_instead="learning_rate"),
    "weight_decay": Option("number", "", use_instead="weight_decay"),
}
_SET_BY_CONFIG = {
    **_RATE,
    "betas": Option("pair", "", use_instead="adam_beta1` and `adam_beta2"),
    "eps": Option("number", "", use_instead="adam_epsilon"),
}
_FOREACH = {"foreach": Option("switch", "One kernel for many tensors; more memory.")}
_AMSGRAD = {"amsgrad": Option("switch", "Divide by the largest second moment so far.")}
_CAUTIOUS = {"cautious": Option("switch", "Update only where it agrees with the gradient's sign.")}
_MOMENTUM = {"momentum": Option("number", "Share of the last update that is kept.", 0.0)}
_BLOCK = {"min_8bit_size": Option("integer", "Tensors with fewer numbers keep fp32 state.", 0)}
_SLOW = {
    "alpha": Option("number", "Weight of the slow moment.", 0.0),
}
_AVERAGING = {
    **_FOREACH,
    "r": Option("number", "Power of the step in the average's weights.", 0.0),
    "weight_lr_power": Option("number", "Power of the learning rate in the average's weights.", 0.0),
    "warmup_steps": Option("integer", "", use_instead="warmup_steps"),
}


def _torch(attribute: str, arguments: Arguments, **more: Any) -> OptimizerRow:
    return OptimizerRow("torch", None, "torch.optim", attribute, arguments, **more)


def _low_bit(attribute: str, **more: Any) -> OptimizerRow:
    """AdamW of torchao, whose state are tensors of fewer bits."""
    options = {**_SET_BY_CONFIG, "block_size": Option("integer", "Numbers that share a scale.", 16)}
    return OptimizerRow("torchao", "torchao", "eft.optim.low_bit", attribute, adam, _ADAM, options, **more)


def _bitsandbytes(attribute: str, arguments: Arguments, keys: frozenset[str], **more: Any) -> OptimizerRow:
    """An optimizer of bitsandbytes; one with `Paged` in its name keeps its state where CUDA can move it to the host."""
    is_8bit = attribute.endswith("8bit")
    options = {**_SET_BY_CONFIG, **(_BLOCK if is_8bit else {}), **more.pop("options", {})}
    kind: StateKind = "8-bit" if is_8bit else "fp32"
    more.setdefault("on_cpu", attribute.removeprefix("Paged"))
    path = "eft.optim.block_wise"
    return OptimizerRow(
        "bitsandbytes", "bitsandbytes", path, attribute, arguments, keys, options, state=kind, fsdp2=False, **more
    )


def _pytorch_optimizer(
    module: str, attribute: str, arguments: Arguments, keys: frozenset[str], options: Any, notes: str, **more: Any
) -> OptimizerRow:
    path = f"pytorch_optimizer.optimizer.{module}"
    return OptimizerRow("pytorch_optimizer", "optimizers", path, attribute, arguments, keys, options, notes, **more)


_BNB_ADAMW = {"state_bytes": 2.03, "notes": "AdamW with 8-bit moments, in blocks with a scale each."}
_BNB_ADEMAMIX = {"options": {**_SLOW, "t_alpha": Option("integer", "Steps over which `alpha` rises.", 1),
                             "t_beta3": Option("integer", "Steps over which the slow decay rises.", 1)}}  # fmt: skip
_BNB_RMSPROP = {
    "options": {
        "eps": Option("number", "Added to the denominator.", 0.0),
        "alpha": Option("number", "Second-moment decay.", 0.0, 1.0),
    },
    "is_decoupled": False,
}

OPTIMIZERS: dict[str, OptimizerRow] = {
    "adamw_torch": _torch(
        "AdamW",
        adam,
        keys=_ADAM,
        options={**_SET_BY_CONFIG, **_FOREACH, **_AMSGRAD},
        notes="AdamW, one kernel per operation.",
    ),
    "adamw_torch_fused": _torch(
        "AdamW",
        fused_adam,
        keys=_ADAM,
        options={**_SET_BY_CONFIG, **_AMSGRAD},
        notes="AdamW in one kernel; the fastest.",
        is_fused=True,
    ),
    "adamw_torch_8bit": _low_bit("TorchaoAdamW8bit", state="8-bit", state_bytes=2.03, notes="AdamW, 8-bit moments."),
    "adamw_torch_4bit": _low_bit("TorchaoAdamW4bit", state="4-bit", state_bytes=1.06, notes="AdamW, 4-bit moments."),
    "ao_adamw_8bit": _low_bit(
        "TorchaoAdamW8bit", state="8-bit", state_bytes=2.03, notes="The same as adamw_torch_8bit."
    ),
    "ao_adamw_4bit": _low_bit(
        "TorchaoAdamW4bit", state="4-bit", state_bytes=1.06, notes="The same as adamw_torch_4bit."
    ),
    "ao_adamw_fp8": _low_bit(
        "TorchaoAdamWFp8", state="fp8", state_bytes=2.03, notes="AdamW, moments in float8_e4m3fn."
    ),
    "adamw_8bit": _bitsandbytes("AdamW8bit", adam, _ADAM, **_BNB_ADAMW),
    "adamw_bnb_8bit": _bitsandbytes("AdamW8bit", adam, _ADAM, **{**_BNB_ADAMW, "notes": "The same as adamw_8bit."}),
    "paged_adamw_8bit": _bitsandbytes(
        "PagedAdamW8bit", adam, _ADAM, state_bytes=2.03, notes="adamw_8bit whose state CUDA may move to the host."
    ),
    "paged_adamw_32bit": _bitsandbytes(
        "PagedAdamW32bit", adam, _ADAM, notes="AdamW whose fp32 state CUDA may move to the host."
    ),
    "lion_8bit": _bitsandbytes("Lion8bit", betas, _BETAS, state_bytes=1.02, notes="Lion with an 8-bit momentum."),
    "lion_32bit": _bitsandbytes("Lion32bit", betas, _BETAS, state_bytes=4.0, notes="Lion of bitsandbytes."),
    "paged_lion_8bit": _bitsandbytes(
        "PagedLion8bit", betas, _BETAS, state_bytes=1.02, notes="lion_8bit whose state CUDA may move to the host."
    ),
    "paged_lion_32bit": _bitsandbytes(
        "PagedLion32bit", betas, _BETAS, state_bytes=4.0, notes="Lion whose state CUDA may move to the host."
    ),
    "ademamix_8bit": _bitsandbytes(
        "AdEMAMix8bit",
        ademamix,
        SPECIFIC_KEYS,
        state_bytes=3.05,
        notes="AdEMAMix with 8-bit moments.",
        **_BNB_ADEMAMIX,
    ),
    "paged_ademamix_8bit": _bitsandbytes(
        "PagedAdEMAMix8bit",
        ademamix,
        SPECIFIC_KEYS,
        state_bytes=3.05,
        notes="ademamix_8bit whose state CUDA may move to the host.",
        **_BNB_ADEMAMIX,
    ),
    "paged_ademamix_32bit": _bitsandbytes(
        "PagedAdEMAMix32bit",
        ademamix,
        SPECIFIC_KEYS,
        state_bytes=12.0,
        notes="AdEMAMix whose state CUDA may move to the host; bitsandbytes 0.50 has no working CPU kernel for it.",
        devices=("cuda",),
        instead="ademamix",
        **_BNB_ADEMAMIX,
    ),
    "rmsprop_bnb": _bitsandbytes(
        "RMSprop32bit", no_arguments, frozenset(), state_bytes=4.0, notes="RMSprop of bitsandbytes.", **_BNB_RMSPROP
    ),
    "rmsprop_bnb_8bit": _bitsandbytes(
        "RMSprop8bit",
        no_arguments,
        frozenset(),
        state_bytes=1.02,
        notes="RMSprop with an 8-bit second moment.",
        **_BNB_RMSPROP,
    ),
    "rmsprop_bnb_32bit": _bitsandbytes(
        "RMSprop32bit", no_arguments, frozenset(), state_bytes=4.0, notes="The same as rmsprop_bnb.", **_BNB_RMSPROP
    ),
    "sgd": _torch(
        "SGD",
        no_arguments,
        options={
            **_SET_BY_CONFIG,
            **_FOREACH,
            **_MOMENTUM,
            "dampening": Option("number", "Share of the gradient that momentum leaves out.", 0.0),
            "nesterov": Option("switch", "Nesterov's momentum."),
        },
        notes="Weight decay is added to the gradient; with momentum that is not the decoupled form. With momentum 4 "
        "bytes of state per parameter.",
        state="none",
        state_bytes=0.0,
        is_decoupled=False,
    ),
    "adagrad": _torch(
        "Adagrad",
        no_arguments,
        options={
            **_RATE,
            **_FOREACH,
            "lr_decay": Option("number", "The rate is divided by 1 + lr_decay · step.", 0.0),
            "initial_accumulator_value": Option("number", "Sum of squares at the start.", 0.0),
            "eps": Option("number", "Added to the denominator.", 0.0),
        },
        notes="Divides by the root of all squares so far; weight decay is added to the gradient.",
        state_bytes=4.0,
        is_decoupled=False,
    ),
    "rmsprop": _torch(
        "RMSprop",
        no_arguments,
        options={
            **_RATE,
            **_FOREACH,
            **_MOMENTUM,
            "alpha": Option("number", "Second-moment decay.", 0.0, 1.0),
            "eps": Option("number", "Added to the denominator.", 0.0),
            "centered": Option("switch", "Divide by the variance."),
        },
        notes="Divides by a running root of squares; weight decay is added to the gradient.",
        state_bytes=4.0,
        is_decoupled=False,
    ),
    "muon": OptimizerRow(
        "torch",
        None,
        "eft.optim.muon",
        "MuonWithAdamW",
        adam,
        _ADAM,
        {
            **_RATE,
            "betas": Option("pair", "", use_instead="adam_beta1` and `adam_beta2"),
            "momentum": Option("number", "Share of the old momentum that is kept; 0.95.", 0.0),
            "nesterov": Option("switch", "Nesterov's momentum; true."),
            "ns_steps": Option("integer", "Newton-Schulz iterations; 5.", 1, 99),
            "adjust_lr_fn": Option(
                "choice",
                "Scale by shape; `match_rms_adamw` lets matrices share AdamW's learning rate.",
                choices=("match_rms_adamw", "original"),
            ),
            "adapter_factors": Option("switch", "Orthogonalise an adapter's factors too; false."),
            "head": Option("switch", "Orthogonalise the output head too; false."),
        },
        "Momentum made orthogonal (torch.optim.Muon) for hidden matrices; embeddings, heads, norms, biases, adapter "
        "factors and stacked experts are updated by AdamW.",
        state_bytes=4.0,
        splits=True,
        fsdp2=False,
    ),
    "adafactor": OptimizerRow(
        "transformers",
        None,
        "transformers.optimization",
        "Adafactor",
        scheduled_adafactor,
        frozenset(),
        {
            **_RATE,
            "eps": Option("pair", "Added to the squared gradient; smallest scale of a parameter.", None),
            "clip_threshold": Option("number", "Largest root mean square of an update.", 0.0),
            "decay_rate": Option("number", "Power of the step in the second-moment decay."),
            "beta1": Option("number", "First-moment decay; none by default.", 0.0),
            "scale_parameter": Option("switch", "Scale the learning rate by the parameter's root mean square."),
        },
        "Second moments factored into rows and columns; follows the learning-rate schedule.",
        state="factored fp32",
        fsdp2=False,
        state_bytes=0.03,
    ),
    "lion_pytorch": _pytorch_optimizer(
        "lion",
        "Lion",
        betas,
        _BETAS,
        {
            **{key: option for key, option in _SET_BY_CONFIG.items() if key != "eps"},
            **_FOREACH,
            **_CAUTIOUS,
            "weight_decouple": Option("switch", "Decay apart from the gradient (default true)."),
        },
        "Sign of the momentum; wants 3 to 10 times less learning rate than AdamW. Its authors use adam_beta2 0.99.",
        state_bytes=4.0,
    ),
    "adopt_adamw": _pytorch_optimizer(
        "adopt",
        "ADOPT",
        decoupled_adam,
        _ADAM,
        {**_SET_BY_CONFIG, **_FOREACH, **_CAUTIOUS},
        "Adam that divides by the previous second moment; the first step only measures it. "
        "Its authors use adam_beta2 0.9999 and adam_epsilon 1e-6.",
    ),
    "ademamix": _pytorch_optimizer(
        "ademamix",
        "AdEMAMix",
        decoupled_ademamix,
        SPECIFIC_KEYS,
        {
            **_SET_BY_CONFIG,
            **_FOREACH,
            **_CAUTIOUS,
            **_SLOW,
            "t_alpha_beta3": Option("number", "Steps over which `alpha` and the slow decay rise.", 1.0),
        },
        "AdamW with a second, much slower first moment (adam_beta3).",
        state_bytes=12.0,
    ),
    "stable_adamw": _pytorch_optimizer(
        "adamw",
        "StableAdamW",
        stable_adam,
        _ADAM,
        {**_SET_BY_CONFIG, **_FOREACH},
        "AdamW that clips each tensor's update as Adafactor does.",
    ),
    "came_pytorch": _pytorch_optimizer(
        "came",
        "CAME",
        three_betas,
        _BETAS | {"adam_beta3"},
        {
            **{key: option for key, option in _SET_BY_CONFIG.items() if key != "eps"},
            **_FOREACH,
            "eps1": Option("number", "Added to the squared gradient.", 0.0),
            "eps2": Option("number", "Added to the instability.", 0.0),
            "clip_threshold": Option("number", "Largest root mean square of an update.", 0.0),
        },
        "Adafactor with a first moment, damped where updates are unstable (adam_beta3).",
        fsdp2=False,
        state_bytes=4.1,
    ),
    "schedule_free_adamw": OptimizerRow(
        "schedulefree",
        "optimizers",
        "eft.optim.schedule_free",
        "ScheduleFreeAdamW",
        adam,
        _ADAM,
        {**_SET_BY_CONFIG, **_AVERAGING},
        "AdamW with averaging instead of a decaying learning rate.",
        is_decoupled=False,
    ),
    "schedule_free_sgd": OptimizerRow(
        "schedulefree",
        "optimizers",
        "eft.optim.schedule_free",
        "ScheduleFreeSGD",
        no_arguments,
        frozenset(),
        {
            **_RATE,
            **_AVERAGING,
            "momentum": Option("number", "Where between iterate and average gradients are taken.", 0.0),
        },
        "SGD with averaging instead of a decaying learning rate.",
        state_bytes=4.0,
        is_decoupled=False,
    ),
    "schedule_free_radam": OptimizerRow(
        "schedulefree",
        "optimizers",
        "eft.optim.schedule_free",
        "ScheduleFreeRAdam",
        adam,
        _ADAM,
        {
            **_SET_BY_CONFIG,
            **_AVERAGING,
            "silent_sgd_phase": Option("switch", "No update while the second moment is still too uncertain."),
        },
        "RAdam with averaging; its first steps do not move the weights.",
        is_decoupled=False,
        silent=uncertain_steps,
    ),
}
"""Exactly the names of `config.optim.OptimizerName`."""
