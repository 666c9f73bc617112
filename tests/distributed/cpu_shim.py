"""Runs accelerate's real FSDP2, HSDP and tensor-parallel paths on the CPU over gloo, where accelerate refuses them.

On a machine without accelerators `AcceleratorState` never leaves MULTI_CPU, silently trains DDP where FSDP was asked
for, and refuses every ParallelismConfig. Hooks of Trainer only: what is tested is what runs on GPUs.
"""

from __future__ import annotations

from typing import Any

from accelerate import ParallelismConfig, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from eft.trainer.trainer import EftTrainer


class CpuShimTrainer(EftTrainer):
    """EftTrainer whose Accelerator believes that this CPU is an accelerator."""

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        arguments = super()._build_accelerator_args(**kwargs)
        self.plugin: FullyShardedDataParallelPlugin | None = arguments.pop("fsdp_plugin", None)
        self.meshes: ParallelismConfig | None = arguments.pop("parallelism_config", None)
        return arguments

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self.meshes is not None:
            state.parallelism_config = self.meshes
            state.device_mesh = self.meshes.build_device_mesh("cpu")
        if self.plugin is not None:
            state.fsdp_plugin = self.plugin
            # Also where accelerate writes it: every later `AcceleratorState()` copies it from there.
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.is_fsdp_enabled = True
