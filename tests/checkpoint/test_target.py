"""The output of a conversion is there whole or not at all, and replaces nothing that it should not."""

import errno
import fcntl
import os
import shutil
from collections import namedtuple

import pytest

from megalora.checkpoint.target import TargetFolder, companions
from megalora.errors import UserError


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def model(folder, text="old"):
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(text)
    return folder


def refused(match, *args):
    with pytest.raises(UserError, match=match):
        TargetFolder(*args)


def test_it_appears_when_it_is_whole(tmp_path):
    target = TargetFolder(tmp_path / "a" / "b", False, [])
    with target.writing() as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
    assert tree(tmp_path) == ["a", "a/b", "a/b/sub", "a/b/sub/file"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, UserError("no")])
def test_a_failure_leaves_nothing(tmp_path, error):
    old = model(tmp_path / "old")
    for name, overwrite in (("old", True), ("new/er", False)):
        with pytest.raises((KeyboardInterrupt, ZeroDivisionError, UserError)):
            with TargetFolder(tmp_path / name, overwrite, []).writing() as folder:
                (folder / "file").write_text("x")
                raise error
    assert tree(tmp_path) == ["old", "old/model.safetensors"] and (old / "model.safetensors").read_text() == "old"


def test_a_full_disk_is_told(tmp_path):
    with pytest.raises(UserError, match="cannot be written .No space left.*free space"):
        with TargetFolder(tmp_path / "new", False, []).writing():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert tree(tmp_path) == []


def test_an_existing_target(tmp_path):
    old = model(tmp_path / "old")
    refused("exists: give --overwrite", old, False, [])
    with TargetFolder(old, True, []).writing() as folder:
        (folder / "config.json").write_text("new")
        assert (old / "model.safetensors").exists()  # the old one is there until the new one is whole
    assert tree(tmp_path) == ["old", "old/config.json"]
    (tmp_path / "empty").mkdir()
    TargetFolder(tmp_path / "empty", False, [])


def test_what_is_not_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").touch()
    refused("holds other things", tmp_path / "thesis", True, [])
    (tmp_path / "file").touch()
    refused("is a file", tmp_path / "file", True, [])
    (model(tmp_path / "run") / ".megalora.json").write_text("{}")
    refused("holds other things", tmp_path / "run", True, [])
    source = model(tmp_path / "models" / "one")
    (tmp_path / "link").symlink_to(source)
    for output in (source, source.parent, tmp_path / "link", source / ".." / "one"):
        refused("which is read", output, True, [source])
    refused("which is read", source, True, [tmp_path / "link"])
    TargetFolder(source / "shards", True, [source])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_place(tmp_path):
    tmp_path.chmod(0o500)
    refused("cannot be written in", tmp_path / "new", False, [])
    tmp_path.chmod(0o700)


def test_room(tmp_path, monkeypatch):
    target = TargetFolder(tmp_path / "not" / "yet" / "there", False, [])
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 0, 2 << 30))
    target.check_room(1 << 30)
    with pytest.raises(UserError, match="needs 2.21 GB, but 2.15 GB are free"):
        target.check_room(2 << 30)


def test_what_a_killed_process_left_is_cleared(tmp_path):
    aside = tmp_path / ".new.tmp"
    (aside / "mp_rank_00").mkdir(parents=True)
    (aside / "stale").touch()
    with TargetFolder(tmp_path / "new", False, []).writing() as folder:
        (folder / "file").touch()
    assert tree(tmp_path) == ["new", "new/file"]


def test_two_at_once(tmp_path):
    with TargetFolder(tmp_path / "new", False, []).writing() as folder:
        (folder / "file").touch()
        with pytest.raises(UserError, match="another process"):
            with TargetFolder(tmp_path / "new", False, []).writing():
                pytest.fail("both write")
        assert tree(tmp_path) == [".new.tmp", ".new.tmp/file"]
    assert tree(tmp_path) == ["new", "new/file"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(*args):
        raise OSError(errno.ENOTSUP, "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    with TargetFolder(tmp_path / "new", False, []).writing():
        pass
    assert tree(tmp_path) == ["new"]


def test_what_goes_along_with_the_weights(tmp_path):
    wanted = ["LICENSE", "config.json", "merges.txt", "tokenizer.json", "tokenizer.model"]
    wanted += ["additional_chat_templates/tools.jinja", "chat_template.jinja"]
    left = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]
    left += [".gitattributes", "original/consolidated.00.pth", "model.gguf", "mp_rank_00_pp_rank_000/layout.json"]
    for name in [*wanted, *left]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert sorted(companions(tmp_path)) == sorted(wanted)


def test_links_stay_inside(tmp_path):
    hub = tmp_path / "models--a--b"
    snapshot = hub / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    (hub / "blobs").mkdir()
    (hub / "blobs" / "ab12").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/ab12")
    assert companions(snapshot)["tokenizer.json"].read_text() == "{}"
    (snapshot / "vocab.json").symlink_to(tmp_path / "secret")
    (tmp_path / "secret").touch()
    with pytest.raises(UserError, match="vocab.json: is a link out of the folder"):
        companions(snapshot)
