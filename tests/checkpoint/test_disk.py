"""Nothing in the project runs what a pickle says; tensors reach a stream whole, or its error is told."""

import ast
import errno
import io
import os
import pickle
from pathlib import Path

import pytest
import torch

from megalora.checkpoint.disk import save_tensors, unpickled
from megalora.errors import UserError
from megalora.files import write_file

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("megalora", "tools", "examples", "benchmarks")
SOURCES = sorted(file for part in PARTS for file in (ROOT / part).rglob("*.py"))

LOADERS = ("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "torch.jit.load", "torch.package")


def unsafe(source: str) -> list[str]:
    """Each call that could run code out of a file, by line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "pickle":
            found += [f"{node.lineno}: {ast.unparse(node)}"]  # by its own name, a load would not be seen
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in LOADERS:
            found += [f"{node.lineno}: {ast.unparse(node)}"]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = {k.arg: k.value for k in node.keywords}.get("weights_only")
            if not (isinstance(safe, ast.Constant) and safe.value is True):
                found.append(f"{node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.keyword) and node.arg in ("weights_only", "allow_pickle"):
            if ast.unparse(node.value) != str(node.arg == "weights_only"):
                found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


# What passes between a process and the workers that it started itself is pickled; nothing of a file is.
PIPES = {"megalora/data/encode_worker.py": "sys.stdin.buffer", "megalora/data/workers.py": "self._process.stdout"}


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_source_runs_what_a_file_says(file):
    source = file.read_text(encoding="utf-8")
    pipe = PIPES.get(str(file.relative_to(ROOT)))
    if pipe is None:
        assert not unsafe(source)
        return
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    loads = [node for node in calls if ast.unparse(node.func).startswith("pickle.load")]
    assert loads and {ast.unparse(argument) for node in loads for argument in node.args} == {pipe}
    assert "pickle.Unpickler(" not in source and "from pickle" not in source


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "torch.load(file, weights_only=trusted)",
        "numpy.load(file, allow_pickle=True)",
        "pickle.loads(data)",
        "pickle.Unpickler",
        "from pickle import loads",
    ],
)
def test_the_check_catches(source):
    assert unsafe(source)
    assert not unsafe("torch.load(file, map_location='cpu', weights_only=True)")


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize("container", ["pickle", "torch"])
def test_a_hostile_pickle_is_refused(tmp_path, monkeypatch, container):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file.pt"
    if container == "pickle":
        file.write_bytes(pickle.dumps(Hostile(), protocol=2))
    else:
        torch.save({"a": torch.ones(2), "b": Hostile()}, file)
    for mmap in (False, True):
        with pytest.raises(UserError, match="file.pt: cannot be read as tensors and plain values"):
            unpickled(file, mmap)
    assert not (tmp_path / "owned").exists()


class Disk(io.BytesIO):
    """With room for `room` bytes."""

    def __init__(self, room: int):
        super().__init__()
        self.room = room

    def write(self, data):
        if self.tell() + memoryview(data).nbytes > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def test_tensors_in_a_stream_are_those_of_torch(tmp_path):
    value = {"a": torch.arange(70_000.0), "b": {"c": torch.ones(0, 3)}, "step": 7, "names": ["x", None]}
    file = tmp_path / "file.pt"
    write_file(file, lambda stream: save_tensors(value, stream))
    for mmap in (False, True):
        found = unpickled(file, mmap)
        assert torch.equal(found["a"], value["a"]) and found["b"]["c"].shape == (0, 3)
        assert (found["step"], found["names"]) == (7, ["x", None])
    for room in (0, 100, 5_000, file.stat().st_size - 1):
        with pytest.raises(OSError, match="No space left on device") as raised:
            save_tensors(value, Disk(room))
        assert raised.value.errno == errno.ENOSPC


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "file.pt")
    with pytest.raises(UserError, match="file.pt: is not a regular file"):
        unpickled(tmp_path / "file.pt")
