"""Products whose tokens travel meanwhile, against the collectives around whole products."""

import pytest
import torch
from oracle import Run, largest_difference, reference, train
from shared_memory import SharedMemory
from spawn import spawn

from megalora.parallel.exchange import Exchange, gather_product, product_scatter
from megalora.parallel.mesh import build_mesh


class Watched(SharedMemory):
    """Notes the order of events."""

    def __init__(self, axis):
        super().__init__(axis)
        self.events = []

    def meet(self):
        super().meet()
        self.events.append("meet")

    def join(self):
        self.events.append("join")


def both_ways(rank: int, n: int) -> None:
    axis = build_mesh(rank, n, tp=n).tp
    link = Watched(axis)
    exchange = Exchange(axis, link)
    generator = torch.Generator().manual_seed(rank)
    matrix = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(99))

    def product(rows, out=None):
        link.events.append(len(rows))
        result = rows @ matrix.t()
        return result if out is None else out.copy_(result)

    for tokens in (3, 5, 2):  # more than before, and fewer
        x = torch.randn(tokens, 6, dtype=torch.float64, generator=generator)
        for kept in (0, 4, 6):
            wanted, wanted_full = gather_product(x, product, 7, axis, None)
            link.events.clear()
            ours, full = gather_product(x, product, 7, axis, exchange, kept=kept)
            torch.testing.assert_close(ours, wanted, rtol=1e-13, atol=1e-13)  # CPUs sum other rows in other orders
            own = full.unflatten(0, (n, -1))[rank]
            assert torch.equal(own[:, kept:], x[:, kept:])
            own.copy_(x)
            assert torch.equal(full, wanted_full)
            # Own rows before anybody is waited for, and after the copies those of the others.
            events = link.events[link.events.index(tokens) - 1 :]  # new memory is met for too
            assert events[:4] == ["meet", tokens, "join", "meet"] and sum(events[4:]) == (n - 1) * tokens
        x = torch.randn(n * tokens, 6, dtype=torch.float64, generator=generator)
        wanted = product_scatter(x, product, 7, axis, None)
        link.events.clear()
        ours = product_scatter(x, product, 7, axis, exchange)
        assert (ours - wanted).abs().max() <= 1e-13
        assert link.events[-3:] == [tokens, "join", "meet"]  # own rows last, while the others' terms are on their way
        kept_result = ours.clone()
        product_scatter(torch.ones_like(x), product, 7, axis, exchange)
        assert torch.equal(ours, kept_result), "a result lies in memory that others write to"


@pytest.mark.parametrize("n", [2, 3, 4])
def test_as_the_collectives(n):
    spawn(both_ways, n)


def sums_in_one_order(rank: int, n: int) -> torch.Tensor:
    """Every rank gives the same terms for all: the sums must be equal to the bit on all of them."""
    axis = build_mesh(rank, n, tp=n).tp
    x = torch.randn(1, 8, generator=torch.Generator().manual_seed(rank)).repeat(n, 1)
    exchange = Exchange(axis, SharedMemory(axis))
    return product_scatter(x, lambda rows, out: rows if out is None else out.copy_(rows), 8, axis, exchange)


def test_sums_are_in_rank_order():
    results = spawn(sums_in_one_order, 4)
    assert all(torch.equal(result, results[0]) for result in results)


LAYOUTS = [
    ("llama", 2, 1, 1, "none"),
    ("qwen2", 4, 1, 1, "full"),
    ("qwen3", 2, 2, 1, "none"),
    ("llama", 2, 2, 1, "full"),
    ("mistral", 2, 1, 2, "full"),
    ("llama", 8, 1, 1, "none"),
]


@pytest.mark.parametrize("family, tp, pp, dp, recompute", LAYOUTS)
def test_a_run_gives_the_numbers_of_one_process(family, tp, pp, dp, recompute):
    run = Run(family, tp, pp, sequence_parallel=True, exchange=True, recompute=recompute)
    run = run.short(tp * pp * dp, steps=2)
    assert largest_difference(reference(run), spawn(train, tp * pp * dp, run)) <= 1e-12


def test_chunks_of_a_pipeline_too():
    run = Run("llama", 2, 2, chunks=2, schedule="interleaved_1f1b", sequence_parallel=True, exchange=True)
    assert largest_difference(reference(run), spawn(train, 4, run)) <= 1e-12


def meetings(rank: int, n: int, lora: dict) -> int:
    """How often the ranks meet in a step."""
    count = 0

    def meet(self, join=lambda: None, original=Exchange._meet):
        nonlocal count
        count += 1
        original(self, join)

    Exchange._meet = meet
    train(rank, n, Run(tp=2, sequence_parallel=True, exchange=True, steps=1, lora=lora))
    return count


def test_a_branch_adds_no_message():
    every = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.1, "target_modules": "all-linear"}
    assert spawn(meetings, 2, every) == spawn(meetings, 2, {**every, "target_modules": ["q_proj"]})


@pytest.mark.parametrize("targets", [["q_proj"], ["down_proj"], ["up_proj", "o_proj"]])
def test_with_few_adapters_too(targets):
    lora = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.1, "target_modules": targets, "bias": "lora_only"}
    run = Run("qwen2", 2, sequence_parallel=True, exchange=True, lora=lora).short(2, steps=2)
    assert largest_difference(reference(run), spawn(train, 2, run)) <= 1e-12
