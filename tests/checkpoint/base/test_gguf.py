"""A GGUF file as an HF folder: weights, tokens and metadata as they are in it; what cannot be read is said."""

import json
import os
import struct

import numpy as np
import pytest
from fuzz import examples, ours_only
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import pre_tokenizers

from megalora import cli
from megalora.checkpoint.base.gguf import read_gguf
from megalora.errors import UserError
from megalora.models.config import read_config
from megalora.models.spec import mixers_of

gguf = pytest.importorskip("gguf")
SPECIAL = ["<|endoftext|>", "<|im_start|>"]
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt", "he", "Ġthe"]
LAYERS, HIDDEN, INNER, HEADS = 2, 32, 64, 4


def write(file, pre="smollm", **leave_out):
    """A tiny llama, as llama.cpp's converter writes it, in float32."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    if "tokens" not in leave_out:
        writer.add_token_list(TOKENS)
    kinds = [gguf.TokenType.CONTROL if token in SPECIAL else gguf.TokenType.NORMAL for token in TOKENS]
    writer.add_token_types(kinds)
    writer.add_token_merges(["Ġ t", "h e", "Ġt he"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    generator = np.random.default_rng(0)

    def tensor(name, *shape):
        writer.add_tensor(name, generator.standard_normal(shape).astype(np.float32))

    tensor("token_embd.weight", len(TOKENS), HIDDEN)
    tensor("output_norm.weight", HIDDEN)
    tensor("output.weight", len(TOKENS), HIDDEN)
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensor(f"blk.{layer}.{name}.weight", HIDDEN, HIDDEN)
        tensor(f"blk.{layer}.attn_norm.weight", HIDDEN)
        tensor(f"blk.{layer}.ffn_norm.weight", HIDDEN)
        tensor(f"blk.{layer}.ffn_gate.weight", INNER, HIDDEN)
        tensor(f"blk.{layer}.ffn_up.weight", INNER, HIDDEN)
        tensor(f"blk.{layer}.ffn_down.weight", HIDDEN, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def convert(file, folder, *flags):
    return cli.main(["convert", "from-gguf", "--input", str(file), "--output", str(folder), *flags])


def test_a_gguf_becomes_a_folder(tmp_path):
    from transformers import AutoTokenizer

    file = write(tmp_path / "tiny.gguf")
    (tmp_path / "adapter_config.json").write_text("{}")  # transformers would load that too
    assert convert(file, tmp_path / "hf", "--dry_run") == 0 and not (tmp_path / "hf").exists()
    assert convert(file, tmp_path / "hf") == 0
    config = read_config(tmp_path / "hf")
    _, mlp = mixers_of(config.stack.layers[0])
    assert (config.num_hidden_layers, config.hidden_size, mlp.inner) == (LAYERS, HIDDEN, INNER)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    theirs = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
    for ours, name in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("lm_head.weight", "output.weight"),
        ("model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight"),
        ("model.layers.1.self_attn.v_proj.weight", "blk.1.attn_v.weight"),
    ):
        assert np.array_equal(tensors[ours].numpy(), theirs[name]), ours
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.convert_ids_to_tokens(list(range(len(TOKENS)))) == TOKENS
    assert tokenizer.tokenize("on the 12") == ["o", "n", "Ġthe", "Ġ", "1", "2"]
    assert (tokenizer.bos_token, tokenizer.eos_token) == (SPECIAL[1], SPECIAL[0])
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["model_max_length"] == 128
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi"


def test_what_cannot_be_read(tmp_path, capsys):
    with pytest.raises(UserError, match="gpt2/qwen2, which is not known here .known: gpt2/smollm"):
        read_gguf(write(tmp_path / "other.gguf", pre="qwen2"))
    with pytest.raises(UserError, match="lacks metadata of a language model .*tokens"):
        read_gguf(write(tmp_path / "bare.gguf", tokens=None))
    whole = write(tmp_path / "whole.gguf").read_bytes()
    for size in (0, 3, 200, len(whole) // 2):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(UserError, match="cut.gguf: is damaged or not GGUF"):
            read_gguf(tmp_path / "cut.gguf")
    assert convert(tmp_path / "nowhere.gguf", tmp_path / "hf") == 2
    assert "nowhere.gguf does not exist" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists() and not list(tmp_path.glob(".*"))


def _gguf(tensors=0, fields=(), body=b"", version=3) -> bytes:
    """A header: fields are (name, type, value as bytes)."""
    packed = b"".join(struct.pack("<Q", len(n)) + n + struct.pack("<I", kind) + value for n, kind, value in fields)
    return b"GGUF" + struct.pack("<IQQ", version, tensors, len(fields)) + packed + body


def _list(kind: int, count: int) -> bytes:
    return struct.pack("<IQ", kind, count)


LIES = {
    "values without end": _gguf(fields=[(b"tokenizer.ggml.scores", 9, _list(6, 2**40))]),
    "texts without end": _gguf(fields=[(b"tokenizer.ggml.tokens", 9, _list(8, 2**40))]),
    "lists of lists": _gguf(fields=[(b"a", 9, _list(9, 2**40) + _list(9, 2**40))]),
    "a text without end": _gguf(fields=[(b"a", 8, struct.pack("<Q", 2**63))]),
    "a type": _gguf(fields=[(b"a", 77, b"0" * 100)]),
    "fields": b"GGUF" + struct.pack("<IQQ", 3, 0, 2**40) + b"0" * 100,
    "tensors": b"GGUF" + struct.pack("<IQQ", 3, 2**40, 0) + b"0" * 100,
    "dimensions": _gguf(1, body=struct.pack("<Q1sI", 1, b"a", 2**31) + b"0" * 100),
    "elements": _gguf(1, body=struct.pack("<Q1sIQQIQ", 1, b"a", 2, 2**40, 2**40, 0, 0) + b"0" * 100),
    "another version": _gguf(version=1),
    "no GGUF": b"GGUX" + b"0" * 100,
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_claims_more_than_it_holds(tmp_path, lie):
    (tmp_path / "a.gguf").write_bytes(LIES[lie])
    with pytest.raises(UserError, match=r"a\.gguf: is damaged or not GGUF .* download it again"):
        read_gguf(tmp_path / "a.gguf")


@pytest.mark.parametrize("name", ["block_count", "embedding_length", "feed_forward_length"])
def test_a_size_beyond_what_the_tensors_are_is_refused(tmp_path, name):
    """Of block_count transformers makes as many layers before it looks for their tensors."""
    data = write(tmp_path / "a.gguf").read_bytes()
    at = data.index(f"llama.{name}".encode()) + len(f"llama.{name}") + 4
    (tmp_path / "a.gguf").write_bytes(data[:at] + struct.pack("<I", 10**9) + data[at + 4 :])
    with pytest.raises(UserError, match=f"is damaged or not GGUF .*{name}"):
        read_gguf(tmp_path / "a.gguf")


def test_only_a_regular_file_is_read(tmp_path):
    os.mkfifo(tmp_path / "a.gguf")
    with pytest.raises(UserError, match="a.gguf: is not a regular file"):
        read_gguf(tmp_path / "a.gguf")


def test_a_folder_of_one(tmp_path):
    with pytest.raises(UserError, match="is a folder: name a GGUF file"):
        read_gguf(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=f"is a folder: name {tmp_path / 'a.gguf'}"):
        read_gguf(tmp_path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write(tmp_path_factory.mktemp("sound") / "a.gguf").read_bytes()


@examples(40)
@given(data=st.data())
def test_any_bytes(sound, tmp_path, data):
    """Above all in the metadata, which is the first 6,000 of them."""
    whole, numbers = bytearray(sound), st.integers(0, 2**64 - 1).map(lambda n: n.to_bytes(8, "little"))
    for _ in range(data.draw(st.integers(1, 4))):
        at, new = data.draw(st.integers(0, 6000)), data.draw(st.binary(min_size=1, max_size=8) | numbers)
        whole[at : at + len(new)] = new
    (tmp_path / "a.gguf").write_bytes(whole[: data.draw(st.integers(0, len(whole)) | st.just(len(whole)))])
    ours_only(lambda: read_gguf(tmp_path / "a.gguf"))
