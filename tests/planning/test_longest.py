"""The longest row of a layout: it fits, and one that is a percent longer does not."""

from dataclasses import replace

import pytest

from megalora.adapters.config import LoraConfig
from megalora.building import resolve_lora
from megalora.errors import UserError
from megalora.models.config import config_from_dict
from megalora.planning.devices import DEVICES
from megalora.planning.layouts import Planner
from megalora.planning.longest import longest_rows
from megalora.planning.nodes import Workload
from megalora.planning.plans import Cluster, Plan, TooLarge, Wanted

CONFIG = config_from_dict(
    {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
)
LORA = resolve_lora(LoraConfig.from_dict({"r": 4, "target_modules": "all-linear"}), CONFIG)
WORK = Workload(1, 64)


def planner(gpus: int, usable: int, host: int = 0) -> Planner:
    return Planner(CONFIG, LORA, Cluster(gpus, 8, usable, DEVICES["h100"], host))


def test_it_fits_and_a_longer_one_does_not():
    wanted = Wanted(WORK, step_rows=None, schedule="1f1b", cp=None)
    four = planner(4, 2**28)
    plans, _ = longest_rows(four, wanted, 4)
    lengths = [plan.layout.work.seq_length for plan in plans]
    assert lengths == sorted(lengths, reverse=True) and min(lengths) > 4096
    assert {(p.layout.tp, p.layout.pp, p.layout.cp) for p in plans} >= {(1, 1, 1), (1, 1, 4), (2, 1, 2), (2, 2, 1)}
    for plan in plans:
        layout = plan.layout
        assert plan.memory <= 2**28 and (layout.work.rows, layout.microbatches) == (1, layout.pp)
        sizes, asked = (layout.tp, layout.pp, layout.cp), replace(wanted, rows=1, microbatches=layout.pp)
        longer = int(layout.work.seq_length * 1.02) // 1024 * 1024 + 1024
        for length, kind in ((layout.work.seq_length, Plan), (longer, TooLarge)):
            found = four.fastest(sizes, replace(asked, work=replace(WORK, seq_length=length)))
            assert isinstance(found, kind), (sizes, length)


def test_host_memory_makes_it_longer_and_too_little_memory_says_what_is_needed():
    wanted = Wanted(WORK, step_rows=None, schedule="1f1b")
    (plain,), _ = longest_rows(planner(1, 2**28), wanted, 1)
    (host,), _ = longest_rows(planner(1, 2**28, 2**30), wanted, 1)
    assert host.layout.work.seq_length > plain.layout.work.seq_length and host.stages[0].host > 0
    none, (least,) = longest_rows(planner(1, 2**20), wanted, 1)
    assert not none and least.memory.total > 2**20
    with pytest.raises(UserError, match="does not divide gpus"):
        longest_rows(planner(4, 2**28), replace(wanted, tp=3), 4)
