"""Short versions of the chat templates in use, true to what they do with turns, thinking and tools, written for these
tests (templates/*.jinja); and the special tokens that each of them needs."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from megalora.data import ChatTemplate
from megalora.data.pieces import IGNORE
from megalora.data.template import TemplateOptions


class Template(NamedTuple):
    """special: tokens of the tokenizer, bos ("": none) and eos first; plain: tokens that are added, not special."""

    special: tuple[str, ...]
    plain: tuple[str, ...] = ()


_DEEPSEEK = (
    *("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
    *(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
    ),
    *("<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
)
_LLAMA = ("<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>")
_QWEN = ("", "<|im_end|>", "<|endoftext|>", "<|im_start|>")
_THINK, _CALL = ("<think>", "</think>"), ("<tool_call>", "</tool_call>")
_MISTRAL_TOOLS = ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
TEMPLATES = {
    "chatml": Template(_QWEN),
    "r1": Template(_DEEPSEEK, _THINK),
    "r1_first": Template(_DEEPSEEK, _THINK),
    "deepseek_v3": Template(_DEEPSEEK),
    "qwen25": Template(_QWEN, _CALL),
    "qwen3": Template(_QWEN, (*_CALL, *_THINK)),
    "qwen3_training": Template(_QWEN, _THINK),
    "llama31": Template(_LLAMA),
    "llama32": Template(_LLAMA),
    "mistral_v3": Template(("<s>", "</s>", "[INST]", "[/INST]", *_MISTRAL_TOOLS)),
    "gemma": Template(("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")),
    "phi3": Template(("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
}


CORPUS = [
    "user\nassistant\nsystem\n\n",
    "hello world, who are you? I am Mega.\n\n\n",
    "你是谁？我是 Mega。",
] * 20


def bpe(special: list[str], bos: str | None = None) -> Tokenizer:
    """Byte-level BPE with some merges (newlines merge too); sets `bos` before a text, as Llama 3 does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def source(name: str) -> str:
    """Return the jinja source of a template."""
    return (Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def tokenizer_of(name: str, backend: object) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the tokens of a template. backend: a tokenizer of the tokenizers library with the special
    ones."""
    special, plain = TEMPLATES[name]
    bos = {"bos_token": special[0]} if special[0] else {}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special[1], **bos)
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    made.chat_template = source(name)
    return made


def make(name, **options):
    """Return a template with its tokenizer. options: those of TemplateOptions."""
    return ChatTemplate(tokenizer_of(name, backend(name)), options=TemplateOptions(**options))


def trained(template, conversation):
    """The trained texts of each document, and the whole texts."""
    documents = []
    for sample in template.encode(conversation):
        runs, last = [], False
        for token, label in zip(sample.input_ids.tolist(), sample.labels.tolist(), strict=True):
            assert label in (IGNORE, token)
            if label != IGNORE:
                runs = runs if last else [*runs, []]
                runs[-1].append(token)
            last = label != IGNORE
        documents.append([template.tokenizer.decode(run) for run in runs])
    return documents


def backend(name):
    """Byte-level BPE that cuts texts as Llama 3 and Qwen do: line breaks stay together, whatever follows."""
    made = bpe([token for token in TEMPLATES[name].special if token])
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    cut = pre_tokenizers.Split(Regex(words), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return made
