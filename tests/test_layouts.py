"""The oracle (docs/design.md): every layout gives the losses, norms, gradients and adapters of one process.

Two steps or, where all that they could show is shown elsewhere, one (every layout in `make proof`: three) with dropout
0.1, packed rows, B not zero and clipped gradients, in float64 within 1e-12.
"""

import itertools
import math
import os
from collections import defaultdict
from unittest import mock

import pytest
import torch
from oracle import ALL_LINEAR, FAMILIES, Run, check_all, check_runs, largest_difference, reference, train, train_each
from plain_attention import Plain
from spawn import spawn

from megalora.pipeline.schedule import SCHEDULES

SIZES = (1, 2, 4)
LAYOUTS = [layout for layout in itertools.product(SIZES, repeat=3) if 1 < math.prod(layout) <= 8]
RECOMPUTE = ("none", "selective", "full")


def grid() -> list[tuple[Run, int]]:
    """(run, dp): every layout with each recompute; those of up to 4 processes with and without sequence
    parallelism, those of 8 (which are slow) with the two in turn. The families take turns too."""
    found = []
    for number, (tp, pp, dp) in enumerate(LAYOUTS):
        options = list(itertools.product((False, True) if tp > 1 else (False,), RECOMPUTE))
        if tp > 1 and tp * pp * dp == 8:
            options = [option for i, option in enumerate(options) if i % 2 == number % 2]
        found += [(tp, pp, dp, *option, number + 2 * turn) for turn, option in enumerate(options)]
    return [case(*values, steps=3) for values in found]


def pairs() -> list[tuple[Run, int]]:
    """(run, dp): every layout, with and without sequence parallelism, each with one recompute and one family, such
    that all means meet in pairs (found by a search: `test_the_cases_cover_what_they_promise`)."""
    found = [(*layout, sp) for layout in LAYOUTS for sp in ((False, True) if layout[0] > 1 else (False,))]
    families, recompute = map(int, "1452034420103145413345520"), map(int, "1002221210112001120102201")
    return [case(*values, RECOMPUTE[r], f) for values, r, f in zip(found, recompute, families, strict=True)]


def case(
    tp: int, pp: int, dp: int, sequence_parallel: bool, recompute: str, turn: int, steps: int = 2
) -> tuple[Run, int]:
    run = Run([*FAMILIES][turn % len(FAMILIES)], tp, pp, sequence_parallel=sequence_parallel, steps=steps)
    run = run.on(recompute=recompute)
    # Fewer microbatches are fewer collectives, and those are what takes the time.
    return (run.on(micro_batch_rows=2) if dp == 1 and pp <= 2 else run, dp)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_every_layout_gives_the_numbers_of_one_process(size):
    """MEGALORA_PROOF (make proof): each with every recompute, too."""
    cases = grid() if os.environ.get("MEGALORA_PROOF") else pairs()
    check_all((run, dp) for run, dp in cases if run.tp * run.pp * dp == size)


@pytest.mark.parametrize("cases", [grid, pairs])
def test_the_cases_cover_what_they_promise(cases):
    seen = defaultdict(set)
    for run, dp in cases():
        seen["layout"].add((run.tp, run.pp, dp, run.recompute))
        if run.tp > 1:
            seen["tp"].add((run.tp, run.sequence_parallel, run.recompute))
            seen["tp layout"].add((run.tp, run.pp, dp, run.sequence_parallel))
        for axis, size in (("tp", run.tp), ("pp", run.pp), ("dp", dp)):
            seen["family"].add((run.family, axis, size if cases is grid else size > 1))
            seen["recompute"].add((run.recompute, axis, size))
        seen["family"].add((run.family, "sp", run.sequence_parallel))
        seen["family"].add((run.family, "recompute", run.recompute))
    assert len(LAYOUTS) == 16 and {where[:3] for where in seen["layout"]} == set(LAYOUTS)
    if cases is grid:
        assert seen["layout"] == {(*layout, recompute) for layout in LAYOUTS for recompute in RECOMPUTE}
    assert seen["tp"] == set(itertools.product((2, 4), (False, True), RECOMPUTE))
    assert seen["tp layout"] == {(*layout, sp) for layout in LAYOUTS if layout[0] > 1 for sp in (False, True)}
    sizes = SIZES if cases is grid else (False, True)
    values = {"tp": sizes, "pp": sizes, "dp": sizes, "sp": (False, True), "recompute": RECOMPUTE}
    assert seen["family"] == {(name, what, v) for name in FAMILIES for what in values for v in values[what]}
    assert seen["recompute"] == {(how, axis, v) for how in RECOMPUTE for axis in ("tp", "pp", "dp") for v in SIZES}
    assert FAMILIES["qwen2"]["num_key_value_heads"] < 4, "one family has fewer KV heads than tp4 has ranks"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_nothing_on_one_process(family, recompute):
    run = Run(family, recompute=recompute)
    assert largest_difference(reference(run), [train(0, 1, run)]) <= 1e-12


MIXED = ("full", "layer", "mlp", "norms")
LEVELS = [("norms", 0), ("mlp", 0), ("layer", 0), ("full", 16), (MIXED, 8)]


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_parts_computed_again_change_no_bit(family):
    """Without tiles to the bit; a tile sums the gradients of factors in another order."""
    base = Run(family, micro_batch_rows=2)
    plain = train(0, 1, base)
    for recompute, tile in LEVELS:
        offloaded = frozenset({0, 1} if recompute in ("layer", "full", MIXED) else ())
        ours = train(0, 1, base.on(recompute=recompute, tile=tile, offloaded=offloaded))
        assert ours.losses[0] == plain.losses[0], (recompute, tile)
        assert largest_difference(plain, [ours]) <= (1e-12 if tile else 0.0), (recompute, tile)


def test_parts_computed_again_on_a_mesh():
    runs = [
        Run("llama", **TP2_SP, pp=2, recompute=MIXED, tile=8, offloaded=frozenset({0, 1})),
        Run("qwen2", tp=4, recompute=MIXED[::-1], tile=8, micro_batch_rows=2, offloaded=frozenset({2, 3})),
        Run("gpt_neox", **TP2_SP, pp=2, schedule="gpipe", recompute="layer", tile=8, offloaded=frozenset({1})),
        Run("qwen3", tp=2, recompute="mlp", tile=8, **lora(layers_to_transform=[1, 2])),  # dp 2
    ]
    check_runs(4, [run.short(4) for run in runs])


WEIGHTS = (0.1, 1.0, 2.5)


def test_weights_of_labels():
    """A weight says what a label counts for among the others: the same for all is none; mixed ones are the mean."""
    plain = train(0, 1, Run())
    for same in (1.0, 0.5):
        assert largest_difference(plain, [train(0, 1, Run(weights=(same,)))]) <= 1e-12
    mixed = train(0, 1, Run(weights=WEIGHTS))
    assert abs(mixed.losses[0] - plain.losses[0]) > 1e-3 and abs(mixed.evaluation - plain.evaluation) > 1e-3


def train_by_calls(rank: int, world_size: int, runs: list[Run]) -> list:
    """As train_each, with pieces of documents as GPUs take long ones."""
    with (
        mock.patch("megalora.parallel.context.takes_pieces", lambda *_: True),
        mock.patch("megalora.ops.merged_attention.Cudnn", side_effect=Plain) as kernel,
    ):
        outcomes = train_each(rank, world_size, runs)
    assert kernel.called
    return outcomes


def test_and_their_pieces_attended_call_by_call():
    runs = [
        Run("llama", cp=2, micro_batch_rows=2, recompute="layer", weights=WEIGHTS),
        Run("qwen3", cp=2, recompute=MIXED, tile=8, offloaded=frozenset({0})),
        Run("phi3", cp=2, recompute="selective", rows=2),
        Run("deepseek_v2", cp=2, steps=2, learning_rate=1e-3),
    ]
    outcomes = zip(*spawn(train_by_calls, 2, runs, timeout=600), strict=True)
    assert all(largest_difference(reference(run), list(of)) <= 1e-12 for run, of in zip(runs, outcomes, strict=True))


def test_documents_cut_over_ranks():
    """Context parallelism beside the other means: windows, shared KV heads, packing, recompute, tp, pp and dp."""
    runs = {
        2: [
            Run("mistral", cp=2, micro_batch_rows=2, weights=WEIGHTS),
            Run("qwen3", cp=2, recompute=MIXED, tile=8, offloaded=frozenset({0})),
            Run("phi3", cp=2, recompute="selective", rows=2),
            Run("qwen3_moe", cp=2, micro_batch_rows=2, seq_length=72),  # tokens for every expert
        ],
        4: [
            Run("llama", cp=4, micro_batch_rows=2),
            Run("llama", **TP2_SP, cp=2, micro_batch_rows=2, recompute="layer", tile=8, weights=WEIGHTS),
            Run("qwen2", pp=2, cp=2, recompute="full", weights=WEIGHTS),
            Run("gpt_neox", cp=2, recompute="layer"),  # dp 2
            Run("deepseek_v2", cp=2, seq_length=72),  # dp 2
        ],
        8: [Run("mistral", cp=8, rows=2, micro_batch_rows=2), Run("llama", tp=2, pp=2, cp=2, rows=2)],
    }
    for world_size, some in runs.items():
        check_runs(world_size, [run.short(world_size) for run in some])


def lora(**fields) -> dict:
    return {"lora": ALL_LINEAR | fields}


TP4 = {"tp": 4, "micro_batch_rows": 2}
TP2_SP = {"tp": 2, "sequence_parallel": True}
FEW_LAYERS = {"num_hidden_layers": 2}
SIX_LAYERS = {"model": {"num_hidden_layers": 6}}
# The gradient of a k bias is near zero: it moves all scores of a query alike, but for the rotation.
BIASED_LLAMA = {"model": {"attention_bias": True, "mlp_bias": True}, "learning_rate": 1e-3}
PATTERNS = lora(
    use_rslora=True,
    rank_pattern={"q_proj": 5, r"layers\.[02]\.mlp\.down_proj": 2},
    alpha_pattern={"v_proj": 11, "o_proj": 3},
)
# As SmolLM2-135M: tp divides neither the heads nor, here, intermediate_size; some KV heads are on two ranks.
NINE_HEADS = {
    "model": {
        "hidden_size": 54,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 81,
    }
}
UPPER_WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
OPTIONS = {  # name: (run, dp)
    "gpipe pp4, m > p": (Run("llama", pp=4, schedule="gpipe", rows=6, recompute="full"), 1),
    "gpipe tp2 pp2": (Run("qwen3", **TP2_SP, pp=2, schedule="gpipe"), 1),
    "1f1b pp2, m > p": (Run("mistral", pp=2, rows=8), 1),
    "1f1b pp4, m > p": (Run("qwen2", pp=4, rows=9), 1),
    "1f1b pp4, m < p": (Run("llama", pp=4, rows=2), 1),
    "1f1b pp4, one microbatch": (Run("qwen3", pp=4, rows=2, micro_batch_rows=2), 1),
    "two rows a microbatch, sp": (Run("llama", **TP2_SP, pp=2, micro_batch_rows=2), 1),
    "two rows a microbatch, dp": (Run("mistral", pp=2, micro_batch_rows=2), 2),
    "all rows in one microbatch": (Run("qwen2", **TP2_SP, micro_batch_rows=4), 1),
    "uniform 6 / 4": (Run("llama", pp=4, **SIX_LAYERS), 1),
    "uniform_floor 6 / 4": (Run("qwen2", pp=4, partition_method="uniform_floor", **SIX_LAYERS), 1),
    "parameters 6 / 4": (Run("mistral", pp=4, partition_method="parameters", **SIX_LAYERS), 1),
    "custom 3 1 2": (
        Run("qwen3", pp=3, partition_method="custom", custom_partition=(3, 1, 2), **SIX_LAYERS),
        1,
    ),
    "bias all": (Run("qwen2", **TP4, **lora(bias="all")), 1),
    "bias all, sp": (Run("qwen2", **TP4, sequence_parallel=True, **lora(bias="all")), 1),
    "bias all, q adapted": (Run("qwen2", tp=2, pp=2, **lora(bias="all", target_modules=["q_proj"])), 1),
    "bias lora_only": (
        Run("qwen2", **TP4, **lora(bias="lora_only", target_modules=["k_proj", "o_proj"])),
        1,
    ),
    "bias of row linears": (Run("llama", tp=2, **lora(bias="all"), **BIASED_LLAMA), 1),
    "bias of row linears, sp": (Run("llama", **TP2_SP, **lora(bias="all"), **BIASED_LLAMA), 2),
    "bias frozen": (Run("llama", **TP2_SP, **BIASED_LLAMA), 1),
    "patterns, rslora": (Run("qwen3", **TP2_SP, pp=2, **PATTERNS), 1),
    "patterns, rslora, tp4": (Run("llama", **TP4, **PATTERNS), 1),
    "upper layers": (Run("llama", pp=4, **lora(layers_to_transform=[2, 3])), 1),
    "upper layers, gpipe": (Run("mistral", pp=4, schedule="gpipe", **lora(layers_to_transform=[2, 3])), 1),
    "last layer, full recompute": (
        Run("qwen2", **TP2_SP, pp=2, recompute="full", rows=6, **lora(layers_to_transform=[3])),
        1,
    ),
    "last layer, dp": (Run("llama", pp=2, **lora(layers_to_transform=[3])), 2),
    "first layer": (Run("llama", pp=4, recompute="selective", **lora(layers_to_transform=[0])), 1),
    "a layer between": (Run("qwen3", pp=4, rows=6, **lora(layers_to_transform=[1])), 1),
    "q and v": (Run("qwen2", **TP4, sequence_parallel=True, **lora(target_modules=["q_proj", "v_proj"])), 1),
    "q and v, pp": (Run("llama", tp=2, pp=2, **lora(target_modules=["q_proj", "v_proj"])), 1),
    "k, replicated": (Run("qwen2", **TP4, **lora(target_modules=["k_proj"])), 1),
    "o": (Run("llama", **TP2_SP, **lora(target_modules=["o_proj"])), 1),
    "down": (Run("mistral", **TP4, recompute="full", **lora(target_modules=["down_proj"])), 1),
    "one KV head": (Run("qwen3", **TP4, sequence_parallel=True, model={"num_key_value_heads": 1}), 1),
    "one KV head, tp2": (Run("llama", tp=2, model={"num_key_value_heads": 1}), 1),
    "9 heads, tp2": (Run("llama", tp=2, recompute="selective", **NINE_HEADS), 1),
    "9 heads, tp2 sp": (Run("qwen2", **TP2_SP, pp=2, **NINE_HEADS), 1),
    "9 heads, tp4 sp": (Run("qwen3", **TP4, sequence_parallel=True, **NINE_HEADS), 1),
    "9 heads, tp4, bias": (Run("qwen2", **TP4, recompute="full", **NINE_HEADS, **lora(bias="all")), 1),
    "9 heads, tp2 dp2": (Run("mistral", tp=2, **NINE_HEADS, **lora(target_modules=["k_proj", "v_proj"])), 2),
    "no dropout": (Run("llama", **TP2_SP, pp=2, **lora(lora_dropout=0.0)), 1),
    "much dropout": (Run("qwen2", **TP4, sequence_parallel=True, **lora(lora_dropout=0.7)), 1),
    "no window": (Run("mistral", tp=2, model={"sliding_window": None}), 1),
    "window in the upper layers": (Run("qwen3", pp=2, model=UPPER_WINDOW), 1),
}


@pytest.mark.parametrize("part", range(3))
def test_every_option_gives_the_numbers_of_one_process(part):
    cases = [*OPTIONS.values()][part::3]
    check_all((shortened(run, run.tp * run.pp * dp), dp) for run, dp in cases)


def shortened(run: Run, processes: int) -> Run:
    """With few rows where the option is not how many there are, and few layers where it is of none of them."""
    few = {} if run.pp > 2 or run.partition_method != "uniform" or "layer" in str((run.lora, run.model)) else FEW_LAYERS
    run = run if run.rows != Run.rows else run.short(processes, steps=2)
    return run.on(model=run.model | few)


def schedule_runs(pp: int) -> list[Run]:
    """Every schedule with fewer microbatches than stages, one, and more; all, the upper half and one layer adapted."""
    found = []
    for name, schedule in SCHEDULES.items():
        chunks = 2 if schedule.chunked else 1
        layers = pp * chunks if pp > 2 else 4
        base = Run("llama", pp=pp, schedule=name, chunks=chunks, model={"num_hidden_layers": layers})
        cases = [
            (max(1, pp - 1), None),
            (1, list(range(layers // 2, layers))),
            (pp + 1, list(range(layers // 2, layers))),
            (pp + 1, [layers // 2 - 1]),
        ]
        if pp == 8 and not os.environ.get("MEGALORA_PROOF"):  # the slowest; what is left out, 4 stages show
            cases, base = cases[3:], base.on(steps=1)
        found += [base.on(rows=rows, **lora(layers_to_transform=adapted)) for rows, adapted in cases]
    return found


@pytest.mark.parametrize("pp", [2, 4, 8])
def test_every_schedule_gives_the_numbers_of_one_process(pp):
    runs = schedule_runs(pp)
    check_runs(pp, runs)


def test_schedules_beside_the_other_means():
    """Lanes are what NCCL has; rings of 2, of an odd and of an even number of stages."""
    inter = {"schedule": "interleaved_1f1b", "chunks": 2}
    six, eight = ({"model": {"num_hidden_layers": layers}} for layers in (6, 8))
    cases = {
        2: [Run("qwen3", pp=2, lanes=True, rows=3, **inter)],
        3: [Run("llama", pp=3, lanes=True, rows=4, **inter, **six)],
        4: [
            Run("mistral", pp=4, lanes=True, rows=5, **inter, **eight),
            Run("llama", pp=4, lanes=True, schedule="eager_1f1b", rows=5),
            Run("qwen2", **TP2_SP, pp=2, **inter),
            Run("qwen3", **TP2_SP, pp=2, schedule="pre_recompute_1f1b", recompute="selective"),
            Run("mistral", pp=2, schedule="shifted_critical_path", micro_batch_rows=2),  # dp2
            Run("llama", pp=2, partition_method="custom", custom_partition=(1, 2, 2, 1), **inter, **six),  # dp2
            Run("qwen2", pp=2, recompute="full", **inter, **lora(layers_to_transform=[1, 2])),  # dp2
        ],
    }
    for world_size, runs in cases.items():
        check_runs(world_size, runs)


def test_kinds_of_adapters_give_the_numbers_of_one_process():
    """DoRA, a bias of B, LoRA+, exclusions: with one start of the processes."""
    runs = [
        Run("llama", **TP2_SP, pp=2, **lora(use_dora=True, rank_pattern={"q_proj": 5})),
        Run("qwen2", **TP4, **lora(use_dora=True, bias="all", init_lora_weights="orthogonal", r=4)),
        Run("qwen2", **TP4, sequence_parallel=True, recompute="full", **lora(use_dora=True, bias="lora_only")),
        # Terms of a parallel residual, with dp2 and with pp2.
        Run("gpt_neox", tp=2, **lora(use_dora=True, bias="lora_only", target_modules=["dense", "dense_4h_to_h"])),
        Run("gpt_neox", **TP2_SP, **lora(use_dora=True, bias="lora_only", target_modules=["dense", "dense_4h_to_h"])),
        Run("gpt_neox", **TP2_SP, pp=2, **lora(use_dora=True)),
        Run("llama", **TP4, exchange=True, sequence_parallel=True, **lora(use_dora=True)),
        Run("qwen3", **TP2_SP, pp=2, **lora(lora_bias=True, exclude_modules=["gate_proj", "v_proj"])),
        # Without the k rows of a fused linear: the gradient of their bias is near zero.
        Run("gpt_neox", **TP4, **lora(lora_bias=True, exclude_modules=["query_key_value"])),
        Run("mistral", **TP4, loraplus_lr_ratio=16.0, learning_rate=1e-3, **lora(target_modules=["k_proj", "o_proj"])),
    ]
    runs = [run.short(4, steps=2) for run in runs]
    check_runs(4, runs)
    plain = reference(runs[-1].on(loraplus_lr_ratio=1.0))
    assert largest_difference(plain, [reference(runs[-1])]) > 1e-3, "the rate of B matters"


def test_trained_words_give_the_numbers_of_one_process():
    """Embedding and head in full, rows of tokens, adapters on both; a vocabulary that tp does not divide."""
    ends = {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "init_lora_weights": False}
    q = {"target_modules": ["q_proj"]}
    runs = [
        Run("llama", **TP2_SP, pp=2, **lora(modules_to_save=["embed_tokens", "lm_head"], **q)),
        Run("llama", **TP4, **lora(**ends)),
        Run("mistral", **TP2_SP, pp=2, **lora(rank_pattern={"lm_head": 5}, **ends)),
        Run("qwen2", **TP4, sequence_parallel=True, **lora(trainable_token_indices=[3, 130, 64], **q)),  # tied
        Run("qwen3", tp=2, **lora(trainable_token_indices={"lm_head": [5], "embed_tokens": [5, 99]}, **q)),  # dp2
        Run("qwen2", **TP2_SP, pp=2, **lora(modules_to_save=["lm_head"], **q)),  # tied: trained apart
    ]
    check_runs(4, [run.short(4, steps=2) for run in runs])


def test_float32_within_1e_5():
    cases = [
        (Run("llama", tp=2, pp=2, sequence_parallel=True), 1),
        (Run("mistral", tp=2, pp=1), 2),
        (Run("qwen2", tp=4, micro_batch_rows=2, sequence_parallel=True, recompute="full"), 1),
        (Run("qwen3", pp=4), 1),
    ]
    check_all([(run.on(dtype=torch.float32, learning_rate=1e-3), dp) for run, dp in cases], tolerance=1e-5)


# ---- the reference: if these did not hold, agreeing with it would prove less


def test_dropout_seed_and_microbatch_size():
    base = reference(Run())
    assert largest_difference(base, [train(0, 1, Run())]) == 0, "a run repeats bit for bit"
    assert largest_difference(base, [train(0, 1, Run(**lora(lora_dropout=0.0)))]) > 1e-3
    assert largest_difference(base, [train(0, 1, Run(seed=8))]) > 1e-3
    assert 0 < largest_difference(base, [train(0, 1, Run(micro_batch_rows=4))]) < 1e-12


def test_norms_are_clipped_and_evaluation_has_no_dropout():
    outcome = reference(Run())
    clipped = sum(gradient.square().sum() for _, gradient in outcome.gradients.values()).sqrt()
    assert min(outcome.norms) > 1.0 and abs(clipped - 1.0) < 1e-12
    frozen = reference(Run(steps=1)).evaluation
    again = train(0, 1, Run(steps=1, **lora(lora_dropout=0.0)))
    assert frozen != again.evaluation, "one step with dropout leads elsewhere than one without"
