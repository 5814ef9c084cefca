"""Trackers: what each is sent, what a resumed run goes on with, and what becomes of one that is missing or fails."""

import json
import sys
import textwrap

import pytest

from megalora.errors import UserError
from megalora.monitor.monitor import Monitor
from megalora.monitor.trackers import IDS, About, Trackers

# Packages of the three names, with the calls that are made of the real ones: each writes what it is told to a file.
WANDB = """
import json, os
class Settings:
    def __init__(self, console): self.console = console
class Run:
    def __init__(self, **given):
        self.id, self.file = given["id"] or "w1", open(os.path.join(given["dir"], "wandb.log"), "a")
        self.tell("init", {**given, "settings": given["settings"].console})
    def tell(self, *what): print(json.dumps(what), file=self.file, flush=True)
    def define_metric(self, name, step_metric): self.tell("axis", name, step_metric)
    def log(self, values): self.tell("log", values)
    def finish(self): self.tell("finish")
def init(**given): return Run(**given)
"""
SWANLAB = """
import json, os
class Run: id = "s1"
def tell(*what): print(json.dumps(what), file=file, flush=True)
def init(**given):
    global file
    os.makedirs(given["logdir"], exist_ok=True)
    file = open(os.path.join(given["logdir"], "log"), "a")
    tell("init", given)
    return Run()
def log(values, step): tell("log", step, values)
def finish(): tell("finish")
"""
MLFLOW = {
    "__init__": "",
    "entities": """
    class Metric:
        def __init__(self, key, value, timestamp, step): self.said = [key, value, step]
    """,
    "tracking": """
    import json, types
    class MlflowClient:
        def __init__(self, tracking_uri): self.file = open(tracking_uri.removeprefix("sqlite:///"), "a")
        def tell(self, *what): print(json.dumps(what), file=self.file, flush=True)
        def get_experiment_by_name(self, name): return None
        def create_experiment(self, name): return "7"
        def create_run(self, experiment, run_name):
            self.tell("create", experiment, run_name)
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="m1"))
        def update_run(self, run, status): self.tell("update", run, status)
        def log_param(self, run, key, value): self.tell("param", run, key, value)
        def log_batch(self, run, metrics): self.tell("log", run, [one.said for one in metrics])
        def set_terminated(self, run): self.tell("end", run)
    """,
}
NAMES = ("wandb", "mlflow", "swanlab")


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder on the path with the three packages."""
    folder = tmp_path / "packages"
    (folder / "mlflow").mkdir(parents=True)
    (folder / "wandb.py").write_text(WANDB)
    (folder / "swanlab.py").write_text(SWANLAB)
    for name, text in MLFLOW.items():
        (folder / f"mlflow/{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(str(folder))
    for name in ("WANDB_PROJECT", "WANDB_NAME", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "SWANLAB_LOG_DIR"):
        monkeypatch.delenv(name, raising=False)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] in NAMES]:
        del sys.modules[name]


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


RECORD = {"step": 3, "loss": 0.5, "grad_norm": float("nan"), "phases": {"forward": 0.1}}
SENT = {"train/loss": 0.5, "train/phases/forward": 0.1}


def test_each_gets_every_finite_number_and_the_settings(packages, tmp_path):
    run = tmp_path / "run"
    with Monitor(run, 0, 9, report_to=NAMES, settings={"seed": 7}) as monitor:
        monitor.step({**RECORD, "learning_rate": 0.1, "tokens": 4, "tokens_per_second": 8.0})
        monitor.evaluation({"step": 3, "loss": 0.7, "code": {"loss": 0.6}})
    sent = SENT | {"train/learning_rate": 0.1, "train/tokens": 4, "train/tokens_per_second": 8.0}
    evaluated = {"eval/loss": 0.7, "eval/code/loss": 0.6}
    begun, axis, *logged, end = lines(run / "wandb.log")
    assert begun[0] == "init" and begun[1]["config"] == {"seed": 7} and begun[1]["name"] == "run"
    assert begun[1]["settings"] == "off" and axis == ["axis", "*", "step"] and end == ["finish"]
    assert logged == [["log", {**sent, "step": 3}], ["log", {**evaluated, "step": 3}]]
    assert lines(run / "swanlog/log")[1:] == [["log", 3, sent], ["log", 3, evaluated], ["finish"]]
    created, param, first, second, end = lines(run / "mlflow.db")
    assert created == ["create", "7", "run"] and param == ["param", "m1", "seed", "7"] and end == ["end", "m1"]
    assert first == ["log", "m1", [[name, value, 3] for name, value in sent.items()]]
    assert second == ["log", "m1", [[name, value, 3] for name, value in evaluated.items()]]
    assert not (run / "runs").exists(), "TensorBoard was not asked for"


def test_a_resumed_run_goes_on_there_and_a_new_one_does_not(packages, tmp_path):
    for resumed_step in (0, 5, 0):
        Trackers(About(tmp_path, resumed_step, NAMES), pytest.fail).close()
    ids = [said[1]["id"] for said in lines(tmp_path / "wandb.log") if said[0] == "init"]
    assert ids == [None, "w1", None]
    assert [said[0] for said in lines(tmp_path / "mlflow.db")] == ["create", "end", "update", "end", "create", "end"]
    assert [said[1].get("id") for said in lines(tmp_path / "swanlog/log") if said[0] == "init"] == [None, "s1", None]
    assert json.loads((tmp_path / IDS).read_text()) == {"wandb": "w1", "mlflow": "m1", "swanlab": "s1"}


def test_nothing_is_written_where_none_is_asked_for(tmp_path):
    trackers = Trackers(About(tmp_path, names=("none",)), pytest.fail)
    trackers.write(RECORD, "train")
    trackers.close()
    assert not list(tmp_path.iterdir())


def test_what_is_missing_or_does_not_start_is_an_error(packages, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="report_to wandb: the package wandb cannot be imported .*: pip install wandb"):
        Trackers(About(tmp_path, names=("wandb",)), pytest.fail)
    (packages / "swanlab.py").write_text("def init(**given): raise RuntimeError('no key')")
    with pytest.raises(
        UserError, match=r"swanlab: it does not start \(no key\): run swanlab login, or set SWANLAB_MODE"
    ):
        Trackers(About(tmp_path, names=("swanlab",)), pytest.fail)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="report_to tensorboard: .*: pip install tensorboard"):
        Trackers(About(tmp_path, names=("tensorboard",)), pytest.fail)
    told = []
    Trackers(About(tmp_path), told.append).close()
    assert len(told) == 1 and told[0].startswith("TensorBoard is not written")


def test_one_that_fails_later_is_told_of_once_and_the_others_go_on(packages, tmp_path):
    told = []
    trackers = Trackers(About(tmp_path, names=("wandb", "swanlab")), told.append)

    def log(values):
        raise ConnectionError("the network is gone")

    trackers._others["wandb"]._run.log = log
    for _ in range(2):
        trackers.write(RECORD, "train")
    trackers.close()
    assert told == ["wandb gets no more of this run, whose numbers are in metrics.jsonl: the network is gone"]
    assert [said[0] for said in lines(tmp_path / "swanlog/log")] == ["init", "log", "log", "finish"]
