"""Files of the older decoders: transformers' own are read, adapters go both ways, merge and convert, greedy replies."""

from __future__ import annotations

import json
import warnings

import pytest
import talking
import torch
import transformers
from oracle import fields_of
from test_convert import done, sums
from test_convert_adapter import close, digests, logits_of, our_logits, train_with_peft
from test_generation_parity import QUESTIONS, adapted, answers

from megalora.data import ChatTemplate, load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's use of it

NARROW = {"do_layer_norm_before": False, "word_embed_proj_dim": 32}
ALIBI = {
    "new_decoder_architecture": False, "multi_query": False, "num_kv_heads": None, "parallel_attn": False,
    "alibi": True,
}  # fmt: skip
# peft takes project_in and project_out into all-linear too.
LINEARS = {"opt": ["q_proj", "v_proj", "out_proj", "fc1", "fc2"]}
MODELS = {
    "gpt2": ("gpt2", {}), "gpt_bigcode": ("gpt_bigcode", {}), "codegen": ("codegen", {}), "bloom": ("bloom", {}),
    "falcon": ("falcon", {}), "opt": ("opt", NARROW), "phi": ("phi", {}), "mpt": ("mpt", {}), "gptj": ("gptj", {}),
}  # fmt: skip


def save_model(folder, family: str, **fields) -> torch.nn.Module:
    """As transformers writes it: two layers with random weights and a tokenizer."""
    fields = fields_of(family, **{"num_hidden_layers": 2, "eos_token_id": [0, talking.END], "bos_token_id": 1} | fields)
    config = transformers.CONFIG_MAPPING[family](**fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=fields.get("attention")).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0, 0.15)
    model.save_pretrained(folder)
    talking.tokenizer().save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_transformers_files_and_an_adapter_of_peft(tmp_path, capsys, name):
    family, fields = MODELS[name]
    base, adapter = tmp_path / "base", tmp_path / "theirs"
    save_model(base, family, **fields)
    theirs = train_with_peft(base, adapter, {"target_modules": LINEARS.get(family, "all-linear")})
    close(our_logits(base, adapter), logits_of(theirs))


@pytest.mark.parametrize("name", ["gpt2", "falcon"])
def test_convert_and_merge(tmp_path, capsys, name):
    """GPT-2's weights are stored as [in, out], Falcon's q k v by groups of heads."""
    family, fields = MODELS[name]
    base, adapter = tmp_path / "base", tmp_path / "theirs"
    save_model(base, family, **fields)
    theirs = train_with_peft(base, adapter, {"target_modules": "all-linear"})
    layout = ["--tensor_parallel_size", 4, "--pipeline_parallel_size", 2]
    done(capsys, "to-shards", "--input", base, "--output", tmp_path / "base-shards", *layout)
    done(capsys, "to-hf", "--input", tmp_path / "base-shards", "--output", tmp_path / "base-back")
    assert sums(tmp_path / "base-back") == sums(base)
    done(capsys, "adapter", "from-peft", "--input", adapter, "--output", tmp_path / "shards", *layout)
    done(capsys, "adapter", "to-peft", "--input", tmp_path / "shards", "--output", tmp_path / "back")
    assert digests(tmp_path / "back") == digests(adapter)
    assert json.loads((tmp_path / "back/adapter_config.json").read_text())["fan_in_fan_out"] == (name == "gpt2")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft warns of keys that it misses, and of fan_in_fan_out
        bare = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        import peft

        reloaded = peft.PeftModel.from_pretrained(bare, tmp_path / "back").eval()
    close(logits_of(reloaded), logits_of(theirs))
    done(capsys, "adapter", "merge", "--input", adapter, "--output", tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    close(logits_of(merged), logits_of(theirs))


@pytest.mark.parametrize(
    "family, fields",
    [("gpt2", {}), ("bloom", {"tie_word_embeddings": False}), ("falcon", ALIBI), ("gptj", {})],
    ids=["gpt2", "bloom", "falcon", "gptj"],
)
def test_greedy_replies_are_those_of_transformers(tmp_path, family, fields):
    peer = adapted(save_model(tmp_path / "model", family, **fields), tmp_path / "adapter")
    questions, out = QUESTIONS[:3], tmp_path / "replies.jsonl"
    wanted = answers(peer, ChatTemplate(load_tokenizer(tmp_path / "model")), questions, [0, talking.END])
    (tmp_path / "questions.txt").write_text("\n".join(questions))
    command = [
        "--model_path", str(tmp_path / "model"), "--resume_peft_from_checkpoint", str(tmp_path / "adapter"),
        "--dtype", "float32", "--max_new_tokens", "64", "--prompts_file", str(tmp_path / "questions.txt"),
        "--output_file", str(out),
    ]  # fmt: skip
    printed = talking.run(0, 1, command)
    assert not any("error" in str(line) for line in printed), printed
    assert [row["response"] for row in talking.rows(out)] == wanted
