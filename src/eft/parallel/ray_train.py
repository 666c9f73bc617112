"""Run a function in the workers of Ray Train, and tell what they say and how they end.

Ray places the workers, gives them torchrun's variables and a process group, and starts them all again when one is lost.
What they print and what they fail with travels through a queue of Ray's, as they may be on other machines.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.queue import Empty, Queue

from eft.config.parallel import ParallelConfig
from eft.core.constants import EXIT_FAILED, EXIT_OK
from eft.core.errors import ConfigError, EftError
from eft.parallel.failures import exit_code_of, words_of
from eft.parallel.launch import RunFailed

Order = TypeVar("Order")
Stream = Literal["out", "err"]

ROOM_S = 45.0
"""How long to wait for a place for all workers; Ray itself would wait for ever, and say nothing."""
_OBJECT_STORE_BYTES = 100 * 2**20
"""Of a cluster of our own: nothing of a run goes through Ray's object store."""
_PATIENCE_S = 0.5
_TAIL_LINES = 12


@dataclass(frozen=True)
class RayRequest:
    """What Ray is asked for."""

    num_workers: int
    resources: dict[str, float] | None
    """Of each worker; None: a CPU, and a GPU where the cluster has any."""
    placement_strategy: str
    max_failures: int
    run_name: str | None
    storage_path: str | None
    timeout_s: int
    """After which a collective that waits is an error."""

    @classmethod
    def of(cls, config: ParallelConfig, num_workers: int, max_restarts: int = 0) -> RayRequest:
        """As the config says; `max_restarts` beside its `ray_max_failures`."""
        return cls(
            num_workers,
            config.resources_per_worker,
            config.ray_placement_strategy,
            max_restarts or config.ray_max_failures,
            config.ray_run_name,
            config.ray_storage_path,
            config.ddp_timeout,
        )

    def resources_of_worker(self) -> dict[str, float]:
        """What is reserved for each worker in the cluster that there is."""
        if self.resources is not None:
            return self.resources
        return {"CPU": 1.0, "GPU": 1.0} if ray.cluster_resources().get("GPU") else {"CPU": 1.0}


@contextlib.contextmanager
def ray_cluster(address: str | None) -> Iterator[None]:
    """Join the cluster at `address`; None: start one on this machine that ends with the block.

    Ours has no dashboard; of clusters that `ray.init` starts Ray sends no usage reports by itself.
    """
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        options |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    else:
        _check_address(address)
    try:
        ray.init(address or "local", **options)
    except ConnectionError as error:
        raise ConfigError(f"RAY_ADDRESS: no Ray cluster answers at {address}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Raise ConfigError where nobody listens, which Ray itself would take minutes to find out."""
    if address.startswith("ray://"):
        raise ConfigError(
            f"RAY_ADDRESS: {address} is Ray Client's, through which no training is followed; run the command on a "
            "machine of the cluster, or hand it to `ray job submit`"
        )
    host, _, port = address.rpartition(":")
    if port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            why = error.strerror or error
            raise ConfigError(f"RAY_ADDRESS: no Ray cluster answers at {address} ({why})") from error


def logs_of_cluster() -> Path:
    """Where Ray keeps, on each machine, what its processes write."""
    context = ray.get_runtime_context()
    return Path(context.get_temp_dir(), context.get_session_name(), "logs")


def check_room(request: RayRequest, *, may_grow: bool) -> None:
    """Return once there is a place for all workers.

    Args:
        may_grow: whether machines may still come to the cluster.

    Raises:
        ConfigError: there is none, and none has come up within ROOM_S seconds.
    """
    resources = request.resources_of_worker()
    place = placement_group([resources] * request.num_workers, strategy=request.placement_strategy)
    try:
        hopeless = not may_grow and _is_too_small(request.num_workers, resources)
        found = place.wait(0.0 if hopeless else ROOM_S)
    finally:
        remove_placement_group(place)
    if found:
        return
    total, free = ray.cluster_resources(), ray.available_resources()
    shown = ", ".join(f"{total.get(name, 0):g} {name} ({free.get(name, 0):g} free)" for name in resources)
    each = ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
    raise ConfigError(
        f"ray_num_workers: no place for {request.num_workers} worker{'s' * (request.num_workers > 1)} with {each} each "
        f"(`ray_placement_strategy: {request.placement_strategy}`): the cluster of {len(ray.nodes())} machine"
        f"{'s' * (len(ray.nodes()) > 1)} has {shown}. Lower `ray_num_workers` or `resources_per_worker`, or add "
        "machines."
    )


def _is_too_small(num_workers: int, resources: dict[str, float]) -> bool:
    total = ray.cluster_resources()
    return any(amount * num_workers > total.get(name, 0.0) for name, amount in resources.items())


def run_workers(
    work: Callable[[Order], int],
    order: Order,
    request: RayRequest,
    *,
    show: Callable[[Stream, str], None],
    on_wait: Callable[[], None] = lambda: None,
) -> int:
    """`work(order)` in every worker at once, each in the process group of all of them.

    Args:
        work: importable by its name, gives an exit code; `order` must pickle.
        show: takes what rank 0 prints, and a line at every restart.
        on_wait: called at least twice a second.

    Returns:
        The exit code of rank 0.

    Raises:
        RunFailed: a worker failed once too often, or with an error that the user must mend.
    """
    resources = request.resources_of_worker()
    use_gpu = resources.get("GPU", 0.0) > 0
    queue = Queue(actor_options={"num_cpus": 0})
    trainer = TorchTrainer(
        _in_worker,
        train_loop_config={"work": work, "order": order, "queue": queue, "folder": str(Path.cwd())},
        # As `process_group` would make it: objects and flags go over gloo also where tensors do not.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo", timeout_s=request.timeout_s),
        scaling_config=ScalingConfig(
            num_workers=request.num_workers,
            use_gpu=use_gpu,
            resources_per_worker=resources,
            placement_strategy=request.placement_strategy,
        ),
        run_config=RunConfig(
            name=request.run_name,
            storage_path=request.storage_path,
            failure_config=FailureConfig(max_failures=request.max_failures),
            callbacks=[_Errors(queue)],
        ),
    )
    fit = _Fit(trainer)
    fit.start()
    heard = _Heard(show, request.max_failures)
    while True:
        was_running = fit.is_alive()
        on_wait()
        try:
            heard.take(queue.get(timeout=_PATIENCE_S))
        except Empty:
            if not was_running:
                break
        if heard.hopeless is not None:
            # Not to be mended by another start; the workers end with their driver.
            break
    if heard.hopeless is not None or fit.error is not None:
        raise heard.failure(fit.error, logs_of_cluster())
    return heard.codes.get(0, EXIT_OK)


class _Fit(threading.Thread):
    """Ray's own loop, in a thread of its own: the main one hears signals and the workers."""

    def __init__(self, trainer: TorchTrainer) -> None:
        super().__init__(name="ray-fit", daemon=True)
        self._trainer = trainer
        self.error: BaseException | None = None

    def run(self) -> None:
        """Until the run is over."""
        try:
            self._trainer.fit()
        except BaseException as error:
            self.error = error


class _Errors(UserCallback):
    """Tells the driver, from Ray's side, what became of the workers."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called before Ray ends the workers, or starts them again."""
        self._queue.put(("errors", -1, {rank: str(error) for rank, error in worker_exceptions.items()}))


def _in_worker(config: dict[str, Any]) -> None:
    """What Ray calls in a thread of every worker."""
    rank = int(os.environ["RANK"])
    queue: Queue = config["queue"]
    folder = config["folder"]

    def tell(kind: str, content: Any) -> None:
        queue.put((kind, rank, content))

    tell("here", f"process {os.getpid()} on {socket.gethostname()}")
    # Ray runs workers in folders of its own; the config's paths are relative to the user's.
    place = contextlib.chdir(folder) if Path(folder).is_dir() else contextlib.nullcontext()
    out = contextlib.redirect_stdout(_Voice(tell, "out")) if rank == 0 else contextlib.nullcontext()
    try:
        with place, out, contextlib.redirect_stderr(_Voice(tell, "err")):
            tell("end", config["work"](config["order"]))
    except BaseException as error:
        text, followed = words_of(error)
        # An error that the user must mend would only come again.
        code = exit_code_of(error) if isinstance(error, EftError) and not followed else None
        tell("failed", (text.rstrip(), followed, code))
        # What is raised here must pickle; the driver has read it already.
        raise RuntimeError(f"rank {rank}: {error}") from None


class _Voice(io.TextIOBase):
    """A stream whose whole lines are told."""

    def __init__(self, tell: Callable[[str, str], None], name: Stream) -> None:
        self._tell = tell
        self._name = name
        self._held = ""
        self._lock = threading.Lock()

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, text: str) -> int:
        """Tell up to the last end of a line, and hold the rest back."""
        with self._lock:
            whole, end, self._held = (self._held + text).rpartition("\n")
            if end:
                self._tell(self._name, whole + end)
        return len(text)


@dataclass
class _Heard:
    """What the driver knows of the workers of the current attempt."""

    show: Callable[[Stream, str], None]
    max_failures: int
    places: dict[int, str] = field(default_factory=dict)
    codes: dict[int, int] = field(default_factory=dict)
    failures: list[tuple[int, str]] = field(default_factory=list)
    """(rank, its words) in the order of their coming."""
    followed: list[tuple[int, str]] = field(default_factory=list)
    """The same of those that only lost another."""
    errors: dict[int, str] = field(default_factory=dict)
    """Rank to what Ray says of it, also of those that are gone without a word."""
    tails: dict[int, deque[str]] = field(default_factory=dict)
    hopeless: int | None = None
    """Exit code of an error that another start would only repeat."""
    restarts: int = 0

    def take(self, letter: tuple[str, int, Any]) -> None:
        """(kind, rank, content), as `_in_worker` and `_Errors` send them."""
        kind, rank, content = letter
        if kind == "here":
            if rank in self.places:
                self._begin_again()
            self.places[rank] = content
        elif kind == "end":
            self.codes[rank] = content
        elif kind == "errors":
            self.errors = content
        elif kind == "failed":
            self._take_failure(rank, *content)
        else:
            self.tails.setdefault(rank, deque(maxlen=_TAIL_LINES)).extend(content.splitlines())
            if rank == 0:
                self.show("err" if kind == "err" else "out", content)

    def _take_failure(self, rank: int, said: str, followed: bool, code: int | None) -> None:
        if code is not None:
            self.hopeless, self.failures = code, [(rank, said)]
        elif followed:
            self.followed.append((rank, said))
        else:
            self.failures.append((rank, said))

    def _begin_again(self) -> None:
        self.restarts += 1
        allowed = "" if self.max_failures < 0 else f" of {self.max_failures}"
        _, said = self._cause()
        why = said.splitlines()[-1].removeprefix("error: ") if said else "the workers were lost"
        self.show("err", f"note: {why}\nnote: Ray has started all workers again ({self.restarts}{allowed})\n")
        for known in (self.places, self.codes, self.failures, self.followed, self.errors, self.tails):
            known.clear()

    def _cause(self) -> tuple[int | None, str]:
        """The rank that failed first, and its words. Who is gone without a word has taken the others along."""
        told = {rank for rank, _ in (*self.failures, *self.followed)}
        gone = [rank for rank in self.errors if rank not in told]
        if not gone and self.followed and not self.failures:
            # Ray may see what followed before it sees the loss.
            gone = [rank for rank in self.places if rank not in told and rank not in self.codes]
        if gone:
            return gone[0], self._last_words(gone[0])
        return next(iter((*self.failures, *self.followed)), (None, ""))

    def _last_words(self, rank: int) -> str:
        """The error that a rank has printed before it went; else that it is gone, and what Ray says of that."""
        printed = [line for line in self.tails.get(rank, ()) if line.startswith("error: ")]
        if printed:
            return printed[-1]
        words = self.errors.get(rank, "").strip().splitlines()
        why = f": {words[-1].strip()}" if words else ""
        return f"rank {rank} ({self.places.get(rank, 'not begun')}) was lost{why}"

    def failure(self, error: BaseException | None, logs: Path) -> RunFailed:
        """The failing worker's own words first, then where the rest is. `error`: Ray's, where it gave up."""
        rank, said = self._cause()
        if rank is None:
            return RunFailed(f"{error}\n(all output: {logs})", EXIT_FAILED)
        code = EXIT_FAILED if self.hopeless is None else self.hopeless
        return RunFailed(f"{said}\n(rank {rank} failed first, exit code {code}; all output: {logs})", code)
