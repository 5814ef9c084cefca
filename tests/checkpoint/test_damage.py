"""Any damage to any file of a run's checkpoints is found, named, and passed over; only errors of ours come out."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from fuzz import edited, examples, ours_only
from hypothesis import example, given
from hypothesis import strategies as st

from megalora.checkpoint.adapter.opening import open_adapter
from megalora.checkpoint.adapter.shards import CONFIG_FILE, read_adapter, save_adapter
from megalora.checkpoint.base.shards import LAYOUT_FILE, BaseShards, save_base_shards
from megalora.checkpoint.layout import ADAPTER_FILE, BASE_FILE, Layout
from megalora.checkpoint.manifest import MANIFEST, digest
from megalora.checkpoint.run.folder import TRACKER
from megalora.checkpoint.run.state import CheckpointWriter, newest_sound, verified
from megalora.errors import UserError
from megalora.parallel.split import Split, shard_range

NAME = "model.layers.0.self_attn.q_proj.lora_B.weight"
SHARDS = ("mp_rank_00_pp_rank_000", "mp_rank_01_pp_rank_000")
FILES = (MANIFEST, *(f"{shard}/{name}" for shard in SHARDS for name in (ADAPTER_FILE, CONFIG_FILE)))
COMMON = examples(120)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A run with checkpoints of two tp ranks at steps 10 and 20."""
    folder = tmp_path_factory.mktemp("sound")

    def write(aside: Path) -> Path:
        for rank in (1, 0):
            split = Split.range((8, 2), 0, *shard_range(8, rank, 2))
            tensors, layout = {NAME: torch.full((4, 2), float(step))}, Layout(2, 1, rank, 0)
            moments = {NAME: {"exp_avg": tensors[NAME]}}
            save_adapter(aside, tensors, {NAME: split}, layout, {"r": 2}, moments, {"step": step})
        return aside

    for step in (10, 20):
        CheckpointWriter(folder, writes=True, is_main=True, gather=lambda v: [v]).save(step, write, {"model": "abc"})
    return folder


@pytest.fixture
def run(sound, tmp_path) -> Path:
    return fresh(sound, tmp_path / "run")


def fresh(sound: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(sound, folder))


def newest(run: Path) -> Path:
    return run / "checkpoints/iter_0000020"


def assert_passed_over(run: Path, name: str) -> None:
    """Step 20 is damaged in the file `name`."""
    saved, complaints = newest_sound(run)
    assert saved.step == 10 and str(newest(run)) in complaints[0] and name in complaints[0], complaints
    assert TRACKER in complaints[1] and len(complaints) == 2
    assert torch.equal(open_adapter(run).tensors[NAME], torch.full((8, 2), 10.0))
    assert torch.equal(open_adapter(run / "checkpoints").tensors[NAME], torch.full((8, 2), 10.0))
    for read in (verified, open_adapter):
        with pytest.raises(UserError, match="iter_0000020"):
            read(newest(run))


@COMMON
@given(name=st.sampled_from(FILES), at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere(sound, tmp_path, name, at, bit):
    run = fresh(sound, tmp_path / "run")
    data = bytearray((newest(run) / name).read_bytes())
    data[int(at * len(data))] ^= 1 << bit
    (newest(run) / name).write_bytes(data)
    assert_passed_over(run, name)


def test_a_flipped_bit_at_every_place_of_the_manifest(run):
    file = newest(run) / MANIFEST
    whole = file.read_bytes()
    for at in range(len(whole)):
        data = bytearray(whole)
        data[at] ^= 1 << at % 8
        file.write_bytes(data)
        with pytest.raises(UserError, match=MANIFEST):
            verified(newest(run))


@COMMON
@given(name=st.sampled_from(FILES), length=st.floats(0, 1, exclude_max=True))
@example(name=MANIFEST, length=0.0)
@example(name=FILES[1], length=0.0)
def test_a_file_that_ends_early(sound, tmp_path, name, length):
    run = fresh(sound, tmp_path / "run")
    file = newest(run) / name
    file.write_bytes(file.read_bytes()[: int(length * file.stat().st_size)])
    assert_passed_over(run, name)


@pytest.mark.parametrize("name", [*FILES, *SHARDS])
@pytest.mark.parametrize("instead", ["nothing", "a folder", "a link to itself", "a longer file"])
def test_another_thing_in_its_place(run, name, instead):
    path = newest(run) / name
    longer = path.read_bytes() + b"\n" if path.is_file() else b"x"
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if instead == "a folder":
        path.mkdir()
    elif instead == "a link to itself":
        path.symlink_to(path)
    elif instead == "a longer file":
        path.write_bytes(longer)
        if name == MANIFEST:  # white space behind it says nothing else
            assert newest_sound(run)[0].step == 20
            return
    assert_passed_over(run, name)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_checkpoint(run, name):
    shutil.copy(run / "checkpoints/iter_0000010" / name, newest(run) / name)
    if name.endswith(CONFIG_FILE):  # all steps have the same
        assert newest_sound(run)[0].step == 20
    else:
        assert_passed_over(run, "step 10" if name == MANIFEST else name)


@COMMON
@given(data=st.binary(max_size=12) | st.sampled_from([b"20", b"20\n", b"10", b"99", b"\xff\xfe2\x000\x00", b"release"]))
def test_any_tracker(sound, tmp_path, data):
    """It is a hint: what is sound is taken, and a tracker that says something else is named."""
    run = fresh(sound, tmp_path / "run")
    (run / "checkpoints" / TRACKER).write_bytes(data)
    saved, complaints = newest_sound(run)
    assert saved.step == 20
    assert bool(complaints) == (data.strip() != b"20") and all(TRACKER in line for line in complaints)


def test_a_tracker_that_is_no_file(run):
    tracker = run / "checkpoints" / TRACKER
    tracker.unlink()
    tracker.mkdir()
    saved, (complaint,) = newest_sound(run)
    assert saved.step == 20 and TRACKER in complaint


# ---- files made up by somebody

@COMMON
@given(data=st.data())
def test_any_manifest(sound, tmp_path, data):
    run = fresh(sound, tmp_path / "run")
    file = newest(run) / MANIFEST
    body = data.draw(edited(json.loads(file.read_text())))
    file.write_text(json.dumps(body))
    if body != json.loads((newest(sound) / MANIFEST).read_text()):
        assert_passed_over(run, MANIFEST)
    if isinstance(body, dict):  # of somebody who makes its own sum right
        body.pop("sha256", None)
        file.write_text(json.dumps(body | {"sha256": digest(body)}))
        newest_sound(run)
        ours_only(lambda: verified(newest(run)))
    file.write_bytes(data.draw(st.binary(max_size=40)))
    assert_passed_over(run, MANIFEST)


@COMMON
@given(data=st.data())
def test_any_layout_of_base_shards(tmp_path, data):
    folder = tmp_path / "base"
    if not folder.exists():
        for rank in (0, 1):
            module = torch.nn.Module()
            module.w = torch.nn.Parameter(torch.ones(4, 2))
            split = Split.range((8, 2), 0, *shard_range(8, rank, 2))
            save_base_shards(folder, module, {"w": split}, Layout(2, 1, rank, 0))
    file = folder / SHARDS[1] / LAYOUT_FILE
    good = file.read_text()
    file.write_text(json.dumps(data.draw(edited(json.loads(good)))))
    ours_only(lambda: BaseShards(folder, {"w": (8, 2)}).copy("w", (slice(0, 8), slice(0, 2)), torch.empty(8, 2)))
    file.write_text(good)


@COMMON
@given(at=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=6), new=st.binary(min_size=6, max_size=6))
def test_any_bytes_in_a_shard(sound, tmp_path, at, new):
    """Without a manifest, as somebody may copy shards: torch's container has no sums that are looked at."""
    folder = tmp_path / "loose"
    if not folder.exists():
        shutil.copytree(newest(sound), folder)
        (folder / MANIFEST).unlink()
    file = folder / SHARDS[0] / ADAPTER_FILE
    data = bytearray((newest(sound) / SHARDS[0] / ADAPTER_FILE).read_bytes())
    for place, byte in zip(at, new, strict=False):
        data[int(place * len(data))] = byte
    file.write_bytes(data)
    ours_only(lambda: read_adapter(folder))
    file.write_bytes(bytes(data[: int(at[0] * len(data))]))
    assert not ours_only(lambda: read_adapter(folder))


@pytest.mark.parametrize("value", [1, [], {"w": 1}, {1: torch.ones(1)}, {"w": [torch.ones(4)]}, {"w": torch.ones(3)}])
def test_base_shards_of_something_else(tmp_path, value):
    (tmp_path / SHARDS[0]).mkdir()
    torch.save(value, tmp_path / SHARDS[0] / BASE_FILE)
    assert not ours_only(lambda: BaseShards(tmp_path, {"w": (8, 2)}))
