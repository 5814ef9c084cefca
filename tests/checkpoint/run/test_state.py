"""Checkpoints of a run: complete or not there at all; damage is found, named and passed over."""

import errno
import json
import os
import shutil
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from waiting import PATIENCE

from megalora.checkpoint.adapter.opening import open_adapter
from megalora.checkpoint.adapter.peft import write_peft
from megalora.checkpoint.adapter.shards import CONFIG_FILE, save_adapter
from megalora.checkpoint.layout import ADAPTER_FILE, Layout
from megalora.checkpoint.manifest import digest
from megalora.checkpoint.run.folder import MARKER, claim, remove_run
from megalora.checkpoint.run.state import CheckpointWriter, identity_difference, newest_sound, verified
from megalora.errors import UserError
from megalora.parallel.split import Split, shard_range

IDENTITY = {"model": "abc", "data": "def"}
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
A = "model.layers.0.self_attn.q_proj.lora_A.weight"
B = "model.layers.0.self_attn.q_proj.lora_B.weight"


def write_shard(step: int, tp: int = 1, tp_rank: int = 0):
    """A function for `save`: A is `step` everywhere, B is cut over tp."""

    def write(folder):
        split = Split.range((8, 2), 0, *shard_range(8, tp_rank, tp)) if tp > 1 else Split((8, 2))
        tensors = {A: torch.full((2, 4), float(step)), B: torch.full(split.local_shape, float(step))}
        splits = {A: Split((2, 4)), B: split}
        return save_adapter(folder, tensors, splits, Layout(tp, 1, tp_rank, 0), LORA, None, {"step": step})

    return write


def alone(output_dir, **options) -> CheckpointWriter:
    return CheckpointWriter(output_dir, writes=True, is_main=True, gather=lambda value: [value], **options)


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints at steps 10 and 20."""
    for step in (10, 20):
        alone(tmp_path).save(step, write_shard(step), IDENTITY)
    return tmp_path


class Ranks:
    """Ranks as threads, with a gather that waits for all of them."""

    def __init__(self, size: int):
        self.size, self.values = size, [None] * size
        self.barrier = threading.Barrier(size, timeout=PATIENCE)

    def gather(self, rank: int):
        def gather(value):
            self.values[rank] = value
            self.barrier.wait()
            values = list(self.values)
            self.barrier.wait()
            return values

        return gather

    def run(self, work) -> list:
        """work(rank, gather) on every rank; what each returned or raised."""
        results = [None] * self.size

        def call(rank):
            try:
                results[rank] = work(rank, self.gather(rank))
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=call, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def names(output_dir) -> set[str]:
    return {child.name for child in (output_dir / "checkpoints").iterdir()}


# ---- writing ----


def test_layout_on_disk(run):
    checkpoints = run / "checkpoints"
    assert names(run) == {"iter_0000010", "iter_0000020", "latest_checkpointed_iteration.txt"}
    assert int((checkpoints / "latest_checkpointed_iteration.txt").read_text()) == 20
    manifest = json.loads((checkpoints / "iter_0000020" / "manifest.json").read_text())
    assert manifest["step"] == 20 and manifest["identity"] == IDENTITY
    shard = "mp_rank_00_pp_rank_000"
    assert set(manifest["files"]) == {f"{shard}/{ADAPTER_FILE}", f"{shard}/{CONFIG_FILE}"}
    saved, complaints = newest_sound(run)
    assert (saved.step, saved.identity, complaints) == (20, IDENTITY, [])


def test_ranks_write_together_and_one_only_watches(tmp_path):
    def work(rank, gather):
        writer = CheckpointWriter(tmp_path, writes=rank < 2, is_main=rank == 0, gather=gather)
        return writer.save(5, write_shard(5, 2, rank), IDENTITY)

    final = tmp_path / "checkpoints" / "iter_0000005"
    assert Ranks(3).run(work) == [final] * 3
    assert {child.name for child in final.iterdir()} == {
        "manifest.json",
        "mp_rank_00_pp_rank_000",
        "mp_rank_01_pp_rank_000",
    }
    found = open_adapter(tmp_path)
    assert torch.equal(found.tensors[B], torch.full((8, 2), 5.0)) and found.trainer == {"step": 5}


@pytest.mark.parametrize("broken", [0, 1])
def test_an_error_of_one_rank_stops_all_and_leaves_the_run_as_it_was(run, broken):
    def full_disk(folder):
        write_shard(30, 2, broken)(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    def work(rank, gather):
        writer = CheckpointWriter(run, writes=True, is_main=rank == 0, gather=gather)
        writer.save(30, full_disk if rank == broken else write_shard(30, 2, rank), IDENTITY)

    for error in Ranks(2).run(work):
        assert isinstance(error, UserError) and "No space left" in str(error) and "iter_0000030" in str(error)
    assert names(run) == {"iter_0000010", "iter_0000020", "latest_checkpointed_iteration.txt"}
    assert newest_sound(run)[0].step == 20


def test_our_own_bugs_keep_their_type_and_hang_no_rank(run):
    def work(rank, gather):
        writer = CheckpointWriter(run, writes=True, is_main=rank == 0, gather=gather)
        writer.save(30, (lambda folder: 1 / 0) if rank else write_shard(30, 2, 0), IDENTITY)

    other, broken = Ranks(2).run(work)
    assert isinstance(other, UserError) and isinstance(broken, ZeroDivisionError)


def test_output_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="iter_0000001: cannot be written"):
        alone(tmp_path / "file").save(1, write_shard(1), IDENTITY)


@pytest.mark.parametrize("call", ["fsync", "replace", "rename"])
@pytest.mark.parametrize("when", range(8))
def test_a_failure_at_any_moment_of_the_end_leaves_a_sound_run(run, monkeypatch, call, when):
    real, count = getattr(os, call), iter(range(100))

    def fails(*args):
        if next(count) == when:
            raise OSError(errno.EIO, "Input/output error")
        return real(*args)

    monkeypatch.setattr(os, call, fails)
    try:
        alone(run).save(30, write_shard(30), IDENTITY)
    except UserError as error:
        assert "Input/output error" in str(error)
    monkeypatch.undo()
    saved, _ = newest_sound(run)
    assert saved.step in (20, 30) and not any(name.endswith(".tmp") for name in names(run))
    for folder in (run / "checkpoints").glob("iter_*"):
        verified(folder)


def test_a_stale_half_is_swept_and_a_damaged_one_replaced(run):
    (run / "checkpoints" / "iter_0000030.tmp" / "x").mkdir(parents=True)
    (run / "checkpoints" / "iter_0000020" / "manifest.json").write_text("")
    alone(run).save(20, write_shard(21), IDENTITY)
    assert names(run) == {"iter_0000010", "iter_0000020", "latest_checkpointed_iteration.txt"}
    assert open_adapter(run).trainer == {"step": 21}


def test_save_total_limit_keeps_the_newest(tmp_path):
    for step in range(1, 6):
        alone(tmp_path, save_total_limit=2).save(step, write_shard(step), IDENTITY)
    assert names(tmp_path) == {"iter_0000004", "iter_0000005", "latest_checkpointed_iteration.txt"}


def test_save_total_limit_deletes_nothing_for_a_checkpoint_that_failed(run):
    def fails(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError):
        alone(run, save_total_limit=1).save(30, fails, IDENTITY)
    assert newest_sound(run)[0].step == 20


def test_save_total_limit_never_deletes_what_was_just_written(run):
    """The run went back to step 10, beyond a damaged step 20, and saves step 15."""
    (run / "checkpoints" / "iter_0000020" / "manifest.json").write_text("")
    alone(run, save_total_limit=1).save(15, write_shard(15), IDENTITY)
    assert newest_sound(run)[0].step == 15


# ---- finding ----


def test_no_run_is_no_complaint(tmp_path):
    assert newest_sound(tmp_path) == (None, [])
    assert newest_sound(tmp_path / "absent") == (None, [])


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


SHARD = "mp_rank_00_pp_rank_000"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: flip(f / SHARD / ADAPTER_FILE), f"{SHARD}/{ADAPTER_FILE} is damaged"),
        (lambda f: flip(f / SHARD / CONFIG_FILE), f"{SHARD}/{CONFIG_FILE} is damaged"),
        (lambda f: flip(f / "manifest.json"), "manifest.json"),
        (lambda f: (f / SHARD / ADAPTER_FILE).write_bytes(b"x"), "has 1 bytes, not"),
        (lambda f: (f / SHARD / ADAPTER_FILE).unlink(), f"{ADAPTER_FILE} is missing"),
        (lambda f: shutil.rmtree(f / SHARD), "is missing"),
        (lambda f: (f / "manifest.json").unlink(), "was not finished"),
        (lambda f: (f / "manifest.json").write_text(""), "is not JSON"),
        (lambda f: (f / "manifest.json").write_text("{}"), "manifest.json is damaged"),
    ],
)
def test_damage_is_named_and_passed_over(run, damage, words):
    folder = run / "checkpoints" / "iter_0000020"
    damage(folder)
    saved, complaints = newest_sound(run)
    assert saved.step == 10
    assert words in complaints[0] and str(folder) in complaints[0], complaints
    assert "take an older one" not in complaints[0], "it is taken"
    assert "says '20', but step 10" in complaints[1]  # the tracker
    assert open_adapter(run).notes == tuple(complaints)
    with pytest.raises(UserError):
        open_adapter(folder)


def test_a_stale_tracker_is_named(run):
    tracker = run / "checkpoints" / "latest_checkpointed_iteration.txt"
    tracker.write_text("10")
    saved, complaints = newest_sound(run)
    assert saved.step == 20 and "says '10', but step 20" in complaints[0]
    tracker.unlink()
    saved, complaints = newest_sound(run)
    assert saved.step == 20 and "is missing" in complaints[0]


def test_a_renamed_checkpoint_is_not_another_step(run):
    (run / "checkpoints" / "iter_0000020").rename(run / "checkpoints" / "iter_0000099")
    saved, complaints = newest_sound(run)
    assert saved.step == 10 and "was written as step 20" in complaints[0]


def test_a_manifest_may_not_name_files_outside(run):
    manifest = run / "checkpoints" / "iter_0000020" / "manifest.json"
    body = json.loads(manifest.read_text())
    del body["sha256"]
    body["files"]["../iter_0000010/manifest.json"] = {"size": 1, "sha256": ""}
    manifest.write_text(json.dumps(body | {"sha256": digest(body)}))
    with pytest.raises(UserError, match="outside the folder"):
        verified(manifest.parent)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=st.sampled_from(["format", "step", "identity", "files"]), value=JUNK)
def test_any_manifest_gives_a_checkpoint_or_our_error(run, field, value):
    manifest = run / "checkpoints" / "iter_0000010" / "manifest.json"
    text = manifest.read_text()
    body = json.loads(text)
    del body["sha256"]
    body[field] = value
    body = json.loads(json.dumps(body))
    manifest.write_text(json.dumps(body | {"sha256": digest(body)}))
    try:
        verified(manifest.parent)
    except UserError:
        pass
    manifest.write_text(text)


def test_the_difference_of_two_runs_is_named():
    assert identity_difference(IDENTITY, dict(IDENTITY)) == ""
    assert identity_difference(IDENTITY, IDENTITY | {"data": "xyz"}) == "data: def there, xyz here"
    assert identity_difference(IDENTITY, IDENTITY | {"seed": "1"}) == "seed: (none) there, 1 here"


def test_remove_run_leaves_what_is_not_ours(run):
    claim(run)
    (run / "runs").mkdir()
    write_peft(run / "peft", open_adapter(run).tensors, LORA)
    for name in ("metrics.jsonl", "notes.txt", "runs/events.out.tfevents.1.host", "checkpoints/mine.txt"):
        (run / name).write_text("")
    (run / "checkpoints" / "iter_0000030.tmp").mkdir()
    remove_run(run)
    left = {str(p.relative_to(run)) for p in run.rglob("*")} - {MARKER}
    assert left == {"notes.txt", "checkpoints", "checkpoints/mine.txt"}
    (run / "checkpoints" / "mine.txt").unlink()
    remove_run(run)
    assert {p.name for p in run.iterdir()} == {"notes.txt", MARKER}
    remove_run(run / "absent")


# ---- open_adapter ----


def test_an_adapter_is_found_by_content(run, tmp_path):
    peft_folder = tmp_path / "peft"
    found = open_adapter(run)
    write_peft(peft_folder, found.tensors, LORA)
    (tmp_path / "loose").mkdir()
    shutil.copytree(run / "checkpoints" / "iter_0000010" / SHARD, tmp_path / "loose" / SHARD)
    for path, step in [
        (run, 20),
        (run / "checkpoints", 20),
        (run / "checkpoints" / "iter_0000010", 10),
        (tmp_path / "loose", 10),
        (peft_folder, 20),
    ]:
        assert torch.equal(open_adapter(path).tensors[A], torch.full((2, 4), float(step))), path


def test_no_adapter_says_what_was_looked_for(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        open_adapter(tmp_path / "absent")
    with pytest.raises(UserError, match=r"neither adapter_config.json .*mp_rank_XX.*iter_"):
        open_adapter(tmp_path)


def test_a_run_without_a_sound_checkpoint(run):
    for step in (10, 20):
        (run / "checkpoints" / f"iter_00000{step}" / "manifest.json").unlink()
    told = "no checkpoint of this run is sound.*iter_0000020.*iter_0000010"
    with pytest.raises(UserError, match=f"{told}.*: name another run"):
        open_adapter(run)
    (run / "peft").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (run / "peft" / name).write_text("{}")
    with pytest.raises(UserError, match=f"{told}.*: name its export, {run / 'peft'}"):
        open_adapter(run)
    with pytest.raises(UserError, match=f"safetensors: is a file of an adapter: name its folder, {run / 'peft'}"):
        open_adapter(run / "peft" / "adapter_model.safetensors")
