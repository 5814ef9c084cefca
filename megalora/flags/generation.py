"""Section of `megalora generate` beside the model and the layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megalora.errors import UserError
from megalora.flags import shared
from megalora.flags.flag import Section, flag


@dataclass(frozen=True)
class GenerationArguments(Section):
    """Prompts and decoding. Without prompt and prompts_file, it is a chat in the terminal."""

    prompt: str | None = flag(None, "a single prompt", unset="a chat in the terminal")
    prompts_file: str | None = flag(
        None,
        "file of prompts: one per line, or JSON rows as for training",
        unset="a chat in the terminal",
        exists="a file of prompts; check the path",
    )
    image: str | None = flag(
        None,
        "image file before the prompt, for a model that reads one (blip-2); without a prompt it is described",
        unset="none; rows of prompts_file name their own",
        exists="an image file; check the path",
    )
    output_file: str | None = flag(None, "JSON lines file for the replies", unset="the terminal")
    system: str | None = flag(None, "system message before each prompt", unset="the template's", empty=True)
    max_new_tokens: int = flag(256, "maximum length of a reply, in tokens", at_least=1)
    temperature: float | None = flag(
        None,
        "sampling temperature; 0 is greedy decoding",
        at_least=0,
        unset="that of the model's generation_config.json, or 0",
    )
    top_k: int | None = flag(
        None,
        "sample from the k most likely tokens; 0 is all tokens",
        at_least=0,
        unset="that of generation_config.json, or all tokens",
    )
    top_p: float | None = flag(
        None,
        "sample from the most likely tokens whose probabilities sum to this (nucleus sampling)",
        above=0,
        at_most=1,
        unset="that of generation_config.json, or all tokens",
    )
    min_p: float | None = flag(
        None,
        "sample from tokens at least this probable, relative to the most likely one",
        at_least=0,
        at_most=1,
        unset="that of generation_config.json, or all tokens",
    )
    repetition_penalty: float | None = flag(
        None,
        "penalty on tokens that already occur: divides positive logits, multiplies negative ones; 1 is off",
        above=0,
        unset="that of generation_config.json, or 1",
    )
    stop: tuple[str, ...] | None = flag(
        None,
        r"strings that end a reply; they are not part of it; \n, \t and \\ are escapes",
        verbatim=True,
        unset="none",
    )
    seed: int | None = flag(None, "seed of the sampling", at_least=0, at_most=2**63 - 1, unset="42")
    template: str | None = shared.TEMPLATE.field(None, unset="the adapter's own, or the tokenizer's")
    source_prefix: str | None = shared.SOURCE_PREFIX.field(None, unset="that of the adapter's training, or none")
    chat_template_kwargs: str | None = shared.CHAT_TEMPLATE_KWARGS.field(None, unset="the template's defaults")
    special_tokens_in_text: bool = shared.SPECIAL_TOKENS_IN_TEXT.field(False)
    seq_length: int | None = flag(
        None,
        "maximum length of prompt and reply together, in tokens",
        at_least=2,
        unset="the model's max_position_embeddings",
    )
    kv_cache: str = shared.KV_CACHE.field("dense")
    disable_adapter: bool = flag(False, "reply from the base model, without resume_peft_from_checkpoint")
    compare_base: bool = flag(False, "show the base model's reply next to the adapter's")
    show_thinking: bool = flag(False, "show the reasoning of a reply (between its think tags), apart from the answer")
    return_logits: bool = flag(False, "also write the logits of each prompt, as safetensors")
    logits_dir: str = flag("logits", "folder for the logits of return_logits")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt is not None and self.prompts_file is not None:
            raise UserError("prompt and prompts_file are both given", "give one of them")
        if self.compare_base and self.disable_adapter:
            raise UserError("compare_base and disable_adapter are both true", "give one of them")
        shared.template_variables(self.chat_template_kwargs)

    @property
    def chats(self) -> bool:
        """Whether prompts are typed: none is given."""
        return self.prompt is None and self.prompts_file is None and self.image is None

    @property
    def template_variables(self) -> dict[str, Any]:
        """Variables of the chat template."""
        return shared.template_variables(self.chat_template_kwargs)
