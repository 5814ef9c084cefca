"""The six DeepSeek-R1-Distill models, cut into stages on the meta device: every parameter is somewhere, once."""

import math

import pytest
import torch
import transformers
from published_configs import CONFIGS

from megalora.adapters.config import LoraConfig
from megalora.building import resolve_lora
from megalora.models.config import check_layout, config_from_dict, read_config
from megalora.models.stage import NO_LORA, Stage
from megalora.parallel.mesh import Axis
from megalora.parallel.placement import Placement
from megalora.parallel.split import Split, named_splits
from megalora.pipeline.partition import METHODS, partition

PARAMETERS = {
    "Llama-8B": 8_030_261_248,
    "Llama-70B": 70_553_706_496,
    "Qwen-1.5B": 1_777_088_000,
    "Qwen-7B": 7_615_616_512,
    "Qwen-14B": 14_770_033_664,
    "Qwen-32B": 32_763_876_352,
}


@pytest.fixture(params=PARAMETERS)
def name(request):
    return request.param


@pytest.fixture
def path(shared_dir, name):
    return shared_dir / "data" / "configs" / f"DeepSeek-R1-Distill-{name}.json"


def stages(config, tp: int, pp: int, lora=NO_LORA, method: str = "uniform"):
    """Every (tp rank, stage) of a layout, without a process."""
    parts = partition(method, [1] * config.num_hidden_layers, pp)
    for rank in range(tp):
        place = Placement(Axis(rank, tuple(range(tp))), False, torch.bfloat16, "meta")
        for s, layers in enumerate(parts):
            yield rank, Stage(config, layers, place, lora, first=s == 0, last=s == pp - 1)


def held(config, tp: int, pp: int, **options) -> dict[str, list[tuple[Split, int]]]:
    """Of each parameter, for each rank that has it: (its Split, how many elements this rank counts)."""
    found = {}
    for _, stage in stages(config, tp, pp, **options):
        splits = named_splits(stage)
        for name, parameter in stage.named_parameters():
            split = splits[name]
            counted = sum(part.numel() for part in split.owned(parameter))
            found.setdefault(name, []).append((split, counted))
            assert tuple(parameter.shape) == split.local_shape, name
    return found


@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 4), (4, 4)])
def test_every_parameter_is_held_and_counted_once(name, path, tp, pp):
    config = read_config(path)
    check_layout(config, tp, pp)
    found = held(config, tp, pp)
    expected = config.tensors
    assert set(found) == set(expected)
    for parameter, parts in found.items():
        whole = expected[parameter]
        assert {split.global_shape for split, _ in parts} == {whole}
        times = tp if "norm" in parameter else 1  # norms are frozen: no rank leaves them to another
        assert sum(counted for _, counted in parts) == times * math.prod(whole), parameter
        places = {run[:2] for split, _ in parts for run in split.runs or ((0, whole[0]),)}
        bounds = sorted(places)
        assert bounds[0][0] == 0 and bounds[-1][1] == whole[parts[0][0].dim or 0]
        assert all(a[1] == b[0] for a, b in zip(bounds[:-1], bounds[1:], strict=True)), f"{parameter}: a gap"
    total = sum(sum(counted for _, counted in parts) // (tp if "norm" in n else 1) for n, parts in found.items())
    assert total == PARAMETERS[name]


def test_names_and_shapes_are_those_of_transformers(path):
    config = transformers.AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    assert read_config(path).tensors == {n: tuple(p.shape) for n, p in theirs.named_parameters()}


@pytest.mark.parametrize("method", [m for m in METHODS if m != "custom"])
def test_adapters_are_counted_once(path, method):
    """r (in + out) for each adapted linear."""
    config = read_config(path)
    lora = LoraConfig.from_dict({"r": 8, "target_modules": "all-linear"})
    lora = resolve_lora(lora, config)
    found = held(config, 2, 4, lora=lora, method=method)
    counted = sum(count for n, parts in found.items() if ".lora_" in n for _, count in parts)
    shapes = config.tensors
    linears = [n for n, shape in shapes.items() if len(shape) == 2 and ".layers." in n]
    assert len(linears) == 7 * config.num_hidden_layers
    assert counted == sum(8 * sum(shapes[n]) for n in linears)


# ---- decoders of today


@pytest.mark.parametrize("name", CONFIGS)
def test_published_configs_are_cut_into_stages(name):
    """At tp 2, pp 4 every parameter is counted once, and there are as many as the model is published with."""
    raw, parameters = CONFIGS[name]
    config = config_from_dict(raw)
    check_layout(config, 2, 4)
    found, total = held(config, 2, 4), 0
    if config.head.tied:
        del found[config.head.weight]
    assert set(found) == set(config.tensors)
    for parameter, parts in found.items():
        whole = math.prod(config.tensors[parameter])
        counted = sum(count for _, count in parts)
        shared = "norm" in parameter or "act_fn" in parameter  # which every rank holds
        assert counted in (whole, 2 * whole if shared else whole), parameter
        total += whole
    assert total == parameters


@pytest.mark.parametrize(
    "name", ["gemma-3-1b-it", "stablelm-2-12b", "OLMo-2-1124-7B", "Minitron-4B-Base", "starcoder2-3b"]
)
def test_published_configs_have_the_names_of_transformers(name):
    raw = dict(CONFIGS[name][0])
    config = transformers.CONFIG_MAPPING[raw["model_type"]](**{k: v for k, v in raw.items() if k != "model_type"})
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    assert config_from_dict(raw).tensors == {n: tuple(p.shape) for n, p in theirs.named_parameters()}
