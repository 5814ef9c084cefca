"""The report: what the board shows of some runs, as one HTML file that needs nothing else.

megalora report build/demo --output demo.html
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

from megalora.board import POINTS, documents_of
from megalora.errors import UserError
from megalora.files import write_file
from megalora.flags import ReportArguments
from megalora.runs.folder import Run, find_runs, names_of
from megalora.web.pages import STATIC


def report(arguments: ReportArguments) -> Path:
    """Write the file, and return it. Raises UserError where there are no runs, or where it cannot be written."""
    folders = find_runs(arguments.runs)
    if not folders:
        raise UserError(f"runs {' '.join(arguments.runs)}: holds no run", "name the output_dir of a run")
    runs = [Run(folder, name) for folder, name in zip(folders, names_of(folders), strict=True)]
    for run in runs:
        while run.read_on():
            pass
    file = Path(arguments.output)
    try:
        write_file(file, page_of(_contents(runs)).encode("utf-8"))
    except OSError as error:
        raise UserError(f"output {file}: cannot be written ({error.strerror or error})", "name another file") from None
    return file


def page_of(contents: dict[str, Any]) -> str:
    """Return the board's page with its styles, scripts and `contents` in it."""
    page = (STATIC / "board.html").read_text(encoding="utf-8")

    def style(match: re.Match) -> str:
        return f"<style>\n{(STATIC / match[1]).read_text(encoding='utf-8')}\n</style>"

    def script(match: re.Match) -> str:
        return f"<script>\n{(STATIC / match[1]).read_text(encoding='utf-8')}\n</script>"

    # What is inside <script> ends at "</script>" wherever that stands: "<" is written otherwise.
    data = json.dumps(contents, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    page = re.sub(r'<link rel="stylesheet" href="static/([a-z.]+)">', style, page)
    page = re.sub(r'<script src="static/([a-z.]+)"></script>', script, page)
    return page.replace("<!-- data -->", f'<script type="application/json" id="data">{data}</script>')


def _contents(runs: list[Run]) -> dict[str, Any]:
    """Return what the page asks the board for, all of it."""
    fields = dict.fromkeys(field for run in runs for field in run.fields())
    series = {
        field: {str(number): run.series(field, 0, math.inf, POINTS) for number, run in enumerate(runs)}
        for field in fields
    }
    return {
        "runs": [run.told() for run in runs],
        "series": {name: {n: curve for n, curve in some.items() if curve[0]} for name, some in series.items()},
        "notes": [[dataclasses.asdict(note) for note in run.notes()] for run in runs],
        "replies": [{"evaluations": run.replies(), "timeline": run.timeline()} for run in runs],
        "rows": [documents_of(run) for run in runs],
    }
