"""Runs on a base in 8 and in 4 bits: the same numbers on every layout."""

import torch
from oracle import Run, largest_difference, reference, train_each
from spawn import spawn

# As SmolLM2-135M: tp divides neither the heads nor intermediate_size, so parts end inside of blocks and at odd columns.
NINE_HEADS = {"hidden_size": 54, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 81}
RUNS = [
    Run("phi3", tp=4, base_format="fp8", sequence_parallel=True, steps=2),
    Run("gpt_neox", tp=4, base_format="nf4", recompute="full", steps=2),
    Run("llama", tp=2, pp=2, base_format="nf4", model=NINE_HEADS, exchange=True, sequence_parallel=True, steps=2),
]


def test_every_layout_gives_the_numbers_of_one_process():
    each = spawn(train_each, 4, RUNS)
    for number, run in enumerate(RUNS):
        assert largest_difference(reference(run), [outcomes[number] for outcomes in each]) <= 1e-12, run
        dense = reference(run.on(base_format="dense")).losses[0]
        assert 1e-5 < abs(reference(run).losses[0] - dense) < 0.5, "quantised, and not at random"


def test_the_numbers_are_those_of_a_dense_base_of_the_decoded_values(monkeypatch):
    import oracle

    from megalora.parallel.quantised import Fp8Matrix, Nf4Matrix

    for name, kind in (("nf4", Nf4Matrix), ("fp8", Fp8Matrix)):
        run = Run("llama", base_format=name, steps=2)
        quantised = oracle.train(0, 1, run)
        whole_tensor = oracle.whole_tensor

        def decoded(tensor_name, shape, scale, kind=kind, whole_tensor=whole_tensor):
            whole = whole_tensor(tensor_name, shape, scale)
            if not tensor_name.endswith("proj.weight"):
                return whole
            place = oracle.BaseFormat("nf4" if kind is Nf4Matrix else "fp8")
            matrix = place.matrix(*shape, 0, torch.float64, "cpu")
            matrix.fill(slice(0, shape[0]), oracle.RandomWeight(whole), oracle.Split(shape), False)
            return matrix.weight(slice(0, shape[0]))

        with monkeypatch.context() as patch:
            patch.setattr(oracle, "whole_tensor", decoded)
            dense = oracle.train(0, 1, run.on(base_format="dense"))
        assert largest_difference(quantised, [dense]) <= 1e-12
