"""The pages' files in web/static: served as they are, or put into one page that needs nothing else."""

from __future__ import annotations

from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

STATIC = Path(__file__).parent / "static"
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}


def page_routes(page: str) -> list[Route]:
    """Return the routes of a page: itself at /, and the files that it names below /static/."""

    async def home(request: Request) -> Response:
        return FileResponse(STATIC / page, media_type="text/html")

    async def static(request: Request) -> Response:
        file = STATIC / request.path_params["name"]
        if file.suffix not in _TYPES or file.parent != STATIC or not file.is_file():
            raise HTTPException(404)
        return FileResponse(file, media_type=_TYPES[file.suffix])

    return [Route("/", home), Route("/static/{name}", static)]
