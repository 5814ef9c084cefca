"""A dialogue at a real terminal (a pseudo-terminal): streaming, /base, /tuned, history, Ctrl-C, /quit."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import select
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file, save_file

from megalora import cli

PATIENCE = 200.0  # seconds for anything to appear, on a machine that is busy


class Terminal:
    """A program at a terminal of its own: `type` to it, `wait` for what it shows."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # Ctrl-C is its terminal's to send
        )  # fmt: skip
        os.close(slave)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def read(self) -> None:
        """Waits for something to be shown."""
        assert select.select([self.master], [], [], PATIENCE)[0], f"nothing comes after {self.shown[-2000:]!r}"
        self.shown += os.read(self.master, 1 << 16).decode(errors="replace").replace("\r\n", "\n")

    def wait(self, text: str) -> str:
        """What comes up to the next `text`, which is taken off."""
        while text not in self.shown:
            self.read()
        before, _, self.shown = self.shown.partition(text)
        return before

    def ask(self, message: str) -> str:
        """The reply to a message; the terminal echoes what is typed."""
        self.type(f"{message}\n")
        self.wait(f"{message}\n")
        return self.wait("\n> ")

    def interrupt(self, answer: str) -> None:
        """Ctrl-C until the answer comes: one that arrives while readline is between a key and its next wait is heard
        with the key after it (CPython looks for signals before it waits, and not at once).
        """
        for _ in range(20):
            self.type("\x03")
            while answer not in self.shown and select.select([self.master], [], [], PATIENCE / 20)[0]:
                self.read()
            if answer in self.shown:
                return
        raise AssertionError(f"no answer to Ctrl-C after {self.shown[-2000:]!r}")

    def close(self) -> int:
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.process.kill()
            os.close(self.master)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that never ends a reply by itself, and an adapter of it."""
    folder = tmp_path_factory.mktemp("terminal")
    inputs = tiny.make_inputs(folder)
    config = json.loads((inputs.model / "config.json").read_text())
    tiny.write_json(inputs.model / "config.json", config | {"max_position_embeddings": 1 << 16})
    weights = load_file(inputs.model / "model.safetensors")
    weights["lm_head.weight"][:3] = 0.0  # its special tokens: some other token is always likelier
    save_file(weights, inputs.model / "model.safetensors", metadata={"format": "pt"})
    tiny.tune(1, inputs.flags(folder / "run", max_steps=1, save_steps=1))
    return folder


def reply(folder: Path, *flags: str, tokens: int) -> str:
    words = ["--model_path", str(folder / "model"), "--max_new_tokens", str(tokens), *flags]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        assert cli.main(["generate", *words]) == 0
    return out.getvalue().removesuffix("\n")


@pytest.fixture
def terminal(folder):
    def start(tokens: int, kind: str = "dumb") -> Terminal:
        command = [sys.executable, "-m", "megalora", "generate", "--model_path", str(folder / "model")]
        command += ["--resume_peft_from_checkpoint", str(folder / "run"), "--max_new_tokens", str(tokens)]
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(tiny.ROOT)}
        environment |= {"TERM": kind}  # a dumb one shows what is typed as it is
        return Terminal(command, environment)

    return start


def test_a_dialogue(folder, terminal):
    adapter = ["--resume_peft_from_checkpoint", str(folder / "run")]
    one = {who: reply(folder, *more, "--prompt", "Who are you?", tokens=12)
           for who, more in (("tuned", adapter), ("base", []))}  # fmt: skip
    assert one["tuned"] != one["base"]
    at = terminal(12)
    assert "/help lists the commands" in at.wait("\n> ")
    assert at.ask("Who are you?") == one["tuned"] + " ..."
    again = at.ask("Who are you?")
    assert again != one["tuned"] + " ...", "what was said before is part of the dialogue"
    at.ask("/reset")
    at.ask("/base")
    assert at.ask("Who are you?") == one["base"] + " ..."
    at.ask("/reset")
    assert "adapted model" in at.ask("/tuned")
    assert at.ask("Who are you?") == one["tuned"] + " ..."
    assert "unknown command" in at.ask("/what")
    at.interrupt("Ctrl-D ends")
    at.wait("\n> ")
    at.type("/quit\n")
    assert at.close() == 0


def test_ctrl_c_stops_the_reply_and_not_the_program(folder, terminal):
    whole = 50_000  # which takes so long that Ctrl-C comes before the end on any machine
    at = terminal(whole)
    at.wait("\n> ")
    at.type("Count.\n")
    at.wait("Count.\n")
    for _ in range(5):  # it streams: this much is there before the rest is made
        at.read()
    at.type("\x03")
    assert len(at.wait("[stopped]")) < whole
    at.wait("> ")
    assert at.process.poll() is None
    at.type("\x04")
    assert at.close() == 0


def test_pasted_lines_are_one_question(folder, terminal):
    pytest.importorskip("readline")
    adapter = ["--resume_peft_from_checkpoint", str(folder / "run")]
    whole = reply(folder, *adapter, "--prompt", "Who are you?\nWho?", tokens=12)
    at = terminal(12, "xterm")
    at.wait("> ")
    at.type("\x1b[200~Who are you?\nWho?\x1b[201~")
    at.wait("Who?")
    at.type("\n")
    shown = at.wait(" ...\n")
    assert whole in shown and shown.count(whole) == 1
    at.wait("> ")
    at.type("lost")
    at.wait("lost")
    at.interrupt("Ctrl-D ends")  # forgets the line that is being written
    at.wait("> ")
    at.type("/quit\n")
    assert at.close() == 0
