"""A GGUF file (llama.cpp's format, mostly quantised) as a Hugging Face folder in float32.

transformers dequantises the weights; the whole model is in memory. The tokenizer is built here from the metadata of
the file: what transformers makes of it forgets how the text is cut before it is merged (digits that stand alone).
Needs the gguf package.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalora.checkpoint.base.gguf_check import check_claims, check_sizes
from megalora.errors import UserError

_COUNTS = (
    "block_count", "embedding_length", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count", "expert_count",
)  # fmt: skip
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


@dataclass(frozen=True)
class Gguf:
    """What a GGUF file says of its model.

    tokens         the place of a token is its id; special are those that stand for no text
    roles          bos_token, eos_token, unk_token and pad_token, where there is one
    cut            the name of the rule by which text is cut before it is merged
    longest        tokens that the model can read
    numel          numbers in its tensors together
    """

    file: Path
    tokens: list[str]
    special: list[str]
    merges: list[tuple[str, str]]
    roles: dict[str, str]
    cut: str
    chat_template: str | None
    longest: int
    tensors: int
    numel: int


def read_gguf(file: str | Path) -> Gguf:
    """Return the metadata of a GGUF file. Raises UserError where it is none, or holds a tokenizer that is not known
    here.
    """
    file = Path(file)
    if file.is_dir():
        inside = next(iter(sorted(file.glob("*.gguf"))), None)
        raise UserError(f"{file}: is a folder", f"name {'a GGUF file' if inside is None else inside}")
    try:
        from gguf import GGUFReader, TokenType
    except ImportError as error:
        raise UserError(f"{file}: reading GGUF needs the package gguf ({error})", "pip install gguf") from None
    try:
        check_claims(file)
        reader = GGUFReader(file)
        found = {name: field.contents() for name, field in reader.fields.items()}
        tensors = [int(tensor.n_elements) for tensor in reader.tensors]
        check_sizes(_sizes(found), sum(tensors), len(tensors))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})", "name a GGUF file") from None
    except Exception as error:  # the reader fails on damaged bytes in any way
        raise UserError(f"{file}: is damaged or not GGUF ({error!s:.120})", "download it again") from None
    try:
        kind = (found["tokenizer.ggml.model"], found.get("tokenizer.ggml.pre"))
        if kind[0] != "gpt2" or kind[1] not in _CUTS:
            raise UserError(
                f"{file}: its tokenizer is of the kind {'/'.join(map(str, kind))}, which is not known here (known: "
                f"{', '.join(f'gpt2/{name}' for name in _CUTS)})",
                "take the model's safetensors instead",
            )
        tokens = found["tokenizer.ggml.tokens"]
        types = found["tokenizer.ggml.token_type"]
        ids = {role: found.get(f"tokenizer.ggml.{key}_token_id") for role, key in _ROLES.items()}
        return Gguf(
            file=file,
            tokens=tokens,
            special=[token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.CONTROL],
            merges=[tuple(merge.split(" ")) for merge in found["tokenizer.ggml.merges"]],
            roles={role: tokens[index] for role, index in ids.items() if index is not None},
            cut=kind[1],
            chat_template=found.get("tokenizer.chat_template"),
            longest=int(found[f"{found['general.architecture']}.context_length"]),
            tensors=len(tensors),
            numel=sum(tensors),
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: lacks metadata of a language model ({error!r})", "take another GGUF file") from None


def _sizes(fields: Mapping[str, Any]) -> list[tuple[str, object]]:
    """Return (field, value) of what transformers makes tensors and lists of, and products that are tensors here."""
    arch = fields.get("general.architecture")
    found = {name: fields[f"{arch}.{name}"] for name in _COUNTS if f"{arch}.{name}" in fields}
    width, tokens = found.get("embedding_length", 0), fields.get("tokenizer.ggml.tokens", ())
    sizes: list[tuple[str, object]] = [(f"{arch}.{name}", value) for name, value in found.items()]
    inner = found.get("feed_forward_length", 0)
    if isinstance(width, int) and isinstance(inner, int):
        sizes += [("embedding_length * feed_forward_length", width * inner), ("vocabulary", width * len(tokens))]
    return sizes


def write_hf(gguf: Gguf, folder: Path) -> None:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer, in a folder that exists.

    Raises UserError where transformers cannot read the model, or what is written does not read as it should.
    """
    _write_model(gguf.file, folder)
    _write_tokenizer(gguf, folder)
    _check_tokenizer(gguf, folder)


def _write_model(file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, GenerationConfig

    try:
        with tempfile.TemporaryDirectory() as alone:  # transformers reads what lies beside it too, such as an adapter
            (Path(alone) / "model.gguf").symlink_to(file.resolve())
            loaded = AutoModelForCausalLM.from_pretrained(alone, gguf_file="model.gguf", trust_remote_code=False)
    except Exception as error:  # of another kind for each thing that it cannot do
        raise UserError(
            f"{file}: transformers cannot read it ({error!s:.200})", "take the model's safetensors instead"
        ) from None
    fields = loaded.config.to_dict()
    for no_longer_so in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(no_longer_so, None)
    config = type(loaded.config).from_dict(fields)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False).float()
    model.load_state_dict(loaded.state_dict(), strict=True)
    tokens = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**tokens)
    model.save_pretrained(folder)


def _cut_digits(pre_tokenizers: Any) -> Any:
    """Cut so that each digit stands alone."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


_CUTS: Mapping[str, Callable[[Any], Any]] = {"smollm": _cut_digits}


def _write_tokenizer(gguf: Gguf, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json: byte-level BPE."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    ids = {token: index for index, token in enumerate(gguf.tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=gguf.merges))
    tokenizer.pre_tokenizer = _CUTS[gguf.cut](pre_tokenizers)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in gguf.special])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # tokenizer.json as it is, in transformers 4 and 5
        **gguf.roles,
        "model_max_length": gguf.longest,
        "clean_up_tokenization_spaces": False,
    }
    if gguf.chat_template is not None:
        settings["chat_template"] = gguf.chat_template
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def _check_tokenizer(gguf: Gguf, folder: Path) -> None:
    """Read the tokenizer back as any user would: every id must be the token that it is in the file."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    count = len(gguf.tokens)
    if len(tokenizer) != count or tokenizer.convert_ids_to_tokens(list(range(count))) != gguf.tokens:
        raise UserError(f"{gguf.file}: its tokens are not those of the tokenizer built of it", "take the safetensors")
    for token in gguf.special:
        if tokenizer(token, add_special_tokens=False).input_ids != [gguf.tokens.index(token)]:
            raise UserError(f"{gguf.file}: its token {token} does not stand alone", "take the safetensors")
