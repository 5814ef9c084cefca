"""Tokenizers: loaded from a folder without running its code, and held to the files they are made from.

transformers builds a tokenizer from several files and its own class for the model, and some of its versions get some
classes wrong (spaces lost, digits cut differently). What the `tokenizers` or `sentencepiece` library reads in the
folder's own file is what the model was trained with, so the two are compared before a token is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..added_tokens import AddedToken, add_to_files, added_tokens_of
from ..errors import UserError
from ..files import write_file
from ..tokenizer_files import (
    CONFIG_FILE,
    FILES,
    SENTENCEPIECE_FILE,
    TEMPLATES_FOLDER,
    TOKENIZER_FILE,
    VOCABULARIES,
    has_tokenizer,
    read_fields,
    write_tokenizer,
)

_LARGEST_FILE = 512 << 20  # bytes; the largest in use are of 34 MB

_WORDS = ("a b", " a", "a ", "a  b", "  ", "a   b    c", "\t", "a\tb", "Hello, world! It's 5 o'clock.", "HELLO wOrLd")
_LINES = ("\n", "a\nb", "a\n\nb", "\n\n\n", "a \n b", "\r\n", " \n", "a\n    b\n        c\n")
_SCRIPTS = (
    "你好，世界。",
    "你 好",
    "こんにちは",
    "안녕하세요",
    "Привет",
    "مرحبا",
    "é è ñ ü",
    "e\u0301",
    "ﬁ",
    "🙂👍🏽",
    "👩‍👩‍👧 a",
    "𝒳",
)
_NUMBERS = ("0 1 12 123 1234 12345", "3.14159", "1,000,000", "2024-07-26", "x=1;y=-2", "１２３")
_CODE = (
    "def f(x):\n    return x**2  # ok\n",
    'if (a&&b){c[0]="d";}',
    "<div class='x'>",
    "a_b.c::d->e",
    "$x^2_{i}$ \\frac{1}{2}",
)
PROBES = (*_WORDS, *_LINES, *_SCRIPTS, *_NUMBERS, *_CODE)


@dataclass(frozen=True)
class OpenedTokenizer:
    """A tokenizer of transformers, the folder it is from, and lines that the user should read about it.

    added  tokens that it has beyond those of the folder
    """

    tokenizer: Any
    folder: Path
    notes: tuple[str, ...] = ()
    added: tuple[AddedToken, ...] = ()

    def write(self, folder: str | Path, chat_template: str | None = None) -> None:
        """Write the tokenizer's files into a folder, as `write_tokenizer`, with the added tokens. Raises UserError."""
        write_tokenizer(self.folder, folder, chat_template)
        if not self.added:
            return
        try:
            if not (file := Path(folder) / TOKENIZER_FILE).is_file():
                write_file(file, _backend(self.tokenizer, self.folder).to_str(pretty=True).encode())
            add_to_files(folder, self.added)
        except OSError as error:
            raise UserError(f"{folder}: the tokenizer cannot be written ({error.strerror})", "free space") from None


def load_tokenizer(folder: str | Path) -> Any:
    """Return the tokenizer of a Hugging Face folder, as `open_tokenizer` does, without its notes."""
    return open_tokenizer(folder).tokenizer


def open_tokenizer(folder: str | Path, added: Sequence[AddedToken] = ()) -> OpenedTokenizer:
    """Load the tokenizer of a Hugging Face folder from local files only; never run code of the folder.

    added  tokens that it gets beyond those of the folder
    Where transformers gives other tokens than the folder's own tokenizer.json, the file's tokens are used and a note
    says so. Raises UserError where there are no tokenizer files, where they cannot be read or would need code of the
    folder, and where the tokens of the file cannot be had.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder} to read the tokenizer from", "check the path")
    _check_files(folder)
    code, model = _own_code(folder), None
    if not (folder / TOKENIZER_FILE).is_file() and (folder / SENTENCEPIECE_FILE).is_file():
        model = _sentencepiece_model(folder / SENTENCEPIECE_FILE)
    tokenizer = _load(folder, code)
    notes = (
        [f"{folder}: its own tokenizer code ({code}) is not run; transformers' class reads its files"] if code else []
    )
    note = None
    with told_as(f"the tokenizer in {folder} cannot read every text", "copy its files again"):
        if (folder / TOKENIZER_FILE).is_file():
            tokenizer, note = _like_its_file(tokenizer, folder)
        elif model is not None:
            note = _like_sentencepiece(tokenizer, model, folder / SENTENCEPIECE_FILE)
    notes += [note] if note else []
    opened = OpenedTokenizer(tokenizer, folder, tuple(notes))
    return _with_tokens(opened, tuple(added)) if added else opened


def new_tokens(folder: str | Path, names: Sequence[str]) -> tuple[AddedToken, ...]:
    """Return special tokens of these names, with the ids that the tokenizer of `folder` gives them.

    Raises UserError for a token that it has already, and a tokenizer that cannot get more.
    """
    from tokenizers import AddedToken as Added
    from tokenizers import Tokenizer

    tokenizer = open_tokenizer(folder).tokenizer
    vocabulary = tokenizer.get_vocab()
    for name in names:
        if name in vocabulary:
            raise UserError(
                f"new_special_tokens: {name!r} is a token of {folder} already (id {vocabulary[name]})",
                f"leave it out; to train its row, give trainable_token_indices [{vocabulary[name]}] in lora_config",
            )
    file = Path(folder) / TOKENIZER_FILE
    with told_as(f"the tokenizer in {folder} cannot get new tokens", "copy its files again"):
        whole = Tokenizer.from_str(_backend(tokenizer, folder).to_str())
        if file.is_file():  # it has the ids: classes of transformers may add tokens of their own
            whole = Tokenizer.from_file(str(file))
        whole.add_special_tokens([Added(name, special=True, normalized=False) for name in names])
    return tuple(AddedToken(whole.token_to_id(name), name) for name in names)


def tokens_beyond(folder: str | Path, base: str | Path) -> tuple[AddedToken, ...]:
    """Return the added tokens that the tokenizer.json in `folder` has and the tokenizer in `base` lacks.

    No tokens where one of them has no tokenizer. Raises UserError for files that cannot be read, and for tokens of
    `folder` that have the ids of others in `base`.
    """
    file, other = Path(folder) / TOKENIZER_FILE, Path(base) / TOKENIZER_FILE
    if not file.is_file() or not has_tokenizer(base):
        return ()
    if other.is_file() and file.stat().st_size == other.stat().st_size and file.read_bytes() == other.read_bytes():
        return ()
    vocabulary = load_tokenizer(base).get_vocab()
    found = added_tokens_of(read_fields(file).get("added_tokens") or (), str(file))
    beyond = tuple(token for token in found if token.content not in vocabulary)
    taken = set(vocabulary.values())
    for token in beyond:
        if token.id in taken:
            raise UserError(
                f"{file}: token {token.content!r} has id {token.id}, which is another token's in {base}",
                "name the model that the adapter was trained on",
            )
    return beyond


def tokenizer_identity(tokenizer: Any) -> str:
    """Return the size of the vocabulary, and a hash of its tokens and of which are special."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    special = sorted(str(token) for token in tokenizer.all_special_tokens)
    digest = hashlib.sha256(json.dumps([vocabulary, special, tokenizer.eos_token_id]).encode()).hexdigest()
    return f"{len(vocabulary)} tokens, {digest[:16]}"


# ---- loading ----


def _check_files(folder: Path) -> None:
    if not has_tokenizer(folder):
        missing = ", ".join(VOCABULARIES)
        raise UserError(f"{folder} has no tokenizer (none of {missing})", "copy it from the model's folder")
    for file in (*folder.iterdir(), *folder.glob(f"{TEMPLATES_FOLDER}/*")):  # transformers opens some of any name
        mine = file.name in FILES or file.suffix == ".jinja"
        if not file.is_file() and (mine or not file.is_dir()):
            raise UserError(f"{file}: is not a regular file", "copy the tokenizer's files again")
        if mine and file.stat().st_size > _LARGEST_FILE:
            raise UserError(f"{file}: {file.stat().st_size / 1e9:.1f} GB are no tokenizer", "copy its files again")


def _own_code(folder: Path) -> str | None:
    """Return the Python class of the folder that its tokenizer_config.json asks transformers to run, if it does."""
    file = folder / CONFIG_FILE
    found = read_fields(file).get("auto_map") if file.is_file() else None
    if isinstance(found, dict):
        found = found.get("AutoTokenizer")
    if isinstance(found, (list, tuple)):
        found = next((name for name in found if name), None)
    return None if not found else str(found)


def _load(folder: Path, code: str | None) -> Any:
    """Return the tokenizer of the class that transformers chooses; where that class fails, tokenizer.json by itself."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # a slow import, wanted only here

    tokenizer = error = None
    alone = [PreTrainedTokenizerFast] if (folder / TOKENIZER_FILE).is_file() and not code else []
    for kind in (AutoTokenizer, *alone):
        try:
            with told_as(f"cannot read the tokenizer in {folder}", "copy its files again"):
                loaded = kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
                works = len(loaded("a b", add_special_tokens=False)["input_ids"]) > 0
            tokenizer = loaded
            break
        except UserError as raised:
            error = error or raised
    if tokenizer is None and code:
        never = f"it asks to run its own code ({code}), which megalora never does"
        raise UserError(f"cannot read the tokenizer in {folder}: {never}", "use a tokenizer that transformers has")
    if tokenizer is None:
        raise error
    if not works:
        raise UserError(f"the tokenizer in {folder} gives no tokens for a text", "copy its files again")
    return tokenizer


@contextlib.contextmanager
def told_as(what: str, hint: str) -> Iterator[None]:
    """Raise what a library of tokenizers raises inside as a UserError: of its files, or of a text.

    They raise bare Exceptions and whatever their parsers raise; a panic of `tokenizers` (a regular expression of
    tokenizer.json that backtracks without end) is none of them.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what}: {error!s:.300}", hint) from None


def _backend(tokenizer: Any, folder: str | Path) -> Any:
    """Its tokenizer of the `tokenizers` library. Raises UserError where it has none."""
    found = getattr(tokenizer, "backend_tokenizer", None)
    if found is None:
        raise UserError(
            f"the tokenizer in {folder} has no fast version, which new tokens need", "take a folder with tokenizer.json"
        )
    return found


def _with_tokens(opened: OpenedTokenizer, added: tuple[AddedToken, ...]) -> OpenedTokenizer:
    """Load the tokenizer again, from files that have more tokens. Raises UserError where these have other ids."""
    grown = replace(opened, added=added)
    with tempfile.TemporaryDirectory() as aside:
        grown.write(aside)
        if (config := opened.folder / "config.json").is_file():  # transformers asks it for the class
            shutil.copyfile(config, Path(aside) / "config.json")
        tokenizer = open_tokenizer(aside).tokenizer
    for token in added:
        if tokenizer.convert_tokens_to_ids(token.content) != token.id:
            raise UserError(
                f"the tokenizer in {opened.folder} does not take the new token {token.content!r} as id {token.id}",
                "take a folder whose tokenizer.json lists its added tokens at the end of the vocabulary",
            )
    return replace(grown, tokenizer=tokenizer)


# ---- comparing with the file ----


def _like_its_file(tokenizer: Any, folder: Path) -> tuple[Any, str | None]:
    """Return the tokenizer, or one that gives the tokens of tokenizer.json where this one does not; and a line on that.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    file = folder / TOKENIZER_FILE
    with told_as(f"{file}: is no tokenizer", "copy it again"):
        own = Tokenizer.from_file(str(file))
    own.no_padding()
    own.no_truncation()
    special = [token.content for token in own.get_added_tokens_decoder().values()]
    probes = (*PROBES, *special, *(f"a{token}b" for token in special), *(f" {token} \n" for token in special[:64]))

    def encode(text: str) -> list[int]:
        return own.encode(text, add_special_tokens=False).ids

    different = _difference(tokenizer, encode, probes)
    if different is None:
        return tokenizer, None
    what = f"{file}: transformers' {type(tokenizer).__name__} gives other tokens than the file itself"
    try:
        alone = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        still = _difference(alone, encode, probes)
        if still is not None:  # transformers 4 puts some flags of tokenizer_config.json into the file's own parts
            backend = alone.backend_tokenizer
            backend.normalizer, backend.pre_tokenizer = own.normalizer, own.pre_tokenizer
            still = _difference(alone, encode, probes)
    except Exception as error:
        still = f"{different}; reading the file alone: {error!s:.200}"
    if still is not None:
        raise UserError(f"{what} ({still})", "use another version of transformers")
    return alone, f"{what} ({different}); the file's are used"


def _sentencepiece_model(file: Path) -> Any:
    """Return the sentencepiece model of a file, None where it is a table as of tiktoken. Raises UserError."""
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError, ValueError) as error:  # ValueError: its own message is not UTF-8
        if not _is_tiktoken(file):
            raise UserError(f"{file}: is no sentencepiece model ({error!s:.200})", "copy it again") from None
    if importlib.util.find_spec("tiktoken") is None:
        raise UserError(f"{file}: is a file of tiktoken, which is not installed", "pip install tiktoken")
    return None


def _like_sentencepiece(tokenizer: Any, model: Any, file: Path) -> str | None:
    """Make the tokenizer give the tokens of the sentencepiece model that it is made from; a line where it did not.

    Raises UserError where that cannot be had.
    """
    different = _difference(tokenizer, model.encode, PROBES)
    if different is None:
        return None
    what = f"{file}: transformers' {type(tokenizer).__name__} gives other tokens than the sentencepiece model itself"
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        backend.normalizer, backend.pre_tokenizer = _sentencepiece_normalizer(model), None
        if _difference(tokenizer, model.encode, PROBES) is None:
            return f"{what} ({different}); the model's are used"
    raise UserError(f"{what} ({different})", "use another version of transformers, or a folder with a tokenizer.json")


def _sentencepiece_normalizer(model: Any) -> Any:
    """Return what a sentencepiece model does to a text first, as its own file says it."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Regex, normalizers

    rules = sentencepiece_model_pb2.ModelProto.FromString(model.serialized_model_proto()).normalizer_spec
    steps = [normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:  # even where the text begins with a space
        steps.append(normalizers.Prepend("\u2581"))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])


def _is_tiktoken(file: Path) -> bool:
    """Return whether tokenizer.model is a table of base64 tokens and ranks, as of Llama 3's original release."""
    with file.open("rb") as lines:
        words = lines.readline(4096).split()
    return len(words) == 2 and words[1].isdigit()


def _difference(tokenizer: Any, encode: Callable[[str], Sequence[int]], probes: Sequence[str]) -> str | None:
    """Return the first text whose tokens differ, in words."""
    found = tokenizer(list(probes), add_special_tokens=False)["input_ids"]
    for text, ids in zip(probes, found, strict=True):
        if list(encode(text)) != list(ids):
            return f"{text!r} is {_shown(encode(text))} in the file, {_shown(ids)} in transformers"
    return None


def _shown(ids: Sequence[int]) -> str:
    shown = " ".join(map(str, list(ids)[:8]))
    return f"[{shown}{' ...' if len(ids) > 8 else ''}]"
