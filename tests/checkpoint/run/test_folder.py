"""What of an output_dir is a run's own: nothing else is written over or removed, and nothing behind a link."""

import errno
import json
import os

import pytest

from megalora.checkpoint.run import folder as run_folder
from megalora.checkpoint.run.folder import MARKER, check_own, claim, export_folder, remove_export, remove_run
from megalora.errors import UserError

FILES = (
    "metrics.jsonl",
    "eval_metrics.jsonl",
    "runs/events.out.tfevents.1.host",
    "peft/adapter_model.safetensors",
    "checkpoints/iter_0000010/model.pt",
    "checkpoints/latest_checkpointed_iteration.txt",
)


def write(folder, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("theirs")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("act", [check_own, remove_run, remove_export])
def test_what_another_program_wrote_is_refused(tmp_path, name, act):
    write(tmp_path, name)
    with pytest.raises(UserError, match=rf"holds {name.partition('/')[0]} of another program.*name another output_dir"):
        act(tmp_path)
    assert (tmp_path / name).read_text() == "theirs"


@pytest.mark.parametrize("name", [*(name.partition("/")[0] for name in FILES), "logs", "profile", MARKER])
@pytest.mark.parametrize("act", [check_own, remove_run, remove_export])
def test_a_link_is_refused(tmp_path, name, act):
    run, theirs = tmp_path / "run", tmp_path / "theirs"
    run.mkdir()
    claim(run)
    for file in FILES:
        write(theirs, file)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(theirs / name)
    with pytest.raises(UserError, match=f"{name}: is a symbolic link"):
        act(run)
    assert all((theirs / file).exists() for file in FILES)


def test_what_a_run_has_claimed_is_removed(tmp_path):
    check_own(tmp_path)
    claim(tmp_path)
    for name in FILES:
        write(tmp_path, name)
    (tmp_path / "notes.txt").touch()
    check_own(tmp_path)
    remove_run(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {MARKER, "notes.txt"}


def test_a_run_of_before_there_was_a_marker(tmp_path):
    for name in FILES:
        write(tmp_path, name)
    write(tmp_path, "checkpoints/iter_0000010/manifest.json")
    check_own(tmp_path)
    remove_run(tmp_path)
    assert not any(tmp_path.iterdir())


def test_an_empty_folder_holds_nothing_of_others(tmp_path):
    export_folder(tmp_path).mkdir()
    check_own(tmp_path)
    check_own(tmp_path / "not there")


def test_a_marker_that_says_nothing_gives_nothing(tmp_path):
    write(tmp_path, "metrics.jsonl")
    for value in ({}, {"owns": None}, {"owns": [1, ["metrics.jsonl"]]}):
        (tmp_path / MARKER).write_text(json.dumps(value))
        with pytest.raises(UserError, match="of another program"):
            check_own(tmp_path)


def test_a_marker_that_is_damaged(tmp_path):
    (tmp_path / MARKER).write_text("{")
    with pytest.raises(UserError, match="is not JSON.*: remove it: a run that has checkpoints goes on without"):
        check_own(tmp_path)


@pytest.mark.parametrize(("number", "remedy"), [(errno.ENOSPC, "free space"), (errno.EROFS, "make it writable")])
def test_an_output_dir_that_cannot_be_claimed(tmp_path, monkeypatch, number, remedy):
    def fails(file, data):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_folder, "write_file", fails)
    with pytest.raises(UserError, match=rf"cannot be written \(.*\): {remedy}, or name another"):
        claim(tmp_path)


def test_run_yaml_of_the_user_is_left_alone(tmp_path):
    (tmp_path / "run.yaml").write_text("mine: 1\n")
    check_own(tmp_path)
    assert "run.yaml is yours" in claim(tmp_path, "seed: 1\n")
    assert (tmp_path / "run.yaml").read_text() == "mine: 1\n"
    (tmp_path / "run.yaml").unlink()
    for flags in ("seed: 1\n", "seed: 2\n"):
        assert claim(tmp_path, flags) is None
        assert (tmp_path / "run.yaml").read_text() == flags
