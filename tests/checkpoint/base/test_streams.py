"""Files written block by block are those that torch.save and the safetensors library would have written."""

import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from megalora.checkpoint.base import streams
from megalora.checkpoint.base.hf import DTYPES
from megalora.checkpoint.base.streams import ALIGNMENT, SafetensorsStream, TensorType, TorchStream

COMMON = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def tensors(draw):
    """{name: (tensor, rows of a block)}, wide dtypes first; names as HF has them and as a file system would not."""
    names = draw(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5, unique=True))
    names = [name for name in names if name != "__metadata__" and name.isprintable()] or ["model.norm.weight"]
    dtypes = [draw(st.sampled_from(list(DTYPES.values()))) for _ in names]
    made = {}
    for name, dtype in zip(names, sorted(dtypes, key=lambda d: -d.itemsize), strict=True):
        shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
        made[name] = (torch.randn(shape).to(dtype), draw(st.integers(1, 8)))
    return made


def write(stream, made):
    for name, (tensor, rows) in made.items():
        for block in tensor.split(rows):
            stream.append(name, block)
    stream.close()


def table(made):
    return {name: TensorType(tensor.dtype, tuple(tensor.shape)) for name, (tensor, _) in made.items()}


def same(found, made):
    assert list(found) == list(made) or set(found) == set(made)
    for name, (tensor, _) in made.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@COMMON
@given(tensors(), st.sampled_from([1, 16, 1 << 30]))
def test_a_file_of_torch_save(tmp_path, made, largest_plain):
    file = tmp_path / "partial_model_optim.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "_LARGEST_PLAIN_ENTRY", largest_plain)  # larger entries are ZIP64
        write(TorchStream(file, table(made)), made)
    for mapped in (False, True):
        found = torch.load(file, weights_only=True, mmap=mapped)
        assert type(found) is dict and list(found) == list(made)
        same(found, made)
        for name, (tensor, _) in made.items():
            assert found[name].stride() == tensor.stride() and not found[name].requires_grad
            assert not mapped or found[name].data_ptr() % ALIGNMENT == 0
    assert zipfile.ZipFile(file).testzip() is None  # its checksums are those of the bytes


@COMMON
@given(tensors())
def test_a_safetensors_file(tmp_path, made):
    file = tmp_path / "model.safetensors"
    write(SafetensorsStream(file, table(made)), made)
    same(load_file(file), made)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}  # without it transformers refuses the file
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert (8 + header) % 8 == 0


def test_strided_blocks_are_written_as_they_read(tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    kind = TensorType(torch.float32, (4, 2))
    for stream in (TorchStream, SafetensorsStream):
        stream = stream(tmp_path / ("a.pt" if stream is TorchStream else "a.safetensors"), {"w": kind})
        stream.append("w", whole[:3, 2:4])
        stream.append("w", whole[3:, 2:4])
        stream.close()
    assert torch.equal(torch.load(tmp_path / "a.pt", weights_only=True)["w"], whole[:, 2:4])
    assert torch.equal(load_file(tmp_path / "a.safetensors")["w"], whole[:, 2:4])


@pytest.mark.parametrize("kind", [TorchStream, SafetensorsStream])
def test_what_was_not_promised_is_a_bug(tmp_path, kind):
    types = {"a": TensorType(torch.float32, (2, 3)), "b": TensorType(torch.float32, (2,))}

    def stream():
        return kind(tmp_path / "file.pt", types)

    for name, block in (("b", torch.zeros(2)), ("a", torch.zeros(2, 3).half()), ("a", torch.zeros(1, 2))):
        with pytest.raises(AssertionError):
            stream().append(name, block)
    with pytest.raises(AssertionError):
        stream().append("a", torch.zeros(3, 3))
    short = stream()
    short.append("a", torch.zeros(2, 3))
    with pytest.raises(AssertionError):
        short.close()
    short.abandon()
