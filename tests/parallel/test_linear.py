"""Linears with their LoRA branch: against plain autograd on one rank, then every cut of them against the whole.

Legend as in megalora.parallel.linear: T tokens, IN in_features, O out_features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from spawn import spawn
from torch.nn.functional import linear as affine

from megalora.lora import Adapter
from megalora.ops.dropout import dropout
from megalora.parallel.grads import FlatGradients
from megalora.parallel.linear import ColumnParallelLinear, Placement, RowParallelLinear, Tokens, column_linear
from megalora.parallel.mesh import Axis, ParallelMesh, build_mesh
from megalora.parallel.split import even_part, named_splits

T, IN = 16, 22
OUTS = (14, 10, 10)  # of the group of column linears: not all divisible by tp
TOKENS = Tokens(torch.arange(T) * 3 + 5, torch.arange(T) * 3 + 5, seed=11, step=2)


@dataclass(frozen=True)
class Case:
    """p of dropout; which of three column linears (and the row linear) have a branch, a bias, a trained bias."""

    p: float = 0.3
    adapted: tuple[bool, bool, bool] = (True, False, True)
    bias: bool = True
    trains_bias: bool = False
    evaluating: bool = False

    @property
    def adapters(self) -> list[Adapter | None]:
        return [Adapter(2 + i, 0.5 + i, self.p) if on else None for i, on in enumerate(self.adapted)]

    @property
    def tokens(self) -> Tokens:
        return replace(TOKENS, seed=None) if self.evaluating else TOKENS


CASES = {
    "some adapted": Case(),
    "all adapted": Case(adapted=(True, True, True)),
    "none adapted": Case(adapted=(False, False, False)),
    "no dropout": Case(p=0.0),
    "evaluating": Case(evaluating=True),
    "no bias": Case(bias=False),
    "trained bias": Case(trains_bias=True),
    "trained bias, none adapted": Case(adapted=(False, False, False), trains_bias=True),
}


def tensor(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fill(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for i, (name, split) in enumerate(sorted(named_splits(module).items())):
            module.get_parameter(name).copy_(split.slice(tensor(i, *split.global_shape)))


def columns(case: Case, place: Placement) -> torch.nn.ModuleList:
    module = torch.nn.ModuleList(
        ColumnParallelLinear(
            f"m{i}", IN, out, even_part(out, place.tp), bias=case.bias, adapter=case.adapters[i],
            trains_bias=case.trains_bias, site=7, place=place,
        )
        for i, out in enumerate(OUTS)
    )  # fmt: skip
    fill(module)
    return module


def row(case: Case, place: Placement) -> RowParallelLinear:
    module = RowParallelLinear(
        "m", IN, OUTS[0], even_part(IN, place.tp), bias=case.bias, adapter=case.adapters[0],
        trains_bias=case.trains_bias, site=8, place=place,
    )  # fmt: skip
    fill(module)
    return module


ALONE = Placement(Axis(), False, torch.float64, "cpu")


def formula(x: torch.Tensor, module: torch.nn.Module, case: Case) -> torch.Tensor:
    """y = x W^T + b + s dropout(x) A^T B^T, with the mask as a factor that autograd sees."""
    y = affine(x, module.weight, module.bias)
    if module.adapter is None:
        return y
    draw = case.tokens.draw(case.p, module.site)
    mask = torch.ones_like(x) if draw is None else dropout(torch.ones_like(x), case.tokens.index, draw)
    return y + module.adapter.scaling * (x * mask) @ module.lora_A.weight.t() @ module.lora_B.weight.t()


def gradients(outputs, module, x, seed=50):
    """By name, with "x" for the input, from random gradients of the outputs."""
    named = {n: p for n, p in module.named_parameters() if p.requires_grad} | {"x": x}
    total = sum((y * tensor(seed + i, *y.shape)).sum() for i, y in enumerate(outputs))
    return dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))


def equal(ours: dict, theirs: dict) -> None:
    assert set(ours) == set(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


# ---- one rank, against autograd


@pytest.mark.parametrize("name", CASES)
def test_columns_equal_autograd(name):
    case, x = CASES[name], tensor(99, T, IN).requires_grad_()
    module = columns(case, ALONE)
    ours = column_linear(x, list(module), case.tokens)
    theirs = [formula(x, m, case) for m in module]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    equal(gradients(ours, module, x), gradients(theirs, module, x))


@pytest.mark.parametrize("name", CASES)
def test_row_equals_autograd(name):
    case, x = CASES[name], tensor(99, T, IN).requires_grad_()
    module = row(case, ALONE)
    ours, theirs = module(x, case.tokens), formula(x, module, case)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    equal(gradients([ours], module, x), gradients([theirs], module, x))


def test_gradcheck_of_both():
    case = Case(adapted=(True, True, True), trains_bias=True)
    x = tensor(99, 4, IN).requires_grad_()
    tokens = replace(TOKENS, index=TOKENS.index[:4], local=TOKENS.local[:4])
    group, single = columns(case, ALONE), row(case, ALONE)
    trained = [p for m in (group, single) for p in m.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(lambda x, *_: column_linear(x, list(group), tokens), (x, *trained[:9]))
    assert torch.autograd.gradcheck(lambda x, *_: single(x, tokens), (x, *trained[9:]))


@pytest.mark.parametrize("make", [columns, row])
def test_an_input_without_gradient_still_gives_the_adapters_theirs(make):
    """The first layer reads a frozen embedding."""
    case, x = Case(), tensor(99, T, IN)
    module = make(case, ALONE)

    def outputs(x):
        return column_linear(x, list(module), case.tokens) if make is columns else [module(x, case.tokens)]

    found = [p for p in module.parameters() if p.requires_grad]
    without = torch.autograd.grad(sum(y.square().sum() for y in outputs(x)), found)
    with_ = torch.autograd.grad(sum(y.square().sum() for y in outputs(x.clone().requires_grad_())), found)
    assert all(a.equal(b) and a.any() for a, b in zip(without, with_, strict=True))


def test_linears_of_one_input_share_its_mask_and_sites_differ():
    case = Case(p=0.5, adapted=(True, False, True), bias=False)
    x = torch.ones(T, IN, dtype=torch.float64, requires_grad=True)
    group, single = columns(case, ALONE), row(case, ALONE)
    masks = []
    for module, run in ((group[0], None), (group[2], None), (single, single)):
        with torch.no_grad():
            module.weight.zero_()
            module.lora_A.weight.zero_()
            module.lora_A.weight[0] = 1
            module.lora_B.weight.zero_()
            module.lora_B.weight[0, 0] = 1
        y = run(x, case.tokens) if run else column_linear(x, [module], case.tokens)[0]
        (dx,) = torch.autograd.grad(y[:, 0].sum(), x)
        masks.append(dx != 0)
    assert masks[0].equal(masks[1])
    assert 0.3 < (masks[0] == masks[2]).double().mean() < 0.7


@pytest.mark.parametrize("make", [columns, row])
def test_nothing_is_kept_for_the_frozen_weight(make):
    def kept(case: Case) -> list[tuple[int, ...]]:
        module, x, shapes = make(case, ALONE), tensor(99, T, IN).requires_grad_(), []

        def pack(saved: torch.Tensor) -> torch.Tensor:
            shapes.append(tuple(saved.shape))
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            column_linear(x, list(module), case.tokens) if make is columns else module(x, case.tokens)
        return shapes

    assert (T, IN) not in kept(Case(adapted=(False, False, False)))
    adapted = kept(Case(adapted=(True, True, True)))
    assert adapted.count((T, IN)) == 1, "one input for all branches, and no mask"
    assert not any(shape in adapted for shape in ((T, out) for out in OUTS))
    assert not any(shape in adapted for shape in ((out, IN) for out in OUTS))


# ---- every cut, against the whole


def cut(rank: int, world_size: int, name: str, sequence_parallel: bool):
    """(y, dx, {name: (place, gradient summed where it is partial)}) of a rank, for the columns and the row."""
    case, mesh = CASES[name], build_mesh(rank, world_size, tp=world_size)
    place = Placement(mesh.tp, sequence_parallel, torch.float64, "cpu")
    mine = slice(rank * T // world_size, (rank + 1) * T // world_size) if sequence_parallel else slice(None)
    tokens = replace(case.tokens, local=case.tokens.index[mine])
    found = []
    for make in (columns, row):
        module = make(case, place)
        splits = named_splits(module)
        trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        flat = FlatGradients(trained, splits, mesh)
        if make is columns:
            x = tensor(99, T, IN)[mine].clone().requires_grad_()
            outputs = column_linear(x, list(module), tokens)
            indices = [(slice(None), splits[f"{i}.weight"].index[0]) for i in range(len(OUTS))]
        else:
            x = tensor(99, T, IN)[:, splits["weight"].index[1]].clone().requires_grad_()
            outputs, indices = [module(x, tokens)], [(mine,)]
        total = sum(
            (y * tensor(50 + i, T, OUTS[i])[index]).sum()
            for i, (y, index) in enumerate(zip(outputs, indices, strict=True))
        )
        total.backward()
        flat.reduce()
        found.append(
            (
                [(index, y.detach()) for index, y in zip(indices, outputs, strict=True)],
                (mine, slice(None)) if make is columns else (slice(None), splits["weight"].index[1]),
                x.grad,
                {n: (splits[n].index, p.grad.clone()) for n, p in trained.items()},
            )
        )
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tp, sequence_parallel", [(2, False), (2, True), (4, False), (4, True)])
def test_every_cut_equals_the_whole(tp, sequence_parallel, name):
    case = CASES[name]
    ranks = spawn(cut, tp, name, sequence_parallel)
    for which, make in enumerate((columns, row)):
        module, x = make(case, ALONE), tensor(99, T, IN).requires_grad_()
        outputs = [formula(x, m, case) for m in module] if make is columns else [formula(x, module, case)]
        wanted = gradients(outputs, module, x)
        for rank in ranks:
            ys, x_index, dx, grads = rank[which]
            for whole, (index, y) in zip(outputs, ys, strict=True):
                torch.testing.assert_close(y, whole.detach()[index], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(dx, wanted["x"][x_index], rtol=1e-12, atol=1e-12)
            assert set(grads) == set(wanted) - {"x"}
            for n, (index, grad) in grads.items():
                torch.testing.assert_close(grad, wanted[n][index], rtol=1e-12, atol=1e-12)


# ---- what the branch adds to the communication: no call, and r columns at most


def counted(rank: int, world_size: int, adapted: bool, sequence_parallel: bool) -> list[tuple[str, int]]:
    """(collective, elements that it takes in) of forward and backward of the columns and the row."""
    calls = []
    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
        original = getattr(dist, name)

        def count(*args, original=original, name=name, **kwargs):
            calls.append((name, args[0 if name == "all_reduce" else 1].numel()))
            return original(*args, **kwargs)

        setattr(dist, name, count)
    case = Case(adapted=(adapted,) * 3)
    place = Placement(build_mesh(rank, world_size, tp=2).tp, sequence_parallel, torch.float64, "cpu")
    x = tensor(1, T // (2 if sequence_parallel else 1), IN).requires_grad_()
    tokens = replace(TOKENS, local=TOKENS.index[: len(x)])
    sum(y.sum() for y in column_linear(x, list(columns(case, place)), tokens)).backward()
    x = tensor(1, T, IN // 2).requires_grad_()
    row(case, place)(x, tokens).sum().backward()
    return calls


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_branch_adds_no_collective(sequence_parallel):
    plain, adapted = (spawn(counted, 2, on, sequence_parallel)[0] for on in (False, True))
    assert [name for name, _ in adapted] == [name for name, _ in plain]
    ranks = sum(adapter.r for adapter in Case(adapted=(True,) * 3).adapters)
    if sequence_parallel:
        assert [name for name, _ in plain] == ["all_gather_into_tensor", "reduce_scatter_tensor"] + [
            "reduce_scatter_tensor",
            "all_gather_into_tensor",
        ]
        extra = [after - before for (_, after), (_, before) in zip(adapted, plain, strict=True)]
        assert extra == [T // 2 * ranks, T * ranks, 0, 0]
    else:
        assert adapted == plain == [("all_reduce", T * IN), ("all_reduce", T * OUTS[0])]


def test_masters_are_float32_and_their_gradients_too():
    place = replace(ALONE, dtype=torch.bfloat16)
    module = columns(Case(trains_bias=True), place)
    x = tensor(99, T, IN).to(torch.bfloat16).requires_grad_()
    ys = column_linear(x, list(module), TOKENS)
    sum(y.float().square().sum() for y in ys).backward()
    assert {y.dtype for y in ys} == {x.grad.dtype} == {torch.bfloat16}
    for name, p in module.named_parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16), name
        assert (p.grad is None) == (not p.requires_grad)


def test_gradients_of_microbatches_add_up():
    case = Case(trains_bias=True)
    module = columns(case, ALONE)
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    flat = FlatGradients(trained, named_splits(module), ParallelMesh())
    once = []
    for _ in range(2):
        sum(y.square().sum() for y in column_linear(tensor(99, T, IN), list(module), case.tokens)).backward()
        once.append(flat.buffer.clone())
    torch.testing.assert_close(once[1], 2 * once[0])
