"""From a config to stages: how the ways to cut it meet the model."""

from dataclasses import replace
from unittest import mock

import pytest
import tiny
import torch
from spawn import spawn

from megalora import building
from megalora.adapters.config import LoraConfig
from megalora.building import build_stage, load_base_weights, resolve_lora, settle_head, stage_layers
from megalora.models.config import config_from_dict, read_config
from megalora.models.stage import Stage
from megalora.parallel.mesh import Axis, ParallelMesh, build_mesh
from megalora.parallel.placement import Placement
from megalora.planning.nodes import Workload

CONFIG = config_from_dict(
    {
        "model_type": "llama",
        "vocab_size": 4000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
)


def cut(method: str, **lora):
    resolved = resolve_lora(LoraConfig.from_dict(lora), CONFIG)
    mesh = ParallelMesh(pp=Axis(1, (0, 1, 2)))
    place = Placement(mesh.tp, False, torch.float32, "meta")
    stage, cut = build_stage(CONFIG, mesh, resolved, place, partition_method=method, workload=Workload(2, 64))
    assert list(stage.layers) == list(cut.layers[1])
    return cut


def test_cost_gives_no_stage_a_larger_share_than_uniform_does():
    uniform, cost = cut("uniform", r=4), cut("cost", r=4)
    assert max(cost.shares) < max(uniform.shares)
    assert sum(cost.shares) == pytest.approx(1)
    assert len(cost.layers[-1]) < len(uniform.layers[-1]), "the last stage has the head"


def test_cost_counts_the_floor():
    upper = {"r": 4, "layers_to_transform": [8, 9, 10, 11]}
    assert len(cut("cost", **upper).layers[0]) > len(cut("cost", r=4).layers[0])
    assert cut("cost", **upper).floor >= 1


def cut_by_unlike_ranks(rank: int, world_size: int):
    def seconds(*arguments):
        costs = layer_seconds(*arguments)
        return replace(costs, last=costs.last * (1 + 3 * rank))

    layer_seconds, mesh = building.layer_seconds, build_mesh(rank, world_size, pp=world_size)
    place, lora = Placement(mesh.tp, False, torch.float32, "meta"), resolve_lora(LoraConfig.from_dict({"r": 4}), CONFIG)
    with mock.patch.object(building, "layer_seconds", seconds):
        return build_stage(CONFIG, mesh, lora, place, partition_method="cost", workload=Workload(2, 64))[1]


def test_ranks_on_unlike_devices_cut_alike():
    first, second = spawn(cut_by_unlike_ranks, 2)
    assert first == second


def test_cost_without_a_run_is_that_of_the_forward():
    layers = stage_layers(CONFIG, 3, "cost", None)
    assert [i for part in layers for i in part] == list(range(12))


def test_a_head_in_the_files_of_a_tied_model_is_used(tmp_path):
    """As transformers does; a copy of the embedding is a tie (a loss from the wrong head is silently wrong)."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    folder = tiny.save_model(tmp_path / "tied", tie_word_embeddings=True)
    tied = read_config(folder)
    assert settle_head(tied, folder) == (tied, None), "the files hold one matrix"
    tensors = load_file(folder / "model.safetensors")
    for changed in (False, True):
        head = tensors["model.embed_tokens.weight"].clone()
        head[-1, -1] += float(changed)
        save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
        config, note = settle_head(tied, folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder)
        stage = Stage(config, range(2), Placement(Axis(0, (0,)), False, torch.float32, "cpu"))
        load_base_weights(stage, folder)
        assert torch.equal(stage.head.weight, theirs.lm_head.weight)
        assert torch.equal(stage.head.weight, head)
        assert config.head.tied is not changed and ("the head of the files is used" in (note or "")) is changed
