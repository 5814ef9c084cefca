"""A worker process (see workers.py): chunks of rows on standard input, what they are encoded to on standard output."""

from __future__ import annotations

import gc
import os
import pickle
import sys
from typing import Any


def main() -> None:
    """Encode chunks until standard input ends."""
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anything prints goes to standard error
    encoder = pickle.load(sys.stdin.buffer)
    gc.freeze()  # what is there by now is never garbage, and takes long to look through
    gc.disable()
    while True:
        try:
            chunk = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer: tuple[Any, Exception | None]
        try:
            answer = (encoder.encode(chunk), None)
        except Exception as error:  # raised again where the rows are asked for
            answer = (None, error)
        pickle.dump(answer, results, protocol=5)
        results.flush()
        gc.collect()  # once a chunk, not whenever a row has made some objects


if __name__ == "__main__":
    main()
