"""Greedy text, 64 tokens a reply, is that of transformers' generate with peft's adapter: each family, and a real model.

Three prompts here; `make parity` asks all twenty. The real model is skipped where models/ does not have it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracle import FAMILIES
from spawn import spawn
from talking import END, FORMS, make_model, rows, run

from megalora.data import ChatTemplate, Conversation, load_tokenizer

NEW = 64
REAL = Path(__file__).resolve().parents[1] / "models/SmolLM2-135M-Instruct"
QUESTIONS = """Who are you?
What is the capital of France?
Write a haiku about rain.
7 + 5
Name three colours.
Why is the sky blue? Explain it to a child in two sentences, please.
Hi
List the planets.
Translate "good morning" into Spanish.
What is a prime number?
Tell me a joke about computers.
How do I boil an egg?
Who wrote Hamlet?
Give me a synonym for "quick".
x
What does LoRA stand for in machine learning, and what is it good for when a model is large?
Sort these numbers: 9, 2, 5.
Is water wet?
Describe the sea.
Bye""".split("\n")


def answers(model: torch.nn.Module, template: ChatTemplate, questions: list[str], ends: list[int]) -> list[str]:
    found = []
    for question in questions:
        ids = torch.tensor([template.prompt(Conversation.from_dicts([{"role": "user", "content": question}]))])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
            eos_token_id=ends, pad_token_id=ends[0],
        )  # fmt: skip
        reply = out[0, ids.shape[1] :]
        found.append(template.tokenizer.decode(reply, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return found


def adapted(model: torch.nn.Module, folder: Path, linears: str = "all-linear") -> torch.nn.Module:
    """With a random adapter on these linears, which it saves: strong enough to change what is said."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=linears, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.02, generator=generator)
    tuned.save_pretrained(folder)
    return tuned


def check(folder: Path, model: Path, peer: torch.nn.Module, questions: list[str], ends: list[int], *cut: str) -> None:
    """Ours is theirs, the whole file in one go and one by one, in one process and at tp2·pp2 (cut: flags for that)."""
    peer = adapted(peer, folder / "adapter")
    expected = answers(peer, ChatTemplate(load_tokenizer(model)), questions, ends)
    file, out = folder / "questions.txt", folder / "replies.jsonl"
    file.write_text("\n".join(questions))
    command = [
        "--model_path", str(model), "--resume_peft_from_checkpoint", str(folder / "adapter"), "--dtype", "float32",
        "--max_new_tokens", str(NEW), "--prompts_file", str(file), "--output_file", str(out),
    ]  # fmt: skip
    for ranks, options in ((1, {}), (1, {"MAX_RUNNING": 1}), (4, {})):
        layout = ["--tensor_parallel_size", "2", "--pipeline_parallel_size", "2", *cut] if ranks == 4 else []
        printed = spawn(run, 4, [*command, *layout]) if ranks == 4 else run(0, 1, command, **options)
        assert not any("error" in str(line) for line in printed), printed
        assert [row["response"] for row in rows(out)] == expected
        out.unlink()


@pytest.fixture
def questions(request):
    return QUESTIONS[: request.config.getoption("--questions")]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_model(family, tmp_path, questions):
    peer = make_model(FORMS[family] | {"max_position_embeddings": 512}, tmp_path / "model")
    check(tmp_path, tmp_path / "model", peer, questions, [0, END])


@pytest.mark.slow
def test_a_real_model(tmp_path, questions):
    if not (REAL / "model.safetensors").is_file():
        pytest.skip(f"no {REAL.name} in models/: `make demo` gets it")
    from transformers import AutoModelForCausalLM

    peer = AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32, attn_implementation="eager")
    check(tmp_path, REAL, peer, questions, [2], "--uneven_heads", "true")
