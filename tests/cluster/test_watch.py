"""Position, the threads of a watch between real processes, and the name that a start agrees on."""

import os
import time
from unittest import mock

import pytest
import torch.distributed as dist
from spawn import spawn
from waiting import PATIENCE

from megalora.cluster.launch import agree_on_name, tp_crossing
from megalora.cluster.watch import Position, Watch
from megalora.parallel.collectives import broadcast_object
from megalora.parallel.mesh import Axis


def test_position():
    position = Position()
    assert str(position) == "start-up"
    position.enter("checkpoint")
    assert str(position) == "start-up, checkpoint"
    position.leave()
    position.step(6)
    for _ in range(2):
        position.enter("forward")
        position.leave()
    position.enter("forward")
    position.enter("communication")
    assert str(position) == "step 7, communication in forward 3"
    before = position.progress
    position.leave()
    assert str(position) == "step 7, forward 3" and position.progress > before


def watched(rank, world_size, what):
    """What this rank's watch says while rank 1 does `what`."""
    said: list[object] = []
    world = Axis(rank, tuple(range(world_size)), dist.group.WORLD)
    watch = Watch(heartbeat_timeout=5, hang_timeout=1 if what == "hangs" else 0)
    left = mock.patch("os._exit", lambda status: said.append(status))
    with left, mock.patch.object(watch, "_say", said.append), mock.patch("megalora.cluster.watch._GRACE", 0.1):
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if rank == 0 else None
        port = broadcast_object(server and server.port, world)
        watch.begin(dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False), world)
        watch.step(4)
        with watch("forward"):
            if rank == 1 and what == "fails":
                watch.explain(ValueError("no such thing\nat all"))
            elif rank == 1 and what == "leaves":
                watch.done()
            deadline = time.monotonic() + (3 if what == "leaves" else PATIENCE)
            while not said and rank != 1 and time.monotonic() < deadline:
                time.sleep(0.05)
        dist.barrier()
        watch.end(in_order=True)
    return [text for text in said if isinstance(text, str)]


@pytest.mark.parametrize(
    "what, says",
    [
        ("fails", "failed in step 5, forward 1: ValueError: no such thing"),
        ("leaves", None),
        ("hangs", "no progress for"),
    ],
)
def test_what_the_others_hear(what, says):
    first, _ = spawn(watched, 2, what)
    assert (says is None) == (first == []), first
    assert says is None or says in first[0], first


def agreed(rank, world_size, port):
    """Three starts on one store, of which the second finds rank 1's word of a start that never came about."""
    store = dist.TCPStore("127.0.0.1", port[0], is_master=False, wait_for_workers=False)
    names = []
    for start in range(3):
        if start == 1 and rank == 1:
            store.set("megalora/asks/1", "a rank that has died since")
        dist.barrier()
        names.append(agree_on_name(store, rank, world_size))
        dist.barrier()
    return names


def test_every_start_has_a_name_of_its_own():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    names = spawn(agreed, 3, [server.port])
    assert names[0] == names[1] == names[2] and len(set(names[0])) == 3


def test_tensor_parallelism_across_hosts_is_named():
    assert tp_crossing(4, 2, 1, ["a", "a", "b", "b"], 1.0) is None
    text = tp_crossing(4, 4, 1, ["a", "a", "b", "b"], 12.3)
    assert "crosses hosts (a and b)" in text and "12.3 MB" in text and "a host's 2 ranks" in text
    assert tp_crossing(4, 2, 1, ["a", "a", "a", "b"], 1.0) is not None, "three tasks on one node, one on the other"


def test_this_process_is_found_where_there_is_proc():
    from megalora.cluster.watch import _state, _this_process

    if not os.path.exists("/proc/self/stat"):
        pytest.skip("no /proc here")
    me = _this_process(0)
    assert _state(me) in "RS"
    assert _state(type(me)(0, me.host, me.pid, "1")) == "gone", "another process of the same number"
