"""The cache of tokens: made once, found again, remade where anything it depends on changed or was damaged."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stacked import stacked

from megalora.data import ChatTemplate, DataSettings, FieldNames, load_dataset
from megalora.data import cache as cache_module
from megalora.data import dataset as dataset_module
from megalora.data.documents import Documents
from megalora.data.encode import Encoder
from megalora.data.template import IGNORE, Sample
from megalora.errors import UserError

ROWS = [{"instruction": f"hello {number}", "output": "I am Mega. " * (1 + number % 5)} for number in range(40)]


@pytest.fixture(scope="module")
def template(chatml):
    return ChatTemplate(chatml)


@pytest.fixture
def made():
    """Counts the chunks that are encoded."""
    with mock.patch.object(Encoder, "encode", autospec=True, side_effect=Encoder.encode) as encode:
        yield encode


def load(path, template, cache, seed=1, **settings):
    return load_dataset(path, template, DataSettings(**{"seq_length": 128, **settings}, data_cache=cache), seed)


def same(one, other):
    (*arrays, lengths), (*others, their_lengths) = stacked(one), stacked(other)
    equal = all(np.array_equal(a, b) for a, b in zip(arrays, others, strict=True))
    return equal and lengths == their_lengths and one.fingerprint == other.fingerprint


def test_made_once_and_found_again(template, write_json, tmp_path, made):
    path = write_json(ROWS)
    plain = load(path, template, None)
    first = load(path, template, tmp_path / "cache")
    calls = made.call_count
    second = load(path, template, tmp_path / "cache")
    assert made.call_count == calls and same(plain, first) and same(first, second)
    assert isinstance(second.source.ids, np.memmap)
    assert "made in" in first.notes[-1] and "an earlier run" in second.notes[-1]
    other = load(path, template, tmp_path / "cache", seed=2)
    assert made.call_count == calls and not same(first, other), "another order of the same tokens"
    assert same(other, load(path, template, None, seed=2))


def test_what_it_depends_on(template, llama3, write_json, tmp_path, made):
    path, cache = write_json(ROWS), tmp_path / "cache"
    load(path, template, cache)
    changes = [
        {"seq_length": 256},
        {"packing": False},
        {"train_on": "last"},
        {"on_long_row": "split"},
        {"on_bad_row": "skip"},
        {"max_rows": 7},
    ]
    for change in changes:
        calls = made.call_count
        assert same(load(path, template, cache, **change), load(path, template, None, **change)), change
        assert made.call_count == calls + 2, change
    for other in (ChatTemplate(llama3), ChatTemplate(template.tokenizer, "plain")):
        calls = made.call_count
        load(path, other, cache)
        assert made.call_count == calls + 1
    calls = made.call_count
    path.write_text(path.read_text().replace("hello 7", "hello 8"))
    load(path, template, cache)
    assert made.call_count == calls + 1


@pytest.mark.parametrize("name", ["ids.bin", "runs.bin", "index.npz", "manifest.json", "layout"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_noticed(template, write_json, tmp_path, made, name, damage):
    path, cache = write_json(ROWS), tmp_path / "cache"
    plain = load(path, template, None)
    load(path, template, cache)
    (file,) = cache.glob(f"*/{name}*")
    content = file.read_bytes()
    if damage == "remove":
        file.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        file.write_bytes(flipped if damage == "flip" else content[:-1])
    again = load(path, template, cache)
    assert same(plain, again)
    assert made.call_count == (2 if name == "layout" else 3)
    assert len([folder for folder in cache.iterdir() if folder.is_dir()]) == 1, "no remains"
    assert [file.read_bytes() for file in cache.glob("*/ids.bin")]


def test_ranks_that_waited_do_not_verify_again(template, write_json, tmp_path):
    path, cache = write_json(ROWS), tmp_path / "cache"
    load(path, template, cache)
    (marker,) = cache.glob("*.checked")
    with mock.patch.object(cache_module, "file_digest", side_effect=cache_module.file_digest) as digest:
        os.utime(marker, (0, 0))
        load(path, template, cache)
        assert len(hashed(digest, path)) == 3 and marker.stat().st_mtime > 0, "ids, runs and index"
        os.utime(marker, (time.time() + 60,) * 2)  # as if it had been touched while this one waited
        load(path, template, cache)
        assert len(hashed(digest, path)) == 3


def hashed(digest: mock.Mock, but: Path) -> list[Path]:
    return [call.args[0] for call in digest.call_args_list if call.args[0] != but]


def test_a_data_file_is_hashed_again_only_where_it_was_touched(template, write_json, tmp_path, made):
    path, cache = write_json(ROWS), tmp_path / "cache"
    before = path.stat()
    with mock.patch.object(cache_module, "file_digest", side_effect=cache_module.file_digest) as digest:

        def times() -> int:
            digest.reset_mock()
            load(path, template, cache)
            return len(digest.call_args_list) - len(hashed(digest, path))

        with mock.patch.object(cache_module, "_SETTLED", 1e9):
            assert [times(), times()] == [1, 1], "a file of this moment may be written to again within one tick"
        with mock.patch.object(cache_module, "_SETTLED", -1e9):
            assert [times(), times()] == [1, 0]
            (kept,) = cache.glob("file-*.json")
            kept.write_text(kept.read_text()[:-5])
            assert [times(), times()] == [1, 0]
            changed = path.read_bytes().replace(b"hello 7", b"hello 8")
            path.write_bytes(changed)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
            assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns
            calls = made.call_count
            assert times() == 1 and made.call_count == calls + 1, "the same size and time of writing"
            other = path.with_name("other.json")
            other.write_bytes(changed)
            os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
            other.rename(path)
            assert [times(), times()] == [1, 0], "another file of the same size and time"


def test_two_at_once(template, write_json, tmp_path, made):
    path = write_json(ROWS)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: load(path, template, tmp_path / "cache"), range(4)))
    assert made.call_count == 1 and all(same(found[0], one) for one in found)


def test_one_without_locks(template, write_json, tmp_path):
    path = write_json(ROWS)
    plain = load(path, template, None)
    with (
        mock.patch("fcntl.flock", side_effect=OSError(95, "Operation not supported")),
        ThreadPoolExecutor(3) as threads,
    ):
        assert all(same(plain, one) for one in threads.map(lambda _: load(path, template, tmp_path), range(3)))


def test_who_waited_for_an_error_does_not_look_for_it_again(template, write_json, tmp_path, made):
    path = write_json([*ROWS, {"instruction": "a", "output": ""}])
    entered = []

    def slow(*arguments):
        entered.append(1)
        while len(entered) < 2:  # until the other one asks
            pass
        return encode(*arguments)

    encode, key = dataset_module._encode, dataset_module._key
    asking = mock.patch.object(dataset_module, "_key", side_effect=lambda *a: (entered.append(1), key(*a))[1])
    with asking, mock.patch.object(dataset_module, "_encode", side_effect=slow), ThreadPoolExecutor(2) as threads:
        futures = [threads.submit(load, path, template, tmp_path / "cache") for _ in range(2)]
        errors = [str(future.exception()) for future in futures]
    assert errors[0] == errors[1] and "row 40: " in errors[0] and made.call_count <= 2
    path.write_text(json.dumps(ROWS))
    assert load(path, template, tmp_path / "cache").documents == 40


def test_a_folder_that_cannot_be_written(template, write_json, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the tokens of the rows to .*file.*--data_cache"):
        load(write_json(ROWS), template, tmp_path / "file")


def test_worker_processes_give_the_same(template, tmp_path):
    rows = [ROWS[number % 40] | {"id": number} for number in range(2500)]
    rows[700] = {"instruction": "a", "output": ""}
    lines, whole = tmp_path / "a.jsonl", tmp_path / "b.json"
    lines.write_text("\n".join(map(json.dumps, rows)))
    whole.write_text(json.dumps(rows, indent=1))
    for path in (lines, whole):
        alone = load(path, template, None, on_bad_row="skip")
        shared = load(path, template, None, on_bad_row="skip", processes=2)
        assert same(alone, shared) and alone.notes == shared.notes and shared.skipped == 1
    with pytest.raises(UserError, match="row 700: .* is empty"):
        load(lines, template, None, processes=2)


def test_lines_that_turn_out_to_be_none(template, tmp_path):
    """A file that begins with one row a line and goes on otherwise is read all the same."""
    path = tmp_path / "a.json"
    shown = [json.dumps(row) for row in ROWS * 30] + [json.dumps(row, indent=2) for row in ROWS]
    path.write_text("\n".join(shown))
    other = tmp_path / "b.json"
    other.write_text(json.dumps(ROWS * 31))
    assert same(load(path, template, None), load(other, template, None))
    path.write_text("\n".join(shown) + "\n{")
    with pytest.raises(UserError, match=r"a.json line \d+ column 2: bad JSON"):
        load(path, template, None)


def test_names_that_no_row_has(template, write_json):
    for names in (FieldNames({"reply": "output"}), FieldNames({}, frozenset({"reply"}))):
        with pytest.raises(UserError, match="no row has a field reply"):
            load(write_json(ROWS), template, None, names=names)


@given(st.lists(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), max_size=6), max_size=5))
def test_what_is_hashed_of_documents(documents):
    """All at once it is the same as one after another."""
    ids = [np.array([token for token, _ in tokens], np.int32) for tokens in documents]
    labels = [np.array([token if keep else IGNORE for token, keep in tokens], np.int32) for tokens in documents]
    made = Documents.of([Sample(*both) for both in zip(ids, labels, strict=True)], range(len(ids)))
    expected = b"".join(
        len(own).to_bytes(8, "little") + own.tobytes() + its.tobytes() for own, its in zip(ids, labels, strict=True)
    )
    assert b"".join(made.written()) == expected
