"""A stage below, at and above the lowest adapter: what its layers keep for backward, and what backward computes."""

import gc
import weakref
from unittest import mock

import pytest
import torch

from megalora.adapters.config import LoraConfig
from megalora.batch import Batch
from megalora.building import resolve_lora
from megalora.models import recompute as again
from megalora.models.blocks import attention as attention_block
from megalora.models.blocks import mlp as mlp_block
from megalora.models.config import config_from_dict
from megalora.models.inputs import training_inputs
from megalora.models.stage import Stage
from megalora.parallel.mesh import Axis
from megalora.parallel.placement import Placement

FIELDS = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 67, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
CONFIG = config_from_dict(FIELDS)
TOKENS = 8


def made(lowest: int, recompute: str, **parts) -> Stage:
    """A stage with adapters in layer `lowest` alone."""
    fields = {"r": 2, "target_modules": "all-linear", "lora_dropout": 0.1, "layers_to_transform": [lowest]}
    lora = resolve_lora(LoraConfig.from_dict(fields), CONFIG)
    stage = Stage(CONFIG, range(4), Placement(Axis(), False, torch.float64, "cpu"), lora, recompute=recompute, **parts)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.normal_(std=0.1)
    stage.refresh_adapters()
    return stage


def inputs():
    index = torch.arange(TOKENS)
    batch = Batch(index, index, index, torch.tensor([0, TOKENS], dtype=torch.int32), index)
    return training_inputs(batch, CONFIG, Placement(Axis(), False, torch.float64, "cpu"), seed=1, step=0)


class Held:
    """A tensor that the graph keeps."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("lowest", [0, 2, 3])
def test_layers_below_the_lowest_adapter_keep_nothing(lowest, recompute):
    stage = made(lowest, recompute)
    layer, packed = [0], []  # 4: norm, head and loss

    def counted(index, call):
        def counting(*args, **named):
            layer[0] = index
            result = call(*args, **named)
            layer[0] = 4 if index == 3 else index
            return result

        return counting

    for i, call in stage.layers.items():
        stage.layers[i] = counted(i, call)

    def pack(tensor):
        held = Held(tensor)
        packed.append((layer[0], weakref.ref(held)))
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        loss = stage(None, inputs())
    gc.collect()
    kept = {i for i, held in packed if held() is not None}
    with mock.patch.object(again, "_again", wraps=again._again) as computed:
        loss.backward()
    if recompute == "full":  # what a layer keeps then is its input: that it is computed again tells whether it has any
        assert computed.call_count == 4 - lowest
    else:
        assert min(kept) == lowest and not computed.called
    assert all(parameter.grad.abs().sum() > 0 for parameter in stage.trainable().values())


@pytest.mark.parametrize("lowest", [0, 2])
def test_the_first_adapted_layer_gives_no_gradient_of_its_input(lowest, monkeypatch):
    stage, wants = made(lowest, "none"), {}
    names = {}  # each layer's calls, in order: q k v, o, the MLP's two groups
    for i, layer in stage.layers.items():
        attention, mlp = layer.blocks
        names |= {call: (i, n) for n, call in enumerate((*attention.groups, mlp.up))}

    def note(module, name, key):
        call = getattr(module, name)

        def noted(what, X, *rest, **named):
            wants[names[key(what)]] = X.requires_grad
            return call(what, X, *rest, **named)

        monkeypatch.setattr(module, name, noted)

    note(attention_block, "apply_group", lambda group: group)
    note(mlp_block, "apply_pair", lambda pair: pair.first)
    stage(None, inputs()).backward()
    assert {name for name, wanted in wants.items() if not wanted} == {
        (i, n) for i in range(lowest + 1) for n in range(3) if i < lowest or n == 0
    }


def test_chunks_are_the_layers_of_one_stage_one_after_another():
    whole = made(0, "none")
    chunked = Stage(CONFIG, range(0, 1), whole.place, whole.lora, further=[range(1, 2), range(2, 4)])
    assert list(chunked.state_dict()) == list(whole.state_dict())
    chunked.load_state_dict(whole.state_dict())
    chunked.refresh_adapters()
    hidden, data = None, inputs()
    for chunk in range(3):
        hidden = chunked(hidden, data, chunk)
    # Between chunks the residual stream is added up, within one it is left to the next norm: rounding may differ.
    assert hidden.item() == pytest.approx(whole(None, data).item(), rel=1e-13)


LEAVES = {
    "granite": {"model_type": "granite", "residual_multiplier": 0.3},
    "gemma2": {"model_type": "gemma2", "head_dim": 8, "layer_types": ["full_attention"] * 4, "rms_norm_eps": 1e-6},
    "starcoder2": {"model_type": "starcoder2", "residual_dropout": 0.2, "norm_epsilon": 1e-5, "rms_norm_eps": None},
}


@pytest.mark.parametrize("family", LEAVES)
def test_what_is_done_to_a_result_is_left_to_the_next_norm_and_changes_nothing(family):
    config = config_from_dict({k: v for k, v in (FIELDS | LEAVES[family]).items() if v is not None})
    lora = resolve_lora(LoraConfig.from_dict({"r": 2, "target_modules": "all-linear"}), config)
    place = Placement(Axis(), False, torch.float64, "cpu")

    def run(leaves: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        stage = Stage(config, range(4), place, lora)
        steps = [step for layer in stage.layers.values() for step in layer.steps]
        assert [step.leaves for step in steps] == [True] * 7 + [False]
        assert [step.before for step in steps] == [None, *(step.ending for step in steps[:-1])]
        for step in steps if not leaves else ():
            step.leaves, step.before = False, None
        with torch.no_grad():
            for parameter in stage.parameters():
                parameter.normal_(std=0.1)
        stage.refresh_adapters()
        index = torch.arange(TOKENS)
        batch = Batch(index, index, index, torch.tensor([0, TOKENS], dtype=torch.int32), index)
        loss = stage(None, training_inputs(batch, config, place, seed=1, step=0))
        return [loss, *torch.autograd.grad(loss, list(stage.trainable().values()))]

    assert all(a.equal(b) for a, b in zip(run(True), run(False), strict=True))


@pytest.mark.parametrize("recompute, leaves", [("none", 7), ("selective", 7), ("norms", 7), ("mlp", 0), ("full", 0)])
def test_no_step_leaves_what_is_computed_again_apart(recompute, leaves):
    steps = [step for layer in made(0, recompute).layers.values() for step in layer.steps]
    assert sum(step.leaves for step in steps) == sum(step.before is not None for step in steps) == leaves
