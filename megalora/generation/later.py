"""Errors of one rank that wait until all can hear of them."""

from __future__ import annotations

from collections.abc import Callable

from megalora.errors import UserError


class Later:
    """What one rank does by itself while all make replies: its UserError waits until they can all hear of it."""

    def __init__(self):
        self._error: UserError | None = None

    def of(self, work: Callable[..., None]) -> Callable[..., None]:
        """Return `work`, which does nothing any more once it or another has failed."""

        def tried(*arguments: object) -> None:
            if self._error is None:
                try:
                    work(*arguments)
                except UserError as error:
                    self._error = error

        return tried

    def check(self) -> None:
        if self._error is not None:
            raise self._error
