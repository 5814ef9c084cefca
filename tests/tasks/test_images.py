"""Texts behind images: every layout gives the numbers of one process, and those are transformers' and peft's.

transformers reads one image and text at a time, ours packed rows. All weights are drawn from their names on both sides,
and images from theirs.
"""

import os
from dataclasses import replace

import peft
import pytest
import torch
import transformers
from oracle import (
    ALL_LINEAR,
    IMAGES,
    Run,
    behind_image,
    check_runs,
    fields_of,
    fill,
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
from megalora.models.spec import ModelSpec
from megalora.models.stage import NO_LORA, Stage
from megalora.parallel.mesh import Axis
from megalora.parallel.placement import Placement
from megalora.parallel.split import named_splits
from megalora.planning.memory import stage_memory
from megalora.planning.nodes import Workload
from megalora.planning.shapes import shape_of
from megalora.tasks import TASKS

LAYOUTS = {  # of 4 processes
    "blip-2, opt": (
        {"tp": 2, "pp": 2, "sequence_parallel": True, "recompute": "full"},
        {"tp": 4, "sequence_parallel": True, "micro_batch_rows": 2, "recompute": "selective"},
        {"pp": 2, "chunks": 2, "schedule": "interleaved_1f1b", "micro_batch_rows": 2},
    ),
    "blip-2, t5": (
        {"tp": 2, "pp": 2, "sequence_parallel": True, "recompute": "full"},
        {"pp": 4, "recompute": "layer", "schedule": "gpipe"},
        {"tp": 2, "micro_batch_rows": 2},
    ),
}
SIZE = 28  # of an image, as IMAGES says


def layouts(every: bool = False) -> list[Run]:
    """Each variant on its own layouts, short; every: on those of the other too, and longer. And cut documents."""
    of_any = [layout for own in LAYOUTS.values() for layout in own]
    chosen = {family: of_any if every else own for family, own in LAYOUTS.items()}
    found = [Run(family).on(**layout) for family, own in chosen.items() for layout in own]
    found += [Run("blip-2, opt", cp=2, tp=2)]
    return found if every else [run.short(4) for run in found]


def test_layouts_of_four_processes():
    """`make proof`: both variants on every one of the layouts, and longer."""
    runs = layouts(every=os.environ.get("MEGALORA_PROOF") == "all")
    check_runs(4, runs)


# ---- transformers and peft


def task_of(config: ModelSpec) -> str:
    return config.tasks[0]


def lora_of(config: ModelSpec) -> dict:
    return {"r": 3, "lora_alpha": 6, "target_modules": ALL_LINEAR["target_modules"], "task_type": task_of(config)}


def samples(config: ModelSpec) -> list[Sample]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for number, (asked, said) in enumerate(((17, 5), (9, 12), (4, 3), (20, 7), (2, 13), (1, 2))):
        ids = torch.randint(2, config.prefix.placeholder, (asked + said,), generator=generator)
        labels = torch.where(torch.arange(len(ids)) >= asked, ids, -100)
        sample = Sample(ids.numpy().astype("int32"), labels.numpy().astype("int32"))
        found.append(behind_image(sample, config, number))
    return found


def spec_of(family: str) -> ModelSpec:
    return without_base_dropout(config_from_dict(fields_of(family)))


def batch_of(config: ModelSpec, documents: list[Sample], bins: list[list[int]]):
    sides = None if config.encoder is None else Sides(64, config.encoder.start)
    packed = build_rows(documents, bins, 64, 0, sides)
    loader = Loader(
        packed, micro_batch_rows=len(bins), num_microbatches=1, dp_rank=0, dp_size=1, seed=0, shuffle=False
    )
    return loader.step(0).microbatches[0]


def stage_of(config: ModelSpec) -> Stage:
    lora = resolve_lora(LoraConfig.from_dict(lora_of(config)), config)
    place, task = Placement(Axis(), False, torch.float64, "cpu"), TASKS[task_of(config)]
    stage = Stage(config, range(config.num_hidden_layers), place, lora, loss=task.loss, sums=task.sums)
    fill(stage)
    parameters = dict(stage.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, split in named_splits(stage).items():
            if "lora_" in name:
                parameters[name].copy_(split.slice(whole_tensor(name, split.global_shape, 0.15)))
    stage.refresh_adapters()
    return stage


def ours(config: ModelSpec):
    """(loss sum, gradients)"""
    stage = stage_of(config)
    batch = batch_of(config, samples(config), [[0, 1], [2, 3], [4, 5]])
    loss = stage(None, training_inputs(batch, config, stage.place, seed=1, step=0))
    loss.backward()
    splits = named_splits(stage)
    return loss.item(), {name: in_file_order(splits[name], p.grad) for name, p in stage.trainable().items()}


def theirs(family: str, config: ModelSpec):
    raw = fields_of(family)
    raw.pop("model_type")
    model = transformers.Blip2ForConditionalGeneration(transformers.Blip2Config(**raw)).double()
    lora = peft.LoraConfig(**lora_of(config) | {"target_modules": sorted(config.linears)})
    model = peft.get_peft_model(model, lora).double().eval()
    with torch.no_grad():
        for name, values in model.named_parameters():
            values.copy_(whole_tensor(plain_name(name), tuple(values.shape), 0.15))
    total = 0.0
    for sample in samples(config):
        ids, labels = (torch.from_numpy(one).long()[None] for one in (sample.input_ids, sample.labels))
        first, pixels = int((labels == -100).sum()), whole_tensor(sample.picture.digest, (3, SIZE, SIZE), 1.0)[None]
        if config.encoder is not None:
            ids, labels = ids[:, :first], labels[:, first:]
        said = int((labels != -100).sum())
        total = total + said * model(input_ids=ids, pixel_values=pixels, labels=labels).loss
    total.backward()
    return total.item(), {plain_name(name): p.grad for name, p in model.named_parameters() if p.requires_grad}


def plain_name(name: str) -> str:
    """peft's name of a parameter -> ours."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".default.", ".")


@pytest.mark.parametrize("family", IMAGES)
def test_the_numbers_of_transformers_and_peft(family):
    config = spec_of(family)
    loss, gradients = ours(config)
    their_loss, their_gradients = theirs(family, config)
    assert gradients.keys() == their_gradients.keys()
    assert abs(loss - their_loss) <= 1e-7 * abs(their_loss)
    for name, gradient in gradients.items():
        scale = their_gradients[name].abs().max()
        assert scale > 1e-6 and (gradient - their_gradients[name]).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize("family", IMAGES)
def test_a_document_sees_its_own_image_alone(family):
    config = spec_of(family)
    stage, (first, second, *_) = stage_of(config), samples(config)

    def loss(*documents: Sample) -> float:
        batch = batch_of(config, list(documents), [[*range(len(documents))]])
        with torch.no_grad():
            return stage(None, training_inputs(batch, config, stage.place, seed=None, step=0)).item()

    assert loss(first, second) == pytest.approx(loss(first) + loss(second), rel=1e-13)
    other = replace(second, picture=replace(second.picture, digest="another image"))
    assert abs(loss(other) - loss(second)) > 1e-6
    assert loss(first, other) - loss(other) == pytest.approx(loss(first), rel=1e-12)


def test_vectors_are_kept_up_to_a_bound():
    config = spec_of("blip-2, opt")
    prefix, read = stage_of(config).embedding.prefix, []
    draw = prefix.read
    prefix.read = lambda picture: read.append(picture.digest) or draw(picture)
    a, b, c = (sample.picture for sample in samples(config)[:3])
    one = prefix.vectors(a)
    assert torch.equal(prefix.vectors(a), one) and one.shape == (config.prefix.tokens, config.hidden_size)
    assert read == [a.digest]
    prefix.kept_bytes = 2 * one.nbytes
    for picture in (b, a, c, a, b):  # c takes the place of b, which was not asked for longest
        prefix.vectors(picture)
    assert read == [one.digest for one in (a, b, c, b)]


def test_every_tensor_of_the_file_is_one_of_transformers():
    for family in IMAGES:
        raw = fields_of(family)
        raw.pop("model_type")
        with torch.device("meta"):
            model = transformers.Blip2ForConditionalGeneration(transformers.Blip2Config(**raw))
        config = config_from_dict(fields_of(family))
        theirs = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        assert config.tensors.items() <= theirs.items()
        tied = {name.rpartition(".")[0].rpartition(".")[2] for name in theirs.keys() - config.tensors.keys()}
        assert tied <= {"lm_head", "embed_tokens"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_plan_counts_the_prefix(dtype):
    """The bytes of its weights, on the first stage alone."""
    config = spec_of("blip-2, t5")
    place = Placement(Axis(), False, dtype, "cpu")
    parts = (range(2), True), (range(2, 4), False)
    stages = [Stage(config, layers, place, first=first, last=not first) for layers, first in parts]
    held = [sum(p.nbytes for name, p in stage.named_parameters() if "language_model." not in name) for stage in stages]
    work, shape = Workload(1, 24, element=dtype.itemsize, source_length=32), shape_of(config, NO_LORA, 1, "cpu")
    bare = replace(shape, prefix=(0, 0))
    for (layers, first), size in zip(parts, held, strict=True):
        counted, without = (
            stage_memory(one, [layers], work, first=first, last=not first).weights for one in (shape, bare)
        )
        assert counted - without == size and (size > 0) is first
