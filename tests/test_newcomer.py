"""From the demo to a chat without reading anything else: each last line names a command that works when pasted."""

import re
import shlex
import shutil

import pytest
import tiny
from server import ROOT, started
from waiting import until

from megalora import cli

pytest.importorskip("starlette")


def command_of(line: str) -> list[str]:
    """What a person copies from a line: all behind its last colon and space."""
    words = shlex.split(line.rpartition(": ")[2])
    assert words[0] == "megalora", line
    return words[1:]


def test_each_step_names_the_next(tmp_path, monkeypatch, capfd):
    inputs = tiny.make_inputs(tmp_path / "inputs")
    shutil.copytree(inputs.model, tmp_path / "models/SmolLM2-135M-Instruct")
    (tmp_path / "examples/data").mkdir(parents=True)
    shutil.copy(inputs.data, tmp_path / "examples/data/self_cognition.json")
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    demo = (ROOT / "examples/demo.sh").read_text().strip().splitlines()[-1]
    assert command_of(demo.removeprefix('echo "').removesuffix('"')) == ["recipes"]
    assert cli.main(["recipes"]) == 0
    trains = command_of(capfd.readouterr().out.rstrip().splitlines()[-1])
    assert trains[:2] == ["finetune", "recipe:laptop"] and cli.main([*trains, "--num_train_epochs", "1"]) == 0
    shows = command_of(capfd.readouterr().out.rstrip().splitlines()[-1])
    with started(*shows, "--port", 0) as board:
        assert board.ask("/api/runs")[1][0]["last_step"] > 0
        until("its second line", lambda: len(board.said) > 1 or board.process.poll() is not None)
        serves = command_of(board.said[-1])
    with started(*serves, "--port", 0, "--max_running", 2) as server:
        told = re.compile(r"^megalora: chat page: http://127.0.0.1:\d+(/)$", re.MULTILINE)
        page = until("the page's address", lambda: told.search("\n".join(server.said)), told=lambda: server.said)
        assert "megalora chat" in server.ask(page[1])[1]
        message = {"role": "user", "content": "Who are you?"}
        body = {"model": "tuned", "messages": [message], "max_tokens": 4, "temperature": 0}
        status, answer, _ = server.ask("/v1/chat/completions", body)
        assert status == 200 and answer["model"] == "tuned" and answer["choices"], answer
