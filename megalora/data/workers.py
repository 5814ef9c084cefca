"""Worker processes: chunks of rows are encoded by several Python processes, and come back in order.

A worker is `python -m megalora.data.encode_worker`: an encoder and then chunks come to it on standard input, pickled,
and what they are encoded to goes back on standard output. Processes of our own kind, since a fork of a process with
CUDA or threads is unsafe, and since multiprocessing would run the user's script again in each.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from ..errors import UserError
from .readers import Chunk

_AHEAD = 2  # chunks that wait for each worker


def encode_all(encoder: Any, chunks: Iterable[Chunk], processes: int) -> Iterator[Any]:
    """Yield encoder.encode(chunk) of each chunk, in order, from as many worker processes.

    Raises what the encoder raises, and UserError where a worker dies.
    """
    workers = [_Worker(encoder) for _ in range(processes)]
    free: SimpleQueue[_Worker] = SimpleQueue()
    for worker in workers:
        free.put(worker)

    def run(chunk: Chunk) -> Any:
        worker = free.get()
        try:
            return worker.encode(chunk)
        finally:
            free.put(worker)

    waiting: deque[Future] = deque()
    threads = ThreadPoolExecutor(processes, thread_name_prefix="encode")
    try:
        for chunk in chunks:
            waiting.append(threads.submit(run, chunk))
            if len(waiting) > _AHEAD * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        for worker in workers:
            worker.stop()
        threads.shutdown()


class _Worker:
    def __init__(self, encoder: Any):
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [sys.executable, "-m", "megalora.data.encode_worker"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=False
        )
        self._encoder: Any = encoder  # sent with the first chunk: workers start side by side

    def encode(self, chunk: Chunk) -> Any:
        try:
            if self._encoder is not None:
                pickle.dump(self._encoder, self._process.stdin, protocol=5)
                self._encoder = None
            pickle.dump(chunk, self._process.stdin, protocol=5)
            self._process.stdin.flush()
            result, error = pickle.load(self._process.stdout)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError):
            status = self._process.wait()
            raise UserError(
                f"a process that tokenises rows has died (exit status {status}; -9 is the kernel's for lack of memory)",
                "see what it said above",
            ) from None
        if error is not None:
            raise error
        return result

    def stop(self) -> None:
        self._process.kill()
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
