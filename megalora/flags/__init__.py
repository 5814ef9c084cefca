"""Flags: dataclasses whose fields are flags, read from the command line, YAML or Python. Nothing here imports torch.

A section is handed to the part that needs it, never the whole.
"""

from megalora.flags.generation import GenerationArguments
from megalora.flags.layout import LayoutArguments, ParallelArguments, validate_world
from megalora.flags.parsing import (
    FINETUNE_SECTIONS,
    GENERATE_SECTIONS,
    Conversion,
    FinetuneArguments,
    GenerateArguments,
    Preview,
    Serving,
    parse_board,
    parse_convert,
    parse_doctor,
    parse_finetune,
    parse_generate,
    parse_plan,
    parse_preview,
    parse_report,
    parse_serve,
    split_convert,
)
from megalora.flags.tools import CONVERT_COMMANDS, ConvertArguments, DoctorArguments, PlanArguments, PreviewArguments
from megalora.flags.training import CompatibilityArguments, DataArguments, ModelArguments, TrainArguments
from megalora.flags.web import BoardArguments, ReportArguments, ServeArguments, ServedArguments

__all__ = [
    "CONVERT_COMMANDS",
    "BoardArguments",
    "FINETUNE_SECTIONS",
    "GENERATE_SECTIONS",
    "CompatibilityArguments",
    "Conversion",
    "ConvertArguments",
    "DataArguments",
    "DoctorArguments",
    "FinetuneArguments",
    "GenerateArguments",
    "GenerationArguments",
    "LayoutArguments",
    "ModelArguments",
    "ParallelArguments",
    "PlanArguments",
    "Preview",
    "PreviewArguments",
    "ReportArguments",
    "ServeArguments",
    "ServedArguments",
    "Serving",
    "TrainArguments",
    "parse_board",
    "parse_convert",
    "parse_doctor",
    "parse_finetune",
    "parse_generate",
    "parse_plan",
    "parse_preview",
    "parse_report",
    "parse_serve",
    "split_convert",
    "validate_world",
]
