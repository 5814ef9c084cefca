"""Each invariant of a layout, broken on purpose: the oracle must see every one.

A break is a patch made inside the ranks (which die with it); the reference runs unbroken in the test's own process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import oracle
import pytest
import torch
import torch.distributed as dist
from oracle import ALL_LINEAR, Run, check_all, largest_difference, reference
from spawn import spawn

import megalora.data.loader
import megalora.data.packing
import megalora.models.blocks.attention
import megalora.models.blocks.experts
import megalora.models.stage
import megalora.ops.lora_backward
import megalora.parallel.embedding
import megalora.parallel.experts_grad
import megalora.parallel.grads
import megalora.parallel.group_grad
import megalora.parallel.linear
import megalora.parallel.loss
import megalora.pipeline.p2p
import megalora.tasks.causal
import megalora.training
from megalora.data.loader import Loader
from megalora.parallel.collectives import Pending
from megalora.parallel.experts import ExpertGroup, ReplicatedLinear, SharedFactors
from megalora.parallel.grads import FlatGradients
from megalora.parallel.group import LinearGroup
from megalora.parallel.linear import ColumnParallelLinear, ParallelLinear, RowParallelLinear
from megalora.parallel.mesh import Axis
from megalora.parallel.placement import Tokens
from megalora.pipeline.actions import RECV_BACKWARD
from megalora.pipeline.runner import PipelineRunner


@dataclass(frozen=True)
class Mutation:
    """`breaks()` patches this rank; run and dp say on which layout it must be seen."""

    breaks: Callable[[], None]
    run: Run
    dp: int = 1


MUTATIONS: dict[str, Mutation] = {}


def mutation(name: str, run: Run, dp: int = 1, steps: int = 1) -> Callable:
    """steps: after how many it must be seen."""

    def register(breaks: Callable[[], None]) -> Callable[[], None]:
        MUTATIONS[name] = Mutation(breaks, run.on(steps=steps), dp)
        return breaks

    return register


def wrap(holder: object, name: str, change: Callable) -> None:
    """Replaces holder.name by a function that calls change(original, *args, **kwargs)."""
    original = getattr(holder, name)
    setattr(holder, name, lambda *args, **kwargs: change(original, *args, **kwargs))


def no_collective(x, axis, *rest):
    return x


TP2 = Run(tp=2)
TP2_SP = Run(tp=2, sequence_parallel=True)
TP4 = Run("qwen2", tp=4, micro_batch_rows=2, rows=2)  # 2 KV heads
UNEVEN = Run(
    tp=2,
    model={
        "hidden_size": 54,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 6,
        "intermediate_size": 81,
    },
)
DP2 = Run()
PP2 = Run(pp=2)


# ---- gradients of the adapters


@mutation("partial gradients are not summed over tp", TP2)
@mutation("partial gradients are not summed over tp, sp", TP2_SP)
def _():
    FlatGradients._reduce_partial = lambda self, tp: None


def forget_to_sum(linear: type, parameter: str, where: Callable[[ParallelLinear], bool]) -> None:
    def change(init, self, *args, **kwargs):
        init(self, *args, **kwargs)
        if parameter in self._splits and where(self):
            self._splits[parameter] = dataclasses.replace(self._splits[parameter], partial_grad=False)

    wrap(linear, "__init__", change)


def is_shared(linear: ParallelLinear) -> bool:
    return linear._splits["weight"].partial_grad


@mutation("B of row linears is not summed over tp", TP2)
@mutation("B of row linears is not summed over tp, sp", TP2_SP)
def _():
    forget_to_sum(RowParallelLinear, "lora_B.weight", lambda linear: True)


@mutation("A of column linears is not summed over tp", TP2)
@mutation("A of column linears is not summed over tp, sp", TP2_SP)
def _():
    forget_to_sum(ColumnParallelLinear, "lora_A.weight", lambda linear: True)


@mutation("KV replicas are not summed", TP4)
@mutation("KV heads that two ranks share are not summed", UNEVEN)
def _():
    forget_to_sum(ColumnParallelLinear, "lora_B.weight", is_shared)


@mutation("the biases of KV replicas are not summed", TP4.on(lora=ALL_LINEAR | {"bias": "all"}))
def _():
    forget_to_sum(ColumnParallelLinear, "bias", is_shared)


@mutation("gradients are not summed over dp", DP2, dp=2)
def _():
    FlatGradients.reduce = lambda self: self._reduce_partial(self._mesh.tp)


@mutation("gradients are averaged over dp", DP2, dp=2)
def _():
    def change(reduce, self):
        reduce(self)
        self.buffer.div_(self._mesh.dp.size)

    wrap(FlatGradients, "reduce", change)


@mutation("gradients are not cleared between steps", DP2, steps=2)
def _():
    def change(zero, self):
        if not hasattr(self, "_cleared"):
            zero(self)
            self._cleared = True

    wrap(FlatGradients, "zero", change)


# ---- the gradient norm


@mutation("replicated adapters count tp times in the norm", TP2)
@mutation("replicated adapters count tp times in the norm, sp", TP2_SP)
@mutation("replicated KV heads count twice in the norm", TP4)
@mutation("shared KV heads count twice in the norm", UNEVEN)
def _():
    FlatGradients.square_sum = lambda self: (
        sum(view.double().square().sum() for view in self._views.values()) / self._mesh.dp.size
    )


@mutation("every dp rank counts in the norm", DP2, dp=2)
def _():
    wrap(FlatGradients, "square_sum", lambda square_sum, self: square_sum(self) * self._mesh.dp.size)


@mutation("the norm is that of the last stage", PP2)
def _():
    wrap(FlatGradients, "square_sum", lambda square_sum, self: square_sum(self) * self._mesh.pp.is_last)


# ---- dropout


@mutation("token_index is shifted by one on one rank", DP2, dp=2)
@mutation("token_index is shifted by one on one stage", PP2)
@mutation("token_index is shifted by one on one tp rank", TP2)
def _():
    def change(training_inputs, batch, config, place, **options):
        if dist.get_rank() == 1:
            batch = dataclasses.replace(batch, token_index=batch.token_index + 1)
        return training_inputs(batch, config, place, **options)

    wrap(megalora.training, "training_inputs", change)


@mutation("rows are numbered from 0 on every dp rank", DP2, dp=2)
def _():
    def change(step, self, number):
        data = step(self, number)
        local = [dataclasses.replace(b, token_index=b.token_index % 48) for b in data.microbatches]
        return dataclasses.replace(data, microbatches=local)

    wrap(Loader, "step", change)


@mutation("feature shards share one mask", TP2)
@mutation("feature shards share one mask, sp", TP2_SP)
@mutation("feature shards share one mask, uneven heads", UNEVEN)
def _():
    wrap(Tokens, "draw", lambda draw, self, p, site, feature_offset=0: draw(self, p, site))


@mutation("token shards share one mask", TP2_SP)
def _():
    def change(training_inputs, *args, **options):
        inputs = training_inputs(*args, **options)
        first = inputs.tokens.index[: len(inputs.tokens.local)]
        return dataclasses.replace(inputs, tokens=dataclasses.replace(inputs.tokens, local=first))

    wrap(megalora.training, "training_inputs", change)


@mutation("the mask does not change with the step", Run(), steps=2)
def _():
    wrap(
        Tokens,
        "draw",
        lambda draw, self, *args: draw(dataclasses.replace(self, step=0), *args),
    )


@mutation("recompute draws another mask", Run(recompute="full"))
@mutation("recompute draws another mask, sp", TP2_SP.on(recompute="full"))
def _():
    def change(draw, self, *args):
        in_backward = torch._C._current_graph_task_id() != -1
        return draw(dataclasses.replace(self, step=self.step + in_backward), *args)

    wrap(Tokens, "draw", change)


@mutation("backward of A draws no mask", Run())
def _():
    wrap(
        megalora.ops.lora_backward,
        "lora_down_weight_grad",
        lambda grad, dz, x, token_index, draw: grad(dz, x, token_index, None),
    )


# ---- the loss and what it is divided by


@mutation("each dp rank divides by its own labels", DP2, dp=2)
def _():
    def change(step, self, number):
        data = step(self, number)
        own = sum(int((batch.labels != -100).sum()) for batch in data.microbatches)
        return dataclasses.replace(data, label_count=own)

    wrap(Loader, "step", change)


@mutation("a mean of microbatch means", Run())
def _():
    expected = {}

    def remember(step, self, number):
        data = step(self, number)
        expected["mean"] = data.label_count / len(data.microbatches)
        return data

    def change(loss, hidden, head, inputs):
        return loss(hidden, head, inputs) / max(1, len(inputs.labelled)) * expected["mean"]

    wrap(Loader, "step", remember)
    wrap(megalora.tasks.causal, "next_token_loss", change)


@mutation("labels are not shifted", Run())
def _():
    megalora.data.packing.shift = lambda labels: labels


@mutation("labels are shifted across documents", Run())
def _():
    def change(row, *args):
        found = row(*args)
        return dataclasses.replace(found, labels=np.append(found.labels[1:], found.labels[-1:]))

    wrap(megalora.data.packing.PackedRows, "row", change)


@mutation("the softmax is over this rank's words", TP2)
def _():
    def change(all_reduce, x, axis, *op):
        return x if x.dim() == 2 and len(x) == 2 else all_reduce(x, axis, *op)  # [sum of exp, target]

    wrap(megalora.parallel.loss, "all_reduce", change)


@mutation("the gradient of the hidden states is that of this rank's words", TP2)
def _():
    def change(backward, ctx, dloss):
        ctx.tp = Axis()
        return backward(ctx, dloss)

    loss = megalora.parallel.loss._CrossEntropySum
    original = loss.backward
    loss.backward = staticmethod(lambda ctx, dloss: change(original, ctx, dloss))


# ---- activations


@mutation("a row linear is not reduced", TP2)
def _():
    megalora.parallel.group.all_reduce = no_collective


@mutation("dx of a column linear is not reduced", TP2)
def _():
    megalora.parallel.group_grad.all_reduce_async = lambda x, axis: Pending(x, None, axis)


@mutation("the embedding is of this rank's words", TP2)
def _():
    megalora.parallel.embedding.all_reduce = no_collective


@mutation("the tokens of the ranks are gathered in another order", TP2_SP)
def _():
    wrap(megalora.parallel.exchange, "all_gather", lambda gather, x, tp: gather(x, tp).roll(x.shape[0], 0))


@mutation("stages before the last get no gradient", PP2)
def _():
    def change(take, self, action):
        tensor = take(self, action)
        return tensor.zero_() if action.op == RECV_BACKWARD else tensor

    wrap(megalora.pipeline.p2p.Neighbours, "take", change)


@mutation("a stage reads another microbatch than the one before it", PP2)
def _():
    def change(train, self, microbatches, inputs, scale):
        shift = 0 if self._pp.is_first else 1
        return train(self, microbatches, lambda m: inputs((m + shift) % microbatches), scale)

    wrap(PipelineRunner, "train", change)


@mutation("a branch is that of the first step", Run())
@mutation("a branch is that of the first step, pp", PP2)
def _():
    def change(refresh, self):
        if not self._ready:
            refresh(self)

    wrap(LinearGroup, "refresh", change)


SHARES = ALL_LINEAR | {"target_modules": r".*\.(experts\..*|q_proj)", "expert_lora": "shared"}


@mutation("a factor that experts share is not summed over tp", Run("qwen3_moe", tp=2, lora=SHARES))
def _():
    def change(init, self, *args):
        init(self, *args)
        self._splits = {name: dataclasses.replace(one, partial_grad=False) for name, one in self._splits.items()}

    wrap(SharedFactors, "__init__", change)


# ---- experts

ROUTED = ALL_LINEAR | {"target_modules": r"model\.layers\..*"}  # routers too
SHARED2 = Run("qwen2_moe", tp=2, lora=ROUTED)
GROUPED2 = Run("deepseek_v3", tp=2, lora=ROUTED)


@mutation("factors that every rank holds whole for its experts are not summed over tp", SHARED2)
def _():
    def change(split, shape, place, trained):
        return dataclasses.replace(split(shape, place, trained), partial_grad=False)

    original = ReplicatedLinear.split
    ReplicatedLinear.split = staticmethod(lambda *args: change(original, *args))


@mutation("a rank takes the rows of another rank's experts", SHARED2)
def _():
    def change(init, self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.first, self.stop = 0, self.stop - self.first

    wrap(megalora.parallel.experts_grad.ExpertPair, "__init__", change)


@mutation("a rank chooses experts from all groups", GROUPED2, steps=2)
def _():
    def change(choose, scores, router):
        return choose(scores, dataclasses.replace(router, groups=1) if dist.get_rank() == 1 else router)

    wrap(megalora.models.blocks.experts, "choose", change)


@mutation("backward sorts the rows by an order of before", SHARED2)
def _():
    last = {}

    def change(route, chosen, *args):
        routes = route(chosen, *args)
        rows = routes.pair.shape[0]
        stale = last.get("pair", routes.pair)
        last["pair"] = routes.pair
        order = stale[:rows] if len(stale) >= rows else torch.cat([stale, routes.pair[len(stale) :]])
        return dataclasses.replace(routes, pair=order)

    wrap(megalora.parallel.experts_grad, "route", change)


@mutation("branches of experts are those of the first step", SHARED2)
def _():
    def change(refresh, self):
        if not self._ready:
            refresh(self)

    wrap(ExpertGroup, "refresh", change)


@mutation("ties go to the higher index on one rank", Run("qwen3_moe", tp=2, lora=ROUTED))
def _():
    def change(choose, scores, router):
        chosen = choose(scores.round(decimals=1), router)  # so that there are ties
        return scores.shape[1] - 1 - choose(scores.round(decimals=1).flip(1), router) if dist.get_rank() else chosen

    wrap(megalora.models.blocks.experts, "choose", change)


# ---- where things begin


@mutation("the fan-in of an initial adapter is the rank's", TP2)
def _():
    wrap(
        megalora.parallel.linear,
        "initial_factor",
        lambda initial, name, *args: initial(name, *args) * (2**0.5 if "down_proj" in name else 1),
    )


@mutation("each tp rank draws its own A", TP2)
def _():
    wrap(
        megalora.parallel.linear,
        "initial_factor",
        lambda initial, name, shape, seed, *args: initial(name, shape, seed + dist.get_rank(), *args),
    )


@mutation("all dp ranks read the same rows", DP2, dp=2)
def _():
    wrap(
        megalora.data.loader,
        "deal",
        lambda dealt, work, rows, microbatches, dp_size: [dealt(work, rows, microbatches, dp_size)[0]] * dp_size,
    )


@mutation("a query head reads the KV head of another", UNEVEN)
def _():
    def change(init, self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.reads = None if self.reads is None else self.reads[::-1]

    wrap(megalora.models.blocks.attention.AttentionBlock, "__init__", change)


@mutation("documents of a row see one another", Run())
def _():
    wrap(
        megalora.models.blocks.attention,
        "attention",
        lambda attention, q, k, v, bounds, window, *_: attention(q, k, v, (0, len(q)), window),
    )


def broken(rank: int, world_size: int, name: str):
    chosen = MUTATIONS[name]
    chosen.breaks()
    return oracle.train(rank, world_size, chosen.run)


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_oracle_sees_it(name):
    chosen = MUTATIONS[name]
    outcomes = spawn(broken, chosen.run.tp * chosen.run.pp * chosen.dp, name)
    assert largest_difference(reference(chosen.run), outcomes) > 1e-6


def test_unbroken_the_layouts_agree():
    """So the differences above come from the breaks alone."""
    check_all({repr(m.run) + str(m.dp): (m.run, m.dp) for m in MUTATIONS.values()}.values())
