"""Generation without a GPU: small stages, and a recorder of CUDA graphs."""

from __future__ import annotations

import oracle
import torch
from oracle import ALL_LINEAR, fields_of

from megalora.adapters.config import LoraConfig
from megalora.building import build_stage, resolve_lora
from megalora.models.config import config_from_dict
from megalora.parallel.placement import Placement


def make_stage(mesh, family: str):
    config = config_from_dict(fields_of(family))
    lora = resolve_lora(LoraConfig.from_dict(ALL_LINEAR), config)
    stage, _ = build_stage(config, mesh, lora, Placement(mesh.tp, False, torch.float64, "cpu"))
    oracle.fill(stage)
    return stage


class Again:
    def __init__(self, work, result):
        self.work, self.result = work, result

    def replay(self):
        self.result.copy_(self.work())


class WithoutGpu:
    """A recorder (megalora.models.recorder) whose graphs do the work again."""

    def __init__(self):
        self.warm_ups, self.forgotten = [], []

    def record(self, work, *, lasting=False, warm_up=0):
        assert not lasting, "its results are overwritten by the next step"
        self.warm_ups.append(warm_up)
        result = work()
        return result, Again(work, result)

    def forget(self, graphs):
        self.forgotten += graphs
