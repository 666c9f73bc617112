"""`use_ray` where Ray is missing, or another launcher is asked for too; none of it needs Ray."""

from __future__ import annotations

import sys

import pytest

from eft.cli.launch import Launcher
from eft.cli.ray_run import check_ray_options
from eft.config.load import config_from_mapping
from eft.core.errors import ConfigError

BASE = {"base_model": "x", "datasets": [{"path": "x"}], "output_dir": "out", "learning_rate": 1e-4}


def check(
    launcher: Launcher = Launcher.RAY, nproc: int | None = None, nnodes: int = 1, where: str | None = None
) -> None:
    check_ray_options(launcher, nproc, nnodes, where)


def test_a_missing_ray_is_one_line_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    # An earlier test may have imported all of it.
    for name in ["ray", *(name for name in sys.modules if name.startswith("ray."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"^use_ray: needs .*pip install 'eft-trainer\[ray\]'$"):
        check()


def test_processes_are_counted_in_one_place() -> None:
    with pytest.raises(ConfigError, match="--nproc: .* set `ray_num_workers: 4`"):
        check(nproc=4)
    with pytest.raises(ConfigError, match="--nnodes, --rendezvous: .*RAY_ADDRESS"):
        check(nnodes=2)
    with pytest.raises(ConfigError, match="--nnodes, --rendezvous"):
        check(where="host:29500")


def test_two_launchers_are_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="use_ray: --launcher accelerate starts the processes already"):
        check(Launcher.ACCELERATE)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="use_ray: WORLD_SIZE .* --launcher none"):
        check(Launcher.TORCHRUN)


def test_keys_of_ray_need_ray() -> None:
    with pytest.raises(ConfigError, match="`ray_num_workers`: not used because `use_ray` is not set"):
        config_from_mapping({**BASE, "ray_num_workers": 2})
    config = config_from_mapping({**BASE, "use_ray": True, "resources_per_worker": {"GPU": 1}})
    assert config.resources_per_worker == {"GPU": 1.0}
    with pytest.raises(ConfigError, match="ray_placement_strategy"):
        config_from_mapping({**BASE, "use_ray": True, "ray_placement_strategy": "CLOSE"})
