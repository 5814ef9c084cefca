"""The language model of a folder that reads images too: trained, converted and asked on texts, images' parts kept."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import talking
import torch
import transformers
from oracle import TINY
from safetensors.torch import load_file, save_file
from test_convert import done, refused
from test_convert_adapter import IDS, close, digests, our_logits
from test_generation_parity import NEW, adapted, answers
from tiny import write_json

from megalora import cli
from megalora.data import ChatTemplate, load_tokenizer
from megalora.errors import UserError
from megalora.models.config import config_from_dict

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's use of it

_TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_QWEN_TOWER = {
    "depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 48, "intermediate_size": 48,
}  # fmt: skip
_SECTIONS = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 1]}}
_PART_OF_A_HEAD = {
    "rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 1],
    "mrope_interleaved": True,
}  # fmt: skip
# model_type -> class, fields of its text_config, vision_config
MODELS = {
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {
            "model_type": "gemma3_text", "sliding_window": 6, "head_dim": 10,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        },
        _TOWER,
    ),
    "gemma4": (
        "Gemma4ForConditionalGeneration",
        {
            "model_type": "gemma4_text", "sliding_window": 6, "head_dim": 10, "global_head_dim": 12,
            "num_hidden_layers": 3,
            "num_global_key_value_heads": 2, "attention_k_eq_v": True, "hidden_size_per_layer_input": 0,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.34, "rope_theta": 1e6},
            },
        },
        _TOWER | {"head_dim": 16, "num_key_value_heads": 2},
    ),
    "gemma4_unified": (
        "Gemma4UnifiedForConditionalGeneration",
        {
            "model_type": "gemma4_unified_text", "head_dim": 10, "global_head_dim": 12, "attention_k_eq_v": True,
            "num_global_key_value_heads": 2, "num_hidden_layers": 3,
        },
        {"mm_embed_dim": 32, "mm_posemb_size": 8, "output_proj_dims": 32, "patch_size": 4},
    ),
    "llava": (
        "LlavaForConditionalGeneration", {"model_type": "mistral", "sliding_window": 6},
        _TOWER | {"model_type": "clip_vision_model"},
    ),
    "internvl": ("InternVLForConditionalGeneration", {"model_type": "qwen3", "head_dim": 12}, _TOWER),
    "smolvlm": ("SmolVLMForConditionalGeneration", {"model_type": "llama"}, _TOWER),
    "idefics3": ("Idefics3ForConditionalGeneration", {"model_type": "llama"}, _TOWER),
    "glm4v": (
        "Glm4vForConditionalGeneration",
        {
            "rope_scaling": {
                "rope_type": "default", "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.67,
            },
        },
        _QWEN_TOWER,
    ),
    "mistral3": ("Mistral3ForConditionalGeneration", {"model_type": "mistral"}, _TOWER | {"model_type": "pixtral"}),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", _SECTIONS, _QWEN_TOWER | {"hidden_size": 48}),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", _SECTIONS, _QWEN_TOWER),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        {
            "head_dim": 12,
            "rope_scaling": {"rope_type": "default", "mrope_section": [2, 2, 2], "mrope_interleaved": True},
        },
        _QWEN_TOWER | {"deepstack_visual_indexes": []},
    ),
    "qwen3_5": (
        "Qwen3_5ForConditionalGeneration",
        {
            "model_type": "qwen3_5_text", "head_dim": 12, "full_attention_interval": 2, "linear_num_key_heads": 4,
            "linear_num_value_heads": 8, "linear_key_head_dim": 6, "linear_value_head_dim": 5,
            "rope_parameters": _PART_OF_A_HEAD,
        },
        _QWEN_TOWER,
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeForConditionalGeneration",
        {
            "model_type": "qwen3_5_moe_text", "head_dim": 12, "full_attention_interval": 2, "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 5, "num_experts": 5,
            "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40,
            "intermediate_size": None, "rope_parameters": _PART_OF_A_HEAD,
        },
        _QWEN_TOWER,
    ),
    "llama4": (
        "Llama4ForConditionalGeneration",
        {
            "model_type": "llama4_text", "intermediate_size_mlp": 80, "num_local_experts": 3, "head_dim": 12,
            "interleave_moe_layer_step": 2, "no_rope_layers": [1, 0], "layer_types": ["full_attention"] * 2,
        },
        _TOWER
        | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32, "intermediate_size": 128},
    ),
}  # fmt: skip
REPLIES = {*MODELS} - {"llama4"}  # transformers 5.24 fails at what is around it, where there is no image
LINEARS = r".*(language_model|text_model).*\.(q_proj|o_proj|up_proj)$"  # not those of images, nor the experts of llama4


def save_model(folder, kind: str) -> torch.nn.Module:
    """As transformers writes it, with the names that published files have, and a tokenizer."""
    name, text, vision = MODELS[kind]
    if not hasattr(transformers, name):
        pytest.skip(f"this version of transformers has no {name}")
    fields = (
        TINY | {"num_hidden_layers": 2, "eos_token_id": [0, talking.END], "bos_token_id": 1, "pad_token_id": 0} | text
    )
    fields = {field: value for field, value in fields.items() if value is not None}
    config = transformers.CONFIG_MAPPING[kind](text_config=fields, vision_config=vision)
    torch.manual_seed(3)
    model = getattr(transformers, name)._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 and parameter_name.endswith("weight") else 0.0, 0.15)
    model.save_pretrained(folder)
    talking.tokenizer().save_pretrained(folder)
    return model


def load_model(folder, kind: str) -> torch.nn.Module:
    name = MODELS[kind][0]
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    if model.config.model_type not in REPLIES:
        model = (model.base_model.model if isinstance(model, peft.PeftModel) else model).language_model
    return model(input_ids=IDS[None]).logits[0]


def train_with_peft(model, folder):
    """With a random adapter on the language model's linears, which it saves."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=3, lora_alpha=6, init_lora_weights=False, target_modules=LINEARS,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    tuned = peft.get_peft_model(model, config).eval()
    tuned.save_pretrained(folder)
    return tuned


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", MODELS)
def test_adapters_and_conversions(tmp_path, capsys, kind):
    """An adapter of peft gives its logits; shards and back, and the merged model, keep what reads images."""
    base, adapter, layout = tmp_path / "base", tmp_path / "theirs", ["--tensor_parallel_size", 2]
    model = save_model(base, kind)
    theirs = train_with_peft(load_model(base, kind), adapter)
    expected = logits_of(theirs)
    close(our_logits(base, adapter), expected)

    done(capsys, "to-shards", "--input", base, "--output", tmp_path / "shards", *layout, "--pipeline_parallel_size", 2)
    done(capsys, "to-hf", "--input", tmp_path / "shards", "--output", tmp_path / "back")
    before, after = weights_of(model), weights_of(load_model(tmp_path / "back", kind))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    done(capsys, "adapter", "from-peft", "--input", adapter, "--output", tmp_path / "adapter-shards", *layout)
    done(capsys, "adapter", "to-peft", "--input", tmp_path / "adapter-shards", "--output", tmp_path / "adapter-back")
    assert digests(tmp_path / "adapter-back") == digests(adapter)

    done(capsys, "adapter", "merge", "--input", adapter, "--output", tmp_path / "merged")
    merged = load_model(tmp_path / "merged", kind)
    close(logits_of(merged), expected)
    after = weights_of(merged)
    tower = [name for name in before if "vision" in name or "visual" in name or "projector" in name]
    assert tower and all(torch.equal(before[name], after[name]) for name in tower)


def chats(folder, count: int = 8) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}" * 3}]}
        for n in range(count)
    ]
    write_json(folder / "rows.json", rows)
    return folder / "rows.json"


def finetune(capsys, folder, base, *more: str) -> str:
    status = cli.main(
        ["finetune", "--model_path", str(base), "--data_path", str(chats(folder)), "--output_dir", str(folder / "run"),
         "--seq_length", "64", "--max_steps", "2", "--dtype", "float32", "--learning_rate", "1e-2", *more]
    )  # fmt: skip
    told = capsys.readouterr()
    assert status in (0, None), told
    return told.out + told.err


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_5_vl", "qwen3_5"])
def test_a_run_and_its_export(tmp_path, capsys, kind):
    """It says what is not loaded; peft reads the export without a key left over, and adapts nothing of images."""
    base = tmp_path / "base"
    save_model(base, kind)
    write_json(tmp_path / "lora.json", {"r": 3, "lora_alpha": 6, "target_modules": "all-linear"})
    told = finetune(capsys, tmp_path, base, "--lora_config", str(tmp_path / "lora.json"))
    parts = {"gemma3": "vision_tower, multi_modal_projector", "qwen2_5_vl": "visual", "qwen3_5": "visual"}[kind]
    assert f"the language model of this {kind} is used, on text only: its image parts ({parts}) are not loaded" in told
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft warns of keys that it misses
        tuned = peft.PeftModel.from_pretrained(load_model(base, kind), tmp_path / "run/peft").eval()
    adapted_names = [name for name, _ in tuned.named_modules() if name.endswith(".lora_A")]
    assert adapted_names and all(".language_model.layers." in name for name in adapted_names)
    close(our_logits(base, tmp_path / "run/peft"), logits_of(tuned))


@pytest.mark.parametrize("kind", sorted(REPLIES))
def test_replies_are_theirs(tmp_path, capsys, kind):
    base, out = tmp_path / "base", tmp_path / "replies.jsonl"
    save_model(base, kind)
    peer = adapted(load_model(base, kind).eval(), tmp_path / "adapter", LINEARS)
    ends, questions = [0, talking.END], talking.QUESTIONS[:3]
    expected = answers(peer, ChatTemplate(load_tokenizer(base)), questions, ends)
    (tmp_path / "questions.txt").write_text("\n".join(questions))
    cli.main(
        ["generate", "--model_path", str(base), "--resume_peft_from_checkpoint", str(tmp_path / "adapter"), "--dtype",
         "float32", "--max_new_tokens", str(NEW), "--prompts_file", str(tmp_path / "questions.txt"),
         "--output_file", str(out)]
    )  # fmt: skip
    assert [json.loads(line)["response"] for line in out.read_text().splitlines()] == expected
    assert f"the language model of this {kind} is used, on text only" in capsys.readouterr().err


@pytest.mark.parametrize("kind", MODELS)
def test_defaults_of_text_config(kind):
    """A field that text_config leaves out has the value that transformers' class of this text_config gives it."""
    inner = MODELS[kind][1].get("model_type", f"{kind}_text")
    if inner not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {inner}")
    own = {"hidden_size_per_layer_input": 0} if kind == "gemma4" else {}  # else it is refused
    full = transformers.CONFIG_MAPPING[inner](**own).to_dict()
    short, said = (
        config_from_dict({"model_type": kind, "text_config": {"model_type": inner, **fields}}) for fields in (own, full)
    )
    assert replace(short, dtype=said.dtype) == said


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 asks text_config alone")
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("inner", [None, False, True])
def test_the_head_is_tied_where_transformers_ties_it(kind, outer, inner):
    """By the value beside text_config and the one in it, which need not agree."""
    name, text, vision = MODELS[kind]
    own = {} if inner is None else {"tie_word_embeddings": inner}
    fields = TINY | {"num_hidden_layers": 2} | text | own
    text = {field: value for field, value in fields.items() if value is not None}
    theirs = transformers.CONFIG_MAPPING[kind](text_config=text, vision_config=vision, tie_word_embeddings=outer)
    with torch.device("meta"):
        model = getattr(transformers, name)._from_config(theirs)
    head = (model.get_output_embeddings() or model.language_model.get_output_embeddings()).weight
    raw = {"model_type": kind, "text_config": text, "vision_config": vision, "tie_word_embeddings": outer}
    found = config_from_dict(raw).head.tied
    assert found == (head is model.get_input_embeddings().weight)


def test_what_is_refused(tmp_path, capsys):
    """Rows with images, adapters that have parts in what is not read, and another language model inside."""
    base = tmp_path / "base"
    save_model(base, "gemma3")
    write_json(tmp_path / "images.json", [{"image": "1.png", "prompt": "q", "response": "a"}])
    status = cli.main(
        ["finetune", "--model_path", str(base), "--data_path", str(tmp_path / "images.json"), "--output_dir",
         str(tmp_path / "run"), "--seq_length", "64", "--max_steps", "1"]
    )  # fmt: skip
    assert status == 2 and "images.json row 0: field image is not read" in capsys.readouterr().err
    adapter = tmp_path / "adapter"
    train_with_peft(load_model(base, "gemma3"), adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(3, 32)
    save_file(tensors, adapter / "adapter_model.safetensors")
    refused(capsys, "vision_tower", "adapter", "merge", "--input", adapter, "--output", tmp_path / "merged")
    fields = json.loads((base / "config.json").read_text())
    text = fields.pop("text_config")
    with pytest.raises(UserError, match="field '.*' = .* is not read for model_type 'gemma3'"):
        config_from_dict({**text, **fields})  # which only Qwen2-VL's old files have beside each other
    with pytest.raises(UserError, match="text_config is missing"):
        config_from_dict(fields)
    with pytest.raises(UserError, match=r"text_config.model_type = 't5' is not implemented"):
        config_from_dict(fields | {"text_config": text | {"model_type": "t5"}})
