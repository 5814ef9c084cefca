"""What stands before every request: its Host, the token, and headers that keep pages to themselves."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Iterable
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megalora.web.server import is_loopback

# Pages load scripts and styles of their own server, and nothing else.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_DRAINED_BYTES, _DRAINED_SECONDS = 64 << 20, 10.0  # of the body of a refused request
_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


def allowed_hosts(host: str) -> frozenset[str] | None:
    """Return the names that a server on `host` answers to: on the loopback its own ones, elsewhere any (None)."""
    if not is_loopback(host):
        return None
    return frozenset((*_LOCAL_NAMES, f"[{host}]" if ":" in host else host.lower()))


class Guard:
    """ASGI middleware.

    hosts  names that the Host header may have (on the loopback: a page of another site that resolves its own name to
           this machine cannot read anything then); None: any
    token  must be in the Authorization header (Bearer), in the query as `token`, or in the cookie that a request with a
           sound query is given; None: nobody is asked for it
    free   paths that need no token
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None, token: str | None, free: Iterable[str] = ()):
        self._app, self._hosts, self._token, self._free = app, hosts, token, frozenset(free)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        body = _Body(receive, waits="expect" in headers)
        receive, cookie = body.receive, None

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                if message["status"] >= 400:
                    await body.drain()
                found = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    found[name] = value
                if cookie is not None:
                    found.append("Set-Cookie", cookie)
            await send(message)

        if self._hosts is not None and _host_name(headers.get("host", "")) not in self._hosts:
            names = " or ".join(sorted(self._hosts))
            refused = _refusal(403, f"the Host header is none of this server's names: use {names}")
            await refused(scope, receive, with_headers)
            return
        if self._token is not None and scope["path"] not in self._free:
            in_query = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [""])[-1]
            if not any(self._is_token(text) for text in (in_query, _bearer(headers), self._cookie(scope, headers))):
                refused = _refusal(401, "the token is missing or wrong: it is in the address that the server printed")
                await refused(scope, receive, with_headers)
                return
            if self._is_token(in_query):
                cookie = f"{_cookie_name(scope)}={self._token}; HttpOnly; SameSite=Strict; Path=/"
        await self._app(scope, receive, with_headers)

    def _is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode("utf-8", "surrogateescape"), str(self._token).encode())

    def _cookie(self, scope: Scope, headers: Headers) -> str:
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(_cookie_name(scope))
        except CookieError:
            return ""
        return found.value if found is not None else ""


def _bearer(headers: Headers) -> str:
    kind, _, value = headers.get("authorization", "").partition(" ")
    return value.strip() if kind.lower() == "bearer" else ""


def _cookie_name(scope: Scope) -> str:
    server: Any = scope.get("server") or ("", 0)
    return f"megalora-{server[1]}"  # browsers keep one jar for all ports of a host


class _Body:
    """The body of a request: what a refusal leaves of it is read and thrown away first.

    A connection that is closed with bytes unread is reset, and a client that still sends would see that and never the
    reply.

    waits  the client asks (Expect: 100-continue) before it sends
    """

    def __init__(self, receive: Receive, waits: bool):
        self._receive, self._ended = receive, waits

    async def receive(self) -> Message:
        message = await self._receive()
        self._ended = not message.get("more_body", False)
        return message

    async def drain(self) -> None:
        """Read the rest, as far as it is not too much and does not take too long."""

        async def read() -> None:
            left = _DRAINED_BYTES
            while not self._ended and left > 0:
                left -= len((await self.receive()).get("body", b""))

        try:
            await asyncio.wait_for(read(), _DRAINED_SECONDS)
        except asyncio.TimeoutError:
            pass


def _host_name(host: str) -> str:
    """Return the name in a Host header, without its port."""
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() else host).lower()


def _refusal(status: int, message: str) -> JSONResponse:
    kind, code = ("authentication_error", "invalid_api_key") if status == 401 else ("invalid_request_error", None)
    error = {"message": message, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": error}, status)
