"""Every recipe is sound: its flags, its layout on the GPUs that it names, and a run of it on a tiny model."""

import json
import re
import shlex

import pytest
import tiny

from megalora import cli
from megalora.adapters.config import LoraConfig
from megalora.building import resolve_lora
from megalora.errors import UserError
from megalora.flags import parse_finetune
from megalora.models.config import config_from_dict
from megalora.planning.devices import DEVICES
from megalora.planning.layouts import Planner
from megalora.planning.nodes import Workload
from megalora.planning.plans import Cluster, Wanted
from megalora.recipes import recipe_file, recipes

RECIPES = recipes()
PATHS = ["--model_path", "m", "--data_path", "d.json", "--output_dir", "o"]
LLAMA = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
QWEN = {"model_type": "qwen2", "vocab_size": 152064, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6}


def shape(kind, hidden, inner, layers, heads, kv, **more):
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return kind | sizes | {"num_attention_heads": heads, "num_key_value_heads": kv} | more


SHAPES = {
    "DeepSeek-R1-Distill-Qwen-1.5B": shape(QWEN, 1536, 8960, 28, 12, 2, vocab_size=151936),
    "DeepSeek-R1-Distill-Qwen-7B": shape(QWEN, 3584, 18944, 28, 28, 4),
    "DeepSeek-R1-Distill-Qwen-14B": shape(QWEN, 5120, 13824, 48, 40, 8),
    "DeepSeek-R1-Distill-Qwen-32B": shape(QWEN, 5120, 27648, 64, 40, 8),
    "DeepSeek-R1-Distill-Llama-8B": shape(LLAMA, 4096, 14336, 32, 32, 8),
    "DeepSeek-R1-Distill-Llama-70B": shape(LLAMA, 8192, 28672, 80, 64, 8),
    "Qwen3-8B": shape(QWEN, 4096, 12288, 36, 32, 8, model_type="qwen3", head_dim=128, vocab_size=151936),
}
RESERVE = 4 * 2**30


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return tiny.make_inputs(tmp_path_factory.mktemp("inputs"))


def test_the_list_names_them_all(capsys):
    assert cli.main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert all(recipe.name in out and recipe.what in out for recipe in RECIPES) and len(RECIPES) >= 20
    assert cli.main(["recipes", "--all"]) == 2
    with pytest.raises(UserError, match="unknown recipe:r1-distill-lama-8b: did you mean recipe:r1-distill-llama-8b?"):
        recipe_file("r1-distill-lama-8b")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_its_launch_command_is_sound(recipe):
    """And the flags on the command line hold over those of the file."""
    words = shlex.split(recipe.launch.split("megalora finetune ")[1])
    arguments = parse_finetune(words)
    assert words[0] == f"recipe:{recipe.name}" and arguments.model.model_path == "DIR"
    changed = parse_finetune([*words, "--warmup_steps", "2", "--global_batch_size", "64"])
    assert changed.train.warmup(100) == 2 and changed.train.global_batch_size == 64
    LoraConfig.from_json(arguments.model.lora_config or "{}")


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.gpus != "none"], ids=lambda recipe: recipe.name)
def test_its_layout_fits_the_gpus_it_names(recipe):
    gpus, gib = map(int, re.match(r"(\d+) x (\d+) GB", recipe.gpus).groups())
    arguments = parse_finetune([f"recipe:{recipe.name}", *PATHS])
    parallel, train = arguments.parallel, arguments.train
    assert parallel.nproc in (gpus, None) and (parallel.nproc is None) == (gpus == 1 or "hosts" in recipe.gpus)
    config = config_from_dict(SHAPES[recipe.model])
    lora = resolve_lora(LoraConfig.from_json(arguments.model.lora_config), config)
    usable = gib * 10**9 - RESERVE
    planner = Planner(config, lora, Cluster(gpus, min(gpus, 8), usable, DEVICES["h100"]))
    form = "dense" if arguments.model.base_format == "auto" else arguments.model.base_format
    work = Workload(1, arguments.data.seq_length, element=2, base_format=form)
    rows, microbatches = train.per_device_train_batch_size, train.gradient_accumulation_steps
    sizes = {"tp": parallel.tensor_parallel_size, "pp": parallel.pipeline_parallel_size}
    wanted = Wanted(work, None, rows, microbatches, **sizes, schedule=parallel.schedule, recompute=parallel.recompute)
    plans, _ = planner.search(wanted)
    assert plans and plans[0].memory <= usable


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_it_trains(recipe, inputs, tmp_path):
    """On one process, on short rows."""
    kept = [line for line in recipe_file(recipe.name).read_text().splitlines() if not line.startswith("nproc: ")]
    (tmp_path / "run.yaml").write_text("\n".join(kept))
    words = [tmp_path / "run.yaml", "--model_path", inputs.model, "--data_path", inputs.data]
    words += ["--output_dir", tmp_path / "out", "--seq_length", "64", "--max_steps", "1"]
    words += ["--tensor_parallel_size", "1", "--pipeline_parallel_size", "1", "--gradient_accumulation_steps", "1"]
    tiny.tune(1, [str(word) for word in words])
    line = json.loads((tmp_path / "out/metrics.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 1 and line["loss"] > 0
