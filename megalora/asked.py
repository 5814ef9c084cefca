"""Flags of `megalora generate` -> what is asked and how replies are drawn. On rank 0 alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megalora.data import ChatTemplate
from megalora.data.template import TemplateOptions
from megalora.data.tokenizer import OpenedTokenizer
from megalora.errors import UserError
from megalora.flags import GenerationArguments, ServeArguments
from megalora.generation.prompts import Question, ask, read_questions
from megalora.generation.sampling import Sampling
from megalora.models.spec import ModelSpec
from megalora.rows import image_template

SEED = 42  # of the sampling, where none is given
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def template_of(
    options: GenerationArguments | ServeArguments, config: ModelSpec, opened: OpenedTokenizer, recorded: str | None
) -> ChatTemplate:
    """Return the template that prompts are written with. recorded: source of the one that the adapter has."""
    variables = TemplateOptions(options.template_variables, special_tokens_in_text=options.special_tokens_in_text)
    named = options.template
    if named is None and recorded is None:
        named = image_template(config, opened)
    return ChatTemplate.of(opened, named, variables, recorded)


def questions_of(options: GenerationArguments) -> list[Question] | None:
    """Return the questions of a model that chats; None: a dialogue. Raises UserError for what cannot be read."""
    if options.prompt is not None:
        return [ask(options.prompt, options.system, "prompt")]
    if options.prompts_file is not None:
        return read_questions(options.prompts_file, options.system)
    return None


def sampling_of(options: GenerationArguments, defaults: Mapping[str, float]) -> tuple[Sampling, list[str]]:
    """Return how to sample: by the flags, and by the model's `defaults` where they say nothing; and lines on that."""
    taken = {name: value for name, value in defaults.items() if getattr(options, name) is None}
    chosen = {name: taken.get(name, getattr(options, name)) for name in _SAMPLING}
    sampling = Sampling(
        chosen["temperature"] or 0.0,
        int(chosen["top_k"]) if chosen["top_k"] else None,
        chosen["top_p"],
        chosen["min_p"] or None,
        1.0 if chosen["repetition_penalty"] is None else chosen["repetition_penalty"],
        SEED if options.seed is None else options.seed,
    )
    if sampling.temperature == 0:
        for name in ("top_k", "top_p", "min_p"):
            if getattr(options, name) is not None and options.temperature is None:
                raise UserError(
                    f"{name} {getattr(options, name):g} has no effect with temperature 0, which is what this model's "
                    "generation_config.json leaves",
                    f"give a temperature above 0, or leave {name} out",
                )
        taken = {name: value for name, value in taken.items() if name == "repetition_penalty"}
    told = ", ".join(f"{name} {value:g}" for name, value in taken.items())
    lines = [f"generation_config.json of the model says {told}: flags go on top"] if told else []
    if sampling.temperature == 0 and options.seed is not None and options.temperature is None:
        lines.append("not applied in generation: seed, because the likeliest token is taken")
    return sampling, lines


def special_tokens(template: ChatTemplate, questions: Sequence[Question]) -> list[str]:
    """Return a line where prompts contain special tokens."""
    count = sum(template.special_in_text(question.conversation) for question in questions)
    return [f"special tokens in the prompts are tokenised as text ({count:,} times)"] if count else []
