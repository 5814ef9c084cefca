"""One run at a time in an output_dir: who is kept out and told what, and that a lock outlives nobody."""

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest

from megalora import files
from megalora.checkpoint.run.folder import MARKER, claim, remove_run
from megalora.cluster.lock import LOCK, RunLock
from megalora.cluster.watch import host_name
from megalora.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def refused(folder: Path, wait: float = 0.0) -> str:
    """The line that a second run gets."""
    with RunLock(folder) as second, pytest.raises(UserError) as error:
        second.take(wait)
    return str(error.value)


def test_the_second_is_told_who_is_there_and_what_to_do(tmp_path):
    run = tmp_path / "deep/run"
    with RunLock(run) as lock:
        assert lock.take(0.0) is None
        for _ in range(2):  # a refusal changes nothing
            line = refused(run)
            assert line.startswith(f"output_dir {run}: another run is under way in it (process {os.getpid()} on ")
            assert f" on {host_name()}, since 20" in line
            assert line.endswith("): wait for it or end it, or name another output_dir")
        with RunLock(tmp_path / "deep/other") as other:
            assert other.take(0.0) is None
    assert list(tmp_path.iterdir()) == [], "a run that wrote nothing leaves no trace"
    with RunLock(run) as lock:
        assert lock.take(0.0) is None


def test_what_lies_beside_the_lock_stays(tmp_path):
    with RunLock(tmp_path / "run") as lock:
        lock.take(0.0)
        claim(tmp_path / "run")
        (tmp_path / "run/metrics.jsonl").write_text("")
        remove_run(tmp_path / "run")
        (tmp_path / "run" / MARKER).unlink()
        refused(tmp_path / "run")
        (tmp_path / "run/notes.txt").write_text("")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    with RunLock(tmp_path / "empty") as lock:
        lock.take(0.0)
    assert list((tmp_path / "empty").iterdir()) == [], "the folder is the user's own"


def test_one_that_is_ending_is_waited_for(tmp_path):
    with RunLock(tmp_path) as first, RunLock(tmp_path) as second:
        first.take(0.0)
        ending = threading.Timer(0.3, first.__exit__)
        ending.start()
        assert second.take(60.0) is None
        ending.join()
        refused(tmp_path)


HOLDER = """
import subprocess, sys, time
from megalora.cluster.lock import RunLock

with RunLock(sys.argv[1]) as lock:
    lock.take(0.0)
    child = subprocess.Popen(["sleep", "60"], close_fds=False)
    print(child.pid, flush=True)
    time.sleep(60)
"""


def test_a_killed_process_lets_go_though_a_child_of_it_lives_on(tmp_path):
    command, path = [sys.executable, "-c", HOLDER, str(tmp_path)], {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | path) as one:
        child = int(one.stdout.readline())
        try:
            assert f"(process {one.pid} on " in refused(tmp_path)
            one.kill()
            one.wait()
            assert (tmp_path / LOCK).exists()
            with RunLock(tmp_path) as lock:
                assert lock.take(1.0) is None
                assert f"(process {os.getpid()} on " in refused(tmp_path), "not what the dead one wrote"
        finally:
            one.kill()
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_stops_no_run(tmp_path, number):
    missing = OSError(number, os.strerror(number))
    with mock.patch.object(fcntl, "flock", side_effect=missing), RunLock(tmp_path / "run") as lock:
        note = lock.take(0.0)
    assert f"output_dir {tmp_path / 'run'} cannot be locked ({os.strerror(number)}): a second run" in note
    assert list(tmp_path.iterdir()) == []
    with RunLock(tmp_path / "run") as elsewhere:  # a node that has them, on the same file system
        elsewhere.take(0.0)
        with mock.patch.object(fcntl, "flock", side_effect=missing), RunLock(tmp_path / "run") as lock:
            assert lock.take(0.0) is not None
        refused(tmp_path / "run")


def test_a_platform_without_locks_stops_no_run(tmp_path):
    with mock.patch.object(files, "fcntl", None), RunLock(tmp_path / "run") as lock:
        assert "cannot be locked (this system has no flock)" in lock.take(0.0)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_removed_as_it_is_taken_is_none(tmp_path):
    """The run before ends between the opening and the locking: a third one would lock a new file of that name."""
    flock, calls = fcntl.flock, []

    def removed(file: object, how: int) -> None:
        calls.append(how)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()
        flock(file, how)

    with RunLock(tmp_path) as lock:
        with mock.patch.object(fcntl, "flock", removed):
            assert lock.take(60.0) is None
        assert len(calls) == 2
        refused(tmp_path)


def test_a_file_system_that_does_not_know_its_files_again_stops_no_run(tmp_path):
    with mock.patch("os.path.samestat", return_value=False), RunLock(tmp_path) as lock:
        assert "cannot be locked (its name does not lead to the file" in lock.take(0.0)


def test_a_folder_that_is_removed_as_the_lock_is_made_is_made_again(tmp_path):
    """The run before failed at its start."""
    opened, calls = files.open_own, []

    def gone(path: Path) -> object:
        calls.append(path)
        if len(calls) == 1:
            path.parent.rmdir()
        return opened(path)

    with RunLock(tmp_path / "run") as lock:
        with mock.patch.object(files, "open_own", gone):
            assert lock.take(0.0) is None
        refused(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_another_is_not_removed(tmp_path):
    """Who clears the folder of a run that is under way lets a second one in; it keeps its own lock."""
    with contextlib.ExitStack() as first, RunLock(tmp_path) as second:
        first.enter_context(RunLock(tmp_path)).take(0.0)
        (tmp_path / LOCK).unlink()
        second.take(0.0)
        first.close()
        refused(tmp_path)


def test_a_full_disk_costs_the_name_of_the_holder(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    with RunLock(tmp_path) as lock:
        with mock.patch.object(os, "write", side_effect=full):
            assert lock.take(0.0) is None
        assert "under way in it (no name given): wait" in refused(tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    line = refused(tmp_path / "file/run")
    assert line.startswith(f"output_dir {tmp_path / 'file/run'}: cannot be written (Not a directory): make it writable")
    with mock.patch.object(files, "open_own", side_effect=OSError(errno.EROFS, "Read-only file system")):
        with RunLock(tmp_path) as lock:
            assert "cannot be locked (a read-only file system)" in lock.take(0.0)


def test_a_lock_is_not_taken_behind_a_link(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / LOCK).symlink_to(tmp_path / "theirs")
    assert "is a symbolic link" in refused(tmp_path)
    assert (tmp_path / "theirs").read_text() == "theirs" and (tmp_path / LOCK).is_symlink()


def test_the_lock_of_another_program_is_not_emptied(tmp_path):
    (tmp_path / LOCK).write_text("theirs")
    assert "was written by another program: remove it, or name another output_dir" in refused(tmp_path)
    assert (tmp_path / LOCK).read_text() == "theirs"
