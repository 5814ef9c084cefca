"""The board: a page over output folders, live while they grow. It only reads.

    megalora board build/demo build/other
    megalora board runs/                    every run in a folder

What the page asks for: /api/runs, /api/series, /api/runs/N/notes, /api/runs/N/replies and /api/runs/N/rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import queue
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from megalora.errors import UserError
from megalora.flags import BoardArguments
from megalora.runs.folder import Run, find_runs, names_of
from megalora.web.guard import Guard, allowed_hosts
from megalora.web.pages import page_routes
from megalora.web.server import address_of, bind, served, token_for, with_token

POINTS, MOST_POINTS = 800, 4000
SAMPLE_ROWS = 3
CONNECTIONS = 200
_REST = 0.01  # seconds between two pieces of a large file: pages come first


def board(arguments: BoardArguments) -> None:
    """Serve the page until a signal. Raises UserError for what the user can fix."""
    runs = Runs(arguments.runs)
    token = token_for(arguments.host, arguments.token)
    hosts = allowed_hosts(arguments.host)
    stopped: queue.SimpleQueue[int] = queue.SimpleQueue()  # not an Event: its set() may wait for what it interrupts
    with bind(arguments.host, arguments.port) as listening:
        ends = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, lambda *_: stopped.put(0)) for number in ends}
        try:
            with served(build_app(runs, hosts, token), listening, CONNECTIONS):
                address = with_token(f"{address_of(listening, arguments.host)}/", token, arguments.token)
                found = runs.all()
                print(f"megalora: {len(found)} run{'s' * (len(found) != 1)} at {address}", file=sys.stderr, flush=True)
                talks = next((command for run in found if (command := run.serve_command())), None)
                if talks is not None:
                    print(f"megalora: to talk to it, after Ctrl-C or elsewhere: {talks}", file=sys.stderr, flush=True)
                while True:
                    with contextlib.suppress(queue.Empty):
                        stopped.get(timeout=_REST if runs.read_on() else 0.5)
                        break
        finally:
            for number, old in before.items():
                signal.signal(number, old)


class Runs:
    """The runs of some folders, by their place in the list; new ones are found as they begin."""

    def __init__(self, folders: Sequence[str]):
        self._folders, self._runs = tuple(folders), dict[Any, Run]()
        self._lock, self._asking = threading.Lock(), 0
        find_runs(self._folders)  # raises for a folder that is not there

    def all(self) -> list[Run]:
        """Return the runs, with what is new in them."""
        with self._first():
            try:
                found = find_runs(self._folders)
            except (UserError, OSError):
                found = [run.folder for run in self._runs.values()]
            for folder, name in zip(found, names_of(found), strict=True):
                self._runs.setdefault(folder, Run(folder, name)).name = name
            for run in self._runs.values():
                run.look()
            return list(self._runs.values())

    def read_on(self) -> bool:
        """Read a piece of each large file while nobody asks for anything, and return whether there is more."""
        more = False
        for run in list(self._runs.values()):
            if self._asking:
                return True
            with self._lock:
                more = run.read_on() or more
        return more

    @contextlib.contextmanager
    def _first(self) -> Iterator[None]:
        """Hold the lock, before whoever reads on."""
        self._asking += 1
        try:
            with self._lock:
                yield
        finally:
            self._asking -= 1

    def series(self, fields: Sequence[str], first: float, last: float, points: int) -> dict[str, dict[str, Any]]:
        """Return (steps, values) by field and by the place of the run, of the runs that have them."""
        with self._first():
            found: dict[str, dict[str, Any]] = {}
            for field in fields:
                curves = {str(n): run.series(field, first, last, points) for n, run in enumerate(self._runs.values())}
                found[field] = {number: curve for number, curve in curves.items() if curve[0]}
            return found


def build_app(runs: Runs, hosts: frozenset[str] | None, token: str | None) -> Starlette:
    """Return the application. hosts, token: as `Guard` takes them."""
    rows: dict[Any, Any] = {}

    def one(request: Request) -> Run:
        all_runs, number = runs.all(), request.path_params["number"]
        if number >= len(all_runs):
            raise HTTPException(404, "there is no such run")
        return all_runs[number]

    # Functions that are not async run in threads, so that a slow one does not hold up the others.
    def summaries(request: Request) -> Response:
        return JSONResponse([run.told() for run in runs.all()])

    def series(request: Request) -> Response:
        query = request.query_params
        fields = query.getlist("field")[:50]
        first, last = (_number(query.get(name), default) for name, default in (("from", 0.0), ("to", math.inf)))
        points = int(min(MOST_POINTS, max(10, _number(query.get("points"), POINTS))))
        return JSONResponse(runs.series(fields, first, last, points))

    def notes(request: Request) -> Response:
        return JSONResponse([dataclasses.asdict(note) for note in one(request).notes()])

    def replies(request: Request) -> Response:
        run = one(request)
        return JSONResponse({"evaluations": run.replies(), "timeline": run.timeline()})

    def samples(request: Request) -> Response:
        run = one(request)
        if "documents" not in rows.get(run.folder, {}):  # what is in the way may go
            rows[run.folder] = documents_of(run)
        return JSONResponse(rows[run.folder])

    routes = [
        Route("/api/runs", summaries),
        Route("/api/series", series),
        Route("/api/runs/{number:int}/notes", notes),
        Route("/api/runs/{number:int}/replies", replies),
        Route("/api/runs/{number:int}/rows", samples),
        *page_routes("board.html"),
    ]
    return Starlette(routes=routes, middleware=[Middleware(Guard, hosts=hosts, token=token)])


def documents_of(run: Run) -> dict[str, Any]:
    """Return {"documents"}: the first rows of a run, or {"problem"}: why there are none."""
    from megalora.samples import sample_documents  # transformers takes seconds to import

    try:
        return {"documents": [dataclasses.asdict(one) for one in sample_documents(run.folder, SAMPLE_ROWS)]}
    except UserError as error:
        return {"problem": str(error)}


def _number(text: str | None, default: float) -> float:
    try:
        value = default if text is None else float(text)
    except ValueError:
        return default
    return default if math.isnan(value) else value
