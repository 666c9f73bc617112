"""More than one process."""

from __future__ import annotations

from eft.config.section import Section, key


class ParallelConfig(Section):
    """Options of the process group."""

    ddp_timeout: int = key(1800, "Seconds after which a collective that waits is an error.", ge=1)
    ddp_find_unused_parameters: bool = key(False, "Let DDP search for parameters without gradient.")
    ddp_bucket_cap_mb: int | None = key(None, "Size of DDP's gradient buckets in MiB.", ge=1)
