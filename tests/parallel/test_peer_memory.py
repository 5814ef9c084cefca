"""Who has an Exchange over the memory of GPUs, and that its streams keep their order."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from shared_memory import SharedMemory
from spawn import spawn

from megalora.errors import UserError
from megalora.parallel import peer_memory
from megalora.parallel.exchange import Exchange
from megalora.parallel.mesh import Axis, ParallelMesh, build_mesh
from megalora.parallel.peer_memory import choose_exchange

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
TWO = ParallelMesh(tp=Axis(0, (0, 1)))


def test_nobody_without_neighbours_or_without_a_cut_of_the_tokens():
    assert choose_exchange(None, ParallelMesh(), True, GPU, 8) == (None, None)
    assert choose_exchange(None, TWO, False, CPU, 8) == (None, None)
    assert choose_exchange(False, ParallelMesh(), False, GPU, 8) == (None, None)
    assert choose_exchange(False, TWO, True, GPU, 8) == (None, "tensor-parallel messages wait: as asked")
    _, note = choose_exchange(None, TWO, False, GPU, 8)
    assert "without --sequence_parallel true" in note
    for mesh, cut, device, why in (
        (ParallelMesh(), True, GPU, "tensor_parallel_size is 1"),
        (TWO, False, GPU, "without --sequence_parallel true"),
        (TWO, True, CPU, "there is no GPU"),
    ):
        with pytest.raises(UserError, match=f"tp_comm_overlap = true, but {why}.*leave the flag out"):
            choose_exchange(True, mesh, cut, device, 8)


def choices(rank: int, n: int, places: list, environment: dict) -> list:
    """What this rank of two tensor-parallel groups is told, without the flag and with it. places: (host, GPU, whether
    it reaches the others' memory, whether with atomics, error of its memory, error of mapping it) of each rank."""
    host, index, reaches, atomics, error, map_error = places[rank]
    socket.gethostname = lambda: host
    torch.cuda.can_device_access_peer = lambda device, other: reaches
    peer_memory._has_atomics = lambda device, other: atomics
    os.environ.update({"TMPDIR": "/tmp"} | environment)

    class Memory:
        def __init__(self, axis, device, nbytes):
            if error is not None:
                raise error

        def map(self):
            if map_error is not None:
                raise map_error

    peer_memory.PeerMemory = Memory
    mesh, told = build_mesh(rank, n, tp=2), []
    for wanted in (None, True):
        try:
            exchange, note = choose_exchange(wanted, mesh, True, torch.device("cuda", index), 1 << 20)
            told.append((type(exchange).__name__, note))
        except UserError as raised:
            told.append(str(raised))
        dist.barrier()  # nobody is left waiting
    return told


FINE = (True, True, None, None)
TOGETHER = [("a", 0, *FINE), ("a", 1, *FINE), ("b", 0, *FINE), ("b", 1, *FINE)]
OUT_OF_MEMORY = torch.OutOfMemoryError("out of memory\nmore")


def test_groups_that_reach_each_other_have_one():
    told = spawn(choices, 4, TOGETHER, {})
    assert told == [[("Exchange", None)] * 2] * 4


@pytest.mark.parametrize(
    "rank, place, environment, why",
    [
        (3, ("c", 1, *FINE), {}, "ranks 2 to 3 are in several hosts"),
        (3, ("b", 0, *FINE), {}, "CUDA_VISIBLE_DEVICES"),
        (1, ("a", 1, False, True, None, None), {}, "GPU 1 does not reach the memory of GPU 0"),
        (1, ("a", 1, True, True, OUT_OF_MEMORY, None), {}, "1 MiB that GPUs share"),
        (2, ("b", 0, True, True, None, RuntimeError("no fd")), {}, "could not map each other's memory (no fd)"),
        (0, TOGETHER[0], {"TMPDIR": "/long/" * 20}, "is longer than 80 characters"),
        (0, TOGETHER[0], {"NCCL_P2P_DISABLE": "1"}, "NCCL_P2P_DISABLE = 1"),
        (0, TOGETHER[0], {"TORCH_SYMMMEM": "NVSHMEM"}, "TORCH_SYMMMEM = NVSHMEM"),
    ],
)
def test_where_one_group_cannot_no_rank_has_one(rank, place, environment, why):
    told = spawn(choices, 4, [*TOGETHER[:rank], place, *TOGETHER[rank + 1 :]], environment)
    assert told == [told[0]] * 4
    (name, note), error = told[0]
    assert name == "NoneType" and note.startswith("tensor-parallel messages wait: ") and why in note
    assert error.startswith("tp_comm_overlap = true, but ") and why in error and error.endswith("leave the flag out")


def test_without_atomics_the_flag_is_needed():
    told = spawn(choices, 4, [*TOGETHER[:3], ("b", 1, True, False, None, None)], {})
    assert told == [told[0]] * 4
    assert "atomics of GPU 1 do not work in the memory of GPU 0" in told[0][0][1] and told[0][1] == ("Exchange", None)


def test_a_machine_without_a_driver_has_no_atomics(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(peer_memory.ctypes, "CDLL", missing)
    assert not peer_memory._has_atomics(0, 1)


def over_a_fake(rank: int, n: int) -> None:
    """PeerMemory on CPUs: torch's symmetric memory and streams are replaced by memory of the host and nothing."""
    from torch.distributed import _symmetric_memory as symmetric

    axis = build_mesh(rank, n, tp=n).tp
    shared = SharedMemory(axis)

    class Handle:
        barrier = staticmethod(shared.meet)

        def get_buffer(self, of: int, sizes: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            assert dtype == torch.uint8
            return shared.memory(sizes[0])[of]

    class Stream:
        def __init__(self, device):
            self.waited = 0

        def wait_stream(self, other):
            self.waited += 1

    def rendezvous(own: torch.Tensor, group: str) -> Handle:
        assert own.dtype == torch.uint8 and group == axis.group.group_name
        return Handle()

    symmetric.empty = lambda nbytes, dtype, device: torch.empty(nbytes, dtype=dtype)
    symmetric.rendezvous = rendezvous
    main = Stream(None)
    torch.cuda.Stream, torch.cuda.current_stream = Stream, lambda device: main
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    link = peer_memory.PeerMemory(axis, CPU, 4 * 6 * 8 * n)
    link.map()
    assert os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == "1"
    exchange, matrix = Exchange(axis, link), torch.ones(8, 5)

    def product(rows, out=None):
        return torch.mm(rows, matrix, out=out)

    y, full = exchange.gather(torch.full((6, 8), float(rank)), product, 5, 0)
    assert full[:, 0].tolist() == [float(r) for r in range(n) for _ in range(6)] and torch.equal(y, full @ matrix)
    full = full.clone()  # it lies where the next one writes to
    assert exchange.scatter(full, product, 5).eq(n * 8 * rank).all()
    assert main.waited == 2 and link._side.waited == 1 + len(exchange._blocks())
    with pytest.raises(AssertionError):
        link.memory(4 * 6 * 8 * n + 1)


@pytest.mark.parametrize("n", [2, 3])
def test_its_parts_fit_together(n):
    spawn(over_a_fake, n)


# ---- on two GPUs

TOKENS, WIDTH, OUT = 1024, 512, 768


def in_order(rank: int, results: str) -> None:
    """Gathers and scatters whose copies, products or reads are late in turn on one rank or the other."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=f"file://{results}/store", rank=rank, world_size=2, device_id=device)
    axis = Axis(rank, (0, 1), dist.new_group([0, 1]))
    link = peer_memory.PeerMemory(axis, device, 4 * 2 * TOKENS * max(WIDTH, OUT))
    link.map()
    exchange, late = Exchange(axis, link), {"copies": False, "product": False}
    beside = link.beside

    def slow_copies():
        context = beside()

        class Late:
            def __enter__(self):
                context.__enter__()
                if late["copies"]:
                    torch.cuda._sleep(20_000_000)

            def __exit__(self, *error):
                return context.__exit__(*error)

        return Late()

    link.beside = slow_copies
    matrix = torch.randn(WIDTH, OUT, device=device, generator=torch.Generator(device).manual_seed(9))

    def product(rows, out=None):
        if late["product"]:
            torch.cuda._sleep(20_000_000)
        return torch.mm(rows, matrix[: rows.shape[1]], out=out)

    for number in range(12):
        late["copies"], late["product"] = number % 4 == 2 * rank, number % 4 == 2 * rank + 1
        whole = torch.randn(2 * TOKENS, WIDTH, device=device, generator=torch.Generator(device).manual_seed(number))
        mine = whole[rank * TOKENS :][:TOKENS].clone()
        y, full = exchange.gather(mine, product, OUT, 0)
        assert torch.equal(full, whole), number
        torch.testing.assert_close(y, whole @ matrix, rtol=1e-4, atol=1e-3)
        summed = exchange.scatter(whole * (rank + 1), product, OUT)
        torch.testing.assert_close(summed, 3 * mine @ matrix, rtol=1e-4, atol=1e-3)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than 2 CUDA devices here")
def test_late_copies_and_late_readers(tmp_path):
    here = Path(__file__).resolve().parent
    environment = {"NCCL_NVLS_ENABLE": "0"} | dict(os.environ) | {"PYTHONPATH": f"{here.parents[1]}:{here.parent}"}
    command = [sys.executable, __file__, str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(2)]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()


if __name__ == "__main__":
    in_order(int(sys.argv[2]), sys.argv[1])
