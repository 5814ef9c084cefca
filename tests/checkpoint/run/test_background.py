"""Saves in a thread: of the state at their start, one at a time, and no error is lost."""

import threading

import pytest
import torch

from megalora.checkpoint.adapter.shards import read_adapter, save_adapter
from megalora.checkpoint.layout import Layout
from megalora.checkpoint.run.background import BackgroundSaves, HostCopy
from megalora.checkpoint.run.state import CheckpointWriter, newest_sound
from megalora.errors import UserError
from megalora.parallel.split import Split

NAME = "model.layers.0.self_attn.q_proj.lora_A.weight"


def saves_of(output_dir, gather=lambda value: [value], **options) -> BackgroundSaves:
    return BackgroundSaves(CheckpointWriter(output_dir, writes=True, is_main=True, gather=gather, **options))


def snapshot_of(tensor: torch.Tensor, copies: HostCopy, before=lambda: None):
    """A `snapshot` for BackgroundSaves.start; the thread calls `before` before it writes."""

    def snapshot():
        copies.start()
        tensors = copies.take({NAME: tensor})

        def write(folder):
            before()
            copies.wait()
            return save_adapter(folder, tensors, {NAME: Split(tensor.shape)}, Layout(), {"r": 2})

        return write

    return snapshot


def test_what_is_saved_is_the_state_at_the_start_and_nobody_waits_for_it(tmp_path):
    tensor, copies, disk = torch.ones(2, 4), HostCopy(), threading.Event()
    saves = saves_of(tmp_path)
    folder = saves.start(3, snapshot_of(tensor, copies, disk.wait), {})
    tensor.fill_(7.0)
    assert not folder.exists() and newest_sound(tmp_path)[0] is None and saves.finished() == []
    disk.set()
    saves.wait()
    assert newest_sound(tmp_path)[0].folder == folder == tmp_path / "checkpoints/iter_0000003"
    assert torch.equal(read_adapter(folder).tensors[NAME], torch.ones(2, 4))
    (report,) = saves.finished()
    assert (report.step, report.folder) == (3, folder) and 0 <= report.stalled <= report.total
    assert saves.finished() == []


def test_leaving_waits_for_the_save_under_way(tmp_path):
    disk = threading.Event()
    threading.Timer(0.2, disk.set).start()
    with saves_of(tmp_path) as saves:
        saves.start(1, snapshot_of(torch.ones(2), HostCopy(), disk.wait), {})
    assert newest_sound(tmp_path)[0].step == 1
    disk.clear()
    threading.Timer(0.2, disk.set).start()
    with pytest.raises(KeyError), saves_of(tmp_path) as saves:
        saves.start(2, snapshot_of(torch.ones(2), HostCopy(), disk.wait), {})
        raise KeyError("an error of the training")
    assert newest_sound(tmp_path)[0].step == 2


def test_an_error_is_raised_once_and_the_next_save_goes_on(tmp_path):
    def full():
        raise OSError(28, "No space left on device")

    saves = saves_of(tmp_path)
    saves.start(1, snapshot_of(torch.ones(2), HostCopy(), full), {})
    saves._thread.join()
    assert saves.failed
    with pytest.raises(UserError, match="iter_0000001: cannot be written .No space left"):
        saves.wait()
    assert not saves.failed and saves.finished() == []
    saves.start(2, snapshot_of(torch.ones(2), HostCopy()), {})
    saves.wait()
    assert newest_sound(tmp_path)[0].step == 2


def test_a_rank_that_has_gone_is_an_error_of_ours(tmp_path):
    def gone(value):
        raise RuntimeError("Connection closed by peer [127.0.0.1]:4242")

    with pytest.raises(UserError, match="iter_0000001: not finished, because another rank has left"), \
            saves_of(tmp_path, gather=gone) as saves:  # fmt: skip
        saves.start(1, snapshot_of(torch.ones(2), HostCopy()), {})
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_copies_use_their_memory_again():
    source = {"a": torch.ones(3), "b": torch.ones(3), "c": torch.ones(2, dtype=torch.float64)}
    copies = HostCopy([*source.values()])
    copies.start()
    first = copies.take(source)
    assert all(torch.equal(first[name], source[name]) for name in source)
    memory = {copy.data_ptr() for copy in first.values()}
    assert len(memory) == 3 and not memory & {tensor.data_ptr() for tensor in source.values()}
    copies.start()
    second = copies.take(source)
    assert {copy.data_ptr() for copy in second.values()} == memory
    third = copies.take(source)  # of the same round: others
    assert not {copy.data_ptr() for copy in third.values()} & memory


@pytest.mark.gpu
def test_copies_from_a_gpu():
    tensor = torch.ones(1 << 22, device="cuda")
    copies = HostCopy([tensor])
    copies.start()
    taken = copies.take({"a": tensor})["a"]
    tensor.zero_()  # the stream's later work does not reach the copy
    copies.wait()
    assert taken.is_pinned() and taken.eq(1).all() and tensor.eq(0).all()
