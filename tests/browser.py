"""A headless Chromium, told what to do over its DevTools pipe, without a package. Skips, and says so, without one."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from waiting import PATIENCE

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Page:
    """One tab. errors: what its scripts have thrown or its console has called an error."""

    def __init__(self, to: int, answers: int, process: subprocess.Popen):
        self._to, self._answers, self._process = to, os.fdopen(answers, "rb"), process
        self._numbers, self._session = itertools.count(1), None
        self.errors: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            data = bytearray()
            while (byte := self._answers.read(1)) != b"\0":
                assert byte, f"the browser has ended: {self._process.poll()}"
                data += byte
            answer = json.loads(data)
            self._note(answer)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(parameters["exceptionDetails"])[:500])
        entry = parameters.get("entry", {})
        if event.get("method") == "Log.entryAdded" and entry["level"] == "error":
            if not entry.get("url", "").endswith("favicon.ico"):
                self.errors.append(entry["text"])

    def open(self, address: str) -> None:
        self._call("Page.navigate", url=address)

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        value, thrown = self._value(script)
        assert thrown is None, thrown
        return value

    def _value(self, script: str) -> tuple[Any, Any]:
        """The value of an expression and None; where it throws, None and what."""
        answer = self._call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        return answer["result"].get("value"), answer.get("exceptionDetails")

    def wait(self, script: str, seconds: float = PATIENCE) -> Any:
        """The first value of an expression that is true; one that throws is none yet: what it reads may be to come."""
        deadline = time.monotonic() + seconds
        while not (found := self._value(script))[0] or found[1]:
            shown = (script, found, self.errors)
            assert time.monotonic() < deadline, (*shown, self.run("document.body.innerText")[:2000])
            time.sleep(0.05)
        return found[0]

    def screen(self, width: int, height: int, dark: bool = False) -> None:
        """Another size of the screen, and the person's choice of colours."""
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])

    def drag(self, start: tuple[float, float], stop: tuple[float, float]) -> None:
        """The mouse pressed at one place and let go at another."""
        for kind, (x, y), held in (("mouseMoved", start, 0), ("mousePressed", start, 1), ("mouseMoved", stop, 1),
                                   ("mouseReleased", stop, 0)):  # fmt: skip
            button = "left" if kind != "mouseMoved" or held else "none"
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, buttons=held, clickCount=1)

    def photograph(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A page of a fresh browser, whose profile is in `folder`."""
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser here (none of {', '.join(NAMES)}): the pages are not tested; apt-get install chromium")
    theirs, to = os.pipe()
    answers, their_answers = os.pipe()

    def pipes() -> None:  # Chromium reads descriptor 3 and writes 4
        os.dup2(theirs, 103)
        os.dup2(their_answers, 104)
        os.dup2(103, 3)
        os.dup2(104, 4)

    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command += ["--disable-extensions", "--disable-background-networking", "--remote-debugging-pipe"]
    process = subprocess.Popen(
        [*command, f"--user-data-dir={folder}"],
        preexec_fn=pipes,
        close_fds=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs)
    os.close(their_answers)
    try:
        yield Page(to, answers, process)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
        os.close(to)
