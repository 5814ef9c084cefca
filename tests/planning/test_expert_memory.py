"""The plan's memory of models of experts against what a built stage holds, to the byte."""

from __future__ import annotations

import pytest
import torch
from oracle import ALL_LINEAR, EXPERTS, fields_of

from megalora.adapters.config import LoraConfig
from megalora.building import resolve_lora
from megalora.models.config import config_from_dict
from megalora.models.stage import Stage
from megalora.optimizer import MOMENTS
from megalora.parallel.experts import ExpertGroup
from megalora.parallel.grads import FlatGradients
from megalora.parallel.mesh import build_mesh
from megalora.parallel.placement import Placement
from megalora.parallel.split import named_splits
from megalora.planning.memory import stage_memory
from megalora.planning.nodes import Workload
from megalora.planning.shapes import shape_of

TARGETS = {
    "all linears": ALL_LINEAR,
    "routers too": ALL_LINEAR | {"target_modules": r"model\.layers\..*"},
    "shared A": ALL_LINEAR | {"expert_lora": "shared_a"},
    "shared A and B": ALL_LINEAR | {"target_modules": r".*\.experts\..*", "expert_lora": "shared"},
    "experts alone": ALL_LINEAR | {"target_modules": r".*\.experts\..*"},
}


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("family", EXPERTS)
def test_plan_counts_what_a_stage_holds(family, targets, tp):
    """Weights with the columns of their branches, masters, copies, gradients and moments of the widest rank."""
    config = config_from_dict(fields_of(family))
    lora = resolve_lora(LoraConfig.from_dict(TARGETS[targets]), config)
    mesh = build_mesh(0, 1)
    axis = mesh.tp if tp == 1 else type(mesh.tp)(1, (0, 1))  # the last rank has the larger part
    stage = Stage(config, range(3), Placement(axis, False, torch.float32, "cpu"), lora)
    for parameter in stage.parameters():
        parameter.data.zero_()
    stage.refresh_adapters()
    trained = stage.trainable()
    frozen = {id(p): p for name, p in stage.named_parameters() if name not in trained}
    matrices = [group.matrix.nbytes for group in stage.groups]
    dense = {id(linear.weight) for group in stage.groups for linear in group.linears}
    others = sum(p.nbytes for key, p in frozen.items() if key not in dense)
    copies = [x for group in stage.groups for x in (group.down, group.bias) if x is not None]
    gradients = FlatGradients(trained, named_splits(stage), mesh)
    shape = shape_of(config, lora, tp, "cpu")
    plan = stage_memory(shape, [range(3)], Workload(1, 24, element=4), first=True, last=True)
    assert any(isinstance(group, ExpertGroup) and group.anchor is not None for group in stage.groups)
    assert plan.weights == sum(matrices) + others
    assert plan.adapters == sum(p.nbytes for p in trained.values()) + sum(x.nbytes for x in copies)
    assert plan.optimizer == gradients.buffer.nbytes * (1 + len(MOMENTS))
