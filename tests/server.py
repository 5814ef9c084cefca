"""`megalora serve` and `megalora board` as a user starts them, in a process of its own, and raw requests to them."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from waiting import PATIENCE

ROOT = Path(__file__).resolve().parents[1]


class Server:
    """A process under way. port: where it listens; said: the lines that it has printed."""

    def __init__(self, process: subprocess.Popen):
        self.process, self.said = process, []
        self.port = None
        for line in process.stderr:
            self.said.append(line.rstrip())
            if found := re.search(r"http://[^/]*:(\d+)/", line):
                self.port = int(found[1])
                break
        # What else it says must not fill the pipe.
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self.port is not None, "\n".join(self.said)

    def _read(self) -> None:
        for line in self.process.stderr:
            self.said.append(line.rstrip())

    def ended(self, seconds: float = PATIENCE) -> int:
        """The exit status."""
        status = self.process.wait(seconds)
        self._reader.join(10)
        return status

    def ask(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """(status, JSON or text, headers) of one request. body: an object, or bytes as they are."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        kind = {"Content-Type": "application/json"} if body is not None else {}
        try:
            connection.request(method or ("GET" if body is None else "POST"), path, data, kind | (headers or {}))
            response = connection.getresponse()
            text = response.read().decode()
            is_json = response.headers.get_content_type() == "application/json"
            return response.status, json.loads(text) if is_json else text, dict(response.headers)
        finally:
            connection.close()

    def number(self, name: str) -> float:
        """The sum of a metric over its labels."""
        text = self.ask("/metrics")[1]
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


@contextlib.contextmanager
def started(*words: object) -> Iterator[Server]:
    """`megalora WORDS` while inside."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "megalora", *map(str, words)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        yield Server(process)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
