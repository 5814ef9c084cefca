"""--profile: what ranks recorded, as a trace and a drawing, and what a later run or plan makes of it."""

import contextlib
import json
import re
import time
from xml.etree import ElementTree

import pytest
import torch
from tiny import column, make_inputs, tune

from megalora.adapters.config import LoraConfig
from megalora.building import resolve_lora
from megalora.cli import main
from megalora.errors import UserError
from megalora.models.config import config_from_dict
from megalora.parallel.mesh import Axis
from megalora.pipeline.actions import BACKWARD, FORWARD, Action
from megalora.pipeline.partition import partition
from megalora.planning.layouts import predicted
from megalora.planning.nodes import Workload
from megalora.planning.plans import Layout
from megalora.planning.timing import LayerCosts
from megalora.profiling import (
    Profiler,
    TimedSpan,
    measured_costs,
    model_words,
    read_profile,
    recorded_steps,
    write_profile,
)

FIELDS = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    "steps, first, total, recorded",
    [(2, 0, 10, [1, 2]), (2, 5, 10, [6, 7]), (3, 0, 2, [1]), (2, 0, 1, [0]), (0, 0, 9, []), (2, 4, 4, [])],
)
def test_which_steps_are_recorded(steps, first, total, recorded):
    assert list(recorded_steps(steps, first, total, graphs=False)) == recorded


def test_the_step_that_captures_graphs_is_not_recorded():
    assert list(recorded_steps(2, 0, 10, graphs=True)) == [2, 3]
    assert list(recorded_steps(2, 0, 2, graphs=True)) == [1]
    assert list(recorded_steps(2, 4, 4, graphs=True)) == []


def test_computes_and_phases_are_recorded_within_chosen_steps_only():
    profiler, seen = Profiler(torch.device("cpu")), []

    @contextlib.contextmanager
    def inner(phase):
        seen.append(phase)
        yield

    clock = profiler.clock(inner)
    for number in range(3):
        with profiler.step(number == 1, Axis()):
            with profiler.watch(Action(FORWARD, 4)), clock("forward"):
                time.sleep(0.002)
            with clock("communication"):
                pass
    ((first, second),) = profiler.collect(Axis())[0]
    assert (first.name, first.action, second.name, second.action) == (
        FORWARD,
        Action(FORWARD, 4),
        "communication",
        None,
    )
    assert 0 <= first.start < first.start + 0.002 <= first.end <= second.start <= second.end
    assert seen == ["forward", "communication"] * 3, "the run's own clock misses nothing"


def profile_of(folder, parts=(2, 2), seconds=(1.0, 2.0), **work):
    """A written profile of two stages, 3 microbatches: forward and backward of stage s take seconds[s] each."""
    config = config_from_dict(FIELDS)
    lora = resolve_lora(LoraConfig.from_dict({"r": 4}), config)
    ranges = partition("custom", [1] * 4, len(parts), custom=parts)
    layout = Layout(1, len(parts), 1, "1f1b", 1, 3, Workload(1, 64, **work))
    plan = predicted(config, lora, layout, ranges, torch.device("cpu"))
    recorded = []
    for each in seconds[: len(parts)]:
        spans, now = [TimedSpan("data", None, 0.0, 0.1)], 0.1
        for m in range(3):
            for op in (FORWARD, BACKWARD):
                spans.append(TimedSpan(op, Action(op, m), now, now + each))
                now += each
        recorded.append([spans, spans])
    return write_profile(folder, recorded, plan, model_words(config), "cpu")


def test_the_trace_is_chromes_and_the_drawing_has_what_was_measured_beside_the_plan(tmp_path):
    line = profile_of(tmp_path / "profile")
    trace = json.loads((tmp_path / "profile" / "trace.json").read_text())
    assert "trace.json" in line and "schedule.svg" in line and "2 steps" in line
    computes = [event for event in trace["traceEvents"] if event.get("cat") == "compute"]
    assert len(computes) == 2 * 2 * 6 and {event["pid"] for event in computes} == {0, 1}
    assert all(event["ph"] == "X" and event["dur"] in (pytest.approx(1e6), pytest.approx(2e6)) for event in computes)
    first, second = ([e["ts"] for e in computes if e["args"]["step"] == step] for step in (0, 1))
    assert max(first) < min(second), "steps follow one another"
    names = [event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"]
    assert names == ["rank 0: stage 0, data 0, tensor 0", "rank 1: stage 1, data 0, tensor 0"]
    drawing = ElementTree.parse(tmp_path / "profile" / "schedule.svg")
    text = [one.text or "" for one in drawing.iter() if one.tag.endswith("text")]
    assert any("measured, 12.1 s" in one for one in text)
    assert any("simulated" in one for one in text) and any("planned from counts" in one for one in text)


def test_a_later_run_balances_what_was_measured(tmp_path):
    profile_of(tmp_path)
    measured = read_profile(tmp_path / "trace.json", config_from_dict(FIELDS), "dense")
    assert measured.totals == pytest.approx([2.0, 4.0]) and measured.layers == ((0, 2), (2, 4))
    costs = measured_costs(LayerCosts((1.0,) * 4, 0.0, 0.1), measured)
    assert costs.layers == pytest.approx((1.0,) * 4) and costs.last == pytest.approx(2.0), "the head takes the rest"
    cut = partition("cost", costs.layers, 2, first_cost=costs.first, last_cost=costs.last)
    assert [len(part) for part in cut] == [3, 1]


def test_a_single_stage_scales_all_alike(tmp_path):
    profile_of(tmp_path, parts=(4,), seconds=(3.0,))
    measured = read_profile(tmp_path / "trace.json", config_from_dict(FIELDS), "dense")
    costs = measured_costs(LayerCosts((1.0,) * 4, 0.5, 1.5), measured)
    assert (*costs.layers, costs.first, costs.last) == pytest.approx((1.0,) * 4 + (0.5, 1.5))


def test_what_is_no_profile_of_this_model_is_an_error(tmp_path):
    profile_of(tmp_path)
    (tmp_path / "other.json").write_text('{"traceEvents": []}')
    for other in ({"num_hidden_layers": 8}, {"intermediate_size": 4096}, {"model_type": "mistral"}):
        with pytest.raises(UserError, match="4 layers; this model is .*: profile a run of this model"):
            read_profile(tmp_path / "trace.json", config_from_dict(FIELDS | other), "dense")
    with pytest.raises(UserError, match="other.json is not"):
        read_profile(tmp_path / "other.json", config_from_dict(FIELDS), "dense")
    with pytest.raises(UserError, match="cannot be read"):
        read_profile(tmp_path / "none.json", config_from_dict(FIELDS), "dense")


def test_a_profile_of_a_base_in_another_format_is_an_error(tmp_path):
    config = config_from_dict(FIELDS)
    profile_of(tmp_path, base_format="fp8", context_parallel=2)
    measured = read_profile(tmp_path / "trace.json", config, "fp8")
    assert (measured.base_format, measured.context_parallel) == ("fp8", 2)
    with pytest.raises(UserError, match="base was in fp8, not in dense: give --base_format fp8, or profile a run with"):
        read_profile(tmp_path / "trace.json", config, "dense")


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        profile_of(tmp_path / "file" / "profile")


def test_a_run_on_two_stages_is_profiled_and_the_next_run_and_the_plan_read_it(tmp_path, capsys):
    inputs = make_inputs(tmp_path / "inputs")
    first, second = tmp_path / "first", tmp_path / "second"
    common = {"max_steps": 3, "gradient_accumulation_steps": 3, "pipeline_parallel_size": 2, "save": False}
    trace = first / "profile" / "trace.json"
    one, two = tune(
        2,
        inputs.flags(first, profile=True, profile_steps=1, **common),
        inputs.flags(second, partition_method="cost", profile_file=trace, **common),
    )
    assert str(trace) in one.out and "of the compute" in two.out
    events = json.loads(trace.read_text())["traceEvents"]
    computes = [event for event in events if event.get("cat") == "compute"]
    assert {(e["pid"], e["name"], e["args"]["microbatch"]) for e in computes} == {
        (rank, op, m) for rank in range(2) for op in (FORWARD, BACKWARD) for m in range(3)
    }
    assert {"communication", "optimizer", "data"} <= {event["name"] for event in events}
    assert column(first, "loss") == column(second, "loss"), "recording changes no number"
    words = ["--model_path", str(inputs.model), "--lora_config", str(inputs.lora), "--gpus", "2", "--seq_length", "64"]
    assert main(["plan", *words, "--profile_file", str(trace)]) == 2
    assert "device was cpu\nhint: give --device cpu" in capsys.readouterr().err
    words += ["--device", "cpu"]
    assert main(["plan", *words, "--profile_file", str(trace)]) == 2
    assert "dtype was float32\nhint: give --dtype float32" in capsys.readouterr().err
    words += ["--dtype", "float32", "--pipeline_parallel_size", "2", "--per_device_train_batch_size", "1"]
    assert main(["plan", *words, "--profile_file", str(trace)]) == 0
    stages = re.findall(r"([\d.e+]+) \+ ([\d.e+]+)", capsys.readouterr().out)  # ms forward and backward of each
    planned = sum(float(number) for stage in stages for number in stage)
    measured = json.loads(trace.read_text())["otherData"]["measured"]
    real = 1e3 * sum(sum(measured[what]) for what in ("forward", "backward"))
    assert planned == pytest.approx(real, rel=0.05), "the same layout takes what it took"
