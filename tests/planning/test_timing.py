"""What a stage is reckoned to take: the order of things, and the cuts that follow from it."""

import pytest
from oracle import fields_of

from megalora.adapters.config import LoraConfig
from megalora.building import resolve_lora
from megalora.models.config import config_from_dict
from megalora.monitor import keys_seen, lora_flops_per_token
from megalora.pipeline.partition import partition
from megalora.planning.devices import DEVICES
from megalora.planning.nodes import Message, Workload, chunk_nodes
from megalora.planning.shapes import shape_of
from megalora.planning.timing import chunk_seconds, layer_costs, message_seconds, reduce_seconds

FIELDS = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
CONFIG = config_from_dict(FIELDS)
H100 = DEVICES["h100"]
WORK = Workload(rows=4, seq_length=2048)


def shape(tp: int = 1, **lora):
    return shape_of(CONFIG, resolve_lora(LoraConfig.from_dict(lora), CONFIG), tp)


def costs(work: Workload = WORK, **lora):
    return layer_costs(shape(**lora), work, H100)


def test_the_flops_are_those_of_the_monitor():
    """Both count 4N + 6L + attention; the nodes also count the columns of the room, 64 an input."""
    whole = shape(r=64, target_modules="all-linear")
    nodes = chunk_nodes(whole, range(32), WORK, first=True, last=True)
    flops = sum(p.flops + p.attention for node in nodes for p in (node.forward, node.backward))
    frozen = sum(layer.frozen - 2 * layer.hidden for layer in whole.layers) + whole.embedding
    counted = lora_flops_per_token(
        frozen_matmul_parameters=frozen,
        lora_parameters=sum(layer.trained for layer in whole.layers),
        num_hidden_layers=32,
        num_attention_heads=32,
        head_dim=128,
        context=keys_seen([2048]),
    )
    assert flops / WORK.tokens == pytest.approx(counted, rel=0.03)


def test_backward_only_above_the_lowest_adapter():
    upper = costs(r=8, layers_to_transform=list(range(16, 32)))
    every = costs(r=8)
    assert upper.layers[0] == upper.layers[15] < 0.6 * every.layers[15]
    assert upper.layers[17:] == every.layers[17:]
    assert upper.layers[15] < upper.layers[16] < upper.layers[17], "the first adapted layer needs no input gradient"
    below = chunk_seconds(shape(r=8, layers_to_transform=[31]), range(0, 8), WORK, H100, first=True, last=False)
    assert below.backward == below.recompute == 0 < below.forward


def test_the_embedding_is_nearly_free_and_the_head_is_not():
    seconds = costs(r=8)
    assert seconds.first < 0.01 * seconds.layers[1]
    assert 1.0 < seconds.last / seconds.layers[1] < 3.0


def test_cost_takes_layers_off_the_stage_with_the_head_and_gives_them_to_those_without_backward():
    def sizes(seconds):
        ends = {"first_cost": seconds.first, "last_cost": seconds.last}
        return [len(part) for part in partition("cost", seconds.layers, 4, **ends)]

    assert sizes(costs(r=8))[-1] < 8
    upper = sizes(costs(r=8, layers_to_transform=list(range(16, 32))))
    assert upper[0] > 8 > upper[-1]


def test_the_shares_add_up():
    shares = costs(r=8).shares([range(0, 8), range(8, 20), range(20, 32)])
    assert sum(shares) == pytest.approx(1) and shares[1] > shares[0]


@pytest.mark.parametrize("tp", [1, 4])
def test_recompute_costs_a_forward(tp):
    def seconds(recompute: str):
        work = Workload(4, 2048, sequence_parallel=tp > 1, recompute=recompute)
        return chunk_seconds(shape(tp, r=8), range(0, 4), work, H100, first=False, last=False)

    one, again, attention = seconds("none"), seconds("full"), seconds("selective")
    assert (again.forward, again.backward) == pytest.approx((one.forward, one.backward)) and one.recompute == 0
    assert 0.7 * one.forward < again.recompute < 0.85 * one.forward  # all but the product of down
    assert 0 < attention.recompute < 0.2 * one.forward


def test_small_microbatches_are_bound_by_the_host():
    small = chunk_seconds(shape(tp=8, r=8), range(0, 4), Workload(1, 16), H100, first=True, last=False)
    calls = chunk_nodes(shape(tp=8, r=8), range(0, 4), Workload(1, 16), first=True, last=False)
    assert small.forward >= sum(node.forward.calls for node in calls) * H100.call


def test_a_ring_moves_nearly_twice_the_bytes():
    assert reduce_seconds(10**9, 1, H100.link, H100) == 0
    assert reduce_seconds(10**9, 8, H100.link, H100) == pytest.approx(H100.latency + 1.75e9 / H100.link)


def test_a_message_waits_for_what_its_product_does_not_cover():
    rate, size = H100.gemm, 64 << 20

    def seconds(kind: str, beside: float, device=H100, ranks: int = 4) -> float:
        return message_seconds(Message(kind, size, beside), device, rate, ranks) - device.latency

    sent = 0.75 * size
    assert seconds("gather", 0) == pytest.approx(sent / H100.collective), "beside nothing NCCL sends it"
    assert seconds("gather", 1e15) == 0
    quarter = rate * sent / H100.link  # whose product on a quarter of the tokens takes a quarter of the copies' time
    assert seconds("gather", quarter) == pytest.approx(0.75 * sent / H100.link)
    assert seconds("scatter", 1e15) == pytest.approx(1.25 * size / H100.memory), "four terms read, the sum written"
    assert seconds("reduce", 1e15) == pytest.approx(2 * sent / H100.collective)
    apart = H100.across_nodes()
    assert seconds("gather", 1e15, apart) == pytest.approx(sent / apart.network)


def test_sequence_parallelism_sends_as_much_as_reductions_do():
    def sizes(sequence_parallel: bool) -> list[tuple[str, int]]:
        work = Workload(1, 1024, sequence_parallel=sequence_parallel)
        nodes = chunk_nodes(shape(2, r=8, target_modules="all-linear"), range(4, 8), work, first=False, last=False)
        return [(m.kind, m.size) for node in nodes for p in (node.forward, node.backward) for m in p.messages]

    whole = 1024 * 4096 * 2
    # Forward o and down, backward q k v and gate up; the first layer's q k v has an A below, so all go on.
    assert sizes(False) == [("reduce", whole)] * 16
    assert sorted(set(sizes(True))) == [("gather", whole), ("scatter", whole)] and len(sizes(True)) == 32


MEASURED = {  # one row on an H200: tokens, layers and what of them is computed again, what of the rest; seconds
    (8192, 0, "none", "none"): 0.556,
    (16384, 0, "none", "none"): 1.301,
    (32768, 20, "mlp", "norms"): 4.036,
    (65536, 12, "layer", "mlp"): 12.223,
    (131072, 16, "full", "layer"): 43.751,
    (131072, 32, "layer", "none"): 41.9,
    (393216, 23, "full", "layer"): 370.795,
}


@pytest.mark.parametrize("row", MEASURED)
def test_long_rows_take_what_was_measured(row):
    length, count, level, rest = row
    levels = (level,) * count + (rest,) * (32 - count)
    whole = shape(r=16, target_modules="all-linear")
    work = Workload(1, length, recompute=levels)
    seconds = chunk_seconds(whole, range(32), work, DEVICES["h200"].with_graphs(), first=True, last=True)
    assert seconds.total == pytest.approx(MEASURED[row], rel=0.05)


def test_short_documents_have_the_rate_of_short_ones():
    for keys in (1, 100, 1000):
        assert H100.attention_seconds(keys * 1e12, 1e12) == keys * 1e12 / H100.attention
    assert H100.attention_seconds(4096e12, 1e12) < 0.8 * 4096e12 / H100.attention
    assert DEVICES["a100"].attention_seconds(4096e12, 1e12) == 4096e12 / DEVICES["a100"].attention


@pytest.mark.parametrize("name", ["bert", "modernbert", "t5"])
def test_attention_of_encoders_is_not_causal(name):
    """The plan counts the pairs of tokens and keys that a run's FLOPs do."""
    config = config_from_dict(fields_of(name))
    lora = resolve_lora(LoraConfig.from_dict({"r": 4, "target_modules": "all-linear"}), config)
    sides = {"source_length": 9} if config.encoder is not None else {}
    nodes = chunk_nodes(
        shape_of(config, lora, 1), range(config.num_hidden_layers), Workload(1, 16, **sides), first=True, last=True
    )
    counted = sum(node.forward.attention for node in nodes) / (4 * config.num_attention_heads * config.head_dim)
    if name == "t5":
        assert counted == 2 * 9 * 9 + 2 * (16 * 17 / 2 + 16 * 9)
    else:
        local = 16 * 16 if name == "bert" else 16 * 7 - 2 * (1 + 2 + 3)
        assert counted == pytest.approx(2 * 16 * 16 + 2 * local)


def test_activations_of_several_operations_count_each():
    """xIELU in plain torch is 15 of them forward; on GPUs it is a kernel."""
    config = config_from_dict(fields_of("apertus"))
    lora = resolve_lora(LoraConfig.from_dict({"r": 4, "target_modules": "all-linear"}), config)
    inner = 16 * config.mixers[1].inner * 2
    for device, forward, backward in (("cpu", (29, 15), (81, 38)), ("cuda", (2, 1), (3, 1))):
        nodes = chunk_nodes(shape_of(config, lora, 1, device), range(1), Workload(1, 16), first=False, last=False)
        (act,) = [node for node in nodes if node.name == "activation"]
        assert (act.forward.traffic / inner, act.forward.calls) == forward
        assert (act.backward.traffic / inner, act.backward.calls) == backward
