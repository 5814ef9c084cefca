"""The table of flags as text: `--help`, and docs/flags.md."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from megalora.flags.flag import Flag, flags_of, table_of
from megalora.flags.generation import GenerationArguments
from megalora.flags.layout import LayoutArguments
from megalora.flags.parsing import (
    FINETUNE_SECTIONS,
    GENERATE_SECTIONS,
    NOT_PREVIEWED,
    PREVIEW_SECTIONS,
    SERVE_SECTIONS,
)
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
from megalora.flags.web import BoardArguments, ReportArguments, ServeArguments, ServedArguments

_WIDTH = 110

_SECTIONS = {
    "finetune": FINETUNE_SECTIONS,
    "generate": GENERATE_SECTIONS,
    "serve": SERVE_SECTIONS,
    "board": (BoardArguments,),
    "report": (ReportArguments,),
    "data": PREVIEW_SECTIONS,
    "plan": (PlanArguments,),
    "doctor": (DoctorArguments,),
} | {f"convert {name}": sections for name, (_, sections) in CONVERT_COMMANDS.items()}

# Sections of docs/flags.md: its headings, and the sections under each.
_PAGE = {
    "megalora finetune": FINETUNE_SECTIONS,
    "megalora generate": (GenerationArguments,),
    "megalora serve": (ServedArguments, ServeArguments),
    "megalora board": (BoardArguments,),
    "megalora report": (ReportArguments,),
    "megalora data": (PreviewArguments,),
    "megalora plan": (PlanArguments,),
    "megalora doctor": (DoctorArguments,),
    "megalora convert": (
        ConvertArguments,
        BaseArguments,
        LayoutArguments,
        SafetensorsArguments,
        CombineArguments,
        ExtractArguments,
        CompareArguments,
        InitArguments,
        PlainArguments,
    ),
}

_INTRODUCTION = """\
# Flags

<!-- Generated: python -m megalora.flags > docs/flags.md -->

Flags are written `--name value` (or `--name=value`, or with - for _). A boolean is `true` or `false`; the bare flag is
true. A YAML file of the same names, one `name: value` per line, may be given first or as `--config`; flags on the
command line override it. The Python functions `megalora.finetune`, `generate`, `plan` and `convert` take the same names
([python.md](python.md)). A flag that would have no effect is an error."""

_BELOW = {
    "megalora generate": "Also the flags of Model and Parallel above. Training flags are accepted, and named as not "
    "applied.",
    "megalora serve": "Also the flags of Layout below. tensor_parallel_size * pipeline_parallel_size is the number of "
    "processes: one copy of the model.",
    "megalora data": "Also the flags of Data above, but " + ", ".join(NOT_PREVIEWED) + ".",
    "megalora convert": "Each command takes some of these; `megalora convert COMMAND --help` lists them.",
}


def help_text(command: str) -> str:
    """Return what `megalora COMMAND --help` prints, for every command and convert COMMAND."""
    if command == "convert":
        return _convert_help()
    runs = command in ("board", "report")
    lines = [
        f"usage: megalora {command} {'RUN ...' if runs else '[RUN.yaml]'} --FLAG VALUE ...",
        "",
        "Flags may be written with _ or -. A boolean is true or false; the bare flag is true.",
        f"{'--config RUN.yaml' if runs else 'RUN.yaml (or --config RUN.yaml)'} holds the same names, one `name: value` "
        "per line; flags on the",
        "command line override it.",
    ]
    table = table_of(_SECTIONS[command])
    for section in _SECTIONS[command]:
        lines += ["", *textwrap.wrap(f"{_title(section)}: {_first_paragraph(section)}", _WIDTH)]
        for one in flags_of(section):
            applies = not (command == "generate" and one.definition.training_only)
            applies = applies and not (command == "data" and one.name in NOT_PREVIEWED)
            if applies and table[one.name] is one:
                lines += _help_lines(one)
    if command == "generate":
        lines += ["", "The other flags of megalora finetune are accepted, and named on one line as not applied."]
    return "\n".join(lines)


def flags_page() -> str:
    """Return docs/flags.md: all flags as markdown tables."""
    lines = [_INTRODUCTION]
    for heading, sections in _PAGE.items():
        lines += ["", f"## {heading}"]
        if heading in _BELOW:
            lines += ["", _BELOW[heading]]
        for section in sections:
            lines += ["", f"**{_title(section)}**: {_first_paragraph(section)}", "", *_rows(flags_of(section))]
    return "\n".join(lines)


def _help_lines(one: Flag) -> list[str]:
    indent = " " * 6
    text = f"{one.help} ({one.default_text()})"
    described = textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent)
    return [f"  --{one.name} {one.values()}", *described]


def _rows(flags: Iterable[Flag]) -> list[str]:
    lines = ["| flag | values | default | what it does |", "|---|---|---|---|"]
    for one in flags:
        default = "required" if one.required else one.default_text().removeprefix("default: ")
        values = one.values().replace("|", "\\|")
        lines.append(f"| `{one.name}` | {values} | {default} | {one.help} |")
    return lines


def _convert_help() -> str:
    width = max(map(len, CONVERT_COMMANDS))
    commands = [
        line
        for name, (what, _) in CONVERT_COMMANDS.items()
        for line in textwrap.wrap(f"  {name:{width}}  {what}", _WIDTH, subsequent_indent=" " * (width + 4))
    ]
    usage = "usage: megalora convert COMMAND --input IN --output OUT ..."
    return "\n".join([usage, "", *commands, "", "COMMAND --help lists its flags."])


def _title(section: type) -> str:
    return section.__name__.removesuffix("Arguments")


def _first_paragraph(section: type) -> str:
    return " ".join((section.__doc__ or "").split("\n\n")[0].split())
