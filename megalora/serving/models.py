"""The models that a server has by name: the base and its adapters, each with the template that it was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megalora.data import ChatTemplate
from megalora.errors import UserError
from megalora.generation.prompts import Question, encode
from megalora.generation.requests import Prompt
from megalora.generation.text import Reader
from megalora.serving.bodies import Asked
from megalora.serving.errors import ApiError, bad
from megalora.serving.images import ImageInput


@dataclass(frozen=True)
class ServedModel:
    """One name. adapter: as Prompt has it, 0 the base. stop_token_ids: each of them ends a reply of a chat.

    images  reads the one before each text; None: it reads text alone
    """

    name: str
    adapter: int
    template: ChatTemplate
    stop_token_ids: tuple[int, ...]
    images: ImageInput | None = None

    def prompts(self, asked: Asked, context: int) -> list[Prompt]:
        """Return the prompts, without a number yet. Slow: it renders, tokenises and decodes an image.

        Raises ApiError, also for too many tokens.
        """
        first = [] if self.images is None else self.images.placeholders
        try:
            if asked.conversation is None:
                return [Prompt(0, self._continued(prompt, context), self.adapter) for prompt in asked.prompts]
            ids = encode(self.template, Question(asked.conversation, "messages"), context - len(first))
        except UserError as error:
            code = "context_length_exceeded" if "leave no room" in str(error) else None
            raise bad(str(error), "prompt" if asked.conversation is None else "messages", code) from None
        picture = None if self.images is None or asked.image is None else self.images.read(asked.image)
        return [Prompt(0, [*first, *ids], self.adapter, picture=picture)]

    def _continued(self, prompt: str | tuple[int, ...], context: int) -> list[int]:
        if isinstance(prompt, str) and len(prompt) <= context * self.template.longest_token:
            ids = self.template.text_prompt(prompt)
        elif isinstance(prompt, str):
            raise UserError(
                f"{len(prompt):,} characters leave no room for a reply in a context of {context} tokens", "shorten it"
            )
        else:
            ids = list(prompt)
        if len(ids) >= context:
            raise UserError(f"{len(ids)} tokens leave no room for a reply in a context of {context}", "shorten it")
        return ids


@dataclass(frozen=True)
class Catalogue:
    """models    by name, the base first; adapters may come and go, on the event loop
    reader    of replies, which all models share with their tokenizer; tool_reader: which shows the words of calls too
    words     the model's vocab_size: token ids are below it
    special   id of each special token that leaves no text, by the token
    context   longest prompt and reply together, in tokens
    defaults  of the sampling, where a request says nothing
    created   when the server started, in seconds since 1970
    """

    models: dict[str, ServedModel]
    reader: Reader
    tool_reader: Reader
    words: int
    special: Mapping[str, int]
    context: int
    defaults: Mapping[str, float]
    created: int

    @property
    def takes_images(self) -> bool:
        """Whether each prompt has an image before it: adapters read what their base does."""
        return next(iter(self.models.values())).images is not None

    def find(self, name: str) -> ServedModel:
        """Return the model of a name. Raises ApiError 404."""
        found = self.models.get(name)
        if found is None:
            names = ", ".join(self.models)
            raise ApiError(404, f"no model {name!r:.80} here: there are {names}", "model", "model_not_found")
        return found

    def listed(self) -> list[dict[str, object]]:
        """Return the models as /v1/models lists them."""
        base = next(iter(self.models))
        modalities = ["text", "image"] if self.takes_images else ["text"]
        return [
            {
                "id": name,
                "object": "model",
                "created": self.created,
                "owned_by": "megalora",
                "parent": None if name == base else base,
                "input_modalities": modalities,
            }
            for name in self.models
        ]
