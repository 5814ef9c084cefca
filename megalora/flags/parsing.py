"""From what was given to the arguments of each command.

Each `parse_*` takes the words of a command line, or values by name from Python, and raises UserError for what is
wrong, missing, unknown or without effect. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megalora.errors import UserError
from megalora.flags.flag import flags_of, table_of
from megalora.flags.generation import GenerationArguments
from megalora.flags.layout import LayoutArguments, ParallelArguments
from megalora.flags.reading import Given, read, require, without_idle
from megalora.flags.rules import CONVERT_RULES, FINETUNE_RULES, GENERATE_RULES
from megalora.flags.tools import (
    CONVERT_COMMANDS,
    BaseArguments,
    CombineArguments,
    CompareArguments,
    ConvertArguments,
    DoctorArguments,
    ExtractArguments,
    InitArguments,
    PlainArguments,
    PlanArguments,
    PreviewArguments,
    SafetensorsArguments,
)
from megalora.flags.training import CompatibilityArguments, DataArguments, ModelArguments, TrainArguments
from megalora.flags.web import BoardArguments, ReportArguments, ServeArguments, ServedArguments

Source = Sequence[str] | Mapping[str, Any]

FINETUNE_SECTIONS = (ModelArguments, ParallelArguments, DataArguments, TrainArguments, CompatibilityArguments)
GENERATE_SECTIONS = (ModelArguments, ParallelArguments, GenerationArguments, CompatibilityArguments)


@dataclass(frozen=True)
class FinetuneArguments:
    """Arguments of `megalora finetune`."""

    model: ModelArguments
    parallel: ParallelArguments
    data: DataArguments
    train: TrainArguments


@dataclass(frozen=True)
class GenerateArguments:
    """Arguments of `megalora generate`. `not_applied`: training flags that were given and do not apply."""

    model: ModelArguments
    parallel: ParallelArguments
    generation: GenerationArguments
    not_applied: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conversion:
    """Arguments of `megalora convert COMMAND`; a section that the command does not take has its defaults."""

    command: str
    paths: ConvertArguments | None = None
    layout: LayoutArguments = field(default_factory=LayoutArguments)
    base: BaseArguments = field(default_factory=BaseArguments)
    safetensors: SafetensorsArguments = field(default_factory=SafetensorsArguments)
    combined: CombineArguments | None = None
    extracted: ExtractArguments | None = None
    compared: CompareArguments | None = None
    started: InitArguments | None = None
    plain: PlainArguments | None = None


@dataclass(frozen=True)
class Preview:
    """Arguments of `megalora data`."""

    shown: PreviewArguments
    data: DataArguments


@dataclass(frozen=True)
class Serving:
    """Arguments of `megalora serve`."""

    served: ServedArguments
    layout: LayoutArguments
    server: ServeArguments


SERVE_SECTIONS = (ServedArguments, LayoutArguments, ServeArguments)
PREVIEW_SECTIONS = (PreviewArguments, DataArguments)
NOT_PREVIEWED = ("eval_data_path", "eval_fraction", "data_cache", "packing", "on_bad_row")
"""Flags of the data that only the run itself takes."""


def parse_finetune(source: Source) -> FinetuneArguments:
    """Return the arguments of `megalora finetune`."""
    table = table_of(FINETUNE_SECTIONS)
    elsewhere = {name: "megalora generate" for name in table_of(GENERATE_SECTIONS) if name not in table}
    given = read(source, table, elsewhere)
    for name in ("return_logits", "text_generation"):
        if name in given and given[name].value:
            raise UserError(
                f"{given[name].label} true belongs to megalora generate",
                "run megalora generate with these flags, or leave it out to train",
            )
    given = without_idle(given, table, FINETUNE_RULES)
    require(given, table, _dashes(source))
    model, parallel, data, train = _sections(given, FINETUNE_SECTIONS)
    return FinetuneArguments(model, parallel, data, train)


def parse_generate(source: Source) -> GenerateArguments:
    """Return the arguments of `megalora generate`. Training flags are checked too, then named in `not_applied`."""
    applying = {name: one for name, one in table_of(GENERATE_SECTIONS).items() if not one.definition.training_only}
    given = read(source, {**table_of(FINETUNE_SECTIONS), **applying}, {})
    if "text_generation" in given and not given["text_generation"].value:
        raise UserError(
            f"{given['text_generation'].label} false is not supported: generation always writes text",
            "give true, or leave it out",
        )
    not_applied = [name for name in given if name not in applying]
    given = {name: one for name, one in given.items() if name in applying}
    given = without_idle(given, applying, GENERATE_RULES)
    require(given, applying, _dashes(source))
    model, parallel, generation = _sections(given, GENERATE_SECTIONS)
    if "seed" in given and generation.temperature == 0:
        not_applied.append("seed")
    return GenerateArguments(model, parallel, generation, tuple(not_applied))


def parse_serve(source: Source) -> Serving:
    """Return the arguments of `megalora serve`."""
    table = table_of(SERVE_SECTIONS)
    elsewhere = {name: "megalora generate" for name in table_of(GENERATE_SECTIONS) if name not in table}
    given = without_idle(read(source, table, elsewhere), table, CONVERT_RULES)
    require(given, table, _dashes(source))
    return Serving(*(_section(given, section) for section in SERVE_SECTIONS))


def parse_board(source: Source) -> BoardArguments:
    """Return the arguments of `megalora board`."""
    return _of_runs(source, BoardArguments)


def parse_report(source: Source) -> ReportArguments:
    """Return the arguments of `megalora report`."""
    return _of_runs(source, ReportArguments)


def _of_runs(source: Source, section: type) -> Any:
    """Build a section whose `runs` may stand before all flags."""
    if not isinstance(source, Mapping):
        words = list(source)
        count = next((at for at, word in enumerate(words) if word.startswith("-")), len(words))
        if count and not words[0].endswith((".yaml", ".yml")):
            source = ["--runs", *words]
    table = table_of([section])
    given = read(source, table, {})
    require(given, table, _dashes(source))
    return _section(given, section)


def parse_doctor(source: Source) -> DoctorArguments:
    """Return the arguments of `megalora doctor`."""
    return _section(read(source, table_of([DoctorArguments]), {}), DoctorArguments)


def parse_preview(source: Source) -> Preview:
    """Return the arguments of `megalora data`."""
    table = {name: one for name, one in table_of(PREVIEW_SECTIONS).items() if name not in NOT_PREVIEWED}
    elsewhere = {name: "megalora finetune" for name in table_of(FINETUNE_SECTIONS) if name not in table}
    given = read(source, table, elsewhere)
    require(given, table, _dashes(source))
    if "row" in given and "rows" in given:
        raise UserError("row and rows are both given", "give one of them")
    return Preview(*(_section(given, section) for section in PREVIEW_SECTIONS))


def parse_plan(source: Source) -> PlanArguments:
    """Return the arguments of `megalora plan`."""
    table = table_of([PlanArguments])
    elsewhere = {name: "megalora finetune" for name in table_of(FINETUNE_SECTIONS) if name not in table}
    given = read(source, table, elsewhere)
    require(given, table, _dashes(source))
    return _section(given, PlanArguments)


def parse_convert(command: str, source: Source) -> Conversion:
    """Return the arguments of `megalora convert COMMAND`."""
    if command not in CONVERT_COMMANDS:
        raise _unknown_conversion(command)
    _, sections = CONVERT_COMMANDS[command]
    table = table_of(sections)
    elsewhere = {
        name: f"megalora convert {other}"
        for other, (_, theirs) in reversed([*CONVERT_COMMANDS.items()])
        for name in table_of(theirs)
        if name not in table
    }
    given = without_idle(read(source, table, elsewhere), table, CONVERT_RULES)
    require(given, table, _dashes(source))
    names = {
        ConvertArguments: "paths",
        LayoutArguments: "layout",
        BaseArguments: "base",
        SafetensorsArguments: "safetensors",
        CombineArguments: "combined",
        ExtractArguments: "extracted",
        CompareArguments: "compared",
        InitArguments: "started",
        PlainArguments: "plain",
    }
    return Conversion(command, **{names[section]: _section(given, section) for section in sections})


def split_convert(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Return the command that the words after `megalora convert` begin with, and the words after it."""
    words = list(argv)
    for command in CONVERT_COMMANDS:
        length = len(command.split())
        if words[:length] == command.split():
            return command, words[length:]
    groups = {command.split()[0] for command in CONVERT_COMMANDS if " " in command}
    raise _unknown_conversion(" ".join(words[: 2 if words[:1] and words[0] in groups else 1]))


def _unknown_conversion(said: str) -> UserError:
    what = f"unknown command convert {said}" if said else "convert needs a command"
    return UserError(what, f"give one of {', '.join(CONVERT_COMMANDS)}; megalora convert --help explains them")


def _dashes(source: Source) -> str:
    return "" if isinstance(source, Mapping) else "--"


def _section(given: Mapping[str, Given], section: type) -> Any:
    """Build a section from its flags among those that were given."""
    return section(**{one.name: given[one.name].value for one in flags_of(section) if one.name in given})


def _sections(given: Mapping[str, Given], sections: Sequence[type]) -> list[Any]:
    """Build the sections but that of compatibility, which is checked and folded into `dtype`."""
    said = given["dtype"].value if "dtype" in given else None
    dtype = _section(given, CompatibilityArguments).resolve_dtype(said)
    given = {**given, "dtype": Given(dtype, "dtype")}
    return [_section(given, section) for section in sections if section is not CompatibilityArguments]
