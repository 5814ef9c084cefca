"""Small tokenizers, built here, and the real one of DeepSeek-R1-Distill-Qwen where there is shared data."""

from __future__ import annotations

import gzip
import json

import pytest
from chat_templates import bpe
from transformers import PreTrainedTokenizerFast

from megalora.data import load_tokenizer

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def make_tokenizer():
    """(special tokens, chat template, names of the special tokens) -> a fast tokenizer."""

    def make(special: list[str], chat_template: str | None, adds_bos: bool = False, **names: str):
        backend = bpe(special, names["bos_token"] if adds_bos else None)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
        tokenizer.chat_template = chat_template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def chatml(make_tokenizer):
    """As Qwen and SmolLM2: a default system prompt, a newline after the end token, which is not eos."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return make_tokenizer(special, CHATML, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


@pytest.fixture(scope="session")
def llama3(make_tokenizer):
    """As Llama 3: the template prints bos, and the tokenizer sets it too; texts are trimmed."""
    special = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
    ]
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    return make_tokenizer(special, LLAMA3, adds_bos=True, **names)


@pytest.fixture(scope="session")
def r1(shared_dir, tmp_path_factory):
    """The real tokenizer of DeepSeek-R1-Distill-Qwen, with its chat template."""
    source = shared_dir / "data" / "tokenizers" / "DeepSeek-R1-Distill-Qwen"
    folder = tmp_path_factory.mktemp("r1")
    (folder / "tokenizer.json").write_bytes(gzip.decompress((source / "tokenizer.json.gz").read_bytes()))
    (folder / "tokenizer_config.json").write_bytes((source / "tokenizer_config.json").read_bytes())
    return load_tokenizer(folder)


@pytest.fixture
def write_json(tmp_path):
    """(rows, name) -> the path of a JSON file with them."""

    def write(rows, name: str = "data.json"):
        path = tmp_path / name
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        return path

    return write
