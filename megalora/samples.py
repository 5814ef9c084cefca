"""The first rows of a run as it was trained on them: read, rendered and tokenised as its own flags say."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from megalora.adapters.config import LoraConfig
from megalora.added_tokens import AddedToken
from megalora.checkpoint.adapter.opening import open_adapter
from megalora.data import Rendering
from megalora.data.dataset import encode_row
from megalora.data.pieces import IGNORE
from megalora.data.tokenizer import new_tokens
from megalora.errors import UserError
from megalora.flags import DataArguments, ModelArguments, parse_finetune
from megalora.identity import adapter_labels
from megalora.models.config import read_config
from megalora.parallel.mesh import build_mesh
from megalora.preview import token_texts
from megalora.rows import data_settings, rendering
from megalora.runs.folder import SETTINGS
from megalora.vocabulary import adapter_tokens

MOST_PIECES = 4000  # of a document
_STARTED = re.compile(r"^# megalora [^\n]*started in ([^\n]*); flags")


@dataclass(frozen=True)
class SampleDocument:
    """A document of a row. pieces: (text of a token, whether it is trained)."""

    row: int
    tokens: int
    trained: int
    pieces: tuple[tuple[str, bool], ...]


def sample_documents(run: Path, rows: int) -> list[SampleDocument]:
    """Return the documents of the first `rows` rows of a run. Raises UserError where its flags or files are missing."""
    file = run / SETTINGS
    if not file.is_file():
        raise UserError(f"{file} is not there", "rows can be shown of runs that megalora finetune has started")
    arguments = parse_finetune({"config": str(file)})
    with file.open(encoding="utf-8", errors="replace") as lines:
        started = _STARTED.match(lines.readline())
    folder = Path(started[1]) if started else Path()
    data = replace(arguments.data, data_path=_from(folder, arguments.data.data_path))
    if data.template is not None and (folder / data.template).is_file():
        data = replace(data, template=str(folder / data.template))
    template = _rendering(folder, arguments.model, data)
    settings, found = data_settings(data), []
    for row in range(rows):
        try:
            samples = encode_row(data.data_path, template, settings, row)
        except UserError:
            if row == 0:
                raise
            break  # there are fewer rows
        for sample in samples:
            ids, flags = sample.input_ids.tolist(), (sample.labels != IGNORE).tolist()
            pieces = token_texts(template.tokenizer, ids[:MOST_PIECES], flags[:MOST_PIECES])
            found.append(SampleDocument(row, len(flags), sum(flags), tuple(pieces)))
    return found


def _rendering(folder: Path, model: ModelArguments, data: DataArguments) -> Rendering:
    """Return how the rows of the run's task become documents. folder: where the run was started, which its paths are
    from.
    """
    model_path = str(folder / model.model_path)
    task, labels, added = LoraConfig().task_type, tuple[str, ...](), tuple[AddedToken, ...]()
    if model.resume_peft_from_checkpoint is not None:
        adapter = open_adapter(folder / model.resume_peft_from_checkpoint)
        task, labels = LoraConfig.from_dict(adapter.lora_config, adapter.where).task_type, adapter_labels(adapter)
        added = adapter_tokens(adapter, model_path)
    if model.lora_config is not None:
        task = LoraConfig.from_json(str(folder / model.lora_config)).task_type
    if not added and data.new_special_tokens:
        added = new_tokens(model_path, data.new_special_tokens)
    return rendering(task, read_config(model_path), model_path, data, labels, build_mesh(0, 1).world, added)


def _from(folder: Path, data_path: str) -> str:
    """Return the files of --data_path as seen from another folder than the one that the run was started in."""
    return ",".join(str(folder / part) for part in data_path.split(","))
