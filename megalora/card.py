"""The model card (README.md) of an exported adapter or a merged model: what it is, and what it was trained with."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megalora.files import read_text, write_file

CARD = "README.md"
MARK = "<!-- written by megalora -->"  # cards without it are someone's own
_PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "TOKEN_CLS": "token-classification",
    "SEQ_CLS": "text-classification",
}
_PACKAGES = ("torch", "transformers", "safetensors")
_TRAINING = "## Training"


def adapter_card(
    base: str, task: str, sections: Mapping[str, Mapping[str, Any]], settings: str, engine_version: str
) -> str:
    """Return the card of an adapter for PEFT.

    base      the model that it belongs to: OWNER/NAME, or a folder
    sections  {title: {name: value}}: what is told of the run, in this order
    settings  flags of the run, as YAML
    """
    lines = [
        *_head(base, "peft", task),
        f"# LoRA adapter of {_short(base)}",
        "",
        f"Base model: `{base}`. Task: `{task}`.",
        "",
        *_use(base, task),
        _TRAINING,
        "",
        f"Trained with megalora {engine_version}.",
        "",
    ]
    for title, values in sections.items():
        rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in values.items()]
        lines += [f"### {title[:1].upper()}{title[1:]}", "", "| | |", "| --- | --- |", *rows, ""]
    if settings:
        lines += ["### Flags", "", "```yaml", settings.rstrip("\n"), "```", ""]
    return "\n".join(lines)


def merged_card(base: str, task: str, card: str | None) -> str:
    """Return the card of a model with an adapter merged into it. card: the adapter's, where it has one of ours."""
    told = card[card.index(_TRAINING) :] if card is not None and _TRAINING in card else ""
    lines = [
        *_head(base, "transformers", task),
        f"# {_short(base)} with a LoRA adapter merged into it",
        "",
        f"Base model: `{base}`. Task: `{task}`. The adapter's update is part of the weights.",
        "",
        told or f"{_TRAINING}\n\nNothing is known of the run that the adapter is from.\n",
    ]
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_card(folder: Path, text: str) -> None:
    """Write the card into a folder, unless a card is there that someone wrote. Raises OSError."""
    file = folder / CARD
    if not file.exists() or read_card(folder) is not None:
        write_file(file, text.encode())


def read_card(folder: Path) -> str | None:
    """Return the card in a folder, where there is one of ours."""
    file = folder / CARD
    text = read_text(file, what="model card") if file.is_file() else ""
    return text if MARK in text else None


def _head(base: str, library: str, task: str) -> list[str]:
    """Return the front matter that the hub reads: a folder of this machine is no base_model there."""
    named = [f"base_model: {base}"] if _is_public(base) else []
    found = [*named, f"library_name: {library}", "tags:", "- lora", "- megalora"]
    return ["---", *found, f"pipeline_tag: {_PIPELINES[task]}", "---", MARK, ""]


def _use(base: str, task: str) -> list[str]:
    if task not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        return []
    kind = "AutoModelForCausalLM" if task == "CAUSAL_LM" else "AutoModelForSeq2SeqLM"
    return [
        "```python",
        "from peft import PeftModel",
        f"from transformers import {kind}, AutoTokenizer",
        "",
        f"model = PeftModel.from_pretrained({kind}.from_pretrained({base!r}), FOLDER)  # of this card",
        "tokenizer = AutoTokenizer.from_pretrained(FOLDER)",
        "```",
        "",
    ]


def _is_public(base: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", base) is not None and not Path(base).exists()


def _short(base: str) -> str:
    return base if _is_public(base) else Path(base).name or base


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())
