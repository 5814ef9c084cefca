"""Models whose files hold the experts of a layer in one tensor: loading, MXFP4, conversions, and peft's form of their
adapters (`target_parameters`), both ways."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from oracle import ALL_LINEAR, fields_of, in_file_order, whole_tensor
from safetensors.torch import load_file, save_file
from test_convert import done, run, sums
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from variants import ours_of, peer_of

from megalora.adapters.config import LoraConfig
from megalora.building import resolve_lora
from megalora.checkpoint.adapter.peft import peft_caution, read_peft, write_peft
from megalora.checkpoint.base.hf import HfWeights
from megalora.checkpoint.base.quantised import QuantisedWeights
from megalora.errors import UserError
from megalora.identity import adapter_for
from megalora.models.config import config_from_dict
from megalora.parallel.split import named_splits

APART = ("qwen3_moe", "mixtral")
STACKED = ("gpt_oss", "granitemoe", "granitemoehybrid", "llama4_text", "qwen3_5_moe_text", "gemma4_text, experts")
PROMPT = [5, 17, 99, 3, 42, 8, 8, 120, 61]
EXPERTS = "model.layers.0.mlp.experts"


def logits_of(stage) -> torch.Tensor:
    from test_experts import alone

    with torch.no_grad():
        return stage.head(alone(stage, PROMPT))


def saved(name: str, folder: Path) -> torch.nn.Module:
    """transformers' model of the family, float32, and its files in `folder`."""
    model = peer_of(name, torch.float32, "eager")
    model.save_pretrained(folder)
    if name == "qwen3_5_moe_text":  # as it is published; transformers saves each expert apart
        save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return model


def adapted(name: str, folder: Path, lora: dict):
    """Our model from these files with adapters made of their names, and them as they are saved."""
    stage = ours_of(name, folder, torch.float32, {"target_modules": None} | lora)
    splits = named_splits(stage)
    tensors = {key: in_file_order(splits[key], p.detach()) for key, p in stage.trainable().items()}
    return stage, tensors


@pytest.mark.parametrize("name", STACKED)
def test_files_of_transformers_and_adapters_as_peft_has_them(name, tmp_path, capsys):
    """The same logits from transformers' files; the adapter of all that peft can adapt gives them with peft too; what
    peft saves is read back bit for bit; merged, transformers gives them without peft. To shards and back is exact."""
    base = tmp_path / "base"
    model = saved(name, base)
    lora = ALL_LINEAR | {"lora_dropout": 0.0, "target_modules": "all-linear"}
    stage, tensors = adapted(name, base, lora)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        plain = ours_of(name, base, torch.float32, {"target_modules": ["q_proj"], "r": 1})
        for key, p in plain.trainable().items():
            p.zero_() if "lora_B" in key else None
        plain.refresh_adapters()
        close(logits_of(plain), model(ids).logits[0])
    expected = logits_of(stage)
    resolved, routers = resolve_lora(LoraConfig.from_dict(lora), stage.config), stage.config.routers
    assert peft_caution(name, resolved.adapters, routers, stage.config.in_stacks) is None
    fields = resolved.config.to_dict()
    write_peft(tmp_path / "ours", tensors, fields, str(base))
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert written["target_parameters"] and "gate_up_proj" not in written["target_modules"]
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(
        base, attn_implementation="eager", dtype=torch.float32), tmp_path / "ours")  # fmt: skip
    with torch.no_grad():
        close(theirs(ids).logits[0], expected)
    theirs.save_pretrained(tmp_path / "theirs")
    back = adapter_for(tmp_path / "theirs", base)
    assert back.tensors.keys() == tensors.keys()
    assert all(torch.equal(back.tensors[key], tensor) for key, tensor in tensors.items())
    done(capsys, "adapter", "merge", "--input", tmp_path / "theirs", "--base", base, "--output", tmp_path / "merged")
    assert sums(tmp_path / "merged").keys() == sums(base).keys()
    merged = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        close(merged(ids).logits[0], expected)
    layout = ("--tensor_parallel_size", 2, "--pipeline_parallel_size", 3)
    done(capsys, "to-shards", "--input", base, "--output", tmp_path / "shards", *layout)
    done(capsys, "to-hf", "--input", tmp_path / "shards", "--output", tmp_path / "again")
    assert sums(tmp_path / "again") == sums(base)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


# ---- MXFP4


@pytest.fixture
def in_four_bits(tmp_path) -> Path:
    """Files of gpt_oss with random codes, as they are published: only the experts' weights are in 4 bits."""
    folder = tmp_path / "mxfp4"
    folder.mkdir()
    fields = fields_of("gpt_oss", hidden_size=64)
    fields |= {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
    (folder / "config.json").write_text(json.dumps(fields))
    config = config_from_dict(fields)
    stacks = {name: (len(parts), *config.tensors[parts[0]]) for name, parts in config.stacks.items()}
    inside = {part for parts in config.stacks.values() for part in parts}
    shapes = stacks | {name: shape for name, shape in config.tensors.items() if name not in inside}
    tensors = {name: whole_tensor(name, shape, 0.1).bfloat16() for name, shape in shapes.items()}
    generator = torch.Generator().manual_seed(1)
    for name in config.stacked_linears:
        experts, rows, columns = tensors.pop(name).shape
        size = experts, columns, rows // 32
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*size, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(117, 124, size, generator=generator, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_mxfp4_is_decoded_as_transformers_does(in_four_bits, tmp_path, capsys):
    stored = load_file(in_four_bits / "model.safetensors")
    weights, stack = QuantisedWeights(HfWeights(in_four_bits)), f"{EXPERTS}.gate_up_proj"
    whole = convert_moe_packed_tensors(stored[f"{stack}_blocks"], stored[f"{stack}_scales"])
    assert weights.shapes[stack] == tuple(whole.shape) == (5, 64, 64) and weights.dtype(stack) == torch.bfloat16
    index = (slice(1, 4), slice(21, 50), slice(3, 60))
    part = torch.empty(3, 29, 57, dtype=torch.bfloat16)
    weights.copy(stack, index, part)
    assert torch.equal(part, whole[index])
    done(capsys, "to-hf", "--input", in_four_bits, "--output", tmp_path / "same")
    assert sums(tmp_path / "same") == sums(in_four_bits)
    done(capsys, "dequantise", "--input", in_four_bits, "--output", tmp_path / "dense")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert torch.equal(dense[stack], whole)
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    stages = [ours_of_folder(folder) for folder in (in_four_bits, tmp_path / "dense")]
    assert torch.equal(*map(logits_of, stages))


def ours_of_folder(folder: Path):
    from megalora.building import base_names
    from megalora.checkpoint.base.weights import load_base
    from megalora.models.config import read_config
    from megalora.models.stage import NO_LORA, Stage
    from megalora.parallel.mesh import Axis
    from megalora.parallel.placement import Placement

    config = read_config(folder)
    stage = Stage(config, range(config.num_hidden_layers), Placement(Axis(), False, torch.float32, "cpu"), NO_LORA)
    load_base(stage, folder, splits=named_splits(stage), names=base_names(config))
    stage.refresh_adapters()
    return stage


GATE, DOWN = f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"
SECOND = "model.layers.1.mlp"


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: t.pop(f"{GATE}_scales"), "gate_up_proj_scales is missing"),
        (lambda t: t.update({f"{DOWN}_scales": t[f"{DOWN}_scales"][:, :3].clone()}), "are no MXFP4"),
        (lambda t: t[f"{DOWN}_scales"].fill_(255), "holds scales that are not finite"),
        (lambda t: t.pop(f"{SECOND}.experts.down_proj_bias"), f"lacks {SECOND}.experts.0.down_proj"),
        (lambda t: t.update({f"{SECOND}.router.bias": torch.zeros(4)}), "config.json means [5]"),
        (lambda t: t.update({f"{GATE}_bias": torch.zeros(4, 64)}), "config.json means 5 experts"),
    ],
)
def test_damaged_experts_are_one_line(in_four_bits, tmp_path, capsys, change, said):
    file = in_four_bits / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    status, told = run(capsys, "dequantise", "--input", in_four_bits, "--output", tmp_path / "dense")
    assert status == 2 and said in told, told


# ---- experts apart in the files, in one in peft


@pytest.mark.parametrize("name", APART)
def test_an_adapter_of_fused_parameters_is_read_for_experts_apart(name, tmp_path, capsys):
    """peft's own adapter of gate_up_proj and down_proj: gate and up get one A each, which is the same branch."""
    base = tmp_path / "base"
    model = saved(name, base)
    parameters = ["mlp.experts.gate_up_proj", "0.mlp.experts.down_proj"]
    tuned = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=3,
            lora_alpha=7,
            target_modules=["q_proj"],
            target_parameters=parameters,
            rank_pattern={"experts.down_proj": 5},
            alpha_pattern={"0.mlp.experts.gate_up_proj": 2},
        ),
    )
    with torch.no_grad():
        for key, p in tuned.named_parameters():
            p.copy_(whole_tensor(key, tuple(p.shape), 0.15)) if "lora_" in key else None
        expected = tuned(torch.tensor([PROMPT])).logits[0]
    tuned.save_pretrained(tmp_path / "theirs")
    done(capsys, "adapter", "merge", "--input", tmp_path / "theirs", "--base", base, "--output", tmp_path / "merged")
    close(logits_of(ours_of_folder(tmp_path / "merged")), expected)


def test_target_parameters_name_experts_of_stacked_files_only():
    config = config_from_dict(fields_of("gpt_oss"))
    lora = LoraConfig.from_dict({"r": 2, "target_modules": [], "target_parameters": ["1.mlp.experts.down_proj"]})
    assert resolve_lora(lora, config).adapters.keys() == {f"model.layers.1.mlp.experts.{e}.down_proj" for e in range(5)}
    with pytest.raises(UserError, match="choose among experts.down_proj, experts.gate_up_proj"):
        resolve_lora(LoraConfig.from_dict({"target_parameters": ["experts.up_proj"]}), config)
    with pytest.raises(UserError, match="name the linears of its experts in target_modules"):
        resolve_lora(
            LoraConfig.from_dict({"target_parameters": ["experts.down_proj"]}), config_from_dict(fields_of("mixtral"))
        )


def test_some_experts_of_a_tensor_are_refused_before_a_run():
    """Their checkpoints name the whole tensor: neither resume nor merge could read them. What is excluded stays so."""
    config = config_from_dict(fields_of("qwen3_5_moe_text"))
    some = LoraConfig.from_dict({"target_modules": ["experts.1.down_proj"]})
    with pytest.raises(UserError, match=r"means model\.layers\.0\.mlp\.experts\.1\.down_proj, but not all 5 experts"):
        resolve_lora(some, config)
    without = {"target_modules": ["down_proj"], "exclude_modules": ["experts.0.down_proj"]}
    resolved = resolve_lora(LoraConfig.from_dict(without), config)
    again = resolve_lora(LoraConfig.from_dict(resolved.config.to_dict()), config)
    assert again.adapters == resolved.adapters and f"{EXPERTS}.0.down_proj" not in again.adapters


MIXED = ALL_LINEAR | {
    "target_modules": "all-linear",
    "lora_dropout": 0.0,
    "use_rslora": True,
    "rank_pattern": {r"layers\.1\..*experts\.1\.\w+": 7, r"experts\.\d+\.down_proj": 3},
    "alpha_pattern": {r"experts\.[02]\.gate_up_proj": 5.0},
    "exclude_modules": ["experts.4.down_proj", "experts.1.gate_up_proj"],
}


@pytest.mark.parametrize("name", STACKED)
def test_experts_of_several_ranks_and_scales_and_some_without_are_the_same_in_peft(name, tmp_path, capsys):
    """peft has one rank and one scale for all experts of a tensor: its logits are ours all the same, read back too."""
    base = tmp_path / "base"
    saved(name, base)
    stage, tensors = adapted(name, base, MIXED)
    fields = resolve_lora(LoraConfig.from_dict(MIXED), stage.config).config.to_dict()
    write_peft(tmp_path / "ours", tensors, fields, str(base), stage.config.expert_counts)
    expected = logits_of(stage)
    close(logits_of_peft(base, tmp_path / "ours"), expected)
    assert (logits_of_peft(base) - expected).abs().max() > 1e-2 * expected.abs().max()
    done(capsys, "adapter", "merge", "--input", tmp_path / "ours", "--base", base, "--output", tmp_path / "merged")
    close(logits_of(ours_of_folder(tmp_path / "merged")), expected)
    flags = ["--input", tmp_path / "ours", "--output", tmp_path / "twice"]
    done(capsys, "adapter", "combine", *flags, "--others", tmp_path / "ours", "--weights", 0.25, 0.75)
    close(logits_of_peft(base, tmp_path / "twice"), expected)


@pytest.mark.parametrize("name", APART)
def test_experts_apart_are_alike_in_peft(name, tmp_path, capsys):
    """transformers has them in one parameter: peft refuses several ranks there, and passes over several alphas."""
    base = tmp_path / "base"
    saved(name, base)
    mixed = {
        "rank_pattern": {r"layers\.1\..*experts\.1\.\w+": 7, "q_proj": 2},
        "alpha_pattern": {r"experts\.[02]\.(gate_proj|w1)": 5.0},
        "exclude_modules": r".*experts\.3\.(down_proj|w2)|.*layers\.1\.self_attn\.k_proj",
    }
    gate, up, down = ("gate_proj", "up_proj", "down_proj") if name == "qwen3_moe" else ("w1", "w3", "w2")
    some = [{"target_modules": ["q_proj", *linears]} for linears in ((gate,), (gate, up), (up, down), (down,))]
    for number, more in enumerate((mixed, {"use_rslora": True} | mixed, *some)):
        lora = ALL_LINEAR | {"target_modules": "all-linear", "lora_dropout": 0.0} | more
        stage, tensors = adapted(name, base, lora)
        fields, folder = resolve_lora(LoraConfig.from_dict(lora), stage.config).config.to_dict(), tmp_path / f"{number}"
        write_peft(folder, tensors, fields, str(base), stage.config.expert_counts)
        expected = logits_of(stage)
        close(logits_of_peft(base, folder), expected)
        assert (logits_of_peft(base) - expected).abs().max() > 1e-2 * expected.abs().max()
        out = tmp_path / f"merged{number}"
        done(capsys, "adapter", "merge", "--input", folder, "--base", base, "--output", out)
        close(logits_of(ours_of_folder(out)), expected)


def logits_of_peft(base: Path, adapter: Path | None = None) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        model = model if adapter is None else peft.PeftModel.from_pretrained(model, adapter)
        return model(torch.tensor([PROMPT])).logits[0]


def test_how_many_experts_there_are_the_model_says(tmp_path):
    """Without the model, adapters of experts 0 to 3 may be those of all or of some."""
    names = [f"{EXPERTS}.{e}.down_proj" for e in range(4)]
    tensors = {f"{n}.lora_{f}.weight": torch.ones(2, 2) for n in names for f in "AB"}
    stack = f"{EXPERTS}.down_proj"
    fields = {"r": 2, "target_parameters": [stack]}
    write_peft(tmp_path, tensors, fields)
    assert read_peft(tmp_path).tensors.keys() == tensors.keys()
    fields["exclude_modules"] = ["experts.4.down_proj"]
    with pytest.raises(UserError, match="have no adapter, and only the model says how many there are"):
        write_peft(tmp_path, tensors, fields)
    write_peft(tmp_path, tensors, fields, experts={stack: 6})
    found = read_peft(tmp_path)
    assert len(found.tensors) == 12 and not found.tensors[f"{EXPERTS}.5.down_proj.lora_B.weight"].any()
    assert found.lora_config["exclude_modules"] is None
