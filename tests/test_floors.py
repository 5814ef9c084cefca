"""The floors of the house (docs/design.md): a module imports only its own package and the floors below it.

Read from the source with ast: imports in functions and under TYPE_CHECKING count, relative ones are resolved.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

EDGES = {"errors", "batch", "choices", "files", "recipes", "tokenizer_files"}  # plain types that every floor may use
EDGES |= {"added_tokens", "model_paths", "hub", "card", "pictures"}
GROUND = EDGES | {"adapters", "parallel.mesh", "ops"}
LOWER = GROUND | {"parallel"}
# These are handed an nn.Module or plain values, and know neither the models nor one another.
SERVICES = {"pipeline", "data", "checkpoint", "monitor", "cluster", "web", "runs"}
# What the commands are put together from.
PARTS = {"tasks", "optimizer", "planning", "profiling", "building", "training", "saving", "identity", "generation"}
PARTS |= {"compute_dtype", "serving", "vocabulary"}
TOP = {"auto_layout", "rows", "sources", "image_prompts", "starting", "stepping", "summary"}
TOP |= {"asked"}  # and the commands
TOP |= {"finetune", "generate", "classify", "preview", "plan", "cli", "commands", "convert", "doctor", "__main__"}
TOP |= {"recombine", "sample_replies", "scored_replies"}
TOP |= {"serve", "board", "report", "samples"}

# What each part of the package may import of the package, besides itself.
MAY_IMPORT = {
    # megalora/__init__.py: importing any part runs it, so it imports the rest in functions alone (see test_api.py).
    "": {"errors", "commands", "flags", "finetune", "planning"},
    "errors": set(),
    "batch": {"pictures"},
    "pictures": {"errors", "files"},
    "files": {"errors"},
    "recipes": {"errors"},
    "tokenizer_files": {"errors", "files"},
    "model_paths": {"errors"},
    "hub": {"errors"},
    "card": {"errors", "files"},
    "added_tokens": {"errors", "files", "tokenizer_files"},
    "adapters": EDGES,
    "choices": set(),
    "learning_rate": set(),
    # What a flag offers is defined where it is done, so flags know these; all without torch.
    "flags": {"errors", "choices", "learning_rate", "pipeline", "planning", "recipes", "files"},
    "parallel.mesh": EDGES,
    "ops": EDGES,
    "parallel": GROUND,
    "models": LOWER,
    **{service: LOWER for service in SERVICES},
    **{module: LOWER | {"models", "learning_rate"} | SERVICES | PARTS for module in PARTS},
    **{module: LOWER | {"models", "learning_rate", "flags"} | SERVICES | PARTS | TOP for module in TOP},
}
TORCH_ONLY = {"adapters", "parallel.mesh", "ops"}  # the third-party packages of these; Triton comes with torch
THEIRS = ("torch", "triton", "regex")  # regex: expressions of adapters within a time


def module_name(file: Path, root: Path = ROOT) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in sorted((ROOT / "megalora").rglob("*.py"))}


def part_of(module: str) -> str:
    """The key of MAY_IMPORT that a module of the package falls under: the longest that leads to it."""
    name = module.partition(".")[2]
    while name and name not in MAY_IMPORT:
        name = name.rpartition(".")[0]
    if not name and module != "megalora":
        raise AssertionError(f"{module} has no floor yet: give it one in MAY_IMPORT (and in DESIGN §2)")
    return name


def imports(source: str, module: str, is_package: bool) -> list[tuple[int, str]]:
    """(line, absolute name) of each import; `from a import b` is a.b where that is a module of ours."""
    found = []
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                start = package.split(".")
                start = start[: len(start) - node.level + 1]
                base = ".".join(start + ([node.module] if node.module else []))
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.append((node.lineno, inner if inner in MODULES else base))
    return found


def violations(source: str, module: str, is_package: bool) -> list[str]:
    part = part_of(module)
    bad = []
    for line, name in imports(source, module, is_package):
        root = name.partition(".")[0]
        if root == "tools":
            bad.append(f"{module}:{line} imports {name}: tools are command lines over the package")
        elif root != "megalora":
            if part in TORCH_ONLY and root not in THEIRS and root not in sys.stdlib_module_names:
                bad.append(f"{module}:{line} imports {name}: {part} may use torch only")
        elif name != "megalora" and part_of(name) not in MAY_IMPORT[part] | {part}:
            allowed = ", ".join(sorted(MAY_IMPORT[part])) or "nothing of ours"
            bad.append(f"{module}:{line} imports {name}: it may import {allowed}")
    return bad


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_lower_floors(module):
    file = MODULES[module]
    assert not violations(file.read_text(encoding="utf-8"), module, file.name == "__init__.py")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("megalora.ops.dropout", "from megalora.parallel.mesh import Axis"),
        ("megalora.ops.dropout", "import numpy"),
        ("megalora.parallel.mesh", "from . import collectives"),
        ("megalora.parallel.linear", "def f():\n    from megalora.models import stage"),
        ("megalora.data.packing", "import typing as t\nif t.TYPE_CHECKING:\n    from .. import models"),
        ("megalora.data.packing", "from ..checkpoint import hf"),
        ("megalora.models.stage", "import megalora.finetune"),
        ("megalora.training", "from megalora.flags import TrainArguments"),
        ("megalora.cli", "from tools import finetune"),
    ],
)
def test_the_check_catches(module, source, monkeypatch):
    monkeypatch.setitem(MODULES, "megalora.parallel.collectives", ROOT)  # as if they were written
    monkeypatch.setitem(MODULES, "megalora.models", ROOT)
    assert len(violations(source, module, is_package=False)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("megalora.ops.dropout", "import math, torch\nfrom . import rope\nfrom ..errors import UserError"),
        ("megalora.parallel.linear", "from megalora.ops.dropout import dropout\nfrom .mesh import Axis"),
        ("megalora.models.stage", "from megalora import __version__\nfrom ..parallel import split"),
        ("megalora.data.packing", "import numpy\nfrom megalora.batch import Batch"),
        ("megalora.cli", "from megalora import flags, finetune"),
    ],
)
def test_the_check_lets_pass(module, source):
    assert not violations(source, module, is_package=False)


def test_a_new_package_needs_a_floor():
    with pytest.raises(AssertionError, match="no floor"):
        part_of("megalora.attic.old")


def imported(module: str) -> set[str]:
    """The modules of ours that a module imports."""
    file = MODULES[module]
    found = imports(file.read_text(encoding="utf-8"), module, file.name == "__init__.py")
    return {name for _, name in found if name in MODULES and name != "megalora"}


def test_no_module_imports_itself_through_others():
    """Circles, imports in functions and for type checking counted."""
    graph = {module: imported(module) - {module} for module in MODULES}
    state: dict[str, int] = {}

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert state.get(module) != 1, f"a circle: {' -> '.join((*path[path.index(module) :], module))}"
        if state.get(module) == 2:
            return
        state[module] = 1
        for other in sorted(graph[module]):
            visit(other, (*path, module))
        state[module] = 2

    for module in graph:
        visit(module, ())


def test_a_model_is_data_without_torch():
    named = ("spec", "embeddings", "mixers", "recurrent", "heads", "linears", "routers", "prefix")
    parts = tuple(f"megalora.models.{name}" for name in named)
    names = {name for part in parts for _, name in imports(MODULES[part].read_text(encoding="utf-8"), part, False)}
    assert all(name in parts or name.partition(".")[0] in sys.stdlib_module_names for name in names), names


# How a docstring of a function does not begin: "Return whether ...", "Return the ...", "Build ...".
NO_VERB = set("A An All As Every From How Of One That The What Where Which Whether".split())


def without_verb(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            says = (ast.get_docstring(node) or "Say nothing").split()[0]
            properties = any("property" in ast.unparse(decorator) for decorator in node.decorator_list)
            if not properties and (says in NO_VERB or not says[0].isupper()):
                found.append(f"{node.name}: {says} ...")
    return found


def test_docstrings_are_imperative():
    """As ruff's D401, which knows verbs alone; properties apart."""
    found = {module: without_verb(file.read_text(encoding="utf-8")) for module, file in MODULES.items()}
    assert not {module: names for module, names in found.items() if names}, 'begin with a verb: "Return ..."'
    assert without_verb('def f():\n    """The sum."""\ndef g():\n    """Return it."""') == ["f: The ..."]


LONGEST_FUNCTION, LONGEST_MODULE = 70, 450  # lines


def too_long(source: str, module: str) -> list[str]:
    bad = [f"{module} has {lines} lines" for lines in [source.count("\n")] if lines > LONGEST_MODULE]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            if lines > LONGEST_FUNCTION:
                bad.append(f"{module}:{node.lineno} {node.name} has {lines} lines")
    return bad


@pytest.mark.parametrize("module", MODULES)
def test_functions_and_modules_are_short(module):
    assert not too_long(MODULES[module].read_text(encoding="utf-8"), module)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("x = 0\n" * LONGEST_MODULE, 0),
        ("x = 0\n" * (LONGEST_MODULE + 1), 1),
        ("def f():\n" + "    x = 0\n" * (LONGEST_FUNCTION - 1), 0),
        ("class C:\n    def f(self):\n" + "        x = 0\n" * LONGEST_FUNCTION, 1),
    ],
)
def test_the_lengths_are_counted(source, count):
    assert len(too_long(source, "megalora.any")) == count
