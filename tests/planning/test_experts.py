"""The plan's time of experts against measured steps (benchmarks/RESULTS.md), and what it counts of their kernels."""

from dataclasses import replace

import pytest

from megalora.adapters.config import LoraConfig
from megalora.building import resolve_lora
from megalora.models.config import config_from_dict
from megalora.ops.grouped_gpu import branch_tiles
from megalora.planning.devices import DEVICES
from megalora.planning.layouts import _OPTIMIZER_PASSES
from megalora.planning.nodes import Workload, chunk_nodes
from megalora.planning.shapes import shape_of
from megalora.planning.timing import chunk_seconds

H200 = DEVICES["h200"].with_graphs()
QWEN = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 768,
    "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "vocab_size": 151936,
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
}  # fmt: skip
R1 = {
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 3, "num_attention_heads": 128, "num_key_value_heads": 128,
    "n_shared_experts": 1, "n_routed_experts": 256, "routed_scaling_factor": 2.5, "kv_lora_rank": 512,
    "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "n_group": 8,
    "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 1, "norm_topk_prob": True,
    "hidden_act": "silu", "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "tie_word_embeddings": False,
}  # fmt: skip


def shape(fields: dict, tp: int = 1, dropout: float = 0.0):
    config = config_from_dict(fields)
    lora = {"r": 16, "lora_alpha": 32, "lora_dropout": dropout, "target_modules": "all-linear"}
    return shape_of(config, resolve_lora(LoraConfig.from_dict(lora), config), tp)


@pytest.mark.parametrize(
    "tp, dropout, base, microbatches, tokens_a_second",
    [(1, 0.0, "dense", 1, 18504), (1, 0.0, "fp8", 1, 15008), (2, 0.1, "dense", 2, 11537)],
)
def test_a_step_takes_what_was_measured(tp, dropout, base, microbatches, tokens_a_second):
    whole, work = shape(QWEN, tp, dropout), Workload(1, 4096, sequence_parallel=tp > 1, base_format=base)
    one = chunk_seconds(whole, range(48), work, H200, first=True, last=True).total
    update = 4 * _OPTIMIZER_PASSES * whole.trained([range(48)], first=True, last=True) / H200.memory
    # They were measured when tokens were not yet read where they lie: the plan is ahead of them.
    assert 4096 * microbatches / (microbatches * one + update) / tp == pytest.approx(tokens_a_second, rel=0.09)


@pytest.mark.parametrize("base, forward, backward", [("dense", 5.9, 6.0), ("fp8", 8.7, 9.1)])
def test_a_rank_of_eight_takes_what_was_measured(base, forward, backward):
    """Milliseconds of the kernels of three layers of R1, without messages."""
    never = float("inf")
    alone = replace(H200, link=never, network=never, collective=never, latency=0.0, meeting=0.0, overlaps=False)
    work = Workload(1, 2048, sequence_parallel=True, base_format=base)
    found = chunk_seconds(shape(R1, 8, 0.1), range(3), work, alone, first=True, last=True)
    assert 1e3 * found.forward == pytest.approx(forward, rel=0.08)
    assert 1e3 * found.backward == pytest.approx(backward, rel=0.08)


def experts(tp: int, dropout: float):
    (node,) = [
        node
        for node in chunk_nodes(shape(QWEN, tp, dropout), range(1), Workload(1, 4096), first=False, last=False)
        if node.name == "experts"
    ]
    return node


def test_dropout_reads_and_writes_every_row():
    """It makes a copy, of rows of other ranks' experts too; its term of dx is added by an operation of its own. Tokens
    are not read where they lie: rows are read again for z, those of gate and up made again for dA and read for it.
    """
    x, inner = (4096 * 8 * features * 2 for features in (2048, 768))
    for tp, own in ((1, 1), (2, 0.5)):
        without, dropping = experts(tp, 0.0), experts(tp, 0.1)
        assert dropping.forward.traffic - without.forward.traffic == (2 + own) * (x + inner)
        assert dropping.backward.traffic - without.backward.traffic == (5 + own) * (x + inner) + 2 * own * x
        assert dropping.kept == without.kept and dropping.forward.live > without.forward.live
    assert experts(1, 0.0).forward.calls + 9 == experts(1, 0.1).forward.calls


def test_rows_of_other_ranks_are_neither_read_nor_written():
    whole, half = experts(1, 0.0), experts(2, 0.0)
    out = 4096 * 2048 * 2
    apart = 4096 * 8 * (64 + 64 + 32 + 16) * 2  # both z, of which all rows are copied
    assert whole.forward.traffic - 2 * out - apart == 2 * (half.forward.traffic - 2 * out - apart)


def test_parts_of_dz_are_counted():
    """A quarter of dy's bytes: [tiles, rows, ranks] in float32."""
    assert [branch_tiles(*sizes) for sizes in ((1536, 32), (2048, 16), (2049, 8))] == [(6, 32), (16, 16), (17, 16)]
    rows = 4096 * 8
    live = experts(1, 0.0).backward.live
    dy, gated, out = rows * 2048 * 2, rows * 768 * 2, 4096 * 2048 * 2
    assert live == out + max(dy + max(rows * 16 * 16 * 4, gated), 3 * gated, 2 * gated + max(rows * 6 * 32 * 4, dy))
