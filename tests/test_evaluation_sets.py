"""Several evaluation sets with names: a loss each, and the mean over the labels of all, which the run decides by."""

import pytest
import tiny
from tiny import metrics, tune

from megalora.errors import UserError
from megalora.flags import DataArguments

STEPS = {"max_steps": 3, "eval_steps": 1, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return tiny.make_inputs(tmp_path_factory.mktemp("inputs"))


def test_the_whole_is_the_mean_over_labels(inputs, tmp_path):
    few, many = tiny.questions(3, first=100), tiny.questions(11, first=200)
    files = {name: tiny.write_json(tmp_path / f"{name}.json", rows) for name, rows in (("few", few), ("many", many))}
    whole = tiny.write_json(tmp_path / "whole.json", few + many)
    sets = [f"few={files['few']}", f"many={files['many']}"]
    out = tune(2, inputs.flags(tmp_path / "sets", **STEPS, eval_data_path=sets, keep_best=True))[0].out
    tune(1, inputs.flags(tmp_path / "whole", **STEPS | {"gradient_accumulation_steps": 4}, eval_data_path=whole))
    assert "few: 3 documents in" in out and "evaluation of many: loss" in out
    ours, theirs = (metrics(tmp_path / name, "eval_metrics.jsonl") for name in ("sets", "whole"))
    assert [line["step"] for line in ours] == [1, 2, 3]
    for line, other in zip(ours, theirs, strict=True):
        assert line.keys() == {"step", "loss", "perplexity", "few", "many"}
        assert line["few"]["loss"] != pytest.approx(line["many"]["loss"], abs=1e-3)
        if line["step"] == 1:  # the rows of a step are others over two processes only in their order of sums
            assert line["loss"] == pytest.approx(other["loss"], abs=1e-5)
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = events.EventAccumulator(str(tmp_path / "sets/runs")).Reload()
    assert [event.value for event in found.Scalars("eval/few/loss")] == pytest.approx([x["few"]["loss"] for x in ours])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("a.json", "b.json"), "eval_data_path a.json has no name: write each set as NAME=DATA: held=a.json"),
        (("x=a.json", "x=b.json"), "names two sets x"),
        (("loss=a.json",), "names a set loss, as a metric is named"),
        (("f1_x=a.json",), "as a metric is named"),
    ],
)
def test_sets_that_cannot_be_told_apart_are_refused(words, says):
    with pytest.raises(UserError, match=says):
        DataArguments("rows.json", eval_data_path=words)


def test_a_file_that_is_there_is_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    of = DataArguments("r", eval_data_path=("part=1.json",))
    assert of.evaluations == (("part", "1.json"),)
    (tmp_path / "part=1.json").write_text("[]")
    assert of.evaluations == (("", "part=1.json"),)
    assert DataArguments("r", eval_data_path=("part=1.json,2.json",)).evaluations == (("", "part=1.json,2.json"),)
    with pytest.raises(UserError, match="eval_data_path part=1.json has no name: write each set as NAME=DATA: held="):
        DataArguments("r", eval_data_path=("part=1.json", "x=2.json"))
    named = DataArguments("r", eval_data_path=("a=part=1.json", "x=2.json"))
    assert named.evaluations == (("a", "part=1.json"), ("x", "2.json"))


def test_names_are_read():
    of = DataArguments("rows.json", eval_data_path=("a-1=x.json,y.json", "b=./c=d.json"))
    assert of.evaluations == (("a-1", "x.json,y.json"), ("b", "./c=d.json"))
    assert DataArguments("r", eval_data_path=("./c=d.json",)).evaluations == (("", "./c=d.json"),)
