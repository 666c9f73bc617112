"""How the model's arithmetic is carried out: compiled, or by kernels of another package."""

from __future__ import annotations

from typing import Literal

from eft.config.section import Section, key


class KernelConfig(Section):
    """Options that change speed and memory; the numbers only in their last bits."""

    torch_compile: bool = key(
        False,
        "Compile every decoder layer for rows of any length. Needs a C++ compiler on a CPU, Triton on CUDA.",
        axolotl="Axolotl compiles the whole model, whose graph breaks and recompilations with packing nobody sees.",
    )
    torch_compile_backend: Literal["inductor", "aot_eager", "eager"] = key(
        "inductor", "What turns the captured graphs into code; the other two only capture.", used_when="torch_compile"
    )
    torch_compile_mode: Literal["default", "max-autotune-no-cudagraphs"] = key(
        "default", "How long inductor may look for fast kernels.", used_when="torch_compile"
    )
    liger_rms_norm: bool = key(False, "Liger's kernel for the norms (CUDA; package `liger-kernel`).")
    liger_rope: bool = key(False, "Liger's kernel for rotary positions (CUDA; package `liger-kernel`).")
    liger_glu_activation: bool = key(False, "Liger's kernel for gated MLPs (CUDA; package `liger-kernel`).")
