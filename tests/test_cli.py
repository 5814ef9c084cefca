"""Exit statuses, what is printed by which rank, and that errors come before torch is imported."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from snapshots import assert_snapshot
from told import user_error
from waiting import PATIENCE

from megalora import __version__, cli
from megalora.errors import Interrupted, UserError

ROOT = Path(__file__).resolve().parents[1]
BASE = ["--model_path", ".", "--data_path", ".", "--output_dir", "o"]


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(cli, "_GRACE_SECONDS", 0.0)


def fake(monkeypatch, name: str) -> list:
    """megalora.<name> replaced by a module whose function keeps its arguments."""
    seen: list = []
    module = types.ModuleType(f"megalora.{name}")
    setattr(module, name, seen.append)
    monkeypatch.setitem(sys.modules, f"megalora.{name}", module)
    return seen


def raises(error):
    def command():
        raise error

    return command


def test_success():
    assert cli.run(lambda: None) == 0


def test_user_error_is_told_on_rank_0(monkeypatch, capsys):
    assert cli.run(raises(UserError("a thing is wrong"))) == 2
    assert capsys.readouterr().err == "error: a thing is wrong\n"
    assert cli.run(raises(UserError("a thing\nis wrong", "do another"))) == 2
    assert capsys.readouterr().err == "error: a thing is wrong\nhint: do another\n"
    monkeypatch.setenv("RANK", "3")
    assert cli.run(raises(UserError("a thing is wrong"))) == 2
    assert capsys.readouterr() == ("", "")


def test_interrupt():
    assert cli.run(raises(KeyboardInterrupt())) == 130


def test_a_run_that_was_left_has_its_status_where_nobody_reads_why(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        assert cli.run(raises(Interrupted("saved"))) == 130
        assert cli.run(raises(UserError("a thing is wrong"))) == 2


def test_a_bug_shows_its_traceback_with_the_rank(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    assert cli.run(raises(RuntimeError("oops\nand more"))) == 1
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("[rank 3] ") for line in lines)
    assert "[rank 3] RuntimeError: oops" in lines


def test_version_and_help(monkeypatch, capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"megalora {__version__}\n"
    for words in ([], ["--help"], ["-h"]):
        assert cli.main(words) == 0
        assert_snapshot("help", capsys.readouterr().out.replace(__version__, "VERSION"))
    assert cli.main(["finetune", "--help"]) == 0
    assert "--learning_rate X" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["generate", "--help"]) == 0
    assert capsys.readouterr().out == ""


def test_unknown_command(capsys):
    assert cli.main(["train"]) == 2
    said = user_error(capsys.readouterr().err)
    listed = "finetune, generate, serve, board, report, data, convert, plan, recipes or doctor"
    assert said.startswith(f"unknown command train: give {listed}")


def test_finetune_is_handed_its_arguments(monkeypatch):
    seen = fake(monkeypatch, "finetune")
    assert cli.main(["finetune", *BASE]) == 0
    assert seen[0].train.output_dir == "o"


def test_generate_names_what_does_not_apply(monkeypatch, capsys):
    seen = fake(monkeypatch, "generate")
    assert cli.main(["generate", *BASE]) == 0
    assert seen[0].model.model_path == "."
    assert capsys.readouterr() == ("", "megalora: not applied in generation: data_path, output_dir\n")


def test_world_size_is_checked_before_the_run(monkeypatch, capsys):
    seen = fake(monkeypatch, "finetune")
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert cli.main(["finetune", *BASE, "--tensor_parallel_size", "2", "--pipeline_parallel_size", "2"]) == 2
    assert "World size (6)" in capsys.readouterr().err and not seen


def test_paths_are_checked_before_the_run(monkeypatch, capsys):
    seen = fake(monkeypatch, "finetune")
    words = ["finetune", "--model_path", "nowhere", "--data_path", "d", "--output_dir", "o"]
    assert cli.main(words) == 2
    said = user_error(capsys.readouterr().err)
    named = "a Hugging Face folder with config.json, tokenizer and weights"
    assert said == f"model_path nowhere does not exist: name {named}" and not seen
    # The run itself finds out, once it has noted that it overwrites what is there.
    assert cli.main([*words, "--overwrite_output_dir"]) == 0 and seen.pop()
    # Of several hosts one alone may lack it: the ranks find out together.
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert cli.main(words) == 0 and len(seen) == 1


def test_one_process_is_enough(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for words in (
        ["plan", "--model_path", ".", "--gpus", "8"],
        ["convert", "to-hf", "--input", ".", "--output", "o"],
        ["data", "--model_path", ".", "--data_path", "d"],
    ):
        assert cli.main(words) == 2
        assert user_error(capsys.readouterr().err).endswith(
            f"{words[0]} runs in one process, but 2 were started: start it without torchrun"
        )
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert cli.main(["plan", "--model_path", ".", "--gpus", "8"]) == 2
    assert user_error(capsys.readouterr().err).startswith("environment variable WORLD_SIZE = 'two' is not an integer")


def process(*words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, timeout=PATIENCE, cwd=ROOT
    )


@pytest.mark.parametrize(
    "words",
    [
        ["finetune", "--help"],
        ["plan", "--help"],
        ["convert", "adapter", "merge", "--help"],
        ["generate", "--tmperature", "1"],
        ["finetune"],
        ["finetune", "--model_path", "nowhere", "--data_path", "d", "--output_dir", "o"],
        ["generate", "--model_path", "nowhere"],
        ["convert", "to-hf", "--input", "nowhere", "--output", "o"],
    ],
)
def test_nothing_heavy_is_imported_before_the_arguments_are_sound(words):
    heavy = "{'torch', 'transformers', 'numpy', 'rich'}"
    code = f"from megalora.cli import main; main({words}); "
    code += f"import sys; print('loaded:', {heavy} & set(sys.modules))"
    assert process("-c", code).stdout.endswith("loaded: set()\n")


@pytest.mark.parametrize("words", [["--help"], ["--version"]])
def test_the_usage_needs_no_flags(words):
    code = (
        f"from megalora.cli import main; main({words}); import sys; print('loaded:', 'megalora.flags' in sys.modules)"
    )
    assert process("-c", code).stdout.endswith("loaded: False\n")


@pytest.mark.parametrize("words", [["--help"], ["finetune", "--help"]])
def test_help_to_a_reader_that_has_gone(words):
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "megalora", *words]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment, timeout=PATIENCE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", [["tools/finetune.py"], ["tools/generate.py"], ["-m", "megalora", "finetune"]])
def test_the_scripts(words):
    done = process(*words, "--xyzzy", "1")
    assert done.returncode == 2 and done.stdout == ""
    assert user_error(done.stderr).startswith("unknown flag --xyzzy")


def test_commands_do_not_wait_for_torchs_compiler():
    """Importing it takes a second, of every start."""
    modules = "megalora.finetune, megalora.generate, megalora.convert, megalora.plan, megalora.doctor"
    code = f"import sys, {modules}; print('torch._dynamo' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert printed.strip() == "False"
