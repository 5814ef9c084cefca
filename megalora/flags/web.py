"""Sections of `megalora serve`, `megalora board` and `megalora report`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from megalora.errors import UserError
from megalora.flags import shared
from megalora.flags.flag import REQUIRED, Definition, Section, flag

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,99}")
_TOKEN = re.compile(r"[A-Za-z0-9._~-]{8,200}")
HOST = Definition("address to listen on; 0.0.0.0 is every network of this machine, and then clients need the token")
PORT = Definition("port to listen on; 0 is any that is free", at_least=0, at_most=65535)
TOKEN = Definition("secret that clients must know: in the address as token, or as a Bearer key")
RUNS = Definition(
    "output_dir of each run, also before all flags; a folder that is no run stands for the runs in it",
    verbatim=True,
)
_UNSET_TOKEN = "none on 127.0.0.1; elsewhere one is made and printed"


def _check_token(token: str | None) -> None:
    """Raise UserError for a secret that is easily guessed, or that an address, header or cookie cannot carry."""
    if token is not None and not _TOKEN.fullmatch(token):
        raise UserError(
            "token must be 8 to 200 letters, digits and . _ ~ - (it stands in addresses and headers)",
            "give another, or leave it out",
        )


@dataclass(frozen=True)
class ServedArguments(Section):
    """The base model and its adapters. Each is a model with a name for clients."""

    model_path: str = flag(
        REQUIRED,
        "Hugging Face folder of the base model: config.json, tokenizer, weights",
        exists="a Hugging Face folder with config.json, tokenizer and weights",
    )
    model_name: str | None = flag(None, "name of the base model for clients", unset="that of its folder")
    adapters: tuple[str, ...] | None = flag(
        None,
        "adapters as NAME=FOLDER, each the output_dir of a run, megalora shards or a PEFT folder",
        verbatim=True,
        unset="none",
    )
    max_adapters: int | None = flag(
        None,
        "adapters that there is room for at a time: more can then be loaded while the server runs, at "
        "/v1/load_lora_adapter",
        at_least=1,
        unset="those of --adapters alone",
    )
    max_adapter_rank: int | None = flag(
        None, "rank that each of max_adapters has room for", at_least=1, unset="16, or the largest of --adapters"
    )
    room_for_experts: bool | None = flag(
        None,
        "max_adapters has room on the linears of experts too, which takes memory for each of them",
        unset="true where an adapter of --adapters is of experts",
    )
    resume_from_checkpoint: str | None = flag(
        None,
        "folder to load the base weights from: Hugging Face safetensors or megalora shards",
        unset="model_path",
        exists="a Hugging Face folder or megalora shards",
    )
    base_format: str = shared.BASE_FORMAT.field("auto")
    dtype: str = shared.DTYPE.field("auto")
    nproc: int | None = shared.NPROC.field(None, unset="those of torchrun, or one")

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [name for name, _ in self.named_adapters]
        for word in (*names, *([self.model_name] if self.model_name is not None else [])):
            if not _NAME.fullmatch(word):
                raise UserError(f"{word!r} cannot be the name of a model", "give letters, digits and . _ : / -")
        for name in names:
            if names.count(name) > 1 or name == self.model_name:
                raise UserError(f"two models are named {name}", "give each a name of its own")
        if self.max_adapters is not None and self.max_adapters < len(names):
            raise UserError(
                f"max_adapters {self.max_adapters} is less than the {len(names)} of --adapters",
                f"give at least {len(names)}",
            )
        if self.max_adapter_rank is not None and self.max_adapters is None:
            raise UserError("max_adapter_rank has no effect without max_adapters", "give that as well")
        if self.room_for_experts is not None and self.max_adapters is None:
            raise UserError("room_for_experts has no effect without max_adapters", "give that as well")

    @property
    def named_adapters(self) -> tuple[tuple[str, str], ...]:
        """Return (name, folder) of each adapter."""
        found = []
        for word in self.adapters or ():
            name, equals, folder = word.partition("=")
            if not equals or not folder:
                raise UserError(f"adapters {word!r} is not NAME=FOLDER", "give for example --adapters tuned=output")
            found.append((name, folder))
        return tuple(found)


@dataclass(frozen=True)
class ServeArguments(Section):
    """Where to listen, how many requests run together, and what they may ask."""

    host: str = HOST.field("127.0.0.1")
    port: int = PORT.field(8000)
    token: str | None = TOKEN.field(None, unset=_UNSET_TOKEN)
    max_running: int = flag(32, "requests that run at a time; each has a share of the key/value cache", at_least=1)
    max_waiting: int = flag(256, "requests that may wait for a slot; more are answered with 429", at_least=0)
    seq_length: int | None = flag(
        None,
        "maximum length of prompt and reply together, in tokens; the cache holds max_running times as many",
        at_least=2,
        unset="the model's max_position_embeddings, at most 4096",
    )
    kv_cache: str = shared.KV_CACHE.field("dense")
    stop_timeout: float = flag(
        30.0, "seconds that running requests have to end when the server is told to stop", at_least=0
    )
    template: str | None = shared.TEMPLATE.field(None, unset="each adapter's own, or the tokenizer's")
    chat_template_kwargs: str | None = shared.CHAT_TEMPLATE_KWARGS.field(None, unset="the template's defaults")
    special_tokens_in_text: bool = shared.SPECIAL_TOKENS_IN_TEXT.field(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_token(self.token)
        shared.template_variables(self.chat_template_kwargs)

    @property
    def template_variables(self) -> dict[str, Any]:
        """Variables of the chat template."""
        return shared.template_variables(self.chat_template_kwargs)


@dataclass(frozen=True)
class BoardArguments(Section):
    """The runs to show, and where to listen. The runs are only read."""

    runs: tuple[str, ...] = RUNS.field(REQUIRED)
    host: str = HOST.field("127.0.0.1")
    port: int = PORT.field(8010)
    token: str | None = TOKEN.field(None, unset=_UNSET_TOKEN)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_token(self.token)


@dataclass(frozen=True)
class ReportArguments(Section):
    """The runs to write about, and the file to write."""

    runs: tuple[str, ...] = RUNS.field(REQUIRED)
    output: str = flag(REQUIRED, "HTML file to write; a file of that name is replaced")
