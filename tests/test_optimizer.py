"""AdamW against torch's plain one and against its formula, exact resuming, the schedules, the loss scale."""

import math
import sys

import pytest
import torch
from torch import nn
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
    get_wsd_schedule,
)

from megalora.errors import UserError
from megalora.learning_rate import WITH_LEAST, Shape, learning_rate_factor
from megalora.optimizer import AdapterOptimizer, LossScale


def parameters(dtype=torch.float64) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q_proj.lora_A.weight": (3, 8), "q_proj.bias": (8,), "q_proj.lora_B.weight": (8, 3)}
    return {
        n: nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for n, s in shapes.items()
    }


def set_gradients(named: dict[str, nn.Parameter], step: int) -> None:
    for number, p in enumerate(named.values()):
        generator = torch.Generator().manual_seed(100 * step + number)
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def rate(step: int) -> float:
    return 0.01 * (step + 1)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_plain_adamw_with_undecayed_biases(weight_decay):
    ours, theirs = parameters(), parameters()
    optimizer = AdapterOptimizer(ours, betas=(0.8, 0.95), eps=1e-6, weight_decay=weight_decay)
    biases = [p for n, p in theirs.items() if n.endswith("bias")]
    weights = [p for n, p in theirs.items() if not n.endswith("bias")]
    plain = torch.optim.AdamW(
        [{"params": weights, "weight_decay": weight_decay}, {"params": biases, "weight_decay": 0.0}],
        betas=(0.8, 0.95), eps=1e-6, foreach=False, fused=False,
    )  # fmt: skip
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step(rate(step))
        for group in plain.param_groups:
            group["lr"] = rate(step)
        plain.step()
    assert optimizer.steps == 5
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-12, atol=1e-13)


def test_loraplus_groups_as_peft_does():
    """The rate of B, of biases and of magnitudes is the ratio times that of A."""
    from peft.optimizers import create_loraplus_optimizer

    ours, theirs = parameters(), parameters()
    for named in (ours, theirs):
        named["q_proj.lora_magnitude_vector"] = nn.Parameter(torch.arange(8, dtype=torch.float64))

    linear = nn.Module()
    for name, p in theirs.items():
        holder = linear
        for part in name.split(".")[1:-1]:
            holder.add_module(part, nn.Module())
            holder = getattr(holder, part)
        holder.register_parameter(name.rpartition(".")[2], p)
    model = nn.ModuleDict({"q_proj": linear})
    optimizer = AdapterOptimizer(ours, weight_decay=0.1, loraplus_lr_ratio=16.0)
    plain = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1, weight_decay=0.1
    )
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step(0.01)
        plain.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-12, atol=1e-13, msg=name)


def test_equals_the_formula():
    """Loshchilov and Hutter 2019, algorithm 2, with the defaults."""
    p = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = AdapterOptimizer({"x.weight": p}, weight_decay=0.1)
    x, m, v = p.detach().clone(), torch.zeros(2).double(), torch.zeros(2).double()
    for t in range(1, 5):
        g = torch.tensor([0.3 * t, -1.0], dtype=torch.float64)
        p.grad = g.clone()
        optimizer.step(0.02)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        x = x - 0.02 * 0.1 * x - 0.02 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        torch.testing.assert_close(p.detach(), x, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stop", [1, 3])
def test_resuming_is_exact(dtype, stop):
    straight, resumed = parameters(dtype), parameters(dtype)
    optimizer, first = AdapterOptimizer(straight, weight_decay=0.1), AdapterOptimizer(resumed, weight_decay=0.1)
    for step in range(6):
        set_gradients(straight, step)
        optimizer.step(rate(step))
    for step in range(stop):
        set_gradients(resumed, step)
        first.step(rate(step))
    state = {name: {k: t.clone() for k, t in moments.items()} for name, moments in first.state().items()}
    assert set(state) == set(resumed) and set(state["q_proj.bias"]) == {"exp_avg", "exp_avg_sq"}
    second = AdapterOptimizer(resumed, weight_decay=0.1)
    second.load_state(state, first.steps)
    for step in range(stop, 6):
        set_gradients(resumed, step)
        second.step(rate(step))
    assert second.steps == 6
    for name in straight:
        assert straight[name].equal(resumed[name]), name
        for key in ("exp_avg", "exp_avg_sq"):
            assert optimizer.state()[name][key].equal(second.state()[name][key])


def test_a_step_to_skip_changes_nothing():
    """Also as the first step, when there are no moments yet."""
    named, plain = parameters(), parameters()
    ours, theirs = AdapterOptimizer(named), AdapterOptimizer(plain)
    for step, skip in enumerate((True, False, True, False, False)):
        set_gradients(named, step)
        if skip:
            named[next(iter(named))].grad.fill_(math.nan)
        ours.step(0.1, skip=torch.tensor(skip))
        if skip:
            ours.skipped()
        else:
            set_gradients(plain, step)
            theirs.step(0.1)
        assert ours.steps == theirs.steps
        assert all(named[name].equal(plain[name]) for name in named)


def test_loaded_moments_are_copies():
    named = parameters()
    optimizer = AdapterOptimizer(named)
    set_gradients(named, 0)
    optimizer.step(0.1)
    state = {name: {k: t.clone() for k, t in moments.items()} for name, moments in optimizer.state().items()}
    before = {name: moments["exp_avg"].clone() for name, moments in state.items()}
    other = AdapterOptimizer(named)
    other.load_state(state, 1)
    set_gradients(named, 1)
    other.step(0.1)
    assert all(state[name]["exp_avg"].equal(before[name]) for name in state)


def test_a_state_that_lacks_a_parameter_is_not_taken():
    named = parameters()
    with pytest.raises(KeyError):
        AdapterOptimizer(named).load_state({}, 3)


def test_before_the_first_step_and_without_parameters():
    assert AdapterOptimizer(parameters()).state() == {}
    empty = AdapterOptimizer({})
    empty.step(0.1)
    assert empty.steps == 1 and empty.state() == {}
    empty.load_state({}, 4)
    assert empty.steps == 4
    only_bias = {"x.bias": nn.Parameter(torch.ones(2))}
    only_bias["x.bias"].grad = torch.ones(2)
    AdapterOptimizer(only_bias).step(0.5)
    assert torch.allclose(only_bias["x.bias"], torch.full((2,), 0.5))


def test_apex_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    monkeypatch.setitem(sys.modules, "apex.optimizers", None)
    with pytest.raises(UserError, match="apex.*cannot be imported.*--optimizer adamw"):
        AdapterOptimizer(parameters(), kind="apex")


# ---- schedules


SCHEDULES = {
    "linear": get_linear_schedule_with_warmup,
    "cosine": get_cosine_schedule_with_warmup,
    "constant": lambda optimizer, warmup, total: get_constant_schedule_with_warmup(optimizer, warmup),
}


def theirs(kind: str, total: int, warmup: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = SCHEDULES[kind](optimizer, warmup, total)
    found = []
    for _ in range(total):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("total, warmup", [(10, 0), (10, 3), (1, 0), (7, 7), (100, 10)])
def test_schedules_are_those_of_transformers_after_warmup(kind, total, warmup):
    """In warmup ours differs on purpose: theirs begins with a rate of 0, which makes the first step do nothing."""
    expected = theirs(kind, total, warmup)
    ours = [learning_rate_factor(kind, step, total, warmup) for step in range(total)]
    assert ours[warmup:] == pytest.approx(expected[warmup:total], abs=1e-12)
    assert ours[:warmup] == pytest.approx([(step + 1) / (warmup + 1) for step in range(warmup)])
    if warmup:
        assert expected[0] == 0 < ours[0]
        assert all(a < b for a, b in zip(ours[:warmup], [*ours[1:warmup], 1.0], strict=True))
    if warmup < total:
        assert max(ours) == ours[warmup] == 1.0


@pytest.mark.parametrize("least", [0.0, 0.25])
def test_the_schedules_with_a_least_rate_are_those_of_transformers(least):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    decay = {"num_decay_steps": 6, "decay_type": "linear", "min_lr_ratio": least}
    made = {
        "cosine_with_min_lr": get_cosine_with_min_lr_schedule_with_warmup(optimizer, 4, 24, min_lr_rate=least),
        "polynomial": get_polynomial_decay_schedule_with_warmup(optimizer, 4, 24, lr_end=least, power=2.0),
        "warmup_stable_decay": get_wsd_schedule(optimizer, 4, num_training_steps=24, **decay),
    }
    assert [*made] == [*WITH_LEAST]
    for kind, theirs in made.items():
        shape = Shape(least, decay=0.3, power=2.0)
        ours = [learning_rate_factor(kind, step, 24, 4, shape) for step in range(4, 25)]
        assert ours == pytest.approx([theirs.lr_lambdas[0](step) for step in range(4, 25)], abs=1e-12), kind
        assert learning_rate_factor(kind, 60, 24, 4, shape) == pytest.approx(least)


@pytest.mark.parametrize("kind, end", [("linear", 0.0), ("cosine", 0.0), ("constant", 1.0)])
def test_after_the_end_the_rate_stays(kind, end):
    """Where theirs of the cosine rises again."""
    assert [learning_rate_factor(kind, step, 10, 2) for step in (10, 11, 50)] == [end] * 3


@pytest.mark.parametrize("kind", SCHEDULES)
def test_no_step_of_a_run_has_rate_zero(kind):
    for total, warmup in ((1, 0), (5, 0), (5, 2), (5, 4)):
        assert all(learning_rate_factor(kind, step, total, warmup) > 0 for step in range(total))


# ---- the loss scale of float16


def test_the_loss_scale_follows_torchs():
    """Overflows as a run might meet them, against torch.amp.GradScaler on its own terms."""
    scale = LossScale(True, initial=2.0**10, growth_interval=3)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    p = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([p], lr=0.0)
    for overflowed in (False, False, False, True, False, True, True, False, False, False, False, False, False):
        p.grad = torch.full((1,), math.inf if overflowed else 1.0)
        theirs.scale(torch.zeros(1))
        theirs.step(optimizer)
        theirs.update()
        scale.update(overflowed)
        assert scale.value == theirs.get_scale()


def test_the_loss_scale_does_not_fall_below_one():
    scale = LossScale(True, initial=4.0)
    assert [scale.update(True) for _ in range(4)] == [True, True, False, False]
    assert scale.value == 1.0


def test_a_scale_is_taken_over_from_float16_alone():
    before = LossScale(True)
    before.update(True)
    before.update(False)
    after = LossScale(True)
    after.load_state(before.state())
    assert (after.value, after.good_steps) == (2.0**15, 1)
    after = LossScale(True)
    after.load_state(LossScale(False).state())
    assert after.value == 2.0**16
    after = LossScale(False)
    after.load_state(before.state())
    assert after.value == 1.0


def test_other_dtypes_are_not_scaled():
    scale = LossScale(False)
    assert scale.value == 1.0
    assert not scale.update(True) and scale.value == 1.0
    assert all(not scale.update(False) for _ in range(5000)) and scale.value == 1.0
