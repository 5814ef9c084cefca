"""A run's curves as one PNG beside metrics.jsonl, where matplotlib is installed (`megalora[plots]`)."""

from __future__ import annotations

import importlib
import importlib.util
import io
import math
from pathlib import Path
from typing import Any

from megalora.files import write_file
from megalora.runs.folder import EVALUATION, Run

PICTURE = "metrics.png"
_PANELS = ("loss", "learning_rate", "grad_norm", "tokens_per_second")
_POINTS = 800  # as the board's curves: the least and the greatest value of each part


def write_curves(output_dir: str | Path) -> Path | None:
    """Write the curves of a run into output_dir, and return the file; None where matplotlib is not installed or there
    is nothing to draw.

    matplotlib is imported here, at the end of a run: no start waits for it. Raises OSError.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return None
    run = Run(Path(output_dir), "")
    run.look()
    while run.read_on():
        pass
    fields = set(run.fields())
    panels = [name for name in _PANELS if name in fields]
    if not panels:
        return None
    write_file(Path(output_dir) / PICTURE, _drawn(run, panels, fields))
    return Path(output_dir) / PICTURE


def _drawn(run: Run, panels: list[str], fields: set[str]) -> bytes:
    """Return the PNG."""
    # Not pyplot: it would look for a screen.
    figure: Any = importlib.import_module("matplotlib.figure").Figure(figsize=(10, 3 * math.ceil(len(panels) / 2)))
    for number, name in enumerate(panels, 1):
        axes = figure.add_subplot(math.ceil(len(panels) / 2), min(2, len(panels)), number)
        axes.plot(*run.series(name, 0, math.inf, _POINTS), linewidth=1, label=name)
        if EVALUATION + name in fields:
            axes.plot(*run.series(EVALUATION + name, 0, math.inf, _POINTS), marker=".", label=f"evaluation {name}")
            axes.legend()
        axes.set_title(name.replace("_", " "))
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    figure.set_layout_engine("tight")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()
