"""Callbacks of a run: which are used (CALLBACKS: a predicate on the config and a factory each).

Metrics trackers (TensorBoard, W&B, MLflow, Trackio) are Trainer's own, switched on by `report_to`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from transformers import TrainerCallback

from eft.callbacks.compile_report import CompileReport
from eft.callbacks.context import CallbackContext
from eft.callbacks.logs import MetricsFile, ProgressLine
from eft.callbacks.profiler import Profiler
from eft.callbacks.start_checks import StartChecks
from eft.callbacks.stopping import EarlyStopping, StopOnRequest
from eft.config.root import TrainConfig

Factory = Callable[[TrainConfig, CallbackContext], TrainerCallback]

CALLBACKS: tuple[tuple[Callable[[TrainConfig, CallbackContext], bool], Factory], ...] = (
    (lambda config, context: True, StartChecks),
    (lambda config, context: True, StopOnRequest),
    (lambda config, context: config.torch_compile, CompileReport),
    (
        lambda config, context: config.early_stopping_patience is not None,
        lambda config, context: EarlyStopping(config.early_stopping_patience or 1, context.outcome),
    ),
    (lambda config, context: config.profiler_steps is not None, Profiler),
    (lambda config, context: True, MetricsFile),
    (lambda config, context: context.console is not None, ProgressLine),
)
"""In the order in which they are called."""


def build_callbacks(config: TrainConfig, context: CallbackContext) -> Iterable[TrainerCallback]:
    """The callbacks that this config asks for."""
    return [factory(config, context) for wanted, factory in CALLBACKS if wanted(config, context)]
