"""`megalora finetune` as a user sees it: one run on every layout, the files it leaves, steps that are not finite."""

import contextlib
import hashlib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
from spawn import spawn
from tiny import column, exported, largest_difference, metrics, tune
from told import user_error

from megalora.checkpoint.adapter.shards import read_adapter
from megalora.flags import parse_finetune
from megalora.monitor.timers import PHASES
from megalora.optimizer import LossScale
from megalora.parallel.grads import FlatGradients
from megalora.pipeline.runner import PipelineRunner
from megalora.training import Trainer, steady_heap

ROWS = 4  # of the global batch, on every layout
TP2, PP2 = {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}
SP2, NOT_SP2 = TP2 | {"sequence_parallel": True}, TP2 | {"sequence_parallel": False}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return tiny.make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory) -> Path:
    """The run on one process that every layout is held to."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    tune(1, inputs.flags(folder, gradient_accumulation_steps=ROWS, eval_data_path=evaluated(folder.parent)))
    return folder


def evaluated(folder: Path) -> Path:
    """A file of evaluation rows: an odd number, which leaves some rank with less."""
    return tiny.write_json(folder / "eval.json", tiny.questions(7, first=100))


def test_the_collector_passes_over_the_libraries_while_a_run_trains():
    for error in ((), (KeyError,)):
        with mock.patch("megalora.training.gc") as gc, contextlib.suppress(*error), steady_heap():
            assert gc.mock_calls == [mock.call.collect(), mock.call.freeze()]
            for kind in error:
                raise kind
        assert gc.mock_calls[2:] == [mock.call.unfreeze()]


# ---- one run, any layout


LAYOUTS = {  # name: (dp, flags)
    "tp2": (1, NOT_SP2 | {"per_device_train_batch_size": 2}),
    "pp2": (1, PP2),
    "dp2": (2, {}),
    "tp2 pp2 dp2": (2, TP2 | PP2),
    "tp2 sequence parallel, selective recompute": (
        1,
        SP2 | {"per_device_train_batch_size": 4, "recompute": "selective"},
    ),
    "tp2 pp2 dp2, sequence parallel, full recompute": (2, SP2 | PP2 | {"recompute": "full"}),
    "pp2 gpipe, custom stages": (
        1,
        PP2 | {"schedule": "gpipe", "partition_method": "custom", "custom_partition": [1, 1]},
    ),
    "one process, four rows a microbatch": (1, {"per_device_train_batch_size": 4}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_logs_and_exports_the_same(inputs, alone, tmp_path, name):
    dp, layout = LAYOUTS[name]
    world_size = dp * layout.get("tensor_parallel_size", 1) * layout.get("pipeline_parallel_size", 1)
    microbatches = ROWS // dp // layout.get("per_device_train_batch_size", 1)
    flags = layout | {"gradient_accumulation_steps": microbatches, "eval_data_path": evaluated(tmp_path)}
    tune(world_size, inputs.flags(tmp_path / "run", **flags))
    assert column(tmp_path / "run", "step") == [*range(1, 11)]
    for field in ("loss", "grad_norm"):
        assert column(tmp_path / "run", field) == pytest.approx(column(alone, field), abs=1e-5), field
    for field in ("learning_rate", "tokens"):
        assert column(tmp_path / "run", field) == column(alone, field)
    (ours,), (theirs,) = (metrics(folder, "eval_metrics.jsonl") for folder in (tmp_path / "run", alone))
    assert ours == pytest.approx(theirs, abs=1e-4) and ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    assert largest_difference(exported(tmp_path / "run"), exported(alone)) < 1e-4


def test_the_run_that_all_are_held_to_depends_on_what_it_should(inputs, alone, tmp_path):
    """Otherwise agreeing with it would prove little."""
    losses = column(alone, "loss")
    assert losses[-1] < losses[0] - 1, "it learns"
    assert min(column(alone, "grad_norm")) > 1, "the norm is clipped"
    changed = {
        "dropout": {"lora_config": tiny.write_json(tmp_path / "lora.json", tiny.LORA | {"lora_dropout": 0.0})},
        "seed": {"seed": 43},
        "packing": {"packing": False},
        "rate": {"learning_rate": 1e-3},
        "epsilon": {"adam_epsilon": 1.0},  # with it, the size of a gradient counts
        "no clipping": {"adam_epsilon": 1.0, "max_grad_norm": 0.0},
        "weight_decay": {"weight_decay": 1.0},
    }
    flags = [inputs.flags(tmp_path / n, gradient_accumulation_steps=ROWS, **more) for n, more in changed.items()]
    tune(1, *flags, inputs.flags(tmp_path / "again", gradient_accumulation_steps=ROWS))
    for name in changed:
        differences = [abs(a - b) for a, b in zip(column(tmp_path / name, "loss"), losses, strict=True)]
        assert max(differences) > 1e-3, name
    assert abs(column(tmp_path / "epsilon", "loss")[-1] - column(tmp_path / "no clipping", "loss")[-1]) > 1e-3
    assert column(tmp_path / "again", "loss") == losses, "a run repeats bit for bit"
    assert largest_difference(exported(tmp_path / "again"), exported(alone)) == 0


def test_losses_norms_and_steps_of_transformers_and_peft(inputs, tmp_path):
    """The same steps by hand: the whole data in each step, without packing or dropout, from the same adapter."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    start = tmp_path / "start"
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(inputs.model)
    targets = ["q_proj", "v_proj", "down_proj"]
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    )
    model.save_pretrained(start)
    done = tune(
        2,
        inputs.flags(
            tmp_path / "run",
            lora_config=None,
            resume_peft_from_checkpoint=start,
            gradient_accumulation_steps=32,  # more than there are rows
            weight_decay=0.1,
            max_steps=4,
            lr_scheduler_type="linear",
            **TP2,
        ),
    )
    assert "epochs of 1 step" in done[0].out
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.1)
    documents = by_hand(inputs)
    for line in metrics(tmp_path / "run"):
        optimizer.zero_grad()
        loss = mean_loss(model, documents)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert line["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        rate = 5e-3 * (1 - (line["step"] - 1) / 4)
        assert line["learning_rate"] == pytest.approx(rate, rel=1e-12)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    trained = peft.get_peft_model_state_dict(model)
    assert largest_difference(exported(tmp_path / "run"), trained) < 1e-4
    reread = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(inputs.model), tmp_path / "run/peft")
    assert largest_difference(peft.get_peft_model_state_dict(reread), exported(tmp_path / "run")) == 0


def by_hand(inputs, rows=None) -> list[tuple[list[int], int]]:
    """(tokens, where the reply begins) of each row."""
    tokenizer = tiny.AutoTokenizer.from_pretrained(inputs.model)
    documents = []
    for row in rows or json.loads(inputs.data.read_text()):
        prompt = f"<|im_start|>user\n{row['instruction']}<|im_end|>\n<|im_start|>assistant\n"
        prompt, reply = (tokenizer(text)["input_ids"] for text in (prompt, f"{row['output']}<|im_end|>"))
        documents.append((prompt + reply, len(prompt)))
    return documents


def mean_loss(model, documents) -> torch.Tensor:
    total, count = 0.0, 0
    for tokens, start in documents:
        logits = model(input_ids=torch.tensor([tokens])).logits[0]
        target = torch.tensor(tokens[start:])
        total += torch.nn.functional.cross_entropy(logits[start - 1 : -1], target, reduction="sum")
        count += len(target)
    return total / count


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision(inputs, alone, tmp_path, dtype):
    command = inputs.flags(tmp_path / "run", per_device_train_batch_size=ROWS, **TP2, **{dtype: True})
    assert {"bf16": "bfloat16", "fp16": "float16"}[dtype] in tune(2, command)[0].out
    losses = column(tmp_path / "run", "loss")
    assert losses == pytest.approx(column(alone, "loss"), rel=0.05) and losses != column(alone, "loss")
    assert all(tensor.dtype == torch.float32 for tensor in exported(tmp_path / "run").values())


# ---- what a run leaves


@pytest.fixture(scope="module")
def everything(inputs, tmp_path_factory) -> Path:
    """A run at tp2 pp2 with evaluations, checkpoints and times, for one epoch."""
    folder = tmp_path_factory.mktemp("everything") / "run"
    flags = {"eval_data_path": evaluated(folder.parent), "eval_steps": 3, "save_steps": 3, "save_total_limit": 2}
    flags |= {"wall_clock_breakdown": True, "max_steps": None, "num_train_epochs": 1, "warmup_steps": 2}
    flags |= {"gradient_accumulation_steps": 2, "logging_steps": 2, "per_device_train_batch_size": 1}
    tune(4, inputs.flags(folder, **TP2, **PP2, **flags))
    return folder


def test_metrics(inputs, everything):
    lines = metrics(everything)
    steps = lines[-1]["step"]
    assert [line["step"] for line in lines] == [*range(2, steps, 2), steps] and steps % 2 == 1
    for line in lines:
        assert {"step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second"} <= line.keys()
        assert line["tokens_per_second"] > 0 and line["grad_norm"] > 0
    rates = {line["step"]: line["learning_rate"] for line in lines}
    assert rates[2] == pytest.approx(5e-3 * 2 / 3, rel=1e-12), "warmup"
    assert rates[4] == pytest.approx(5e-3 * (1 + math.cos(math.pi / (steps - 2))) / 2, rel=1e-12), "cosine"
    texts = (everything / "metrics.jsonl").read_text()
    assert all(repr(line["loss"]) in texts for line in lines)
    assert any(line["loss"] != round(line["loss"], 9) for line in lines), "full precision"


def test_every_token_is_counted_once(inputs, everything):
    """Evaluations fall on steps that are not logged."""
    assert sum(column(everything, "tokens")) == sum(len(tokens) for tokens, _ in by_hand(inputs))


def test_phases_only_when_asked(everything, alone):
    for line in metrics(everything):
        assert set(line["phases"]) <= set(PHASES)
        assert {"forward", "backward", "communication", "optimizer", "data"} <= line["phases"].keys()
    saved = [line["step"] for line in metrics(everything) if "checkpoint" in line["phases"]]
    last = metrics(everything)[-1]["step"]
    # Saved after 3, 6, ...: the time is on the next line. The last is saved after the last line.
    assert saved == sorted({min(step + 2 - step % 2, last) for step in range(3, last, 3)})
    assert not any("phases" in line for line in metrics(alone))


def test_the_phases_of_a_line_fit_into_its_time(inputs, tmp_path):
    """tokens / tokens_per_second is the time, which leaves evaluations out; here they take longer than steps."""
    rows = tiny.write_json(tmp_path / "eval.json", tiny.questions(200))
    flags = {"eval_data_path": rows, "eval_steps": 1, "max_steps": 4, "save": False, "wall_clock_breakdown": True}
    tune(1, inputs.flags(tmp_path / "run", **flags))
    for line in metrics(tmp_path / "run"):
        assert sum(line["phases"].values()) <= line["tokens"] / line["tokens_per_second"]


def test_evaluations(inputs, everything):
    """The loss of the adapter at that step, by transformers and peft, one row at a time."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    lines = metrics(everything, "eval_metrics.jsonl")
    last = metrics(everything)[-1]["step"]
    assert [line["step"] for line in lines] == [*range(3, last, 3), last]
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(inputs.model), everything / "peft")
    documents = by_hand(inputs, tiny.questions(7, first=100))
    for line in lines[-2:]:  # those whose checkpoints are kept
        tensors = read_adapter(everything / f"checkpoints/iter_{line['step']:07d}").tensors
        peft.set_peft_model_state_dict(model, {f"base_model.model.{n}": t for n, t in tensors.items()})
        with torch.no_grad():
            loss = mean_loss(model, documents).item()
        assert line["loss"] == pytest.approx(loss, abs=1e-5)
        assert line["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert lines[0]["loss"] > lines[-1]["loss"] + 0.1


def test_tensorboard(everything):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(everything / "runs")).Reload()
    for tag, name, field in (
        ("train/loss", "metrics.jsonl", "loss"),
        ("train/learning_rate", "metrics.jsonl", "learning_rate"),
        ("eval/perplexity", "eval_metrics.jsonl", "perplexity"),
    ):
        scalars = [(event.step, event.value) for event in events.Scalars(tag)]
        assert scalars == [(line["step"], pytest.approx(line[field], rel=1e-6)) for line in metrics(everything, name)]


def test_checkpoints(everything):
    checkpoints = everything / "checkpoints"
    last = metrics(everything)[-1]["step"]
    kept = [f"iter_{step:07d}" for step in [*range(3, last, 3), last][-2:]]
    assert sorted(p.name for p in checkpoints.iterdir()) == [*kept, "latest_checkpointed_iteration.txt"]
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text().strip() == str(last)
    for checkpoint in kept:
        folder = checkpoints / checkpoint
        manifest = json.loads((folder / "manifest.json").read_text())
        found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
        del found["manifest.json"]
        shards = [f"mp_rank_{tp:02d}_pp_rank_{pp:03d}" for tp in (0, 1) for pp in (0, 1)]
        files = ("lora_config.json", "lora_partial_model_optim.pt")
        assert set(found) == {f"{shard}/{file}" for shard in shards for file in files} == set(manifest["files"])
        for name, path in found.items():
            entry, data = manifest["files"][name], path.read_bytes()
            assert (entry["size"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        assert manifest["step"] == int(checkpoint.removeprefix("iter_"))
    for part in (0, 1):
        shard = torch.load(folder / f"mp_rank_00_pp_rank_{part:03d}/lora_partial_model_optim.pt", weights_only=True)
        assert {name.split(".")[2] for name in shard["model"]} == {str(part)}, "the layer of its stage"
        assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in shard["model"])
    whole = read_adapter(folder).tensors
    assert largest_difference({f"base_model.model.{n}": t for n, t in whole.items()}, exported(everything)) == 0
    fields = json.loads((everything / "peft/adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"], fields["peft_type"]) == (4, 8, "LORA")


def test_nothing_is_saved_unasked(inputs, tmp_path):
    tune(1, inputs.flags(tmp_path / "run", save=False, max_steps=2))
    assert not (tmp_path / "run/checkpoints").exists() and not (tmp_path / "run/peft").exists()
    assert column(tmp_path / "run", "step") == [1, 2]


def test_the_length_of_a_run(inputs, tmp_path):
    """Epochs are rounded up to whole steps; with max_steps, whichever ends first."""
    both = {"gradient_accumulation_steps": 6, "save": False}
    commands = [
        inputs.flags(tmp_path / "epochs", max_steps=None, num_train_epochs=2, **both),
        inputs.flags(tmp_path / "half", max_steps=None, num_train_epochs=0.3, **both),
        inputs.flags(tmp_path / "default", max_steps=None, **both),
        inputs.flags(tmp_path / "first", max_steps=3, num_train_epochs=2, **both),
    ]
    shown = tune(1, *commands)[0].out
    packed = int(shown.split(" documents in ")[1].split()[0])
    an_epoch = math.ceil(packed / 6)
    expected = {"epochs": 2 * an_epoch, "half": math.ceil(0.3 * an_epoch), "default": 3 * an_epoch, "first": 3}
    assert {name: len(metrics(tmp_path / name)) for name in expected} == expected
    tokens = column(tmp_path / "epochs", "tokens")
    assert sum(tokens[:an_epoch]) == sum(tokens[an_epoch:]) == sum(len(t) for t, _ in by_hand(inputs))


def test_bad_rows_are_skipped_when_asked(inputs, tmp_path):
    rows = [*tiny.questions(5), {"instruction": "Who?", "output": ""}, {"words": "no shape"}, *tiny.questions(3)]
    data = tiny.write_json(tmp_path / "rows.json", rows)
    out = tune(1, inputs.flags(tmp_path / "run", data_path=data, on_bad_row="skip", max_steps=1, save=False))[0].out
    assert f"{data} row 5" in out and f"{data} row 6" in out and "2 of 10 rows are left out" in out
    flags = {"eval_data_path": data, "on_bad_row": "skip", "max_steps": 1, "save": False}
    out = tune(1, inputs.flags(tmp_path / "other", **flags))[0].out
    assert f"{data} row 5" in out and "2 of 10 rows are left out" in out
    assert "8 documents" in out


# ---- steps that are not finite


def broken(rank: int, world_size: int, command: list[str], bad_rank: int, steps: tuple[int, ...], where: str):
    """A run in which one rank's loss or gradient is not finite in those steps (counted from 1)."""
    train, step, reduce = PipelineRunner.train, Trainer.step, FlatGradients.reduce
    now = [0]

    def counted(self, number, data, **options):
        now[0] = number + 1
        return step(self, number, data, **options)

    def loss(self, *arguments):
        total = train(self, *arguments)
        return total * math.nan if where == "loss" and rank == bad_rank and now[0] in steps else total

    def gradient(self):
        if where == "gradient" and rank == bad_rank and now[0] in steps:
            self.buffer[-1] = math.inf
        reduce(self)

    with contextlib.ExitStack() as patches:
        for owner, name, patch in (
            (PipelineRunner, "train", loss),
            (Trainer, "step", counted),
            (FlatGradients, "reduce", gradient),
        ):
            patches.enter_context(mock.patch.object(owner, name, patch))
        return tiny.run(rank, world_size, [command])


@pytest.mark.parametrize("where, layout", [("loss", {}), ("gradient", {}), ("loss", TP2), ("gradient", PP2)])
def test_a_step_that_is_not_finite_is_skipped_by_all(inputs, tmp_path, where, layout):
    """Two bad steps, a good one, two bad ones: the run goes on."""
    bad = (2, 3, 5, 6)
    command = inputs.flags(tmp_path / "run", gradient_accumulation_steps=2, max_steps=7, save_steps=1, **layout)
    results = spawn(broken, 2, command, 1, bad, where)
    assert [done.status for (done,) in results] == [0, 0], results
    for step in range(2, 8):
        before, after = (
            read_adapter(tmp_path / f"run/checkpoints/iter_{s:07d}") for s in (step - 1, step)
        )  # every rank's shards are in it
        moved = largest_difference(before.tensors, after.tensors)
        updates = after.trainer["optimizer_steps"] - before.trainer["optimizer_steps"]
        assert (moved == 0, updates) == ((True, 0) if step in bad else (False, 1)), step
        moments = [read.optimizer[name][key] for name in before.tensors for key in ("exp_avg", "exp_avg_sq")
                   for read in (before, after)]  # fmt: skip
        unmoved = all(torch.equal(a, b) for a, b in zip(moments[::2], moments[1::2], strict=True))
        assert unmoved == (step in bad)
    assert all(tensor.isfinite().all() for tensor in exported(tmp_path / "run").values())
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines if line.get("skipped")] == list(bad)
    assert all((line[where if where == "loss" else "grad_norm"] is None) == (line["step"] in bad) for line in lines)
    for step in range(1, 8):
        assert (f"step {step} skipped: " in results[0][0].out) == (step in bad)


def test_three_in_a_row_stop_the_run(inputs, tmp_path):
    command = inputs.flags(tmp_path / "run", gradient_accumulation_steps=2, save_steps=1)
    (first,), (second,) = spawn(broken, 2, command, 1, (3, 4, 5, 6), "loss")
    assert (first.status, second.status) == (2, 2) and second.err == ""
    line = user_error(first.err)
    assert line.startswith("step 5: loss nan") and "learning_rate" in line
    assert (tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt").read_text().strip() == "4"


def test_overflow_in_float16_halves_the_scale_and_is_no_bad_step(inputs, tmp_path):
    """The search for a scale may take more than three steps."""
    command = inputs.flags(tmp_path / "run", gradient_accumulation_steps=2, max_steps=6, fp16=True)
    results = spawn(broken, 2, command, 1, (1, 2, 3, 4), "gradient")
    assert [done.status for (done,) in results] == [0, 0], results
    assert "step 4 skipped" in results[0][0].out and "loss scale halved to 4096" in results[0][0].out
    trainer = read_adapter(tmp_path / "run/checkpoints/iter_0000006").trainer
    assert (trainer["loss_scale"], trainer["good_steps"], trainer["optimizer_steps"]) == (4096.0, 2, 2)


def test_loss_scale():
    scale = LossScale(True, initial=4.0, growth_interval=2)
    assert (scale.update(False), scale.value) == (False, 4.0)
    assert (scale.update(False), scale.value) == (False, 8.0), "two good steps"
    assert (scale.update(False), scale.update(True), scale.value) == (False, True, 4.0)
    assert (scale.update(False), scale.value) == (False, 4.0), "an overflow starts the count again"
    assert [scale.update(True) for _ in range(3)] == [True, True, False] and scale.value == 1.0
    off = LossScale(False)
    assert (off.value, off.update(True), off.value) == (1.0, False, 1.0)


# ---- for callers of finetune()


def result_of(command: list[str]) -> tiny.program.FinetuneResult:
    with mock.patch.object(tiny.program, "choose_device", lambda: (torch.device("cpu"), None)):
        return tiny.program.finetune(parse_finetune(command))


def test_what_finetune_returns(inputs, tmp_path, capsys):
    run = tmp_path / "run"
    command = inputs.flags(run, eval_data_path=inputs.data, max_steps=3)
    first, again = result_of(command), result_of(command)
    checkpoint = run / "checkpoints/iter_0000003"
    assert first == tiny.program.FinetuneResult(
        output_dir=run,
        steps=3,
        loss=column(run, "loss")[-1],
        evaluation_loss=metrics(run, "eval_metrics.jsonl")[-1]["loss"],
        checkpoint=checkpoint,
        adapter=run / "peft",
        metrics=run / "metrics.jsonl",
    )
    assert again == replace(first, loss=None, evaluation_loss=None), "nothing was left to do"
    unsaved = result_of(inputs.flags(tmp_path / "other", max_steps=1, save=False))
    assert (unsaved.steps, unsaved.evaluation_loss, unsaved.checkpoint, unsaved.adapter) == (1, None, None, None)


# ---- output_dirs that are not the run's own


def test_nothing_of_other_programs_is_written_over(inputs, tmp_path):
    """In a folder that has one of a run's names already, or leads elsewhere by a link."""
    theirs = tmp_path / "theirs"
    (theirs / "runs").mkdir(parents=True)
    for name in ("metrics.jsonl", "runs/events.out.tfevents.1.host"):
        (theirs / name).write_text("theirs")
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "runs").symlink_to(theirs / "runs")
    locked = tmp_path / "locked"
    locked.mkdir()
    (locked / ".lock").symlink_to(theirs / "metrics.jsonl")
    commands = [
        inputs.flags(folder, max_steps=1, overwrite_output_dir=overwrite)
        for folder in (theirs, linked, locked)
        for overwrite in (False, True)
    ]
    for command, done in zip(commands, tiny.run(0, 1, commands), strict=True):
        line, _ = done.err.splitlines()
        assert done.status == 2 and done.out == "", done
        assert "of another program" in line or "is a symbolic link" in line, (command, line)
    files = {path.relative_to(theirs).as_posix(): path.read_text() for path in theirs.rglob("*") if path.is_file()}
    assert files == {"metrics.jsonl": "theirs", "runs/events.out.tfevents.1.host": "theirs"}
    assert len([*linked.iterdir(), *locked.iterdir()]) == 2


def test_a_damaged_line_of_metrics_does_not_stop_a_resume(inputs, tmp_path):
    run, command = tmp_path / "run", inputs.flags(tmp_path / "run", max_steps=4, save_steps=2, logging_steps=1)
    tune(1, command)
    shutil.rmtree(run / "checkpoints/iter_0000004")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([lines[0], '{"step": 1e999}\n', "[" * 200_000 + "\n", *lines[1:]]))
    (done,) = tune(1, command)
    assert f"{run / 'metrics.jsonl'}: damaged lines are left out: 2, 3" in done.out.replace("\n", "")
    assert column(run, "step") == [1, 2, 3, 4]
