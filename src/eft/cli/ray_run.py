"""`use_ray`: the run in workers that Ray Train starts; each does what `eft train --launcher none` does."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass

import typer

from eft.cli.console import console, error_console, quiet_libraries, set_up_logging
from eft.cli.launch import Launcher, is_first, is_started, processes_here
from eft.cli.progress import data_progress
from eft.config.load import LoadedConfig
from eft.core.constants import EXIT_OK
from eft.core.errors import ConfigError, RunFinished


@dataclass(frozen=True)
class Order:
    """What every worker is told."""

    loaded: LoadedConfig
    allow_change: bool
    report: bool


def check_ray_options(launcher: Launcher, nproc: int | None, nnodes: int, rendezvous: str | None) -> None:
    """Raise ConfigError for options of other launchers, and where Ray is missing."""
    if nproc is not None:
        raise ConfigError(f"--nproc: Ray's workers are counted in the config; set `ray_num_workers: {nproc}` instead")
    if nnodes > 1 or rendezvous is not None:
        raise ConfigError(
            "--nnodes, --rendezvous: Ray finds its machines itself; run the command once, with RAY_ADDRESS set to the "
            "cluster's address"
        )
    if launcher is Launcher.ACCELERATE or is_started():
        started = "--launcher accelerate" if launcher is Launcher.ACCELERATE else "WORLD_SIZE (set by a launcher)"
        raise ConfigError(
            f"use_ray: {started} starts the processes already; remove one of the two, or pass --launcher none"
        )
    try:
        importlib.import_module("ray.train")
    except ImportError as error:
        raise ConfigError("use_ray: needs the package ray with Ray Train; pip install 'eft-trainer[ray]'") from error


def start_on_ray(order: Order, *, overwrite: bool, max_restarts: int = 0) -> None:
    """Run a config on Ray's workers and wait for them. The data are prepared here, before there is a worker.

    Raises:
        EftError: as `train` would; also where the workers do not fit into the cluster.
        typer.Exit: a worker failed (its own message has been printed), or the run was asked to stop.
    """
    from eft import inputs, run
    from eft.parallel.launch import RunFailed
    from eft.parallel.ray_train import RayRequest, check_room, ray_cluster, run_workers
    from eft.resume import folder_request
    from eft.runtime.run_folder import claim_run_folder
    from eft.runtime.stop import StopRequest, stop_file_of

    config = order.loaded.config
    workers = config.ray_num_workers or processes_here(None)
    request = RayRequest.of(config, workers, max_restarts)
    run.check_before_start(config, overwrite=overwrite, allow_change=order.allow_change, world_size=workers)
    address = os.environ.get("RAY_ADDRESS") or None
    where = address or "one of this machine, for this run"
    console.print(f"starting: {workers} workers of Ray Train; cluster: {where}", highlight=False, soft_wrap=True)
    with ray_cluster(address):
        check_room(request, may_grow=address is not None)
        with data_progress(console) as progress:
            inputs.load_datasets(config, progress=progress, world_size=workers)
        if overwrite:
            # Here and once: workers that are started again continue what the lost ones have left.
            claim_run_folder(folder_request(config, overwrite=True)).release()
        stop_file = stop_file_of(config.stop_file, config.output_dir)
        stop = StopRequest(stop_file, looks_for_file=False)
        stop.listen()
        asked: list[int] = []

        def pass_on() -> None:
            """A signal to this process becomes the stop file, which all workers heed at the same step."""
            if stop.code and not asked:
                asked.append(stop.code)
                stop_file.touch()

        try:
            code = run_workers(work, order, request, show=_show, on_wait=pass_on)
        except RunFailed as failure:
            error_console.print(str(failure), highlight=False, soft_wrap=True, markup=False)
            raise typer.Exit(failure.exit_code) from failure
        finally:
            stop.release()
            if asked:
                stop_file.unlink(missing_ok=True)
    if code != EXIT_OK:
        raise typer.Exit(stop.code or code)


def _show(stream: str, text: str) -> None:
    print(text, end="", file=sys.stderr if stream == "err" else sys.stdout, flush=True)


def work(order: Order) -> int:
    """In a worker: its rank of the run. Returns the exit code."""
    from eft import inputs, run
    from eft.cli.train import train_here

    set_up_logging(quiet=not is_first())
    quiet_libraries()
    loaded = order.loaded
    try:
        # On every rank: a run that was finished just before another worker was lost.
        run.check_before_start(loaded.config, overwrite=False, allow_change=order.allow_change)
        meta = inputs.load_datasets(loaded.config)
        train_here(loaded, meta, overwrite=False, allow_change=order.allow_change, report=order.report)
    except typer.Exit as end:
        return end.exit_code
    except RunFinished:
        return EXIT_OK
    return EXIT_OK
