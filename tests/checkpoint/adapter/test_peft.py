"""PEFT folders both ways against the peft library: same bits, same logits."""

import json
import warnings
from random import Random

import pytest
import torch

from megalora.adapters.config import LoraConfig
from megalora.checkpoint.adapter.peft import read_peft, write_peft
from megalora.errors import UserError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TARGETS = ("q_proj", "v_proj", "down_proj")


def tiny_model(seed: int = 0):
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(12).reshape(2, 6)).logits


CONFIGS = {
    "plain": LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS),
    "default targets": LoraConfig(r=3, lora_alpha=6),
    "all-linear": LoraConfig(r=2, lora_alpha=6, target_modules="all-linear", use_rslora=True),
    "patterns": LoraConfig(
        r=2,
        target_modules=TARGETS,
        rank_pattern={"layers.1.self_attn.q_proj": 4},
        alpha_pattern={"v_proj": 3.0},
        layers_to_transform=(1,),
    ),
    "pattern and layers": LoraConfig(r=2, target_modules=r".*\.(q|v)_proj", layers_to_transform=(0,)),
    "bias all": LoraConfig(r=2, target_modules=TARGETS, bias="all"),
    "bias lora_only": LoraConfig(r=2, target_modules=TARGETS, bias="lora_only"),
}


def make_adapter(config: LoraConfig, model):
    """(resolved, tensors by our names, merged state dict) for random A, B and biases."""
    state = model.state_dict()
    linears = {n.removesuffix(".weight"): int(n.split(".")[2]) for n in state if "_proj.weight" in n}
    resolved = config.resolve("llama", linears)
    generator = torch.Generator().manual_seed(1)
    tensors, merged = {}, {name: tensor.clone() for name, tensor in state.items()}
    for name, adapter in resolved.adapters.items():
        weight = state[f"{name}.weight"]
        a = torch.randn(adapter.r, weight.shape[1], generator=generator)
        b = torch.randn(weight.shape[0], adapter.r, generator=generator)
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        merged[f"{name}.weight"] += adapter.scaling * b @ a
    for name in linears:
        if f"{name}.bias" in state and resolved.trains_bias(name):
            bias = torch.randn(state[f"{name}.bias"].shape, generator=generator)
            tensors[f"{name}.bias"] = merged[f"{name}.bias"] = bias
    return tensors, merged


@pytest.mark.parametrize("name", CONFIGS)
def test_the_library_loads_our_folder(tmp_path, name):
    config, model = CONFIGS[name], tiny_model()
    tensors, merged = make_adapter(config, model)
    write_peft(tmp_path, tensors, config.to_dict(), "some/model")
    reference = tiny_model()
    reference.load_state_dict(merged)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft only warns of keys that it misses
        tuned = peft.PeftModel.from_pretrained(model, tmp_path)
    torch.testing.assert_close(logits(tuned), logits(reference), rtol=1e-5, atol=1e-5)

    found = read_peft(tmp_path)
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[n], t) for n, t in tensors.items())
    fields = LoraConfig.from_dict(found.lora_config)
    linears = {n.removesuffix(".weight"): int(n.split(".")[2]) for n in merged if "_proj.weight" in n}
    resolved = fields.resolve("llama", linears)
    assert {f"{n}.lora_A.weight" for n in resolved.adapters} <= tensors.keys()
    assert fields.inference_mode is False


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("pickle", [False, True])
def test_we_load_the_librarys_folder(tmp_path, bias, pickle):
    torch.manual_seed(0)
    theirs = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=list(TARGETS),
        bias=bias,
        rank_pattern={"v_proj": 2},
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    model = peft.get_peft_model(tiny_model(), theirs)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path, safe_serialization=True)
    weights = peft.get_peft_model_state_dict(model)
    if pickle:  # as peft wrote it before it had safetensors
        (tmp_path / "adapter_model.safetensors").unlink()
        torch.save(weights, tmp_path / "adapter_model.bin")

    found = read_peft(tmp_path)
    assert {n.replace(".bias", "") for n in found.tensors if n.endswith("bias")} <= {
        n.removesuffix(".weight") for n in tiny_model().state_dict()
    }
    ours = {k.removeprefix("base_model.model.").replace(".base_layer", ""): v for k, v in weights.items()}
    assert found.tensors.keys() == ours.keys()
    assert all(torch.equal(found.tensors[n], t) for n, t in ours.items())
    config = LoraConfig.from_dict(found.lora_config)
    assert (config.r, config.lora_alpha, config.bias, config.rank_pattern) == (4, 6, bias, {"v_proj": 2})

    # And back: what we write of it is for peft the same adapter.
    again = tmp_path / "again"
    write_peft(again, found.tensors, found.lora_config)
    reloaded = peft.PeftModel.from_pretrained(tiny_model(), again)
    assert torch.equal(logits(reloaded), logits(model.eval()))


@pytest.fixture
def folder(tmp_path):
    config = CONFIGS["plain"]
    write_peft(tmp_path, make_adapter(config, tiny_model())[0], config.to_dict())
    return tmp_path


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "IA3"),
        ("layer_replication", [[0, 2]]),
        ("loftq_config", {"loftq_bits": 4}),
        ("megatron_config", {"a": 1}),
        ("init_lora_weights", "pissa"),
        ("use_qalora", True),
        ("something_new", 3),
        ("task_type", "FEATURE_EXTRACTION"),
    ],
)
def test_fields_that_change_the_numbers_are_refused(folder, field, value):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=f"adapter_config.json.*{field}"):
        read_peft(folder)


def rewrite(folder, change):
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    (folder / "manifest.json").unlink()


KEY = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{KEY}.lora_B.weight"), "has no .*q_proj.lora_B.weight"),
        (lambda t: t.update({f"{KEY}.lora_other": torch.ones(1)}), "lora_other is no"),
        (lambda t: t.update({"other.lora_A.weight": torch.ones(1)}), "other.lora_A.weight is no"),
        (lambda t: t.update({f"{KEY}.lora_B.weight": torch.ones(16, 5)}), r"\[3, 16\] and lora_B \[16, 5\]"),
        (lambda t: t.clear(), "holds no lora_A"),
        (lambda t: t.update({f"{KEY}.lora_B.weight": torch.ones(16, 3).int()}), "lora_B.weight is of int32, not of a"),
        (lambda t: t[f"{KEY}.lora_B.weight"].fill_(torch.inf), "lora_B.weight holds numbers that are not finite"),
    ],
)
def test_tensors_that_are_no_lora_are_named(folder, change, words):
    rewrite(folder, change)
    with pytest.raises(UserError, match=words):
        read_peft(folder)


def test_damage_is_named(folder):
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    weights.write_bytes(weights.read_bytes()[:-1])
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="adapter_model.safetensors: is damaged"):
        read_peft(folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="adapter_model.bin: cannot be read"):
        read_peft(folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match="neither adapter_model.safetensors nor"):
        read_peft(folder)
    config.write_text("[]")
    with pytest.raises(UserError, match="adapter_config.json: holds a list"):
        read_peft(folder)


def test_every_flipped_bit_of_an_export_is_noticed(folder):
    files = [folder / name for name in ("adapter_model.safetensors", "adapter_config.json", "manifest.json")]
    random = Random(0)
    for file in files:
        whole = file.read_bytes()
        for bit in random.sample(range(8 * len(whole)), 20):
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            file.write_bytes(data)
            with pytest.raises(UserError, match=f"{folder}.*megalora convert adapter to-peft --input RUN --output DIR"):
                read_peft(folder)
        file.write_bytes(whole)
    read_peft(folder)


def test_an_export_is_not_written_behind_a_link(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "link").symlink_to(elsewhere)
    found = read_peft(folder)
    with pytest.raises(UserError, match="link: is a symbolic link"):
        write_peft(tmp_path / "link", found.tensors, found.lora_config)
    assert not any(elsewhere.iterdir())
