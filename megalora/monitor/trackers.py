"""Programs that a run's metrics are sent to besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow, SwanLab.

All but TensorBoard are packages to install. Each is asked for by name, and its own environment variables say where to:
without a network WANDB_MODE=offline and SWANLAB_MODE=offline keep the numbers in output_dir, and MLflow does so unless
MLFLOW_TRACKING_URI names a server. A resumed run goes on with the same run there.
"""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megalora.errors import UserError
from megalora.files import read_json, write_file
from megalora.monitor.metrics import EventWriter, scalars

IDS = "trackers.json"  # in output_dir: the id of the run at each program
PROJECT = "megalora"
_HINTS = {
    "wandb": "run wandb login, or set WANDB_MODE=offline to keep the numbers in output_dir",
    "mlflow": "correct MLFLOW_TRACKING_URI, or unset it to keep the numbers in output_dir",
    "swanlab": "run swanlab login, or set SWANLAB_MODE=offline to keep the numbers in output_dir",
}


@dataclass(frozen=True)
class About:
    """A run, as a tracker is told of it. names: of the trackers, None: TensorBoard where it can be had."""

    folder: Path
    resumed_step: int = 0
    names: tuple[str, ...] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


class Tracker(Protocol):
    """Takes the numbers of a run. id: of the run there, which goes on with it."""

    id: str

    def write(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """All trackers of a run. Raises UserError where one that is asked for cannot be had.

    note  takes a line for the user. A tracker that fails later is told of once and gets nothing more: the run goes on.
    """

    def __init__(self, about: About, note: Callable[[str], None]):
        self._note, self._events, self._others = note, None, dict[str, Tracker]()
        if about.names is None or "tensorboard" in about.names:
            self._events = EventWriter(about.folder / "runs", about.resumed_step)
            missing = self._events.missing
            if missing and about.names is not None:
                raise UserError(f"report_to tensorboard: {missing}", "pip install tensorboard, or leave it out")
            if missing:
                note(f"TensorBoard is not written: {missing}")
        file = about.folder / IDS
        known = read_json(file, "remove it") if about.resumed_step and file.is_file() else {}
        for name in about.names or ():
            if name in _OPEN:
                self._others[name] = _opened(name, about, str(known[name]) if name in known else None)
        if self._others:
            ids = {name: tracker.id for name, tracker in self._others.items()}
            write_file(file, (json.dumps(ids) + "\n").encode())

    def write(self, record: Mapping[str, Any], group: str) -> None:
        """Send every finite number of a record as `group/name` (`group/outer/name` where nested). Raises OSError."""
        if self._events is not None:
            self._events.write(record, group)
        for name in [*self._others]:
            self._try(name, lambda one: one.write(dict(scalars(record, group)), record["step"]))

    def close(self) -> None:
        """Send what is left. Raises OSError."""
        for name in [*self._others]:
            self._try(name, lambda one: one.close())
        if self._events is not None:
            self._events.close()

    def _try(self, name: str, act: Callable[[Tracker], None]) -> None:
        try:
            act(self._others[name])
        except Exception as error:  # of a network, of a server, of a full disk: whatever the program has
            del self._others[name]
            self._note(f"{name} gets no more of this run, whose numbers are in metrics.jsonl: {error}")


def _opened(name: str, about: About, known: str | None) -> Tracker:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"report_to {name}: the package {name} cannot be imported ({error})",
            f"pip install {name}, or leave it out of report_to",
        ) from None
    try:
        return _OPEN[name](module, about, known)
    except Exception as error:
        raise UserError(f"report_to {name}: it does not start ({error})", _HINTS[name]) from None


class WandB:
    """Weights & Biases. WANDB_PROJECT, WANDB_NAME, WANDB_MODE and the rest of its variables hold."""

    def __init__(self, wandb: Any, about: About, known: str | None):
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", about.folder.resolve().name),
            dir=str(about.folder),
            config=dict(about.settings),
            id=known,
            resume="allow",
            settings=wandb.Settings(console="off"),
        )
        # Its own count of steps never goes back, as a run that goes on from a checkpoint does.
        self._run.define_metric("*", step_metric="step")
        self.id = str(self._run.id)

    def write(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow, through its client: the module's functions share one run of the whole process."""

    def __init__(self, mlflow: Any, about: About, known: str | None):
        place = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(about.folder / 'mlflow.db').resolve()}"
        self._entities = importlib.import_module("mlflow.entities")
        self._client = importlib.import_module("mlflow.tracking").MlflowClient(tracking_uri=place)
        if known is not None:
            self.id = known
            self._client.update_run(known, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if found is None else found.experiment_id
        run = self._client.create_run(experiment, run_name=about.folder.resolve().name)
        self.id = str(run.info.run_id)
        for key, value in about.settings.items():
            self._client.log_param(self.id, key, str(value)[:500])

    def write(self, values: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        metrics = [self._entities.Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self.id)


class SwanLab:
    """SwanLab. SWANLAB_PROJ_NAME, SWANLAB_MODE and the rest of its variables hold."""

    def __init__(self, swanlab: Any, about: About, known: str | None):
        self._module = swanlab
        run = swanlab.init(
            project=os.environ.get("SWANLAB_PROJ_NAME", PROJECT),
            experiment_name=os.environ.get("SWANLAB_EXP_NAME", about.folder.resolve().name),
            config=dict(about.settings),
            logdir=os.environ.get("SWANLAB_LOG_DIR", str(about.folder / "swanlog")),
            **({} if known is None else {"id": known, "resume": "allow"}),
        )
        self.id = str(run.id)

    def write(self, values: Mapping[str, float], step: int) -> None:
        self._module.log(dict(values), step=step)

    def close(self) -> None:
        self._module.finish()


_OPEN: dict[str, Callable[[Any, About, str | None], Tracker]] = {"wandb": WandB, "mlflow": MLflow, "swanlab": SwanLab}

