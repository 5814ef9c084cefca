"""Names that flags offer are those of the tables that they stand for."""

import importlib

import pytest
import torch
from torch import nn

from megalora import choices, compute_dtype
from megalora.flags import CONVERT_COMMANDS
from megalora.optimizer import AdapterOptimizer


def test_dtypes():
    assert {name: str(dtype) for name, dtype in compute_dtype.DTYPES.items()} == {
        name: f"torch.{name}" for name in choices.DTYPES
    }


def test_optimizers(monkeypatch):
    monkeypatch.setattr("megalora.optimizer._apex_adam", lambda: torch.optim.AdamW)
    parameters = {"lora_A.weight": nn.Parameter(torch.ones(2, 2))}
    for kind in choices.OPTIMIZERS:
        AdapterOptimizer(parameters, kind=kind)
    with pytest.raises(AssertionError):
        AdapterOptimizer(parameters, kind="sgd")


def test_conversions():
    program = importlib.import_module("megalora.convert")
    recombine = importlib.import_module("megalora.recombine")
    assert (*program._COMMANDS, *recombine.RECOMBINE) == tuple(CONVERT_COMMANDS)
