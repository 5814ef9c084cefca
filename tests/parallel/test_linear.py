"""Linears with their LoRA branch: against plain autograd on one rank, then every cut of them against the whole.

Legend as in megalora.parallel.linear: T tokens, IN in_features, O out_features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from spawn import spawn
from torch.nn.functional import linear as affine

from megalora.adapters.lora import Adapter
from megalora.ops.dropout import dropout
from megalora.ops.swiglu import Made
from megalora.parallel import collectives
from megalora.parallel.decomposition import settle_norms
from megalora.parallel.grads import FlatGradients
from megalora.parallel.group import LinearGroup, MLPPair
from megalora.parallel.group_grad import apply_group, apply_pair
from megalora.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megalora.parallel.mesh import Axis, ParallelMesh, build_mesh
from megalora.parallel.placement import Placement, Tokens
from megalora.parallel.split import Split, even_part, named_splits

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
    plain: bool = False  # of gate, up and down: there is no gate

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


def columns(case: Case, place: Placement) -> tuple[torch.nn.ModuleList, LinearGroup]:
    module = torch.nn.ModuleList(
        ColumnParallelLinear(
            f"m{i}", IN, out, even_part(out, place.tp), bias=case.bias, adapter=case.adapters[i],
            trains_bias=case.trains_bias, place=place,
        )
        for i, out in enumerate(OUTS)
    )  # fmt: skip
    group = LinearGroup(list(module), SITES[columns], place)
    fill(module)
    return module, group


def row(case: Case, place: Placement) -> tuple[torch.nn.ModuleList, LinearGroup]:
    linear = RowParallelLinear(
        "m", IN, OUTS[0], even_part(IN, place.tp), bias=case.bias, adapter=case.adapters[0],
        trains_bias=case.trains_bias, place=place,
    )  # fmt: skip
    group, module = LinearGroup([linear], SITES[row], place), torch.nn.ModuleList([linear])
    fill(module)
    return module, group


def place_of(split: Split) -> tuple[slice, ...]:
    """Where the one range of a Split lies in the whole."""
    ((theirs, _),) = split.blocks()
    return theirs


SITES = {columns: 7, row: 8}
BOTH = pytest.mark.parametrize("make", [columns, row])


def apply(group: LinearGroup, x: torch.Tensor, tokens: Tokens) -> tuple[torch.Tensor, ...]:
    """The output of each linear of the group."""
    group.refresh()
    y = apply_group(group, x, tokens)
    assert y.shape[1] == sum(group.sizes)
    return y.split(group.sizes, -1)


ALONE = Placement(Axis(), False, torch.float64, "cpu")


def formula(x: torch.Tensor, module: torch.nn.ModuleList, case: Case, site: int) -> list[torch.Tensor]:
    """y = x W^T + b + s dropout(x) A^T B^T of each linear, with the mask as a factor that autograd sees."""
    draw = case.tokens.draw(case.p, site)
    mask = torch.ones_like(x) if draw is None else dropout(torch.ones_like(x), case.tokens.index, draw)
    ys = []
    for linear in module:
        y = affine(x, linear.weight, linear.bias)
        if linear.adapter is not None:
            A, B = linear.lora_A.weight, linear.lora_B.weight
            y = y + linear.adapter.scaling * (x * mask) @ A.t() @ B.t()
        ys.append(y)
    return ys


def gradients(outputs, module, x, seed=50):
    """By name, with "x" for the input, from random gradients of the outputs."""
    named = {n: p for n, p in module.named_parameters() if p.requires_grad} | {"x": x}
    total = sum((y * tensor(seed + i, *y.shape)).sum() for i, y in enumerate(outputs))
    return dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))


def equal(ours: dict, theirs: dict) -> None:
    assert set(ours) == set(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_magnitudes_of_some_linears_of_a_group():
    """One of another rank, one without an adapter: its factor is 1, also where a row of it is zeros. An adapted row of
    zeros gives its bias a gradient (peft, which divides by its norm, gives nan).
    """
    case = Case(trains_bias=True)
    adapters = [None if one is None else replace(one, dora=True) for one in case.adapters]
    module = torch.nn.ModuleList(
        ColumnParallelLinear(
            f"m{i}", IN, out, even_part(out, Axis()), bias=True, adapter=adapters[i], trains_bias=True, place=ALONE
        )
        for i, out in enumerate(OUTS)
    )
    group = LinearGroup(list(module), SITES[columns], ALONE)
    fill(module)
    with torch.no_grad():
        module[1].weight[3] = 0.0
        for parameter in (module[0].weight, module[0].lora_B.weight, module[0].magnitude):
            parameter[2] = 0.0
    group.refresh()
    settle_norms([(group.dora, group.matrix, group.down, group.row_parallel)], ALONE)
    x = tensor(40, T, IN).requires_grad_()
    ours = apply_group(group, x, case.tokens).split(group.sizes, -1)
    wanted = formula(x, module, case, SITES[columns])
    for i, linear in enumerate(module):
        if linear.magnitude is not None:
            delta = linear.adapter.scaling * linear.lora_B.weight @ linear.lora_A.weight
            norm = (linear.weight + delta).norm(dim=1).detach()
            norm[norm == 0] = 1.0
            wanted[i] = linear.magnitude / norm * (wanted[i] - linear.bias) + linear.bias
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    equal(gradients(ours, module, x), gradients(wanted, module, x))


# ---- one rank, against autograd


@BOTH
@pytest.mark.parametrize("name", CASES)
def test_equal_to_autograd(name, make):
    case, x = CASES[name], tensor(99, T, IN).requires_grad_()
    module, group = make(case, ALONE)
    ours, theirs = apply(group, x, case.tokens), formula(x, module, case, SITES[make])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    equal(gradients(ours, module, x), gradients(theirs, module, x))


@BOTH
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck_of_both(make, p):
    case = Case(p=p, adapted=(True, True, True), trains_bias=True)
    x = tensor(99, 4, IN).requires_grad_()
    tokens = replace(TOKENS, index=TOKENS.index[:4], local=TOKENS.local[:4])
    module, group = make(case, ALONE)
    trained = [p for p in module.parameters() if p.requires_grad]

    assert torch.autograd.gradcheck(lambda x, *_: apply(group, x, tokens), (x, *trained))


@BOTH
def test_an_input_without_gradient_still_gives_the_adapters_theirs(make):
    """The first layer reads a frozen embedding."""
    case, x = Case(), tensor(99, T, IN)
    module, group = make(case, ALONE)
    found = [p for p in module.parameters() if p.requires_grad]

    def grads(x):
        return torch.autograd.grad(sum(y.square().sum() for y in apply(group, x, case.tokens)), found)

    for a, b in zip(grads(x), grads(x.clone().requires_grad_()), strict=True):
        assert a.any()
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_linears_of_one_input_share_its_mask_and_sites_differ():
    case = Case(p=0.5, adapted=(True, False, True), bias=False)
    x = torch.ones(T, IN, dtype=torch.float64, requires_grad=True)
    masks = []
    for make, which in ((columns, 0), (columns, 2), (row, 0)):
        module, group = make(case, ALONE)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
            module[which].lora_A.weight[0] = 1
            module[which].lora_B.weight[0, 0] = 1
        (dx,) = torch.autograd.grad(apply(group, x, case.tokens)[which][:, 0].sum(), x)
        masks.append(dx != 0)
    assert masks[0].equal(masks[1])
    assert 0.3 < masks[0].double().mean() < 0.7
    assert 0.3 < (masks[0] == masks[2]).double().mean() < 0.7


@BOTH
def test_nothing_is_kept_for_the_frozen_weight(make):
    def kept(case: Case) -> list[tuple[int, ...]]:
        (_, group), x, shapes = make(case, ALONE), tensor(99, T, IN).requires_grad_(), []

        def pack(saved: torch.Tensor) -> torch.Tensor:
            shapes.append(tuple(saved.shape))
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            apply(group, x, case.tokens)
        return sorted(shapes)

    assert kept(Case(adapted=(False, False, False))) == [(T,)]
    case = Case(adapted=(True, True, True))
    _, group = make(case, ALONE)
    # One input for all branches; z; A; the places of the tokens; and no mask.
    assert kept(case) == sorted([(T, IN), (T, group.room), (sum(group.ranks), IN), (T,)])


@BOTH
def test_weights_stand_in_the_matrix_of_the_group(make):
    """Filling a weight, after the group was built, fills the matrix; the room is of the adapted linears alone."""
    module, group = make(Case(), ALONE)
    assert group.ranks == ([2, 0, 4] if make is columns else [2])
    whole = group.matrix.whole
    assert whole.shape == (sum(group.sizes), IN + group.room) and group.room >= sum(group.ranks)
    for linear, rows in zip(module, group.rows, strict=True):
        assert linear.weight.data_ptr() == whole[rows].data_ptr()
        assert linear.weight.equal(whole[rows, :IN]) and not linear.weight.requires_grad
    _, plain = make(Case(adapted=(False, False, False)), ALONE)
    assert plain.room == 0


@BOTH
def test_use_before_the_first_refresh_is_noticed(make):
    """The room of the matrix is uninitialised until then. Without a branch or a bias nothing is missing."""
    _, group = make(Case(), ALONE)
    with pytest.raises(AssertionError, match="refresh"):
        apply_group(group, tensor(99, T, IN), TOKENS)
    _, plain = make(Case(adapted=(False, False, False), bias=False), ALONE)
    apply_group(plain, tensor(99, T, IN), TOKENS)


@BOTH
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_of_the_adapter_is_seen(make, fused):
    case, x = Case(), tensor(99, T, IN)
    module, group = make(case, ALONE)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.1, fused=fused)
    for _ in range(3):
        ys, wanted = apply(group, x, case.tokens), formula(x, module, case, SITES[make])
        for y, whole in zip(ys, wanted, strict=True):
            torch.testing.assert_close(y, whole, rtol=1e-12, atol=1e-12)
        sum(y.square().sum() for y in ys).backward()
        optimizer.step()
        optimizer.zero_grad()


@BOTH
def test_what_stands_in_the_room_does_not_matter(make):
    """An op that leaves room leaves it undefined."""
    case, x = Case(), tensor(99, T, IN)
    module, group = make(case, ALONE)
    group.refresh()
    found = []
    for rubbish in (0.0, 7.0, float("nan")):
        X = torch.full((T, IN + group.room), rubbish, dtype=torch.float64)
        X[:, :IN] = x
        y = apply_group(group, X.requires_grad_(), case.tokens)
        dX, *grads = torch.autograd.grad(y.square().sum(), [X, *(p for p in module.parameters() if p.requires_grad)])
        found.append((y, dX[:, :IN], *grads))
    for other in found[1:]:
        assert all(a.equal(b) for a, b in zip(found[0], other, strict=True))


def test_evaluation_gives_the_values_of_training():
    for make in (columns, row):
        case, x = CASES["evaluating"], tensor(99, T, IN)
        _, group = make(case, ALONE)
        with torch.no_grad():
            quiet = apply(group, x, case.tokens)
        for a, b in zip(quiet, apply(group, x, case.tokens), strict=True):
            assert a.equal(b) and not a.requires_grad and b.requires_grad


# ---- every cut, against the whole


def cut(rank: int, world_size: int, name: str, sequence_parallel: bool):
    """(y, dx, {name: (place, gradient summed where it is partial)}) of a rank, for the columns and the row."""
    case, mesh = CASES[name], build_mesh(rank, world_size, tp=world_size)
    place = Placement(mesh.tp, sequence_parallel, torch.float64, "cpu")
    mine = slice(rank * T // world_size, (rank + 1) * T // world_size) if sequence_parallel else slice(None)
    tokens = replace(case.tokens, local=case.tokens.index[mine])
    found = []
    for make in (columns, row):
        module, group = make(case, place)
        splits = named_splits(module)
        trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        flat = FlatGradients(trained, splits, mesh)
        if make is columns:
            x = tensor(99, T, IN)[mine].clone().requires_grad_()
            indices = [(slice(None), place_of(splits[f"{i}.weight"])[0]) for i in range(len(OUTS))]
        else:
            x = tensor(99, T, IN)[:, place_of(splits["0.weight"])[1]].clone().requires_grad_()
            indices = [(mine,)]
        outputs = apply(group, x, tokens)
        total = sum(
            (y * tensor(50 + i, T, OUTS[i])[index]).sum()
            for i, (y, index) in enumerate(zip(outputs, indices, strict=True))
        )
        total.backward()
        flat.reduce()
        found.append(
            (
                [(index, y.detach()) for index, y in zip(indices, outputs, strict=True)],
                (mine, slice(None)) if make is columns else (slice(None), place_of(splits["0.weight"])[1]),
                x.grad,
                {n: (place_of(splits[n]), p.grad.clone()) for n, p in trained.items()},
            )
        )
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tp, sequence_parallel", [(2, False), (2, True), (4, False), (4, True)])
def test_every_cut_equals_the_whole(tp, sequence_parallel, name):
    case = CASES[name]
    ranks = spawn(cut, tp, name, sequence_parallel)
    for which, make in enumerate((columns, row)):
        (module, _), x = make(case, ALONE), tensor(99, T, IN).requires_grad_()
        outputs = formula(x, module, case, SITES[make])
        wanted = gradients(outputs, module, x)
        for rank in ranks:
            ys, x_index, dx, grads = rank[which]
            for whole, (index, y) in zip(outputs, ys, strict=True):
                torch.testing.assert_close(y, whole.detach()[index], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(dx, wanted["x"][x_index], rtol=1e-12, atol=1e-12)
            assert set(grads) == set(wanted) - {"x"}
            for n, (index, grad) in grads.items():
                torch.testing.assert_close(grad, wanted[n][index], rtol=1e-12, atol=1e-12)


# ---- what the branch adds to the communication: no call, and the room for z at most


def counted(rank: int, world_size: int, adapted: bool, sequence_parallel: bool) -> list[tuple[str, int]]:
    """(collective, elements that it takes in) of forward and backward of the columns and the row."""
    calls = []
    for holder, name, taken in (
        (dist, "all_reduce", 0),
        (collectives, "_all_gather_single", 1),
        (collectives, "_reduce_scatter_single", 1),
    ):
        original = getattr(holder, name)

        def count(*args, original=original, name=name, taken=taken, **kwargs):
            calls.append((name, args[taken].numel()))
            return original(*args, **kwargs)

        setattr(holder, name, count)
    case = Case(adapted=(adapted,) * 3)
    place = Placement(build_mesh(rank, world_size, tp=2).tp, sequence_parallel, torch.float64, "cpu")
    x = tensor(1, T // (2 if sequence_parallel else 1), IN).requires_grad_()
    tokens = replace(TOKENS, local=TOKENS.index[: len(x)])
    sum(y.sum() for y in apply(columns(case, place)[1], x, tokens)).backward()
    x = tensor(1, T, IN // 2).requires_grad_()
    apply(row(case, place)[1], x, tokens)[0].sum().backward()
    return calls


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_branch_adds_no_collective(sequence_parallel):
    plain, adapted = (spawn(counted, 2, on, sequence_parallel)[0] for on in (False, True))
    _, group = columns(Case(adapted=(True,) * 3), ALONE)
    room = group.room
    assert sum(group.ranks) == 9 and room == 16
    extra = [after - before for (_, after), (_, before) in zip(adapted, plain, strict=True)]
    assert [name for name, _ in adapted] == [name for name, _ in plain]
    if sequence_parallel:
        assert plain == [
            ("_all_gather_single", T // 2 * IN),
            ("_reduce_scatter_single", T * IN),
            ("_reduce_scatter_single", T * OUTS[0]),
            ("_all_gather_single", T // 2 * OUTS[0]),
        ]
        assert extra == [T // 2 * room, T * room, 0, 0]
    else:
        assert plain == [("all_reduce", T * IN), ("all_reduce", T * OUTS[0])]
        assert extra == [0, 0]


@BOTH
def test_masters_are_float32_and_their_gradients_too(make):
    module, group = make(Case(trains_bias=True), replace(ALONE, dtype=torch.bfloat16))
    x = tensor(99, T, IN).to(torch.bfloat16).requires_grad_()
    ys = apply(group, x, TOKENS)
    sum(y.float().square().sum() for y in ys).backward()
    assert {y.dtype for y in ys} == {x.grad.dtype} == {group.matrix.whole.dtype} == {torch.bfloat16}
    for name, p in module.named_parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16), name
        assert (p.grad is None) == (not p.requires_grad)
        assert p.grad is None or p.grad.dtype == torch.float32


@BOTH
def test_gradients_of_microbatches_add_up(make):
    case = Case(trains_bias=True)
    module, group = make(case, ALONE)
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    flat = FlatGradients(trained, named_splits(module), ParallelMesh())
    once = []
    for _ in range(2):
        sum(y.square().sum() for y in apply(group, tensor(99, T, IN), case.tokens)).backward()
        once.append(flat.buffer.clone())
    torch.testing.assert_close(once[1], 2 * once[0])


# ---- gate and up, and down of what they gate, in one

INNER = 12
GATED = {
    "all adapted": Case(adapted=(True, True, True)),
    "all adapted, trained bias": Case(adapted=(True, True, True), trains_bias=True),
    "no dropout": Case(p=0.0, adapted=(True, True, True)),
    "evaluating": Case(adapted=(True, True, True), evaluating=True),
    "gate alone": Case(adapted=(True, False, False), bias=False),
    "up alone": Case(adapted=(False, True, False)),
    "down alone": Case(adapted=(False, False, True)),
    "none adapted": Case(adapted=(False, False, False)),
    "none adapted, trained bias": Case(adapted=(False, False, False), trains_bias=True),
    "no gate": Case(adapted=(False, True, True), trains_bias=True, plain=True),
    "no gate, up alone": Case(adapted=(False, True, False), plain=True),
    "no gate, down alone": Case(adapted=(False, False, True), plain=True, bias=False),
}


def gated(case: Case, place: Placement) -> tuple[torch.nn.ModuleList, MLPPair]:
    part = even_part(INNER, place.tp)
    options = {"bias": case.bias, "trains_bias": case.trains_bias, "place": place}
    gate, up, down = case.adapters
    module = torch.nn.ModuleList(
        [
            ColumnParallelLinear("gate", IN, INNER, part, adapter=gate, **options),
            ColumnParallelLinear("up", IN, INNER, part, adapter=up, **options),
            RowParallelLinear("down", INNER, IN, part, adapter=down, **options),
        ][case.plain :]
    )
    made = Made("gelu_tanh", False) if case.plain else Made()
    pair = MLPPair(
        LinearGroup(list(module[:-1]), SITES[columns], place),
        LinearGroup([module[-1]], SITES[row], place, made=made),
    )
    fill(module)
    pair.first.refresh()
    pair.second.refresh()
    return module, pair


def in_turn(pair: MLPPair, source: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    return apply_group(pair.second, apply_group(pair.first, source, tokens), tokens)


def source_of(pair: MLPPair, x: torch.Tensor, room: bool) -> torch.Tensor:
    """x, a leaf: with the room for z behind it, or alone."""
    columns = pair.first.room if room else 0
    return torch.cat([x, x.new_zeros(len(x), columns)], 1).requires_grad_()


ROOM = pytest.mark.parametrize("room", [True, False], ids=["with room", "without room"])


@ROOM
@pytest.mark.parametrize("name", GATED)
def test_a_gated_pair_is_its_groups_in_turn(name, room):
    case = GATED[name]
    module, pair = gated(case, ALONE)
    X, other, x = (source_of(pair, tensor(99, T, IN), room) for _ in range(3))
    y, turned = apply_pair(pair, X, case.tokens), in_turn(pair, other, case.tokens)
    *gate, up = formula(x[:, :IN], module[:-1], case, SITES[columns])
    inner = torch.nn.functional.silu(gate[0]) * up if gate else torch.nn.functional.gelu(up, approximate="tanh")
    (wanted,) = formula(inner, module[-1:], case, SITES[row])
    assert y.equal(turned)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    ours, theirs, plain = (gradients([out], module, of) for out, of in ((y, X), (turned, other), (wanted, x)))
    equal(ours, theirs)  # what stands in the room of dX too
    ours["x"], plain["x"] = ours["x"][:, :IN], plain["x"][:, :IN]
    equal(ours, plain)
    with torch.no_grad():
        assert apply_pair(pair, source_of(pair, tensor(99, T, IN), room), case.tokens).equal(y)


@pytest.mark.parametrize("name", [name for name in GATED if name != "none adapted"])
def test_a_gated_pair_whose_input_wants_no_gradient_and_parameters_that_hold_theirs(name):
    """Two microbatches, added to what the parameters hold, as in training."""
    case = GATED[name]
    (module, pair), (twin, twins) = gated(case, ALONE), gated(case, ALONE)
    for parameters in (module, twin):
        trained = {n: p for n, p in parameters.named_parameters() if p.requires_grad}
        FlatGradients(trained, named_splits(parameters), ParallelMesh())
    for seed in (98, 99):
        x, dy = tensor(seed, T, IN), tensor(seed + 10, T, IN)
        apply_pair(pair, x, case.tokens).backward(dy)
        in_turn(twins, x.clone().requires_grad_(), case.tokens).backward(dy)
    for (name, ours), theirs in zip(module.named_parameters(), twin.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None) == (not ours.requires_grad), name
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


@ROOM
@pytest.mark.parametrize("name", GATED)
def test_a_gated_pair_keeps_what_its_groups_keep(name, room):
    _, pair = gated(GATED[name], ALONE)

    def kept(call) -> list[tuple[int, ...]]:
        shapes, source = [], source_of(pair, tensor(99, T, IN), room)

        def pack(saved: torch.Tensor) -> torch.Tensor:
            shapes.append(tuple(saved.shape))
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            call(source, TOKENS)
        return sorted(shapes)

    assert kept(partial(apply_pair, pair)) == kept(lambda source, tokens: in_turn(pair, source, tokens))


def gated_cut(rank: int, world_size: int, name: str, sequence_parallel: bool):
    """(y, {name: gradient}) of the pair, and of its groups in turn."""
    case = GATED[name]
    mesh = build_mesh(rank, world_size, tp=world_size)
    place = Placement(mesh.tp, sequence_parallel, torch.float64, "cpu")
    mine = slice(rank * T // world_size, (rank + 1) * T // world_size) if sequence_parallel else slice(None)
    tokens = replace(case.tokens, local=case.tokens.index[mine])
    found = []
    for call in (apply_pair, in_turn):
        module, pair = gated(case, place)
        x = tensor(99, T, IN)[mine].clone().requires_grad_()
        y = call(pair, x, tokens)
        found.append((y.detach(), gradients([y], module, x)))
    return found


@pytest.mark.parametrize("name", ["all adapted, trained bias", "gate alone", "down alone", "no gate"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_cut_gated_pair_is_its_groups_in_turn(sequence_parallel, name):
    for (y, ours), (turned, theirs) in spawn(gated_cut, 2, name, sequence_parallel):
        assert y.equal(turned)
        equal(ours, theirs)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_weight_that_the_file_has_transposed_is_the_same_matrix(tp):
    """Conv1D stores [in, out]: the parameter is as the file has it, the matrix [out, in] as of any other linear."""
    file = tensor(5, IN, OUTS[0])
    for rank in range(tp):
        place = Placement(Axis(rank, tuple(range(tp))), False, torch.float64, "cpu")
        column, part = even_part(OUTS[0], place.tp), even_part(IN, place.tp)
        options = {"bias": False, "adapter": None, "trains_bias": False, "place": place, "transposed": True}
        for linear, local in (
            (ColumnParallelLinear("m", IN, OUTS[0], column, **options), file.t()[column.start : column.stop]),
            (RowParallelLinear("m", IN, OUTS[0], part, **options), file.t()[:, part.start : part.stop]),
        ):
            group = LinearGroup([linear], 0, place)
            split = linear.shard_dims()["weight"]
            assert split.global_shape == (IN, OUTS[0]) and tuple(linear.weight.shape) == split.local_shape
            with torch.no_grad():
                linear.weight.copy_(split.slice(file))
            assert group.matrix.whole.equal(local)
