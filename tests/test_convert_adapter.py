"""`megalora convert adapter`: PEFT and shards both ways, merged copies; peft sees the same model as we do."""

from __future__ import annotations

import hashlib
import json
import re
import warnings

import pytest
import tiny
import torch
from oracle import FAMILIES
from safetensors.torch import load_file, save_file
from test_convert import done, make, refused, run, sums

from megalora.adapters.config import LoraConfig
from megalora.building import load_adapter, load_base_weights, resolve_lora
from megalora.checkpoint.adapter.opening import open_adapter
from megalora.checkpoint.adapter.shards import save_adapter
from megalora.checkpoint.base.hf import HfWeights
from megalora.checkpoint.layout import Layout
from megalora.models.config import read_config
from megalora.models.inputs import Inputs, rope_tables
from megalora.models.stage import Stage
from megalora.ops.delta_rule import Documents
from megalora.parallel.mesh import Axis
from megalora.parallel.placement import Placement, Tokens
from megalora.parallel.split import Split

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's use of it

IDS = torch.arange(24) * 5 % 131
LORAS = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "all": {"target_modules": "all-linear", "bias": "all"},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"], "use_rslora": True,
        "bias": "lora_only",
        "rank_pattern": {"q_proj": 5, "layers.1.mlp.down_proj": 2}, "alpha_pattern": {"v_proj": 9},
        "layers_to_transform": [1, 3],
    },
}  # fmt: skip


KINDS = {
    "dora": {"target_modules": "all-linear", "use_dora": True, "bias": "lora_only", "rank_pattern": {"q_proj": 5}},
    "a bias of B": {"target_modules": ["q_proj", "o_proj"], "lora_bias": True},
    "words in full": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "adapters on words": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "rows of tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 17, 130]},
    "exclusions": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "layers.1.mlp.down_proj"]},
}
# What families call the linears of LORAS, where they do not call them as llama does.
NAMES = {
    "phi3": {"q_proj": "qkv_proj", "v_proj": "qkv_proj", "up_proj": "gate_up_proj"},
    "gpt_neox": {
        "q_proj": "query_key_value", "v_proj": "query_key_value", "o_proj": "dense", "up_proj": "dense_h_to_4h",
        "down_proj": "dense_4h_to_h",
    },
}  # fmt: skip


def lora_of(family: str, name: str) -> dict:
    """LORAS[name] in the family's own names."""
    text = json.dumps((LORAS | KINDS)[name])
    for theirs, ours in NAMES.get(family, {}).items():
        text = re.sub(rf"\b{theirs}\b", ours, text)
    lora = json.loads(text)
    if isinstance(lora["target_modules"], list):
        lora["target_modules"] = sorted(set(lora["target_modules"]))
    return lora | ({"bias": "lora_only"} if family == "gpt_neox" and lora.get("bias") == "all" else {})


def base_model(folder, family="llama", dtype=torch.float32, **fields):
    """As `make`, with weights of a size at which a model works."""
    make(folder, family, dtype=dtype, **fields)
    tensors = load_file(folder / "model.safetensors")
    scaled = {name: tensor if "norm" in name else tensor * 0.15 for name, tensor in tensors.items()}
    save_file(scaled, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def train_with_peft(base, folder, lora, dtype=None):
    """An adapter of the peft library, every trained number random; the model with it, in `dtype`."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype or torch.float32)
    config = peft.LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", init_lora_weights=False, **lora)
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                away = parameter if parameter.dim() == 1 else 0.0  # magnitudes and biases stay of their size
                parameter.copy_(torch.randn_like(parameter) * 0.2 + away)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(input_ids=IDS[None]).logits[0]


@torch.no_grad()
def our_logits(base, adapter_folder) -> torch.Tensor:
    """Of this package's own model, with the adapter from any folder that `open_adapter` reads."""
    config, adapter = read_config(base), open_adapter(adapter_folder)
    lora = resolve_lora(LoraConfig.from_dict(adapter.lora_config), config)
    place = Placement(Axis(), False, torch.float32, "cpu")
    stage = Stage(config, range(config.num_hidden_layers), place, lora)
    load_base_weights(stage, base)
    load_adapter(stage, adapter.tensors, adapter.where)
    stage.refresh_adapters()
    index = torch.arange(len(IDS))
    bounds, tokens = (0, len(IDS)), Tokens(index, index, None, 0)
    tables = rope_tables(config, index, torch.float32, bounds)
    documents = Documents.of(bounds) if config.recurrent else None
    hidden = stage(None, Inputs(IDS, None, None, bounds, tables, tokens, position_ids=index, documents=documents))
    return stage.head(hidden)


def digests(folder) -> dict[str, str]:
    tensors = load_file(folder / "adapter_model.safetensors")
    # peft copies the base's embedding and head into the file where they are adapted.
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".base_layer.weight")}
    return {name: hashlib.sha256(t.view(torch.uint8).numpy().tobytes()).hexdigest() for name, t in tensors.items()}


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


CASES = [(family, lora) for family in FAMILIES for lora in LORAS] + [("llama", kind) for kind in KINDS]


@pytest.mark.parametrize("family, lora", CASES)
def test_peft_and_shards_both_ways(tmp_path, capsys, family, lora):
    base = base_model(tmp_path / "base", family, **({"attention_bias": True} if family == "llama" else {}))
    theirs = train_with_peft(base, tmp_path / "theirs", lora_of(family, lora))
    layout = ["--tensor_parallel_size", 4, "--pipeline_parallel_size", 2]
    done(capsys, "adapter", "from-peft", "--input", tmp_path / "theirs", "--output", tmp_path / "shards", *layout)
    assert len(list((tmp_path / "shards").glob("mp_rank_*"))) == 8
    close(our_logits(base, tmp_path / "shards"), logits_of(theirs))

    done(capsys, "adapter", "to-peft", "--input", tmp_path / "shards", "--output", tmp_path / "back")
    assert digests(tmp_path / "back") == digests(tmp_path / "theirs")
    written, back = (json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("theirs", "back"))
    assert back["base_model_name_or_path"] == written["base_model_name_or_path"] == str(base)
    for field in ("r", "lora_alpha", "bias", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout"):
        assert back[field] == written[field], field
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft only warns of keys that it misses
        bare = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        reloaded = peft.PeftModel.from_pretrained(bare, tmp_path / "back").eval()
    assert torch.equal(logits_of(reloaded), logits_of(theirs))


@pytest.mark.parametrize("lora", [*LORAS, *KINDS])
def test_merged(tmp_path, capsys, lora):
    base = base_model(tmp_path / "base", "llama", attention_bias=True)
    theirs = train_with_peft(base, tmp_path / "adapter", (LORAS | KINDS)[lora])
    before = sums(base)
    told = done(capsys, "adapter", "merge", "--input", tmp_path / "adapter", "--output", tmp_path / "merged")
    assert str(tmp_path / "merged") in told and sums(base) == before
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    close(logits_of(merged), logits_of(theirs))
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == (base / "tokenizer.json").read_text()
    # What is not adapted is as it was, bit for bit.
    kinds = r"lora_[AB][.]|lora_embedding_[AB]|token_adapter[.]trainable_tokens_delta"
    names = open_adapter(tmp_path / "adapter").tensors
    trained = {re.sub(r"[.]$", ".weight", re.sub(kinds, "", name)) for name in names}
    now = sums(tmp_path / "merged")
    assert now.keys() == before.keys()
    assert {name for name in now if now[name] != before[name]} == trained & now.keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_merge_is_rounded_once(tmp_path, capsys, dtype):
    """From shards in several files, tied: W + s B A in float32 (float64), then in the dtype of W."""
    base = base_model(tmp_path / "base", "qwen2", dtype=dtype)
    lora = {"target_modules": ["q_proj", "down_proj"], "alpha_pattern": {"q_proj": 2}}
    train_with_peft(base, tmp_path / "adapter", lora)
    done(capsys, "to-shards", "--input", base, "--output", tmp_path / "shards", "--tensor_parallel_size", 2)
    done(
        capsys, "adapter", "merge", "--input", tmp_path / "adapter", "--output", tmp_path / "merged",
        "--base", tmp_path / "shards", "--max_shard_size", 5e-5,
    )  # fmt: skip
    one, other, tensors = HfWeights(base), HfWeights(tmp_path / "merged"), open_adapter(tmp_path / "adapter").tensors
    assert one.shapes == other.shapes
    wide = torch.promote_types(dtype, torch.float32)
    for name, shape in one.shapes.items():
        w, merged = torch.empty(shape, dtype=one.dtype(name)), torch.empty(shape, dtype=other.dtype(name))
        whole = tuple(slice(0, n) for n in shape)
        one.copy(name, whole, w)
        other.copy(name, whole, merged)
        linear = name.removesuffix(".weight")
        if f"{linear}.lora_A.weight" in tensors:
            a, b = (tensors[f"{linear}.lora_{f}.weight"].to(wide) for f in "AB")
            scaling = (2 if "q_proj" in name else 6) / 3
            w = torch.addmm(w.to(wide), b, a, alpha=scaling)
            rounding = torch.finfo(dtype).eps
            assert ((merged.to(wide) - w).abs() <= w.abs() * rounding * 0.501 + 1e-6 * (dtype != torch.float64)).all()
        else:
            assert torch.equal(merged, w), name


def test_what_is_refused(tmp_path, capsys):
    base = base_model(tmp_path / "base", "qwen2", dtype=torch.float16)
    train_with_peft(base, tmp_path / "adapter", LORAS["plain"])
    merge = ["adapter", "merge", "--input", tmp_path / "adapter"]
    out = ["--output", tmp_path / "out"]
    refused(capsys, "which is read", *merge, "--output", base, "--overwrite")
    refused(capsys, "which is read", *merge, "--output", tmp_path / "adapter", "--overwrite")
    for words in (("to-peft",), ("from-peft",), ("combine", "--others", tmp_path / "adapter")):
        words = "adapter", *words, "--input", tmp_path / "adapter", "--output", base, "--overwrite"
        refused(capsys, f"output {base}: holds {base}, which is read", *words)
    other = base_model(tmp_path / "other", "qwen2", hidden_size=64)
    refused(capsys, "has shape", *merge, *out, "--base", other)
    refused(capsys, "lacks", *merge, *out, "--base", base_model(tmp_path / "deep", "qwen2", num_hidden_layers=5))
    base.rename(tmp_path / "moved")
    refused(capsys, "is no folder here: give --base", *merge, *out)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    refused(capsys, "does not name its base model: give --base", *merge, *out)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    tensors = {name: tensor * 1e4 for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    refused(capsys, "is not finite in torch.float16", *merge, *out, "--base", tmp_path / "moved")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_run_is_merged_into_its_own_base_only(tmp_path, capsys):
    base = tiny.save_model(tmp_path / "base")
    shapes = {"lora_A": (2, 32), "lora_B": (32, 2)}
    tensors = {f"model.layers.0.self_attn.q_proj.{f}.weight": torch.ones(s) for f, s in shapes.items()}
    splits = {name: Split(tuple(tensor.shape)) for name, tensor in tensors.items()}
    lora = {"r": 2, "target_modules": "model.layers.0.self_attn.q_proj"}
    words = ["adapter", "merge", "--input", tmp_path / "run", "--output", tmp_path / "out", "--base", base]
    for model, hint in (
        ("llama, 2 layers of 64, 0123", "name that model"),
        ("llama, 2 layers of 32, 0123", "name that model; or, to use the adapter on this one all the same, the run's"),
    ):
        trainer = {"step": 1, "identity": {"model": model, "tokenizer": "another"}}
        save_adapter(tmp_path / "run", tensors, splits, Layout(), lora, {}, trainer)
        refused(capsys, "was trained on another base", *words)
        status, told = run(capsys, *words)
        assert status == 2 and hint in told and ("all the same" in hint) == ("all the same" in told), told
    save_adapter(tmp_path / "run", tensors, splits, Layout(), lora)
    done(capsys, *words)


def test_a_dry_run_of_an_adapter(tmp_path, capsys):
    base = base_model(tmp_path / "base", "qwen2")
    train_with_peft(base, tmp_path / "adapter", LORAS["plain"])
    for command in ("to-peft", "from-peft", "merge"):
        words = ["adapter", command, "--input", tmp_path / "adapter", "--output", tmp_path / "out", "--dry_run"]
        assert "nothing was written" in done(capsys, *words)
    assert not (tmp_path / "out").exists()


def test_commands_of_two_words(capsys):
    refused(capsys, "unknown command convert adapter: give one of", "adapter")
    refused(capsys, "unknown command convert adapter to-hf", "adapter", "to-hf")
    assert "--base" in done(capsys, "adapter", "merge", "--help")
