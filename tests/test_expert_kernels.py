"""Steps of a model of experts through our kernels: in Triton's interpreter on a CPU against plain float64, and on a GPU
tokens that are read where they lie against rows that are dispatched first; and what ptxas makes of these kernels.
"""

from __future__ import annotations

import pytest
import torch
from gpu_sizes import sizes
from interpreted import needs_triton, run_interpreted
from oracle import Run, train
from sass import compiled, products_of_nothing

from megalora.ops import grouped_gpu, routing, weighted_gate
from megalora.ops.dispatched import branch_, rows_of
from megalora.ops.grouped import grouped, grouped_nt, grouped_outer_
from megalora.parallel import experts

LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"}
STEP = Run("qwen3_moe", model={"num_hidden_layers": 2}, lora=LORA, steps=2, seq_length=24)


@needs_triton
def test_in_the_interpreter():
    run_interpreted(__file__, "")


def interpreted() -> None:
    wanted, used = train(0, 1, STEP), set()

    def noting(name: str) -> None:
        kernel = getattr(grouped_gpu, name)

        def called(*arguments):
            pair = arguments[-2] if name in ("outer_", "branch_") and len(arguments) > 6 else None
            used.add((name, pair is not None))
            return kernel(*arguments)

        setattr(grouped_gpu, name, called)

    def wide(out, X, P, bounds, turned, Z, A):
        ends = tuple(bounds.tolist())
        made = grouped_nt(X, P, ends) if turned else grouped(X, P, ends, Z, A)
        out[: ends[-1], : made.shape[1]] = made[: ends[-1]]

    for name in ("dispatch_thin", "gate_thin", "outer_", "branch_"):
        noting(name)
    grouped_gpu.takes, grouped_gpu._wide_ = (lambda *tensors: True), wide
    routing.fuses = weighted_gate.fuses = lambda rows: True
    routing.runs_grouped, routing.has_triton = (lambda device, dtype: True), lambda: True
    found = train(0, 1, STEP.on(dtype=torch.float32))
    assert used == {
        ("dispatch_thin", False), ("gate_thin", False), ("outer_", False), ("outer_", True), ("branch_", False),
        ("branch_", True),
    }  # fmt: skip
    for a, b in zip(found.losses, wanted.losses, strict=True):
        assert abs(a - b) <= 1e-5 * b
    for name, (_, grad) in wanted.gradients.items():
        assert (found.gradients[name][1].double() - grad).norm() <= 1e-3 * grad.norm(), name


DISPATCH = {"x": "*bf16", "pair": "*i64", "p": "*bf16", "out": "*bf16", "bounds": "*i32"}
GATE = DISPATCH | {"gate_up": "*bf16", "weights": "*fp32"}
BRANCH = dict.fromkeys(("dy", "taken", "z", "branch"), "*bf16") | dict.fromkeys(("parts", "out", "second"), "*fp32")
BRANCH |= {"scale": "fp32", "second_scale": "fp32", "bounds": "*i32", "pair": "*i64"}
OUTER = {
    "a": "*bf16",
    "b": "*bf16",
    "out": "*fp32",
    "second": "*fp32",
    "scale": "fp32",
    "bounds": "*i32",
    "pair": "*i64",
}


@needs_triton
@pytest.mark.parametrize("ranks", [16, 32, 64])
def test_operands_of_products_are_written(ranks):
    """ptxas 12.8 has made a product that reads shared memory at random: of another form of gate_thin_kernel."""
    from megalora.ops import grouped_kernels as kernels

    tile = {"EXPERTS": 128, "M": 64}
    columns, stages = grouped_gpu._branch_tile(ranks)
    for choices in (0, 8):
        split = {"SECOND": ranks > 16, "CHOICES": choices, "R": ranks, "K": 64}
        split |= {} if choices else {"pair": None}
        outer = compiled(kernels.outer_kernel, OUTER, split | {"SHORT_FIRST": True, "N": 64}, 4, 4)
        branch = compiled(kernels.branch_kernel, BRANCH, split | {"N": columns}, 4, stages)
        assert not products_of_nothing(outer) and not products_of_nothing(branch)
    for kernel, types, constants in (
        (kernels.dispatch_thin_kernel, DISPATCH, {"CHOICES": 8, "N": ranks, "K": grouped_gpu._TAKEN_CONTRACTED}),
        (kernels.gate_thin_kernel, GATE, {"N": 64, "K": grouped_gpu._GATED_CONTRACTED}),
    ):
        assert not products_of_nothing(compiled(kernel, types, tile | constants, 4, 3))


def dispatch_first(x, P, routes, room):
    X = routing.dispatch(x, routes, x.shape[1], room)
    grouped_nt(X[:, : x.shape[1]], P, routes.bounds, out=X[:, x.shape[1] :])
    return X


@pytest.mark.gpu
@pytest.mark.parametrize("more", [{}, {"r": 16}, {"lora_dropout": 0.1}, {"expert_lora": "shared_a"}])
def test_tokens_read_where_they_lie_change_no_bit(monkeypatch, more):
    run = Run("qwen3_moe", model=sizes("qwen3_moe", moe_intermediate_size=64), lora=LORA | more, steps=2, seq_length=64)
    run = run.on(dtype=torch.bfloat16, device="cuda")
    found = train(0, 1, run)
    monkeypatch.setattr(experts, "dispatch_nt", dispatch_first)
    monkeypatch.setattr(experts, "outer_", lambda outs, a, b, *more: grouped_outer_(outs, a, rows_of(b), *more))
    monkeypatch.setattr(experts, "branch_", lambda grads, dy, *more: branch_(grads, rows_of(dy), *more))
    wanted = train(0, 1, run)
    assert found.losses == wanted.losses
    assert all(torch.equal(grad, found.gradients[name][1]) for name, (_, grad) in wanted.gradients.items())


if __name__ == "__main__":
    interpreted()
