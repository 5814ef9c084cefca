"""Loading of the compiled ops: what is said when they are absent, or built for another torch or from other sources."""

import logging
import subprocess
import sys
import types

import pytest
import torch

from megalora.ops import extension, sources


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
    sound = {"devices": ["cpu"], "torch": version, "sources": sources.digest(extension.CSRC)}
    return types.SimpleNamespace(build_info=lambda: sound | info)


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
        (module(sources="0123456789abcdef"), f"built from other sources than {extension.CSRC}"),
        (module(sources=None), "built from other sources"),  # by a setup.py that did not say
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


def test_sources_are_compared_in_a_source_tree_only(importing, monkeypatch, tmp_path):
    importing(module(sources="0123456789abcdef"))
    monkeypatch.setattr(extension, "CSRC", tmp_path / "csrc")
    assert extension.load()
    extension.load.cache_clear(), extension._devices.cache_clear()
    extension.CSRC.mkdir()  # another package's, in site-packages
    (extension.CSRC / "ops.cpp").touch()
    assert extension.load()


def test_a_build_without_setup_py_is_not_compared(importing, caplog):
    importing(module(sources=""))
    assert extension.load() and not caplog.records


def test_the_digest_is_of_names_and_contents(tmp_path):
    (tmp_path / "a.cpp").write_text("int a;")
    (tmp_path / "b.h").write_text("int b;")
    seen = [sources.digest(tmp_path)]
    (tmp_path / "notes.md").write_text("of no matter")
    (tmp_path / "a.cpp").touch()
    assert sources.digest(tmp_path) == seen[0] and len(seen[0]) == 16
    (tmp_path / "a.cpp").write_text("int a;int")  # what follows is moved from one file to another
    (tmp_path / "b.h").write_text(" b;")
    seen.append(sources.digest(tmp_path))
    (tmp_path / "b.h").rename(tmp_path / "c.h")
    seen.append(sources.digest(tmp_path))
    (tmp_path / "k.cu").touch()
    seen.append(sources.digest(tmp_path))
    (tmp_path / "a.cpp").unlink()
    seen.append(sources.digest(tmp_path))
    (tmp_path / "cuda").mkdir()
    (tmp_path / "k.cu").rename(tmp_path / "cuda" / "k.cu")
    seen.append(sources.digest(tmp_path))
    assert len(set(seen)) == len(seen)


def test_setup_py_can_take_the_digest_before_anything_is_installed():
    code = "import pathlib, runpy, sys; print(runpy.run_path(sys.argv[1])['digest'](pathlib.Path(sys.argv[2])))"
    command = [sys.executable, "-I", "-S", "-c", code, sources.__file__, str(extension.CSRC)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.strip() == sources.digest(extension.CSRC)


def test_build_info_describes_the_build():
    library = pytest.importorskip("megalora._C", reason="megalora._C is not built: " + extension.REMEDY)
    info = library.build_info()
    assert "cpu" in info["devices"] and info["openmp"] is True
    assert torch.__version__.startswith(info["torch"])
    assert info["instruction_set"] in ("avx512", "avx2", "default")
    assert info.get("sources") in ("", sources.digest(extension.CSRC)), "older than csrc/: " + extension.REMEDY
