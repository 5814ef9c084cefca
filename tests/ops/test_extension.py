"""Loading of the compiled ops: what is said when they are absent or built for another torch."""

import logging
import types

import pytest
import torch

from megalora.ops import extension


@pytest.fixture
def importing(monkeypatch):
    """Makes `import megalora._C` give a module or raise an error, with nothing loaded before and after."""

    def importing(result):
        def import_module(name):
            assert name == "megalora._C"
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr(extension.importlib, "import_module", import_module)

    extension.load.cache_clear()
    extension._devices.cache_clear()
    yield importing
    extension.load.cache_clear()
    extension._devices.cache_clear()


def module(**info):
    version = torch.__version__.split("+")[0]
    return types.SimpleNamespace(build_info=lambda: {"devices": ["cpu"], "torch": version} | info)


def test_a_sound_library_is_loaded_silently(importing, caplog):
    importing(module())
    assert extension.load() and extension.has_kernels("cpu") and not extension.has_kernels("cuda")
    assert not caplog.records


@pytest.mark.parametrize(
    "result, said",
    [
        (ModuleNotFoundError("No module named 'megalora._C'", name="megalora._C"), "not installed"),
        (ImportError("_C.so: undefined symbol: _ZN3c10\nmore"), "undefined symbol: _ZN3c10"),
        (module(torch="2.9.0"), "built for torch 2.9.0"),
    ],
)
def test_what_is_wrong_is_said_once_with_the_remedy(importing, caplog, result, said):
    importing(result)
    with caplog.at_level(logging.WARNING):
        assert not extension.load() and not extension.has_kernels("cpu") and not extension.load()
    (record,) = caplog.records
    message = record.getMessage()
    assert said in message and "make install" in message and "\n" not in message


def test_only_rank_zero_speaks(importing, caplog, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    importing(ModuleNotFoundError("No module named 'megalora._C'", name="megalora._C"))
    assert not extension.load() and not caplog.records


def test_a_module_missing_inside_the_library_is_not_hidden(importing):
    importing(ModuleNotFoundError("No module named 'numpy'", name="numpy"))
    with pytest.raises(ModuleNotFoundError, match="numpy"):
        extension.load()


def test_dropout_falls_back_to_the_reference(importing):
    from megalora.ops.dropout import Dropout, dropout, dropout_reference

    importing(ModuleNotFoundError("No module named 'megalora._C'", name="megalora._C"))
    spec, x, tokens = Dropout(0.2, 1, 2, 3), torch.randn(6, 10), torch.arange(6)
    assert torch.equal(dropout(x, tokens, spec), dropout_reference(x, tokens, spec))


def test_build_info_describes_the_build():
    library = pytest.importorskip("megalora._C", reason="megalora._C is not built: " + extension.REMEDY)
    info = library.build_info()
    assert "cpu" in info["devices"] and info["openmp"] is True
    assert torch.__version__.startswith(info["torch"])
    assert info["instruction_set"] in ("avx512", "avx2", "default")
