"""Decoders that people tune today: the same numbers on every layout, those of transformers, and with a cache."""

import os

import pytest
import variants
from oracle import MODERN, check_runs

NAMES = list(MODERN)
EAGER = ("gemma2", "vaultgemma", "granite_swa")  # in transformers, for softcaps and sinks


def test_every_layout_gives_the_numbers_of_one_process():
    """`make proof`: each variant on every one of the layouts."""
    every = os.environ.get("MEGALORA_PROOF") == "all"
    check_runs(4, variants.layout_runs(NAMES, every))


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_are_those_of_transformers(name, tmp_path):
    variants.check_parity(name, tmp_path, attention="eager" if name.startswith(EAGER) else "sdpa")


@pytest.mark.parametrize("name", NAMES)
def test_greedy_replies_are_those_of_transformers(name, tmp_path):
    long = {"lengths": (20, 5), "new": 6} if MODERN[name].get("rope_scaling", {}).get("type") == "longrope" else {}
    variants.check_greedy(name, tmp_path, attention="eager" if name.startswith(EAGER) else "sdpa", **long)
