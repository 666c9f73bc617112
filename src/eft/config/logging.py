"""What is written down about the run, and where else it is sent."""

from __future__ import annotations

from typing import Literal

from eft.config.section import Section, key


class LoggingConfig(Section):
    """Metrics, trackers, profiler and watchdog. A local file is always written first."""

    logging_steps: int = key(1, "Log the metrics every N steps.", ge=1)
    include_tkps: bool = key(True, "Log trained and total tokens per second.")
    use_tensorboard: bool = key(False, "Write TensorBoard events to `output_dir`/runs.")
    use_wandb: bool = key(False, "Send metrics to Weights & Biases.")
    wandb_project: str | None = key(None, "Project.", used_when="use_wandb")
    wandb_entity: str | None = key(None, "User or team.", used_when="use_wandb")
    wandb_name: str | None = key(None, "Name of the run.", used_when="use_wandb")
    use_mlflow: bool = key(False, "Send metrics to MLflow.")
    mlflow_tracking_uri: str | None = key(None, "Server or `file:` folder.", used_when="use_mlflow")
    mlflow_experiment_name: str | None = key(None, "Experiment.", used_when="use_mlflow")
    mlflow_run_name: str | None = key(None, "Name of the run.", used_when="use_mlflow")
    use_trackio: bool = key(False, "Send metrics to Trackio.")
    trackio_project_name: str | None = key(None, "Project.", used_when="use_trackio")
    trackio_run_name: str | None = key(None, "Name of the run.", used_when="use_trackio")
    profiler_steps: int | None = key(None, "Profile this many steps with torch.profiler into `output_dir`.", ge=1)
    profiler_steps_start: int = key(0, "First profiled step, counted from 0.", ge=0, used_when="profiler_steps")
    loss_watchdog_threshold: float | None = key(
        None, "A step whose loss is above this is at fault; `loss_watchdog_action` says what follows.", gt=0.0
    )
    loss_watchdog_patience: int = key(
        3, "Steps at fault in a row until the run stops or goes back.", ge=1, used_when="loss_watchdog_threshold"
    )
    loss_watchdog_action: Literal["stop", "skip", "rollback"] = key(
        "stop",
        "`stop`: the run ends, nothing is exported. `skip`: the update of every step at fault is left out. `rollback`: "
        "the run goes back to the last checkpoint before them, and passes over their data.",
        used_when="loss_watchdog_threshold",
    )
    nonfinite_action: Literal["stop", "skip", "rollback", "ignore"] = key(
        "stop",
        "What follows at once when the loss or the norm of the gradients is not a number, or infinite; as "
        "`loss_watchdog_action`. `ignore`: it counts as a loss above `loss_watchdog_threshold`, if there is one.",
        axolotl="Not in Axolotl, which trains on.",
    )
