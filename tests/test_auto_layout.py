"""--layout auto, --global_batch_size and --dry_run: what is chosen, and that it changes no number."""

import json
import re

import pytest
import tiny
import torch
from snapshots import assert_snapshot
from tiny import column, tune

from megalora import auto_layout
from megalora.auto_layout import choose
from megalora.errors import UserError
from megalora.flags import parse_finetune
from megalora.planning.devices import DEVICES
from megalora.planning.layouts import Planner

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return tiny.make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def chosen(inputs, tmp_path, monkeypatch):
    def of(processes, device=CPU, **flags):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        return choose(parse_finetune(inputs.flags(tmp_path / "run", **flags)), device)

    return of


def test_the_rows_of_a_step_stay(chosen):
    for flags in ({"gradient_accumulation_steps": 3}, {"per_device_train_batch_size": 2}, {"global_batch_size": 12}):
        arguments, (note,) = chosen(4, layout="auto", **flags)
        parallel, train = arguments.parallel, arguments.train
        dp = 4 // (parallel.tensor_parallel_size * parallel.pipeline_parallel_size)
        rows = dp * train.per_device_train_batch_size * train.gradient_accumulation_steps
        assert rows == {"gradient_accumulation_steps": 12, "per_device_train_batch_size": 8}.get([*flags][0], 12)
        assert note.startswith("layout auto: tensor ") and "to fix it: --tensor_parallel_size" in note


def test_what_is_given_stays(chosen):
    arguments, _ = chosen(4, layout="auto", tensor_parallel_size=2, recompute="full", global_batch_size=8)
    assert (arguments.parallel.tensor_parallel_size, arguments.parallel.recompute) == (2, "full")
    with pytest.raises(UserError, match="no layout of 4 GPUs"):
        chosen(4, layout="auto", tensor_parallel_size=3)


def test_nothing_is_chosen_unasked(chosen):
    """On CPUs, on one GPU, and where a flag of the layout is given."""
    for processes, device, flags in (
        (4, CPU, {}),
        (1, torch.device("cuda"), {}),
        (4, torch.device("cuda"), {"tensor_parallel_size": 2}),
        (4, torch.device("cuda"), {"layout": "manual"}),
    ):
        arguments, notes = chosen(processes, device, **flags)
        assert not notes and arguments.parallel.tensor_parallel_size == flags.get("tensor_parallel_size", 1)


def test_global_batch_size_is_dealt_to_the_ranks(chosen):
    arguments, _ = chosen(4, global_batch_size=12, tensor_parallel_size=2, per_device_train_batch_size=2)
    assert arguments.train.gradient_accumulation_steps == 3
    with pytest.raises(UserError, match=r"global_batch_size \(10\) is not a multiple of the 4 rows .* choose 8"):
        chosen(4, global_batch_size=10, tensor_parallel_size=2, per_device_train_batch_size=2)


def test_rows_of_a_microbatch_by_tokens(chosen):
    """The inputs' rows have 64 tokens or so; what is given in tokens is rounded down to whole rows."""
    length = chosen(1)[0].data.seq_length
    for layout in ("manual", "auto"):
        arguments, _ = chosen(2, layout=layout, max_tokens_per_microbatch=3 * length + 1, global_batch_size=12)
        assert arguments.train.per_device_train_batch_size == 3
        sizes = arguments.parallel.tensor_parallel_size * arguments.parallel.pipeline_parallel_size
        assert arguments.train.gradient_accumulation_steps == 12 // 3 // (2 // sizes)
    with pytest.raises(UserError, match=rf"max_tokens_per_microbatch \({length - 1}\) is less than one row"):
        chosen(1, max_tokens_per_microbatch=length - 1)
    with pytest.raises(UserError, match="both say how many rows a microbatch has"):
        chosen(1, max_tokens_per_microbatch=4 * length, per_device_train_batch_size=4)


@pytest.fixture
def on_gpus(monkeypatch):
    """As on four H100s, for what is reckoned before anything runs."""
    monkeypatch.setattr(auto_layout, "_memory", lambda device, processes: 80 << 30)
    monkeypatch.setattr(auto_layout, "device_of", lambda device: DEVICES["h100"])
    searched = []
    search = Planner.search
    monkeypatch.setattr(Planner, "search", lambda self, wanted: searched.append((self, wanted)) or search(self, wanted))
    return searched


GPU = torch.device("cuda")


def test_no_flag_of_memory_is_passed_over(chosen, on_gpus):
    flags = {"global_batch_size": 8, "layout": "auto", "dtype": "float32", "base_format": "dense"}
    _, (note,) = chosen(4, GPU, **flags)
    assert "of 76.0 GiB" in note
    _, (note,) = chosen(4, GPU, memory=40.0, **flags)
    assert "of 40.0 GiB" in note
    with pytest.raises(UserError, match="no layout fits 4 GPUs of "):
        chosen(4, GPU, memory=0.0001, **flags)
    arguments, (note,) = chosen(4, GPU, recompute="full", recompute_layers=1, offload_activations=True, **flags)
    assert "--recompute full --recompute_layers 1 --offload_activations true" in note
    (planner, wanted) = on_gpus[-1]
    plans, _ = planner.search(wanted)
    assert all("1 full (1 in host memory)" in stage.recompute for plan in plans for stage in plan.stages)
    assert arguments.parallel.recompute_layers == 1 and plans[0].stages[0].host > 0
    _, (note,) = chosen(4, GPU, offload_activations=False, **flags)
    assert "--offload_activations false" in note


def test_a_profile_scales_the_chosen_plan(inputs, chosen, on_gpus, tmp_path):
    tune(1, inputs.flags(tmp_path / "profiled", max_steps=3, profile=True))
    trace, slower = tmp_path / "profiled/profile/trace.json", tmp_path / "slower.json"
    told = json.loads(trace.read_text())
    measured = told["otherData"]["measured"]
    measured |= {name: [100 * seconds for seconds in measured[name]] for name in ("forward", "recompute", "backward")}
    slower.write_text(json.dumps(told))
    flags = {"global_batch_size": 8, "layout": "auto", "dtype": "float32"}
    speeds = []
    for file in (trace, slower):
        chosen(4, GPU, profile_file=file, **flags)
        speeds.append(on_gpus[-1][0]._cluster.device.gemm32)
    assert speeds[0] == pytest.approx(100 * speeds[1]) and speeds[0] != DEVICES["h100"].gemm32
    with pytest.raises(UserError, match="profile_file"):
        chosen(4, GPU, profile_file=tmp_path / "none.json", **flags)


def test_a_run_that_goes_on_is_planned_with_its_own_adapter(inputs, chosen, on_gpus, tmp_path):
    """Without --lora_config: the checkpoint's, or the adapter's that it starts from, not the default."""
    wide = json.dumps({"r": 24, "target_modules": ["gate_proj"]})
    tune(1, inputs.flags(tmp_path / "run", max_steps=1, lora_config=wide))
    flags = {"global_batch_size": 8, "layout": "auto", "lora_config": None}

    def planned(**more) -> tuple[int, set[str]]:
        chosen(4, GPU, **flags, **more)
        lora = on_gpus[-1][0]._lora
        return lora.config.r, {name.rpartition(".")[2] for name in lora.adapters}

    assert planned() == (24, {"gate_proj"})
    assert planned(output_dir=tmp_path / "new", resume_peft_from_checkpoint=tmp_path / "run") == (24, {"gate_proj"})
    assert planned(output_dir=tmp_path / "new")[0] == planned(overwrite_output_dir=True)[0] == 8


def test_a_chosen_layout_gives_the_same_numbers(inputs, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    tune(1, inputs.flags(one, global_batch_size=4, max_steps=3))
    (done,) = tune(2, inputs.flags(two, layout="auto", global_batch_size=4, max_steps=3))
    assert "layout auto: " in done.out
    assert column(two, "loss") == pytest.approx(column(one, "loss"), rel=1e-4)


def of_any_machine(told: str) -> str:
    """The lines of a dry run without paths, sizes and times, and without the note on cached rows."""
    told = re.sub(r"\ntokens of the rows .*", "", re.sub(r" +(?=\n)", "", told))
    told = re.sub(r"\n {20,}", " ", told)
    told = re.sub(r"\d+(\.\d+)?(?= (GiB|s\b))|\d+:\d\d:\d\d|[0-9a-f]{12,}", "*", re.sub(r"[^ ]*/", "", told))
    return re.sub(r"compiled ops|plain torch.*", "*", told)


def test_a_dry_run_tells_and_writes_nothing(inputs, tmp_path):
    folder = tmp_path / "run"
    (done,) = tune(1, inputs.flags(folder, dry_run=True, warmup_steps=2, eval_fraction=0.2))
    assert "dry run: 10 steps of" in done.out and "learning rate 0.00167 at step 1, 0.005 at step 3" in done.out
    assert "documents in" in done.out and "GiB at the peak" in done.out
    assert_snapshot("dry_run", of_any_machine(done.out))
    assert not folder.exists()
    tune(1, inputs.flags(folder, max_steps=2))
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    (done,) = tune(1, inputs.flags(folder, dry_run=True, overwrite_output_dir=True))
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file != folder} == {
        file: time for file, time in before.items() if file != folder
    }
