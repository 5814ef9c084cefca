"""Encoder-decoders: every layout gives the numbers of one process, and those are the numbers of transformers and peft.

transformers reads one pair at a time, ours packed rows. All weights are drawn from their names on both sides.
"""

import os
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from oracle import (
    ALL_LINEAR,
    SEQ2SEQ,
    Run,
    check_runs,
    fields_of,
    in_file_order,
    whole_tensor,
)

from megalora.adapters.config import LoraConfig
from megalora.building import resolve_lora
from megalora.data import Sample, build_rows
from megalora.data.loader import Loader
from megalora.data.packing import Sides
from megalora.models.config import config_from_dict
from megalora.models.dropouts import without_base_dropout
from megalora.models.inputs import training_inputs
from megalora.models.stage import Stage
from megalora.parallel.mesh import Axis
from megalora.parallel.placement import Placement
from megalora.parallel.split import named_splits
from megalora.tasks import TASKS

LAYOUTS = {  # of 4 processes
    "t5": (
        {"tp": 2, "pp": 2, "sequence_parallel": True, "recompute": "full"},
        {"pp": 4, "recompute": "layer", "schedule": "gpipe"},
    ),
    "t5, version 1.1": (
        {"tp": 4, "sequence_parallel": True, "recompute": "mlp", "tile": 8},
        {"pp": 2, "custom_partition": (1, 4), "partition_method": "custom"},
    ),
    "mt5": ({"tp": 2, "recompute": "selective"},),
    "umt5": (
        {"tp": 2, "pp": 2, "sequence_parallel": True, "recompute": "full"},
        {"pp": 2, "recompute": "layer", "micro_batch_rows": 2},
    ),
    "mbart": ({"tp": 2, "pp": 2, "sequence_parallel": True, "recompute": "full"}, {"tp": 2, "recompute": "selective"}),
    "pegasus": ({"tp": 4, "sequence_parallel": True, "recompute": "mlp", "tile": 8}, {"pp": 2, "recompute": "layer"}),
    "m2m_100": ({"pp": 4, "recompute": "full", "schedule": "gpipe"}, {"tp": 2, "sequence_parallel": True}),
    "bart": (
        {"tp": 2, "pp": 2, "sequence_parallel": True, "recompute": "layer"},
        {"pp": 2, "chunks": 2, "schedule": "interleaved_1f1b", "micro_batch_rows": 2},
    ),
}
# Adapters of the encoder alone, and of the keys of cross attention alone.
FEW = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.1}
PARTS = {
    "encoder": FEW | {"target_modules": r"encoder\..*\.(v|wi)"},
    "keys": FEW | {"target_modules": r".*\.EncDecAttention\.(k|v)"},
}


def layouts(every: bool = False) -> list[Run]:
    """Each variant on its own layouts, short; every: on those of the others too, and longer. And adapters of a part."""
    of_any = [layout for own in LAYOUTS.values() for layout in own if "custom_partition" not in layout]
    found = []
    for family, own in LAYOUTS.items():
        chosen = [*own, *(layout for layout in of_any if every and layout not in own)]
        found += [Run(family).on(**layout) for layout in chosen]
    found += [Run("t5", lora=lora, pp=4, recompute="full") for lora in PARTS.values()]
    return found if every else [run.short(4) for run in found]


def test_layouts_of_four_processes():
    """`make proof`: each variant on every one of the layouts, and longer."""
    runs = layouts(every=os.environ.get("MEGALORA_PROOF") == "all")
    check_runs(4, runs)


# ---- transformers and peft

LORA = {"r": 3, "lora_alpha": 6, "target_modules": ALL_LINEAR["target_modules"], "task_type": "SEQ_2_SEQ_LM"}


def pairs(vocab_size: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for source, target in ((17, 5), (9, 12), (4, 3), (30, 7), (2, 20), (1, 2)):
        ids = torch.randint(2, vocab_size, (source + target,), generator=generator)
        labels = torch.where(torch.arange(len(ids)) >= source, ids, -100)
        found.append(Sample(ids.numpy().astype("int32"), labels.numpy().astype("int32")))
    return found


def spec_of(family: str):
    return without_base_dropout(config_from_dict(fields_of(family)))


def ours(family: str, dtype: torch.dtype):
    """(loss sum, gradients)"""
    config = spec_of(family)
    lora = resolve_lora(LoraConfig.from_dict(LORA), config)
    place, task = Placement(Axis(), False, dtype, "cpu"), TASKS["SEQ_2_SEQ_LM"]
    stage = Stage(config, range(config.num_hidden_layers), place, lora, loss=task.loss, sums=task.sums)
    parameters = dict(stage.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, split in named_splits(stage).items():
            tied = name == config.head.weight and config.head.tied
            whole = whole_tensor(config.embedding.weight if tied else name, split.global_shape, 0.15)
            parameters[name].copy_(split.slice(whole))
    stage.refresh_adapters()
    sides = Sides(36, config.encoder.start)
    packed = build_rows(pairs(config.vocab_size), [[0, 1, 2], [3, 4], [5]], 30, 0, sides)
    loader = Loader(packed, micro_batch_rows=3, num_microbatches=1, dp_rank=0, dp_size=1, seed=0, shuffle=False)
    loss = stage(None, training_inputs(loader.step(0).microbatches[0], config, place, seed=1, step=0))
    loss.backward()
    splits = named_splits(stage)
    return loss.item(), {name: in_file_order(splits[name], p.grad) for name, p in stage.trainable().items()}


def theirs(family: str, dtype: torch.dtype):
    spec, raw = spec_of(family), fields_of(family)
    config = transformers.CONFIG_MAPPING[raw.pop("model_type")](**raw)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager").to(dtype)
    lora = peft.LoraConfig(**LORA | {"target_modules": sorted(spec.linears)})
    model = peft.get_peft_model(model, lora).to(dtype)
    with torch.no_grad():
        for name, values in (*model.named_parameters(), *model.named_buffers()):
            computed = "embed_positions" in name and plain_name(name) not in spec.tensors  # sines and cosines
            if values.is_floating_point() and not computed:
                values.copy_(whole_tensor(plain_name(name), tuple(values.shape), 0.15))
    model.eval()
    total = 0.0
    for pair in pairs(spec.vocab_size):
        ids, first = torch.from_numpy(pair.input_ids).long(), int((pair.labels == -100).sum())
        source, target = ids[None, :first], ids[None, first:]
        read = torch.cat([torch.tensor([[spec.encoder.start]]), target[:, :-1]], 1)  # mBART would begin with the last
        total = total + len(target[0]) * model(input_ids=source, decoder_input_ids=read, labels=target).loss
    total.backward()
    return total.item(), {plain_name(name): p.grad for name, p in model.named_parameters() if p.requires_grad}


def plain_name(name: str) -> str:
    """peft's name of a parameter -> ours."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".default.", ".")


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_the_numbers_of_transformers_and_peft(family):
    loss, gradients = ours(family, torch.float64)
    their_loss, their_gradients = theirs(family, torch.float64)
    assert gradients.keys() == their_gradients.keys()
    assert abs(loss - their_loss) <= 1e-5 * abs(their_loss)
    for name, gradient in gradients.items():
        scale = their_gradients[name].abs().max()
        assert scale > 1e-6 and (gradient - their_gradients[name]).abs().max() <= 1e-5 * scale, name


def test_a_pair_sees_no_other():
    config = spec_of("t5")
    first, second = pairs(config.vocab_size)[:2]
    place, sides = Placement(Axis(), False, torch.float64, "cpu"), Sides(36, config.encoder.start)
    stage = Stage(config, range(config.num_hidden_layers), place)
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            parameter.copy_(whole_tensor(name, tuple(parameter.shape), 0.15))

    def loss(*documents: Sample) -> float:
        packed = build_rows(documents, [range(len(documents))], 30, 0, sides)
        loader = Loader(packed, micro_batch_rows=1, num_microbatches=1, dp_rank=0, dp_size=1, seed=0, shuffle=False)
        with torch.no_grad():
            return stage(None, training_inputs(loader.step(0).microbatches[0], config, place, seed=None, step=0)).item()

    assert loss(first, second) == pytest.approx(loss(first) + loss(second), rel=1e-13)
    other = replace(second, input_ids=(second.input_ids + 1) % config.vocab_size)
    assert loss(first, other) - loss(other) == pytest.approx(loss(first), rel=1e-12)
