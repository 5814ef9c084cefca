"""Errors of the API, in OpenAI's form."""

from __future__ import annotations

from typing import Any

FAILED = "the server failed: its log has the reason"


class ApiError(Exception):
    """An answer that is an error. status: of HTTP; param: the field that is wrong; code: for programs to tell."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, " ".join(message.split()), param, code

    def body(self) -> dict[str, Any]:
        """Return the JSON of the answer."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error of a request that is wrong: status 400."""
    return ApiError(400, message, param, code)
