"""Tasks: the one that the task_type names is what a run computes and reports."""

import math
from dataclasses import replace

import pytest
import torch
from oracle import FAMILIES, TINY

from megalora import choices
from megalora.adapters.config import LoraConfig
from megalora.building import build_stage, resolve_lora
from megalora.models.config import config_from_dict
from megalora.parallel.mesh import Axis, ParallelMesh
from megalora.parallel.placement import Placement
from megalora.tasks import TASKS, CausalLM


def test_the_names_are_those_that_lora_config_takes():
    assert tuple(TASKS) == choices.TASKS
    for name in TASKS:
        assert LoraConfig.from_dict({"task_type": name}).task_type == name


@pytest.mark.parametrize("loss, perplexity", [(0.0, 1.0), (2.0, math.exp(2.0)), (701.0, math.inf)])
def test_perplexity(loss, perplexity):
    assert CausalLM().report([loss * 4], 4) == {"loss": loss, "perplexity": perplexity}


def test_a_stage_computes_the_loss_of_its_task(monkeypatch):
    class Other(CausalLM):
        pass

    other = Other()
    monkeypatch.setattr("megalora.building.TASKS", {"OTHER": other})
    config = config_from_dict(TINY | FAMILIES["llama"])
    lora = resolve_lora(LoraConfig(), config)
    lora = replace(lora, config=replace(lora.config, task_type="OTHER"))
    place = Placement(Axis(), False, torch.float32, "cpu")
    stage, _ = build_stage(config, ParallelMesh(), lora, place)
    assert stage.loss == other.loss
