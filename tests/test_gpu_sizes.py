"""The models of tests on a GPU are models, which shows on a CPU."""

import pytest
from gpu_sizes import sizes
from oracle import ENCODERS, EXPERTS, FAMILIES, fields_of

from megalora.models.config import config_from_dict


@pytest.mark.parametrize("family", [*FAMILIES, *EXPERTS, "qwen3_5_text", "lfm2", "bamba"])
def test_models_of_gpu_tests_are_sound(family):
    for more in ({}, {"head_dim": 64}):  # the second are those of graphs
        assert config_from_dict(fields_of(family, **sizes(family, **more))).num_hidden_layers in (2, 3)


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_of_gpu_tests_are_sound(family):
    assert config_from_dict(fields_of(family, **sizes(family))).num_hidden_layers == 2
