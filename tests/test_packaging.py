"""What the package is built by: setup.py without torch or a compiler, its extras, wheels, and the recipes of images.

No image is built here: what their recipes name is held against the repository instead.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import PATIENCE

from megalora.cli import _COMMANDS

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE, APPTAINER = ROOT / "containers/Dockerfile", ROOT / "containers/megalora.def"
IMAGES = [DOCKERFILE, APPTAINER]
SETUP, MAKEFILE = (ROOT / "setup.py").read_text(), (ROOT / "Makefile").read_text()
EXTRAS = set(re.findall(r'^        "(\w+)": ', SETUP, re.MULTILINE))
INSTRUCTIONS = {"ARG", "FROM", "RUN", "ENV", "COPY", "ENTRYPOINT", "CMD"}
SECTIONS = {"%files", "%post", "%environment", "%runscript"}


def setup_says(*words: str, path: str | None = None, torch: bool = True, **variables: str) -> tuple[int, str, str]:
    """What `setup.py` prints, where no compiler is on `path`, or no torch is installed."""
    hidden = "" if torch else "sys.modules['torch'] = None; "
    run = f"import sys, runpy; {hidden}sys.argv[0] = 'setup.py'; runpy.run_path('setup.py', run_name='__main__')"
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "MEGALORA_BUILD_EXTENSION")} | variables
    environment["PATH"] = environment["PATH"] if path is None else path
    done = subprocess.run(
        [sys.executable, "-c", run, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("lacking", ["compiler", "torch"])
def test_without_a_compiler_or_torch_it_is_plain_torch_and_says_what_is_slower(lacking, tmp_path):
    how = {"path": str(tmp_path)} if lacking == "compiler" else {"torch": False}
    status, out, err = setup_says("--version", **how)
    assert status == 0 and re.fullmatch(r"\d+\.\d+\.\d+", out.strip()), "no compiled ops: a wheel for every torch"
    (line,) = [line for line in err.splitlines() if "megalora" in line]
    assert "without its compiled ops" in line and "slower" in line
    status, _, err = setup_says("--version", **how, MEGALORA_BUILD_EXTENSION="cpu")
    assert status != 0 and "MEGALORA_BUILD_EXTENSION=0" in err, "what is asked for and cannot be is an error"


def test_a_wheel_with_compiled_ops_is_named_by_its_torch():
    import torch

    told = re.match(r"[\d.]*\d", torch.__version__)[0]
    _, out, _ = setup_says("--version", MEGALORA_BUILD_EXTENSION="cpu", MEGALORA_WHEEL="1")
    assert out.strip().endswith(f"+torch{told}.cpu")
    assert setup_says("--version", MEGALORA_BUILD_EXTENSION="0", MEGALORA_WHEEL="1")[1].strip().count("+") == 0
    assert "MEGALORA_WHEEL=1" in MAKEFILE and re.search(r"^wheel: ", MAKEFILE, re.MULTILINE)


def test_every_extra_that_is_named_is_there():
    pages = [
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *IMAGES,
        ROOT / "Makefile",
        *ROOT.glob("megalora/**/*.py"),
    ]
    for page in pages:
        for names in re.findall(r"(?:megalora|\.)\[([a-z,]+)\]", page.read_text(encoding="utf-8")):
            assert set(names.split(",")) <= EXTRAS, f"{page}: {names}"
    assert {"serve", "data", "plots", "trackers", "test", "demo"} <= EXTRAS


# ---- images


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, rest) of each, with continued lines joined."""
    text = re.sub(r"\\\n\s*", "", DOCKERFILE.read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def sections() -> dict[str, list[str]]:
    """Lines of each section of the Apptainer recipe; its head is ""."""
    found: dict[str, list[str]] = {"": []}
    name = ""
    for line in APPTAINER.read_text().splitlines():
        if line.startswith("%"):
            name = line.strip()
            assert name not in found
            found[name] = []
        elif line.strip() and not line.startswith("#"):
            found[name].append(line.strip())
    return found


def test_their_instructions_are_known_and_end_in_the_command():
    parts = dockerfile()
    assert {name for name, _ in parts} <= INSTRUCTIONS
    assert ("ENTRYPOINT", '["megalora"]') in parts
    assert set(sections()) - {""} == SECTIONS and sections()["%runscript"] == ['exec megalora "$@"']


def test_what_they_copy_is_in_the_repository_and_is_enough():
    copied = {word for name, rest in dockerfile() if name == "COPY" for word in rest.split()[:-1]}
    assert copied == {line.split()[0] for line in sections()["%files"]}
    assert [name for name in copied if not (ROOT / name).exists()] == []
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert not copied & set(ignored)
    needed = {"setup.py", "pyproject.toml", "csrc", "megalora"}
    assert needed <= copied, "what setup.py reads"


def test_both_do_the_same():
    runs = " && ".join(rest for name, rest in dockerfile() if name == "RUN")
    post = "\n".join(sections()["%post"])
    for command in (
        "--no-install-recommends g++ python3 python3-dev python3-venv",
        'pip install --no-cache-dir ${TORCH} "s',
    ):
        assert re.sub(r"\s+", " ", command) in re.sub(r"\s+", " ", runs) and command in post
    build = 'MEGALORA_BUILD_EXTENSION=${OPS} pip install --no-cache-dir --no-build-isolation ".[serve,data]"'
    assert build in runs and build in post
    base = dict(rest.split("=", 1) for name, rest in dockerfile() if name == "ARG" and "=" in rest)
    assert f"From: {base['BASE']}" in sections()[""] and f"OPS={base['OPS']}" in post
    torch = re.search(r"^TORCH \?= (\S+)$", MAKEFILE, re.MULTILINE)[1]
    assert base["TORCH"] == torch and f"TORCH={torch}" in post, "the torch of make install"


@pytest.mark.parametrize("file", IMAGES, ids=lambda file: file.name)
def test_the_commands_at_their_head_are_commands(file):
    head = [
        line[1:].strip()
        for line in file.read_text().split("\n\n")[0:2]
        for line in line.splitlines()
        if line[:1] == "#"
    ]
    before = r"(?:-w /work megalora|apptainer run --nv megalora\.sif|-m megalora) (\w+)"
    named = [name for line in head for name in re.findall(before, line)]
    assert named and set(named) <= set(_COMMANDS)
    for line in head:
        for word in shlex.split(line) if line.startswith(("docker", "apptainer", "srun")) else ():
            if word.startswith("containers/"):
                assert (ROOT / word).exists()
