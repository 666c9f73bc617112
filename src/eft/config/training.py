"""Batch, length and precision of the run."""

from __future__ import annotations

from typing import Literal

from eft.config.section import Section, key


class TrainingConfig(Section):
    """How much is trained, in what pieces and in which precision."""

    micro_batch_size: int = key(1, "Bins (packed) or samples in one forward pass of one device.", ge=1)
    gradient_accumulation_steps: int | None = key(None, "Micro-batches per optimizer step and device; default 1.", ge=1)
    global_batch_size: int | None = key(
        None,
        "Bins per optimizer step over all devices; default: micro-batch × accumulation × data-parallel devices.",
        ge=1,
    )
    num_epochs: float = key(1.0, "Passes over the data; a fraction trains a prefix of the last epoch's steps.", gt=0.0)
    max_steps: int | None = key(None, "Optimizer steps, whatever the epochs say.", ge=1)
    bf16: bool | Literal["auto"] = key(
        "auto",
        "bf16 autocast over fp32 trainable weights; `auto`: where the device computes bf16 natively.",
        axolotl="Axolotl keeps weights and optimizer state in bf16 too, and `auto` can become fp16.",
    )
    bfloat16: bool = key(
        False,
        "Weights and gradients in bf16 too, without autocast; `bf16_update` keeps small updates from being lost.",
        axolotl="Axolotl rounds every update to the nearest bf16 number, which loses the small ones.",
    )
    bf16_update: Literal["stochastic_rounding", "fp32_master"] = key(
        "stochastic_rounding",
        "How fp32 updates reach bf16 weights: rounded up or down at random, right on average; or kept in an fp32 copy.",
        used_when="bfloat16",
    )
    fp16: bool = key(False, "fp16 autocast with loss scaling over fp32 trainable weights (CUDA).")
    tf32: bool = key(False, "TensorFloat-32 matrix products for what stays fp32 (CUDA).")
    deterministic: bool = key(False, "Deterministic kernels only: bit-equal repeats on CUDA, at some cost.")
    dataloader_num_workers: int = key(0, "Processes that prepare batches.", ge=0)
    dataloader_pin_memory: bool = key(True, "Page-locked batches (CUDA).")
