"""No command ever runs Python of a folder that it reads, nor asks whether it may."""

from __future__ import annotations

import ast
import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import tiny
from waiting import PATIENCE

from megalora import cli
from megalora.flags.tools import CONVERT_COMMANDS

LOADERS = ("from_pretrained", "from_config")


def _calls(source: str):
    """Calls of transformers' loaders: X.from_pretrained(...) and X.from_config(...)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOADERS:
            yield node


def test_every_loader_says_that_it_trusts_no_code():
    seen = 0
    for folder in ("megalora", "tools", "benchmarks", "examples"):
        for file in sorted((tiny.ROOT / folder).rglob("*.py")):
            for call in _calls(file.read_text(encoding="utf-8")):
                given = {word.arg: word.value for word in call.keywords}
                trusts = given.get("trust_remote_code")
                assert isinstance(trusts, ast.Constant) and trusts.value is False, f"{file}:{call.lineno}"
                seen += 1
    assert seen >= 5


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A model whose tokenizer asks for Python that lies beside it (a config.json that does is refused by itself)."""
    folder = tmp_path_factory.mktemp("hostile")
    inputs = tiny.make_inputs(folder)
    ran = folder / "ran"
    code = f"import pathlib\npathlib.Path({str(ran)!r}).write_text('run')\nclass Mine:\n    pass\n"
    (inputs.model / "mine.py").write_text(code)
    names = {name: "mine.Mine" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor")}
    _add(inputs.model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.Mine", "mine.Mine"]})
    _add(inputs.model / "tokenizer_config.json", tokenizer_class="Mine")
    for name in ("processor_config.json", "preprocessor_config.json", "generation_config.json"):
        file = inputs.model / name
        file.write_text(json.dumps({"auto_map": names, "custom_generate": "mine.py"}))
    return inputs, ran


def _add(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


COMMANDS = {
    "finetune": lambda inputs, out: inputs.flags(out),
    "generate": lambda inputs, out: ["--model_path", str(inputs.model), "--prompt", "hi", "--max_new_tokens", "1"],
    "dialogue": lambda inputs, out: ["--model_path", str(inputs.model), "--max_new_tokens", "1"],
    "plan": lambda inputs, out: ["--model_path", str(inputs.model), "--gpus", "1"],
    "doctor": lambda inputs, out: ["--model_path", str(inputs.model)],
    "data": lambda inputs, out: ["--model_path", str(inputs.model), "--data_path", str(inputs.data)],
    "serve": lambda inputs, out: ["--model_path", str(inputs.model), "--port", "0"],
    "convert to-shards": lambda inputs, out: ["--input", str(inputs.model), "--output", str(out)],
    "convert to-hf": lambda inputs, out: ["--input", str(inputs.model), "--output", str(out)],
}


READ_NO_MODEL = {"board", "report", "recipes"}


def test_every_command_is_tried():
    assert {command.split()[0] for command in COMMANDS} - {"dialogue"} | READ_NO_MODEL == set(cli._COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_or_asks(hostile, tmp_path, monkeypatch, capsys, command):
    """With standard input open and full of yes. A server, which would not end, in a process of its own."""
    inputs, ran = hostile
    words = [*("generate" if command == "dialogue" else command).split(), *COMMANDS[command](inputs, tmp_path / "out")]
    if command == "serve":
        done = subprocess.run(
            [sys.executable, "-m", "megalora", *words],
            input="y\n" * 1000, capture_output=True, text=True, timeout=PATIENCE, cwd=tmp_path, env=_environment(),
        )  # fmt: skip
        status, out, err = done.returncode, done.stdout, done.stderr
    else:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 1000))
        status = cli.main(words)
        out, err = capsys.readouterr()
    assert not ran.exists()
    assert "[y/N]" not in out + err and "custom code" not in err
    assert "Traceback" not in err
    if command in ("finetune", "generate", "dialogue", "data", "serve"):
        assert status == 2 and "asks to run its own code (mine.Mine), which megalora never does" in err


def test_no_conversion_runs_it_either(hostile, tmp_path, monkeypatch, capsys):
    """Each with a sound adapter, wherever it takes a folder of a model."""
    inputs, ran = hostile
    adapter, clean, model = tmp_path / "adapter", tmp_path / "model", str(inputs.model)
    shutil.copytree(inputs.model, clean)
    fields = json.loads((clean / "tokenizer_config.json").read_text())
    fields.pop("auto_map")
    (clean / "tokenizer_config.json").write_text(json.dumps(fields | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    tiny.tune(1, inputs.flags(adapter, model_path=clean, max_steps=1))
    run, peft = str(adapter), str(adapter / "peft")
    flags = {
        **{name: ["--input", model] for name in ("to-shards", "to-hf", "reshard", "dequantise", "from-gguf")},
        "adapter to-peft": ["--input", run, "--base", model],
        "adapter from-peft": ["--input", peft, "--base", model],
        "adapter merge": ["--input", run, "--base", model],
        "adapter combine": ["--input", run, "--others", peft],
        "adapter extract": ["--input", model, "--base", model],
        "adapter compare": ["--adapter", run, "--other", peft],
        "adapter init": ["--input", model, "--lora_config", str(inputs.lora)],
        "adapter to-lora": ["--input", run, "--base", model, "--initial", peft],
    }
    assert flags.keys() == CONVERT_COMMANDS.keys()
    for name, words in flags.items():
        monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
        output = [] if name == "adapter compare" else ["--output", str(tmp_path / f"out of {name}")]
        status = cli.main(["convert", *name.split(), *words, *output])
        said = capsys.readouterr().err
        assert not ran.exists() and status in (0, 2) and "Traceback" not in said, (name, said)
        if name == "adapter merge":
            assert status == 2 and "never does" in said


def _environment():
    return os.environ | {"PYTHONPATH": str(tiny.ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
