"""Which chat template is used: the one that is named, the adapter's, the tokenizer's own, or a built-in one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import read_text
from ..tokenizer_files import TEMPLATE_BYTES

# Every built-in starts with the tokenizer's own beginning-of-text token, where it sets one before any text.
BUILT_IN = {
    "plain": (
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
        "{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
        "{% else %}{{ '### Response:\n' + message['content'] + eos_token + '\n\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
    ),
    # The prompt as it is and the reply behind it: of models that read an image and a text without turns.
    "bare": (
        "{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
        "{% else %}{{ message['content'] }}{% endif %}"
        "{% endfor %}"
    ),
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}

# Templates that print today's date (Llama 3.2) print this one, the date Llama 3's own template falls back to:
# a run is the same run tomorrow, and generation gets the prompt of training. The macro hides the function of
# that name which transformers hands to templates.
FIXED_DATE = (
    "{% macro strftime_now(form) %}{{ form"
    " | replace('%d', '26') | replace('%m', '07') | replace('%b', 'Jul') | replace('%B', 'July')"
    " | replace('%y', '24') | replace('%Y', '2024') | replace('%A', 'Friday') | replace('%a', 'Fri')"
    " | replace('%H', '00') | replace('%M', '00') | replace('%S', '00') }}{% endmacro %}"
)
OPTIONS = f"--template ({' | '.join(BUILT_IN)} | a jinja file)"


@dataclass(frozen=True)
class Choice:
    """A template's source, a phrase that says where it is from, and what the user should know of the choice.

    own        it is the tokenizer's own
    for_tools  another one, for rows with tools
    """

    source: str
    description: str
    notes: tuple[str, ...] = ()
    own: bool = False
    for_tools: str | None = None


def choose(tokenizer: Any, template: str | None, recorded: str | None = None) -> Choice:
    """Choose the template that is named, else the one `recorded` with an adapter, else the tokenizer's own.

    template  a name in `BUILT_IN`, one of the tokenizer's several, or the path of a jinja file
    Where the tokenizer has none it is `plain`, with a note. Raises UserError for a template that cannot be found.
    """
    several = tokenizer.chat_template
    several = several if isinstance(several, Mapping) else {"default": several} if several else {}
    if not all(isinstance(source, str) for source in several.values()):
        raise UserError("the tokenizer's chat_template is no text", "copy tokenizer_config.json again")
    several = {name: source.removeprefix("\ufeff").removeprefix(FIXED_DATE) for name, source in several.items()}
    recorded = recorded and recorded.removeprefix(FIXED_DATE)
    if template is not None:
        chosen = _named(tokenizer, template, several)
        if recorded is not None and chosen.source != recorded:
            other = f"{chosen.description} is used; the adapter was trained with another one"
            return Choice(chosen.source, chosen.description, (f"{other}: leave --template out to use that",))
        return chosen
    own = several.get("default")
    if recorded is not None and recorded != own:
        note = "the chat template that the adapter was trained with is used, not the one of the model's folder"
        return Choice(recorded, "the adapter's chat template", (note,))
    if own is not None:
        return Choice(own, "the tokenizer's chat template", own=True, for_tools=several.get("tool_use"))
    if several:
        names = ", ".join(sorted(several))
        raise UserError(
            f"the tokenizer has chat templates named {names}, and none named default", "give --template NAME"
        )
    note = "the tokenizer has no chat template: the built-in template plain is used; --template names another"
    source = _bos(tokenizer) + BUILT_IN["plain"]
    return Choice(source, "the built-in template plain (the tokenizer has no chat template)", (note,))


def with_fixed_date(source: str) -> str:
    """Return a template's source with the date of every run, where it prints one."""
    return FIXED_DATE + source if "strftime_now" in source and not source.startswith(FIXED_DATE) else source


def with_defaults(variables: Mapping[str, Any], source: str) -> str:
    """Return the template with values for variables that are not given, so that whoever uses it later has them too."""
    set_here = (
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}"
        for name, value in sorted(variables.items())
    )
    return "".join(set_here) + source


def _named(tokenizer: Any, name: str, several: Mapping[str, str]) -> Choice:
    if name in BUILT_IN:
        return Choice(_bos(tokenizer) + BUILT_IN[name], f"the built-in template {name}")
    if name in several and not Path(name).exists():
        return Choice(several[name], f"the tokenizer's chat template {name}")
    try:
        return Choice(read_text(Path(name), most=TEMPLATE_BYTES).removeprefix(FIXED_DATE), f"the template {name}")
    except UserError as error:
        names = f"; the tokenizer's are {', '.join(sorted(several))}" if len(several) > 1 else ""
        reason = f"{name} is no built-in template and cannot be read as a jinja file ({error})"
        raise UserError(f"--template: {reason}", f"give {OPTIONS}{names}") from None


def _bos(tokenizer: Any) -> str:
    """Return jinja for the beginning-of-text token, where the tokenizer itself sets one before a text."""
    bos = tokenizer.bos_token_id
    return "{{ bos_token }}" if bos is not None and tokenizer("a")["input_ids"][0] == bos else ""


def _literal(value: Any) -> str:
    """Return a value of JSON as jinja writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value)
