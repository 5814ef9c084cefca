"""Files of strangers are read within bounds; ours are whole or as before, and never behind a link."""

import errno
import os

import pytest

from megalora import files
from megalora.errors import UserError
from megalora.files import aside_of, atomic_folder, open_own, read_json, write_file


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (b"[" * 200_000, "is not JSON .nested too deeply"),
        (b"[1]", "holds a list, not an object"),
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not JSON"),
    ],
)
def test_what_is_no_object_is_named(tmp_path, contents, words):
    (tmp_path / "a.json").write_bytes(contents)
    with pytest.raises(UserError, match=rf"a_flag .*a\.json: {words}.*: do this"):
        read_json(tmp_path / "a.json", "do this", what="a_flag")


def test_a_field_that_is_there_twice_is_refused(tmp_path):
    """json.loads takes the last and is silent; at any depth."""
    file = tmp_path / "a.json"
    for text in ('{"r": 8, "a": 1, "r": 16}', '{"a": [{"r": 8, "r": 8}]}'):
        file.write_text(text)
        with pytest.raises(UserError, match="a_flag .*a.json: an object has the field 'r' twice: keep one"):
            read_json(file, what="a_flag")


def test_a_json_file_is_refused_by_its_size(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"a": 1}' + " " * 92)
    assert read_json(file, most=100) == {"a": 1}
    with pytest.raises(UserError, match="a.json: is larger than 99 bytes"):
        read_json(file, most=99)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_only_regular_files_are_read(tmp_path, make):
    make(tmp_path / "a.json")
    with pytest.raises(UserError, match="a.json: is not a regular file"):
        read_json(tmp_path / "a.json")


def test_a_file_of_ours_is_opened_behind_no_link(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "ours").symlink_to(tmp_path / "theirs")
    with pytest.raises(UserError, match="ours: is a symbolic link"):
        open_own(tmp_path / "ours")
    (tmp_path / "new").symlink_to(tmp_path / "not there")
    with pytest.raises(UserError, match="new: is a symbolic link"):
        open_own(tmp_path / "new")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: is not a regular file"):
        open_own(tmp_path / "pipe")
    assert not (tmp_path / "not there").exists() and (tmp_path / "theirs").read_text() == "theirs"
    with open_own(tmp_path / "theirs") as file:
        file.write(" and ours\n")
    assert (tmp_path / "theirs").read_text() == "theirs and ours\n"


def test_a_written_file_replaces_links(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    for name in (tmp_path / "ours", aside_of(tmp_path / "ours")):
        name.symlink_to(tmp_path / "theirs")
    write_file(tmp_path / "ours", b"ours")
    assert (tmp_path / "theirs").read_text() == "theirs" and not (tmp_path / "ours").is_symlink()
    assert (tmp_path / "ours").read_text() == "ours"


def test_a_file_is_whole_or_as_before(tmp_path):
    file = tmp_path / "file"
    write_file(file, b"old")

    def half(stream):
        stream.write(b"ne")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_file(file, half)
    assert file.read_bytes() == b"old" and not aside_of(file).exists()
    write_file(file, lambda stream: stream.write(b"new"))
    assert [(child.name, child.read_bytes()) for child in tmp_path.iterdir()] == [("file", b"new")]


def test_a_folder_is_not_made_behind_a_link(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").touch()
    aside_of(tmp_path / "ours").symlink_to(tmp_path / "theirs")
    with pytest.raises(UserError, match="is a symbolic link"), atomic_folder(tmp_path / "ours"):
        pytest.fail("written behind it")
    assert (tmp_path / "theirs" / "file").exists()


def test_a_lock_that_is_held(tmp_path):
    with open_own(tmp_path / "a") as first, open_own(tmp_path / "a") as second:
        assert files.lock(first.fileno()) is None
        with pytest.raises(BlockingIOError):
            files.lock(second.fileno())
    with open_own(tmp_path / "a") as third:
        assert files.lock(third.fileno()) is None
