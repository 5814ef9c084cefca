"""What a signal handler may tell the user: it runs in between two instructions of the main thread."""

from __future__ import annotations

import contextlib
import os


def tell(text: str) -> None:
    """Write a line to standard error past print() and sys.stderr.

    The main thread may be inside either, which then raise or wait for themselves, and sys.stderr may be no file (a
    notebook). What cannot be written is left: Ctrl-C ends the `tee` behind a pipe too, and the run is still to save.
    """
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="replace"))
