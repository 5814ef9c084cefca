"""Tiny models that talk, what transformers and peft reply with them, and `megalora generate` on ranks of `spawn`.

The models are random. Their tokenizer has a token for each ASCII character, so that replies compare as tokens.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from oracle import FAMILIES, TINY

from megalora.data import ChatTemplate, Conversation, load_tokenizer
from megalora.errors import UserError
from megalora.flags import parse_generate
from megalora.generation import replica
from megalora.parallel.mesh import build_mesh

program = importlib.import_module("megalora.generate")  # `megalora.generate` is the function of that name
NEW = 20
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
END = 2
QUESTIONS = ["Hi", "What is the capital of France?", "x + y", "Name a colour.", "7"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PROMPT_TOKENS = len("ssuser\ne\nsassistant\n") - 1  # of the template around a question; s, e: a special token
FORMS = FAMILIES | {
    # Shorter than any prompt, but through four layers it sees past the template's last 13 tokens to the question.
    "mistral": {"model_type": "mistral", "sliding_window": 9, "head_dim": 10},
    # We read both forms of the rope fields; this one is read by transformers 4 and 5.
    "qwen3": {"model_type": "qwen3", "head_dim": 8, "rope_theta": 1e6},
}


@dataclass(frozen=True)
class Case:
    """A model folder, a peft folder of an adapter for it, and what transformers replies to QUESTIONS."""

    model: Path
    adapter: Path
    base: list[str]
    tuned: list[str]
    tuned_ids: list[list[int]]  # of `tuned`, with the token that ends it
    prompt_ids: list[list[int]]  # what each reply starts from
    follow_up: str  # after QUESTIONS[0] and its tuned reply, to QUESTIONS[1]


def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    characters = [split.pre_tokenize_str(chr(byte))[0][0] for byte in range(TINY["vocab_size"] - len(SPECIAL))]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *characters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = split, decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    made.chat_template = CHATML
    return made


def make_model(fields: dict, folder: Path) -> torch.nn.Module:
    """A random model of `fields` on top of TINY, saved to `folder` with its tokenizer."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    fields = TINY | {"eos_token_id": [0, END], "bos_token_id": 1, "pad_token_id": None} | fields
    config = CONFIG_MAPPING[fields["model_type"]](**fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.15)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


def make(family: str, folder: Path) -> Case:
    import peft

    model = make_model(FORMS[family], folder / "model")
    template = ChatTemplate(load_tokenizer(folder / "model"))

    def reply(model, *texts: str) -> list[int]:
        roles = ["user", "assistant"] * len(texts)
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
        ids = torch.tensor([template.prompt(Conversation.from_dicts(messages))])
        with torch.no_grad():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False,
                eos_token_id=[0, END], pad_token_id=1,
            )  # fmt: skip
        return out[0, ids.shape[1] :].tolist()

    def text(token_ids: list[int]) -> str:
        return template.tokenizer.decode(token_ids, skip_special_tokens=True)

    base = [text(reply(model, question)) for question in QUESTIONS]
    targets = {
        "phi3": ["qkv_proj", "o_proj", "down_proj"],
        "gpt_neox": ["query_key_value", "dense", "dense_4h_to_h"],
    }.get(family, ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"])
    lora = peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=0.1, target_modules=targets, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, lora).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.15)
    tuned.save_pretrained(folder / "adapter")
    replies = [reply(tuned, question) for question in QUESTIONS]
    follow_up = text(reply(tuned, QUESTIONS[0], text(replies[0]), QUESTIONS[1]))
    prompts = [
        template.prompt(Conversation.from_dicts([{"role": "user", "content": question}])) for question in QUESTIONS
    ]
    return Case(folder / "model", folder / "adapter", base, [*map(text, replies)], replies, prompts, follow_up)


def run(rank: int, world_size: int, *commands: list[str], stdin: bytes = b"", **limits: int) -> list[str]:
    """`megalora generate` of each command on this rank: what it prints, or "error: " and the message.

    stdin is rank 0's; limits are sizes of the program and of the replica, made small.
    """

    @contextlib.contextmanager
    def mesh(device, tp, pp, clock=None, patience=None):
        yield build_mesh(rank, world_size, tp, pp)

    printed = []
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(program, "distributed", mesh))
        patches.enter_context(mock.patch.object(program, "choose_device", lambda: (torch.device("cpu"), None)))
        for name, value in limits.items():
            owner = program if hasattr(program, name) else replica
            patches.enter_context(mock.patch.object(owner, name, value))
        reader, writer = os.pipe()
        os.write(writer, stdin if rank == 0 else b"never read")
        os.close(writer)
        patches.callback(os.close, reader)
        patches.enter_context(mock.patch.object(sys, "stdin", mock.Mock(fileno=lambda: reader)))
        for command in commands:
            out = patches.enter_context(contextlib.redirect_stdout(io.StringIO()))
            try:
                program.generate(parse_generate(command))
                printed.append(out.getvalue())
            except UserError as error:
                printed.append(f"error: {error}")
    return printed


def flags(case: Case, *more: object, adapter: bool = True) -> list[str]:
    named = ["--resume_peft_from_checkpoint", case.adapter] if adapter else []
    return [str(word) for word in ("--model_path", case.model, "--max_new_tokens", NEW, *named, *more)]


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
