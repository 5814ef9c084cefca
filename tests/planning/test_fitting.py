"""What recompute auto chooses: as little as memory needs."""

import pytest

from megalora.adapters.config import LoraConfig
from megalora.building import resolve_lora
from megalora.models.config import config_from_dict
from megalora.planning.fitting import Budget, Fitting, StageUse, fit
from megalora.planning.free import host_memory
from megalora.planning.nodes import Workload
from megalora.planning.shapes import shape_of

LAYERS = 8
FIELDS = {
    "model_type": "llama", "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 1024,
    "num_hidden_layers": LAYERS, "num_attention_heads": 8, "num_key_value_heads": 2,
    "max_position_embeddings": 1 << 20, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
CONFIG = config_from_dict(FIELDS)
LORA = resolve_lora(LoraConfig.from_dict({"r": 8, "target_modules": "all-linear"}), CONFIG)
STAGE = StageUse(shape_of(CONFIG, LORA, 1), (range(LAYERS),), True, True)
WORK = Workload(1, 65536)


def levels(bytes_: int, host: int = 0) -> list[str]:
    chosen = fit(STAGE, WORK, Budget(bytes_, host))
    assert chosen.lacks == max(0, chosen.memory.total - bytes_) and chosen.host <= host
    assert (chosen.note is None) == (chosen.lacks == 0)
    return [chosen.work.level(i) for i in range(LAYERS)]


def test_as_little_as_needed_in_the_order_of_what_it_costs():
    order, step = ["none", "norms", "mlp", "layer", "full"], 16 << 20
    size = fit(STAGE, WORK, Budget(1 << 50)).memory.total
    assert levels(size) == ["none"] * LAYERS and levels(size - 1)[0] == "norms"
    seen: set[str] = set()
    before = [0] * LAYERS
    while True:
        chosen = fit(STAGE, WORK, Budget(size))
        ranks = [order.index(chosen.work.level(i)) for i in range(LAYERS)]
        assert all(a <= b for a, b in zip(before, ranks, strict=True)), "less memory, and less computed again"
        assert ranks == sorted(ranks, reverse=True) and len(set(ranks)) <= 2, ranks
        seen |= {chosen.work.level(i) for i in range(LAYERS)}
        if chosen.lacks:
            break
        before, size = ranks, size - step
    assert seen == set(order) and ranks == [len(order) - 1] * LAYERS


def test_host_memory_comes_before_attention_is_computed_again():
    bare = fit(STAGE, WORK, Budget(0))  # nothing fits: the least there is
    whole = Fitting("full").choose(STAGE, WORK)
    assert set(levels(0)) == {"full"} and bare.memory == whole.memory and not bare.work.offloaded
    layer = STAGE.memory(Workload(1, 65536, recompute="layer")).total
    chosen = fit(STAGE, WORK, Budget(layer - 1, host=1 << 40))
    assert {chosen.work.level(i) for i in range(LAYERS)} == {"layer"} and chosen.work.offloaded == {0}
    little = fit(STAGE, WORK, Budget(bare.memory.total - 1, host=chosen.host * 2))
    assert not little.lacks and little.host <= chosen.host * 2 and "full" in little.work.recompute
    assert little.words(range(LAYERS)).count("in host memory") >= 1


def test_flags_of_a_run():
    some = Fitting("full", layers=3).choose(STAGE, WORK)
    assert [some.work.level(i) for i in range(LAYERS)] == ["full"] * 3 + ["none"] * (LAYERS - 3)
    assert Fitting("selective").choose(STAGE, WORK).work.recompute == "selective"
    assert Fitting("auto").choose(STAGE, WORK).work.recompute == "none"  # on a CPU
    budget = Budget(1 << 50, 1 << 50)
    assert len(Fitting("full", budget, offloads=True).choose(STAGE, WORK).work.offloaded) == LAYERS
    both = Fitting("full", budget, layers=3, offloads=True).choose(STAGE, WORK).work
    assert both.recompute == some.work.recompute and both.offloaded == {0, 1, 2}
    assert not Fitting("auto", budget, offloads=False).choose(STAGE, WORK).work.offloaded


@pytest.mark.parametrize("version", [1, 2])
def test_host_memory_within_the_control_group(tmp_path, version):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 10 kB\nMemAvailable: 8 kB\n")
    assert host_memory(tmp_path) == 8192 and host_memory(tmp_path / "none") == 0
    group = tmp_path / ("sys/fs/cgroup" if version == 2 else "sys/fs/cgroup/memory")
    group.mkdir(parents=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, ("5000\n", "1000\n"), strict=True):
        (group / name).write_text(value)
    assert host_memory(tmp_path) == 4000
    (group / names[0]).write_text("max\n")
    assert host_memory(tmp_path) == 8192
