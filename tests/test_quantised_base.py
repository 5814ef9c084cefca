"""Runs on a base in 8 and in 4 bits, from the files to the merged model: the same numbers on every layout."""

import hashlib
import json

import pytest
import quantised
import tiny
import torch
from oracle import Run, largest_difference, reference, train_each
from safetensors.torch import load_file, save_file
from spawn import spawn
from told import user_error

from megalora import cli
from megalora.checkpoint.adapter.opening import open_adapter
from megalora.identity import other_base

# As SmolLM2-135M: tp divides neither the heads nor intermediate_size, so parts end inside of blocks and at odd columns.
NINE_HEADS = {"hidden_size": 54, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 81}
RUNS = [
    Run("phi3", tp=4, base_format="fp8", sequence_parallel=True),
    Run("gpt_neox", tp=4, base_format="nf4", recompute="full"),
    Run("llama", tp=2, pp=2, base_format="nf4", model=NINE_HEADS, exchange=True, sequence_parallel=True),
    Run("llama", tp=2, pp=2, base_format="nf4_fp8", model=NINE_HEADS, sequence_parallel=True),
    Run("qwen2", tp=4, base_format="nf4_fp8", recompute="full"),
]


def test_every_layout_gives_the_numbers_of_one_process():
    runs = [run.short(4, steps=2) for run in RUNS]
    each = spawn(train_each, 4, runs)
    for number, run in enumerate(runs):
        assert largest_difference(reference(run), [outcomes[number] for outcomes in each]) <= 1e-12, run
        dense = reference(run.on(base_format="dense")).losses[0]
        assert 1e-5 < abs(reference(run).losses[0] - dense) < 0.5, "quantised, and not at random"


def test_the_numbers_are_those_of_a_dense_base_of_the_decoded_values(monkeypatch):
    import oracle

    for name in ("nf4", "fp8", "nf4_fp8"):
        run = Run("llama", base_format=name)
        quantised = oracle.train(0, 1, run)
        whole_tensor = oracle.whole_tensor

        def decoded(tensor_name, shape, scale, name=name, whole_tensor=whole_tensor):
            whole = whole_tensor(tensor_name, shape, scale)
            if not tensor_name.endswith("proj.weight"):
                return whole
            matrix = oracle.BaseFormat(name).matrix(*shape, 0, torch.float64, "cpu", rank=0)
            matrix.fill(slice(0, shape[0]), oracle.RandomWeight(whole), oracle.Split(shape), False)
            return matrix.weight(slice(0, shape[0]))

        with monkeypatch.context() as patch:
            patch.setattr(oracle, "whole_tensor", decoded)
            dense = oracle.train(0, 1, run.on(base_format="dense"))
        assert largest_difference(quantised, [dense]) <= 1e-12


# ---- commands


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(inputs, output_dir, what was said) of a run on a model that the files have in NF4."""
    folder = tmp_path_factory.mktemp("quantised")
    inputs = tiny.make_inputs(folder)
    dense = load_file(inputs.model / "model.safetensors")
    tensors = {}
    for name, W in dense.items():
        tensors |= quantised.bitsandbytes(name, W.bfloat16()) if name.endswith("proj.weight") else {name: W}
    save_file(tensors, inputs.model / "model.safetensors")
    config = json.loads((inputs.model / "config.json").read_text())
    tiny.write_json(inputs.model / "config.json", config | {"quantization_config": quantised.BITSANDBYTES})
    out = folder / "out"
    (done,) = tiny.tune(1, inputs.flags(out, max_steps=4, save_steps=2))
    return inputs, out, done.out


def run(capsys, *words: object) -> tuple[int, str]:
    capsys.readouterr()
    status = cli.main([*map(str, words)])
    told = capsys.readouterr()
    return status, told.out + told.err


def test_a_run_says_its_base_and_goes_on_only_on_the_same(trained):
    inputs, out, said = trained
    assert "base in nf4" in said
    assert open_adapter(out).trainer["identity"]["base format"] == "nf4"
    losses = tiny.column(out, "loss")
    assert len(losses) == 4 and losses[-1] < losses[0]
    (again,) = tiny.tune(1, inputs.flags(out, max_steps=4, save_steps=2, base_format="nf4"))
    assert "nothing to do" in again.out
    (other,) = tiny.run(0, 1, [inputs.flags(out, max_steps=4, base_format="fp8")])
    assert other.status == 2 and "base format: nf4 there, fp8 here" in user_error(other.err)
    for adapter in (out, out / "peft"):
        flags = {"resume_peft_from_checkpoint": adapter, "base_format": "dense", "save": False, "lora_config": None}
        (dense,) = tiny.tune(1, inputs.flags(out.parent / "dense", max_steps=1, **flags))
        assert "was trained on the base in nf4, and is used on it in dense" in dense.out
        assert "by its config" not in dense.out


def test_another_model_than_an_export_names_is_told(trained, tmp_path):
    inputs, out, _ = trained
    adapter = open_adapter(out / "peft")
    assert other_base(adapter, "nf4", str(inputs.model)) == []
    assert other_base(adapter, "nf4", str(tmp_path / "elsewhere" / inputs.model.name)) == [], "a folder that was moved"
    (note,) = other_base(adapter, "nf4", str(tmp_path / "other"))
    assert note.endswith(f"was trained on {inputs.model} by its config, and is used on {tmp_path / 'other'}")


def test_replies_and_the_merged_model_come_from_the_decoded_base(trained, tmp_path, capsys):
    inputs, out, _ = trained
    model = ("--model_path", inputs.model, "--resume_peft_from_checkpoint", out)
    prompts = ("--prompt", "Who are you?", "--max_new_tokens", 8, "--temperature", 0)
    status, reply = run(capsys, "generate", *model, *prompts)
    assert status == 0, reply
    status, told = run(
        capsys, "convert", "adapter", "merge", "--input", out, "--base", inputs.model, "--output", tmp_path / "merged"
    )
    assert status == 0, told
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    adapter = open_adapter(out).tensors
    name = "model.layers.1.mlp.down_proj"
    B, A = (adapter[f"{name}.lora_{factor}.weight"].float() for factor in "BA")
    W = quantised.decoded(inputs.model, f"{name}.weight")
    merged = load_file(tmp_path / "merged" / "model.safetensors")[f"{name}.weight"]
    torch.testing.assert_close(merged.float(), W + 2 * B @ A, rtol=2**-8, atol=1e-6)
    assert merged.dtype == torch.bfloat16


def sums(folder) -> dict[str, tuple[str, tuple[int, ...], torch.dtype]]:
    found = {}
    for file in folder.glob("*.safetensors"):
        for name, x in load_file(file).items():
            digest = hashlib.sha256(x.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
            found[name] = digest, tuple(x.shape), x.dtype
    return found


def test_quantised_weights_pass_bit_for_bit_and_are_decoded_when_asked(tmp_path, capsys):
    folder, dense = quantised.make(tmp_path / "nf4", dense=("down_proj",)), tmp_path / "dense"
    pair = ("--input", folder, "--output")
    assert run(capsys, "convert", "to-hf", *pair, tmp_path / "same", "--max_shard_size", "0.0001")[0] == 0
    assert len(list((tmp_path / "same").glob("*.safetensors"))) > 1
    assert sums(tmp_path / "same") == sums(folder)
    assert json.loads((tmp_path / "same" / "config.json").read_text())["quantization_config"]
    status, told = run(capsys, "convert", "to-shards", *pair, tmp_path / "no", "--tensor_parallel_size", 2)
    assert status == 2 and "megalora convert dequantise" in user_error(told)
    assert run(capsys, "convert", "dequantise", *pair, dense)[0] == 0
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    for name, tensor in load_file(dense / "model.safetensors").items():
        assert tensor.float().equal(quantised.decoded(folder, name)) and tensor.dtype == torch.bfloat16
    status, told = run(capsys, "convert", "dequantise", "--input", dense, "--output", tmp_path / "no")
    assert status == 2 and "is not quantised" in user_error(told)
    scalar = quantised.make(tmp_path / "scalar", "one scale")
    assert run(capsys, "convert", "to-hf", "--input", scalar, "--output", tmp_path / "scalar again")[0] == 0
    assert sums(tmp_path / "scalar again") == sums(scalar)
