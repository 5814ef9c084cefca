"""An ASGI application on a socket, served by uvicorn in a thread beside the one that computes."""

from __future__ import annotations

import contextlib
import ipaddress
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from megalora.errors import UserError

CLOSING_SECONDS = 5  # that open connections have to end
_STARTING_SECONDS = 60


def require_web() -> None:
    """Raise UserError where the packages of the extra `serve` are missing."""
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"the package {error.name} is not installed", "pip install 'megalora[serve]'") from None


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 is any that is free. Raises UserError where there is none to be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"host {host} is not an address of this machine ({error})", "give 127.0.0.1") from None
    listening = socket.socket(family, kind, protocol)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen(1024)
    except OSError as error:
        listening.close()
        raise UserError(
            f"host {host}, port {port}: cannot listen there ({error.strerror or error})", "give another --port"
        ) from None
    return listening


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address."""
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def token_for(host: str, given: str | None) -> str | None:
    """Return the secret that clients must know: the one given, none on the loopback, elsewhere a new one."""
    if given is not None:
        return given
    return None if is_loopback(host) else secrets.token_urlsafe(18)


def with_token(address: str, token: str | None, given: str | None) -> str:
    """Return the address of a page to print: with the token where it was made here; logs keep no secret of the user's.

    given  the token that the user has chosen
    """
    if token is None:
        return address
    return f"{address}?token={'TOKEN, the one that was given' if given is not None else token}"


def address_of(listening: socket.socket, host: str) -> str:
    """Return the URL of a server that listens on `host`."""
    name = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(host, host)
    return f"http://{f'[{name}]' if ':' in name else name}:{listening.getsockname()[1]}"


@contextlib.contextmanager
def served(app: Any, listening: socket.socket, connections: int) -> Iterator[None]:
    """Serve `app` on a socket while inside; then let open connections end, for CLOSING_SECONDS at most.

    connections  that may be open at a time: more are answered with 503
    """
    import uvicorn

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        http="h11",
        ws="none",
        loop="asyncio",
        limit_concurrency=connections,
        timeout_graceful_shutdown=CLOSING_SECONDS,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="http", daemon=True)
    thread.start()
    deadline = time.monotonic() + _STARTING_SECONDS
    while not server.started and thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    if not server.started:
        raise UserError("the HTTP server did not start", "see its own message above")
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(CLOSING_SECONDS + 2)
        listening.close()
