"""metrics.jsonl says how busy the busiest expert was, the same on every layout, and nothing for a model without."""

import pytest
import tiny
from tiny import Inputs, column, metrics, tune

MIXTRAL = {
    "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 1, "num_key_value_heads": 2,
}  # fmt: skip
FLAGS = {"max_steps": 3, "gradient_accumulation_steps": 2, "logging_steps": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    dense = tiny.make_inputs(folder)
    return Inputs(tiny.save_model(folder / "mixtral", **MIXTRAL), dense.data, dense.lora)


def test_the_busiest_expert_is_logged(inputs, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    tune(1, inputs.flags(one, **FLAGS))
    shares = column(one, "busiest_expert")
    assert len(shares) == 2 and all(1 / 4 < share <= 1 for share in shares)
    flags = FLAGS | {"gradient_accumulation_steps": 1, "recompute": "full"}
    tune(2, inputs.flags(two, **flags))  # two data-parallel ranks: each choice counts once
    assert column(two, "busiest_expert")[0] == shares[0], "before rounding can turn a choice"


def test_a_dense_model_has_none(tmp_path):
    dense = tiny.make_inputs(tmp_path / "inputs")
    tune(1, dense.flags(tmp_path / "run", max_steps=1))
    assert "busiest_expert" not in metrics(tmp_path / "run")[0]
