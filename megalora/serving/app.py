"""The routes of the server: OpenAI's API, health, metrics, and the chat page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from megalora.generation.requests import Prompt
from megalora.serving.answers import Answer
from megalora.serving.backlog import RETRY_SECONDS, Backlog
from megalora.serving.bodies import Asked, read_chat, read_completion, read_json
from megalora.serving.errors import FAILED, ApiError, bad
from megalora.serving.loading import AdapterLoader
from megalora.serving.metrics import CONTENT_TYPE, ServerMetrics
from megalora.serving.models import Catalogue, ServedModel
from megalora.serving.replies import Replies
from megalora.web.guard import Guard
from megalora.web.pages import page_routes

LARGEST_BODY = 8 << 20  # bytes
BODY_SECONDS = 30.0  # that a client has to send its body,
READ_SECONDS = 60.0  # and to read each part of a stream
LEFT = 499  # as nginx counts a client that left

Read = Callable[[Mapping[str, Any], Mapping[str, float], bool], Asked]


def build_app(
    catalogue: Catalogue,
    backlog: Backlog,
    hosts: frozenset[str] | None,
    token: str | None,
    adapters: AdapterLoader | None = None,
) -> Starlette:
    """Return the application. hosts, token: as `Guard` takes them; adapters: loads some while it runs."""
    server = _Server(catalogue, backlog)
    routes = [
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        Route("/v1/completions", server.completions, methods=["POST"]),
        Route("/v1/models", server.models),
        Route("/v1/models/{name:path}", server.model),
        Route("/health", server.health),
        Route("/metrics", server.metrics),
        *page_routes("chat.html"),
    ]
    if adapters is not None:
        routes += [
            Route("/v1/load_lora_adapter", _admin(adapters.load), methods=["POST"]),
            Route("/v1/unload_lora_adapter", _admin(adapters.unload), methods=["POST"]),
        ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, hosts=hosts, token=token, free=["/health"])],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _bug},
    )


def _admin(work: Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]) -> Callable[[Request], Awaitable[Response]]:
    """Return an endpoint that has `work` done with the body of a request."""

    async def endpoint(request: Request) -> Response:
        return JSONResponse(await work(read_json(await _body(request))))

    return endpoint


class _Server:
    def __init__(self, catalogue: Catalogue, backlog: Backlog):
        self._catalogue, self._backlog = catalogue, backlog
        self._metrics = ServerMetrics(backlog.counts)
        # Rendering and tokenising take long enough to hold up the streams, and one at a time is enough.
        self._encoder = ThreadPoolExecutor(1, "encode")
        self._encoding = 0
        tokenizer = next(iter(catalogue.models.values())).template.tokenizer
        self._spell = lambda token_id: tokenizer.decode([token_id], clean_up_tokenization_spaces=False)

    async def chat(self, request: Request) -> Response:
        return await self._counted(request, read_chat)

    async def completions(self, request: Request) -> Response:
        return await self._counted(request, read_completion)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": self._catalogue.listed()})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self._catalogue.find(name)
        return JSONResponse(next(one for one in self._catalogue.listed() if one["id"] == name))

    async def health(self, request: Request) -> Response:
        running, waiting = self._backlog.counts()
        stopping = self._backlog.closed
        body = {"status": "stopping" if stopping else "ok", "running": running, "waiting": waiting}
        return JSONResponse(body, 503 if stopping else 200)

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    # ---- replies ----

    async def _counted(self, request: Request, read: Read) -> Response:
        """Answer, and count the answer by its status."""
        asked = None
        try:
            asked = read(read_json(await _body(request)), self._catalogue.defaults, self._catalogue.takes_images)
            model = self._catalogue.find(asked.model)
            prompts = await self._encoded(model, asked)
            asked = replace(asked, image=None)  # while the replies come, nobody needs its megabytes
            response = await self._answer(request, asked, model, prompts)
        except ApiError as error:
            response = await _api_error(request, error)
        except ClientDisconnect:
            self._metrics.cancelled()
            response = Response(status_code=LEFT)
        name = "" if asked is None or asked.model not in self._catalogue.models else asked.model
        self._metrics.answered(name, response.status_code)
        return response

    async def _answer(
        self, request: Request, asked: Asked, model: ServedModel, prompts: Sequence[Prompt]
    ) -> Response:
        replies = Replies(asked, model, prompts, self._catalogue, self._backlog, self._metrics)
        answer = Answer(replies, self._spell)
        if asked.stream:
            return _Events(answer.events(), replies.cancel, self._metrics.cancelled)
        whole = asyncio.ensure_future(answer.whole())
        left = asyncio.ensure_future(_disconnected(request.receive))
        try:
            await asyncio.wait([whole, left], return_when=asyncio.FIRST_COMPLETED)
            if whole.done():
                return JSONResponse(whole.result())
            self._metrics.cancelled()
            return Response(status_code=LEFT)
        finally:
            for task in (whole, left):
                task.cancel()
            replies.cancel()

    async def _encoded(self, model: ServedModel, asked: Asked) -> list[Prompt]:
        """Return the prompts. Raises ApiError, 429 where those in line for it will fill the backlog."""
        self._backlog.check(self._encoding + 1)
        self._encoding += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._encoder, model.prompts, asked, self._catalogue.context)
        finally:
            self._encoding -= 1


class _Events(Response):
    """A stream of server-sent events. It ends when the client leaves, or reads nothing for READ_SECONDS."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], cancel: Callable[[], None], cancelled: Callable[[], None]):
        super().__init__()
        del self.headers["content-length"]
        self._events, self._cancel, self._cancelled = events, cancel, cancelled

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        left = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait([sending, left], return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                self._cancelled()
                return
            try:
                sending.result()
            except (OSError, asyncio.TimeoutError):  # its connection is lost, or it reads nothing
                self._cancelled()
        finally:
            for task in (sending, left):
                task.cancel()
            self._cancel()

    async def _send(self, send: Send) -> None:
        async def within(message: Any) -> None:
            await asyncio.wait_for(send(message), READ_SECONDS)

        await within({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events:
            await within({"type": "http.response.body", "body": event, "more_body": True})
        await within({"type": "http.response.body", "body": b""})


async def _disconnected(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> bytes:
    """Return the body of a request. Raises ApiError where it is no JSON by its type, is too large, or takes too long.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Pages of other sites may post other types without being asked, but not this one.
        raise ApiError(415, "the Content-Type must be application/json")
    data = bytearray()

    async def read() -> None:
        async for chunk in request.stream():
            data.extend(chunk)
            if len(data) > LARGEST_BODY:
                raise ApiError(413, f"the body is larger than {LARGEST_BODY:,} bytes: shorten it")

    try:
        await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body was not sent within {BODY_SECONDS:g} seconds") from None
    if not data:
        raise bad("the body is empty: send one JSON object")
    return bytes(data)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {"Retry-After": str(RETRY_SECONDS)} if error.status == 429 else None
    return JSONResponse(error.body(), error.status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: f"there is nothing at {request.url.path:.80}", 405: f"{request.method} is not allowed here"}
    body = ApiError(error.status_code, what.get(error.status_code, error.detail)).body()
    return JSONResponse(body, error.status_code)


async def _bug(request: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, FAILED).body(), 500)
