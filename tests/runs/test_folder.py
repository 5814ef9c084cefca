"""What of an output_dir the board shows besides its curves."""

from __future__ import annotations

import json
import os

import pytest
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st
from runs_on_disk import make_run

from megalora.errors import UserError
from megalora.runs.folder import Run, find_runs, names_of


def test_what_a_run_says(tmp_path):
    run = Run(make_run(tmp_path / "out", steps=3, evaluations=2), "out")
    assert run.summary()["last_step"] == 0 and run.fields() == [], "nobody has looked yet"
    run.look()
    said = run.summary()
    assert (said["last_step"], said["total_steps"], said["latest"]["loss"]) == (3, 40, 1 / 3)
    assert set(said["fields"]) == {"loss", "learning_rate", "phases/forward", "eval/loss"}
    assert run.series("eval/loss", 0, 99, 10) == ([1, 2], [1.0, 0.5])
    assert run.settings() == {"learning_rate": "0.001", "output_dir": "out", "input_names": "a b", "save": "true"}
    notes = run.notes()
    assert [(note.text, note.rank, note.fault) for note in notes] == [
        ("---- rank 0 on host, process 7", 0, False),
        ("the adapter is new", 0, False),
        ("rank 1 died", 1, True),
    ]
    version = run.version
    run.look()
    assert run.version == version


def test_folders_of_runs_and_their_names(tmp_path):
    for place in ("a/out", "b/out", "b/other", "b/none"):
        (tmp_path / place).mkdir(parents=True)
    runs = [make_run(tmp_path / place) for place in ("a/out", "b/out", "b/other")]
    found = find_runs([str(tmp_path / "a/out"), str(tmp_path / "b"), str(runs[0])])
    assert found == [runs[0], runs[2], runs[1]]
    assert names_of(found) == ["a/out", "other", "b/out"]
    with pytest.raises(UserError, match="is not a folder: name the output_dir of a run"):
        find_runs([str(tmp_path / "nowhere")])


LAYOUT = {
    "tensor": 2, "pipeline": 1, "context": 1, "data": 3, "schedule": "",
    "stages": [{"layers": [[0, 3]], "share": 1.0}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ({"layout": LAYOUT}, LAYOUT),
        ({}, None),
        ([], None),
        ({"layout": LAYOUT | {"tensor": 10**9}}, None),
        ({"layout": LAYOUT | {"data": 0}}, None),
        ({"layout": LAYOUT | {"pipeline": 2}}, None),
        ({"layout": LAYOUT | {"stages": [{"layers": [[0]], "share": 1}]}}, None),
        ({"layout": LAYOUT | {"stages": [{"layers": [[0, 1]], "share": float("nan")}]}}, None),
        ({"layout": LAYOUT | {"stages": [{"layers": [[0, float("inf")]], "share": 1}]}}, None),
    ],
)
def test_a_layout_is_as_a_run_writes_it_or_none(tmp_path, told, found):
    (tmp_path / ".megalora.json").write_text(json.dumps(told))
    assert Run(tmp_path, "").layout() == found


def test_hostile_folders(tmp_path):
    folder = make_run(tmp_path / "out")
    (folder / "run.yaml").write_text("!!python/object/apply:os.system [false]")
    assert Run(folder, "").settings() == {}
    (folder / "run.yaml").write_text("- 1")
    assert Run(folder, "").settings() == {}
    (folder / "run.yaml").unlink()
    os.mkfifo(folder / "run.yaml")
    os.mkfifo(folder / "logs" / "rank_00002.log")
    (folder / "logs" / "rank_x.log").write_text("error")
    (folder / "replies.jsonl").write_text('{"step": 1e999, "replies": []}\n')
    run = Run(folder, "")
    assert run.replies() == []
    os.mkfifo(folder / ".megalora.json")
    assert run.settings() == {} and len(run.notes()) == 3 and run.layout() is None


LINES = st.lists(
    st.binary(max_size=30)
    | st.text('{}[]",:0123456789e+-.\\nstep', max_size=40).map(str.encode)
    | st.sampled_from(
        [b'{"step": 3, "loss": 1e999}', b'{"step": 1e999}', b'{"step": 9007199254740993, "x": 1}', b"[" * 5000,
         b'{"step": 1, "loss": 1' + b"0" * 400 + b"}", b'{"step": 2, "phases": {"forward": {"a": 1}}}',
         b'{"step": 1e400, "replies": [{}]}', b'{"step": 1, "replies": [{"prompt": 3}, 4]}', b"2026-01-01 00:00:00 nan",
         b"step 5/99999999999999999999 ", b"---", b"a: !!binary x", b"a: &a [*a]",
         b'{"layout": {"tensor": 1e999}}', b'{"task_type": "CAUSAL_LM"}', b"model_path: " + b"x" * 5000,
         b"# megalora 0, started in /x; flags"]
    ),
    max_size=5,
).map(b"\n".join)  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "served"),
    [
        ({}, True), ({"task_type": "TOKEN_CLS"}, False), ({"use_dora": True}, False), ({"bias": "lora_only"}, False),
        ({"modules_to_save": ["lm_head"]}, False), ({"target_modules": "all-linear"}, True),
        ({"target_modules": ["model.layers.0.mlp.experts.0.up_proj"]}, True),
        ({"target_modules": None, "target_parameters": ["mlp.experts.gate_up_proj"]}, True),
    ],
)  # fmt: skip
def test_the_command_that_serves_an_adapter(tmp_path, fields, served):
    (tmp_path / "peft").mkdir()
    (tmp_path / "run.yaml").write_text("model_path: base\n")
    adapter = {"task_type": "CAUSAL_LM", "bias": "none", "target_modules": ["q_proj"]} | fields
    (tmp_path / "peft/adapter_config.json").write_text(json.dumps(adapter))
    command = Run(tmp_path, "run").serve_command()
    assert command is None if not served else command.startswith("megalora serve --model_path base --adapters tuned=")


@examples(60)
@given(data=st.data())
def test_any_files_of_a_run(tmp_path_factory, data):
    """The board shows what there is of them, and never fails."""
    folder = tmp_path_factory.getbasetemp() / "any_run"
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    (folder / "peft").mkdir(exist_ok=True)
    names = ["metrics.jsonl", "eval_metrics.jsonl", "replies.jsonl", "run.yaml", "logs/rank_00000.log"]
    for name in (*names, ".megalora.json", "peft/adapter_config.json"):
        (folder / name).write_bytes(data.draw(LINES))
    run = Run(folder, "any")
    run.look()
    run.read_on()
    assert run.summary()["name"] == "any" and run.version
    for name in run.fields():
        run.series(name, 0, 10, 4)
    run.settings(), run.notes(), run.replies(), run.layout(), run.serve_command()
