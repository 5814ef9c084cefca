"""The launch as the reference's documentation prints it, by real processes; and every place weights may come from."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
import tiny
import torch
from safetensors.torch import load_file
from spawn import spawn
from tiny import column, exported, largest_difference, metrics, tune
from waiting import PATIENCE

from megalora.adapters.config import LoraConfig
from megalora.building import build_stage, load_base_weights, resolve_lora
from megalora.checkpoint.adapter.shards import read_adapter
from megalora.checkpoint.base.shards import save_base_shards
from megalora.checkpoint.layout import Layout
from megalora.models.config import read_config
from megalora.parallel.mesh import build_mesh
from megalora.parallel.placement import Placement
from megalora.parallel.split import named_splits

REFERENCE = """--output_dir ./output/medi --per_device_train_batch_size 1 --gradient_accumulation_steps 1
--wall_clock_breakdown True --logging_steps 1 --partition_method 'uniform_floor' --num_train_epochs 100
--no_tie_modules true --input_names 'input_ids' 'attention_mask' --split_method 'layer_split' --fp16 false
--save true --save_steps 10 --seq_length 2048 --lora_config './lora_config.json' --model_path DIR
--resume_from_checkpoint DIR --resume_peft_from_checkpoint './lora_checkpoint'"""
ITS_LORA_CONFIG = {
    "task_type": "CAUSAL LM",
    "inference_mode": False,
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "target_modules": ["q_proj", "v_proj"],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return tiny.make_inputs(tmp_path_factory.mktemp("inputs"))


def test_the_reference_launch(inputs, tmp_path):
    """At two processes, which is dp2; from the shards of an adapter that another run left."""
    tiny.write_json(tmp_path / "lora_config.json", ITS_LORA_CONFIG)
    tiny.write_json(tmp_path / "rows.json", tiny.questions(160))  # two rows of 2048 tokens, nearly full
    tune(1, inputs.flags(tmp_path / "earlier", lora_config=tmp_path / "lora_config.json", max_steps=2))
    shutil.copytree(tmp_path / "earlier/checkpoints/iter_0000002", tmp_path / "lora_checkpoint")
    command = shlex.split(REFERENCE.replace("DIR", str(inputs.model)) + " --data_path rows.json")
    done = tiny.torchrun(tmp_path, 2, *command)
    assert done.returncode == 0, done.stderr
    assert "starting from the adapter lora_checkpoint" in done.stdout
    assert "2 = tensor 1 x pipeline 1 x data 2" in done.stdout and "step 100/100" in done.stdout

    output = tmp_path / "output/medi"
    lines = metrics(output)
    assert [line["step"] for line in lines] == [*range(1, 101)], "an epoch is one step here"
    assert all({"forward", "backward", "communication", "optimizer"} <= line["phases"].keys() for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    saved = sorted(p.name for p in (output / "checkpoints").glob("iter_*"))
    assert saved == [f"iter_{step:07d}" for step in range(10, 101, 10)]
    assert (output / "checkpoints/latest_checkpointed_iteration.txt").read_text().strip() == "100"
    assert {p.name for p in (output / "checkpoints/iter_0000100").iterdir()} == {
        "manifest.json",
        "mp_rank_00_pp_rank_000",  # dp ranks hold the same
    }
    assert len(list((output / "runs").iterdir())) == 1
    fields = json.loads((output / "peft/adapter_config.json").read_text())
    assert fields["task_type"] == "CAUSAL_LM" and sorted(fields["target_modules"]) == ["q_proj", "v_proj"]

    # On one process, with two microbatches for two ranks.
    (alone,) = tune(
        1,
        inputs.flags(
            tmp_path / "alone",
            lora_config=tmp_path / "lora_config.json",
            data_path=tmp_path / "rows.json",
            resume_peft_from_checkpoint=tmp_path / "lora_checkpoint",
            seq_length=2048,
            gradient_accumulation_steps=2,
            max_steps=1,
        ),
    )
    assert column(tmp_path / "alone", "loss")[0] == pytest.approx(lines[0]["loss"], abs=1e-5), alone


def test_the_reference_generation(inputs, tmp_path):
    """Its training flags, two more, and inference_mode in the adapter's config: a dialogue, and logits as files."""
    config = ITS_LORA_CONFIG | {"inference_mode": True}
    tiny.write_json(tmp_path / "lora_config.json", ITS_LORA_CONFIG)
    tune(1, inputs.flags(tmp_path / "earlier", lora_config=tmp_path / "lora_config.json", max_steps=2))
    shards = tmp_path / "lora_checkpoint"
    shutil.copytree(
        tmp_path / "earlier/checkpoints/iter_0000002", shards, ignore=shutil.ignore_patterns("manifest.json")
    )
    tiny.write_json(shards / "mp_rank_00_pp_rank_000/lora_config.json", config)
    tiny.write_json(tmp_path / "lora_config.json", config)
    flags = shlex.split(REFERENCE.replace("DIR", str(inputs.model)) + " --return_logits true --text_generation true")
    layout = ["--pipeline_parallel_size", "2", "--max_new_tokens", "6"]
    done = tiny.torchrun(tmp_path, 2, *flags, *layout, tool="generate.py", stdin="Who are you?\nAnd I?\n")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2, done.stdout
    (said,) = (line for line in done.stderr.splitlines() if "not applied in generation" in line)
    assert "save_steps" in said and "lora_config" in said
    first, second = (load_file(tmp_path / f"logits/prompt_0000{i}.safetensors") for i in range(2))
    assert first["logits"].shape == (len(first["input_ids"]), tiny.FIELDS["vocab_size"])
    assert second["input_ids"][: len(first["input_ids"])].equal(first["input_ids"]), "the dialogue goes on"


def test_a_yaml_file_and_the_module(inputs, tmp_path):
    """`python -m megalora finetune run.yaml --flags`: one process without torchrun, flags go before the file."""
    words = inputs.flags(tmp_path / "run", max_steps=9, save=False)
    pairs = [f"{name.removeprefix('--')}: {value}" for name, value in zip(words[::2], words[1::2], strict=True)]
    (tmp_path / "run.yaml").write_text("\n".join(pairs) + "\n")
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(tiny.ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "megalora", "finetune", "run.yaml", "--max-steps", "2"],
        capture_output=True, text=True, timeout=PATIENCE, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.returncode == 0 and "step 2/2" in done.stdout, done.stderr
    assert column(tmp_path / "run", "step") == [1, 2]


def write_base_shards(rank: int, world_size: int, model: str, folder: str) -> None:
    """The base weights as shards of tp2 pp2."""
    mesh, config = build_mesh(rank, world_size, 2, 2), read_config(model)
    lora = resolve_lora(LoraConfig(), config)
    stage, _ = build_stage(config, mesh, lora, Placement(mesh.tp, False, torch.float32, "cpu"))
    load_base_weights(stage, model)
    save_base_shards(folder, stage, named_splits(stage), Layout(2, 2, mesh.tp.rank, mesh.pp.rank))


def test_base_weights_from_shards(inputs, tmp_path):
    """resume_from_checkpoint at another layout than wrote them; they are the same model, so the run goes on."""
    spawn(write_base_shards, 4, str(inputs.model), str(tmp_path / "base"))
    bare = tmp_path / "bare"  # model_path needs no weights then
    shutil.copytree(inputs.model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    tune(1, inputs.flags(tmp_path / "hf", max_steps=4, save_steps=2))
    flags = {"model_path": bare, "resume_from_checkpoint": tmp_path / "base", "max_steps": 4}
    tune(2, inputs.flags(tmp_path / "shards", **flags, tensor_parallel_size=2))
    assert column(tmp_path / "shards", "loss") == pytest.approx(column(tmp_path / "hf", "loss"), abs=1e-5)
    assert largest_difference(exported(tmp_path / "shards"), exported(tmp_path / "hf")) < 1e-4
    (done,) = tune(1, inputs.flags(tmp_path / "hf", **flags | {"max_steps": 5}))
    assert "continuing after step 4" in done.out


def test_a_peft_adapter_made_elsewhere(inputs, tmp_path):
    """By the peft library, with every name a layout cuts otherwise: at a rate of 0 it comes out as it went in."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3},
        use_rslora=True, init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(inputs.model), config)
    model.save_pretrained(tmp_path / "adapter")
    flags = {"resume_peft_from_checkpoint": tmp_path / "adapter", "lora_config": None, "learning_rate": 0.0}
    flags |= {"max_steps": 1, "gradient_accumulation_steps": 2}
    (done,) = tune(4, inputs.flags(tmp_path / "run", **flags, tensor_parallel_size=2, pipeline_parallel_size=2))
    assert f"starting from the adapter {tmp_path / 'adapter'}" in done.out
    given = peft.get_peft_model_state_dict(model)
    assert largest_difference(exported(tmp_path / "run"), given) == 0
    tensors = read_adapter(tmp_path / "run/checkpoints/iter_0000001").tensors
    assert tensors["model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (2, 32)
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(inputs.model), tmp_path / "run/peft")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)


def test_an_adapter_that_the_reference_wrote(inputs, tmp_path):
    """Two stages of its pipeline, in its own form: at a rate of 0 it comes out as it went in."""
    tiny.write_json(tmp_path / "lora_config.json", ITS_LORA_CONFIG)
    tune(1, inputs.flags(tmp_path / "earlier", lora_config=tmp_path / "lora_config.json", max_steps=1))
    given = exported(tmp_path / "earlier")
    ours = {name.removeprefix("base_model.model."): tensor for name, tensor in given.items()}
    for stage in range(2):
        folder = tmp_path / f"2026-11-24_ckpt/iter_0000010/mp_rank_00_pp_rank_{stage:03d}"
        folder.mkdir(parents=True)
        tiny.write_json(folder / "lora_config.json", ITS_LORA_CONFIG | {"peft_type": "LORA", "rank_pattern": {}})
        state = {
            f"{stage + 1}.{name.replace('.weight', '.default.weight')}": tensor
            for name, tensor in ours.items()
            if f"layers.{stage}." in name
        }
        torch.save(state, folder / "lora_partial_model_optim.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "2026-11-24_ckpt/latest_checkpointed_iteration.txt").write_text("10")
    flags = {"resume_peft_from_checkpoint": tmp_path / "2026-11-24_ckpt", "learning_rate": 0.0, "max_steps": 1}
    flags["lora_config"] = tmp_path / "lora_config.json"
    (done,) = tune(2, inputs.flags(tmp_path / "run", **flags, tensor_parallel_size=2))
    assert f"starting from the adapter {tmp_path / '2026-11-24_ckpt/iter_0000010'}" in done.out
    assert largest_difference(exported(tmp_path / "run"), given) == 0
