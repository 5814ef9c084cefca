"""Files: every layout of a file gives the same rows, and what cannot be read is told with the place."""

from __future__ import annotations

import gzip
import json
import os
import struct
import sys
from fractions import Fraction
from unittest import mock

import pytest
from fuzz import examples, ours_only
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalora.data import json_stream, read_rows, readers
from megalora.data.readers import NotLines, Source, parse_sources, read_chunks
from megalora.errors import UserError

try:
    import zstandard
except ImportError:  # whose absence is a line too
    zstandard = None


def by_lines(path):
    """The rows as worker processes parse them, None where the file is not JSON Lines."""
    try:
        return [row for chunk in read_chunks(str(path)) for row in chunk.parse()]
    except NotLines:
        return None


texts = st.text(max_size=12)
row_objects = st.dictionaries(texts, st.recursive(texts | st.integers() | st.none(), st.lists), max_size=4)
space = st.text(alphabet=" \t\r\n", max_size=3)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(row_objects, min_size=1, max_size=6), st.data())
def test_every_layout_of_a_file_gives_the_rows(tmp_path, rows, data):
    indent, ascii_only = data.draw(st.sampled_from([None, 2])), data.draw(st.booleans())
    shown = [json.dumps(row, indent=indent, ensure_ascii=ascii_only) for row in rows]
    concatenated = "".join(data.draw(space) + text for text in shown) + data.draw(space)
    for text in (json.dumps(rows), "\n".join(json.dumps(row) for row in rows), concatenated):
        path = tmp_path / "rows.json"
        path.write_bytes(data.draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + text.encode())
        assert list(read_rows(path)) == rows
        assert by_lines(path) in (rows, None)
        assert by_lines(path) == rows or "\n" not in text.strip() or text is concatenated


def test_rows_as_the_reference_readme_prints_them(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{\n "conversation": [\n {"input": "hi", "output": "ho"}\n ]\n}\n{"conversation": []}\n')
    assert len(list(read_rows(path))) == 2


@pytest.mark.parametrize(
    "content, told",
    [
        (b"", "holds no rows"),
        (b" \n", "holds no rows"),
        (b"[]", "holds no rows"),
        (b'{"a": 1}\n{"a" 2}', "line 2 column 6"),
        (b'[{"a": 1},\n {"a": 1]', "line 2 column 9"),
        (b'{"a": 1},\n{"a": 2}', "line 1 column 9"),
        (b'{"a": "x\n', "line 1 column 9: bad JSON"),
        (b'{"a": 1}\n{"a": "\xff"}', "line 2: byte 16 is not UTF-8"),
        (b"[" * 100_000, "cannot be read"),
        (b"1" * 5000, "cannot be read"),
        (b'[{"a": 1},\n {"a": {"b": 1, "b": 2}}]', "line 2 column 2: bad JSON: an object has the field 'b' twice"),
        (b'{"a": 1}\n{"a": 1, "a": 1}', "line 2 column 1: bad JSON: an object has the field 'a' twice"),
    ],
)
def test_bad_files_are_told_with_the_place(tmp_path, content, told):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        list(read_rows(path))
    assert told in str(error.value) and "bad.json" in str(error.value)


def test_missing_file_and_folder(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    for path in ("none.json", ".", "pipe.csv"):
        with pytest.raises(UserError, match="cannot read the data file .*No such|is not a regular file"):
            list(read_rows(tmp_path / path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.conll", "a.tsv"])
def test_a_row_that_goes_on_and_on(tmp_path, monkeypatch, name):
    """In one line or many; of a compressed file a few bytes are enough for it."""
    for module in (readers, json_stream):
        monkeypatch.setattr(module, "ROW_BYTES", 5000)
    ends = {"jsonl": '{"a": "%s"}', "json": '[{"a": [%s 1]}]', "csv": 'a\n"%s"', "conll": "%s", "tsv": "%s"}
    inner = {"jsonl": "x", "json": "1, ", "csv": 'x""\n', "conll": "word TAG\n", "tsv": "x"}[name[2:]]
    monkeypatch.setattr(json_stream, "BLOCK", 1000)
    for count, good in ((100, True), (6000, False)):
        with gzip.open(tmp_path / f"{name}.gz", "wb") as file:
            file.write((ends[name[2:]] % (inner * count)).encode())
        if good:
            list(read_chunks(str(tmp_path / f"{name}.gz"))) if name != "a.tsv" else None
            continue
        for lines in (True, False):
            with pytest.raises(UserError, match=r"a\.\w+\.gz (from )?line \d+: a row of more than 5,000 bytes"):
                list(read_chunks(str(tmp_path / f"{name}.gz"), lines=lines))


ROWS = [{"instruction": 'a, "b"\nc', "output": "é"}, {"instruction": "d", "output": "e"}]


def table(separator):
    quoted = ([f'"{value}"' for value in (text.replace('"', '""') for text in row.values())] for row in ROWS)
    return "\r\n".join(separator.join(fields) for fields in (ROWS[0], *quoted)).encode()


def test_tables(tmp_path):
    for suffix, separator in ((".csv", ","), (".tsv", "\t")):
        path = tmp_path / f"rows{suffix}"
        for mark in (b"", b"\xef\xbb\xbf"):
            path.write_bytes(mark + table(separator))
            assert list(read_rows(path)) == ROWS


@pytest.mark.parametrize(
    "content, told",
    [
        (b"a,b\n1,2,3\n", "line 2: 3 fields, but the header has 2"),
        (b"a,a\n1,2\n", "a column is named twice"),
        (b'a,b\n1,"2', "line 2: not a table"),
        (b"a,b\n1,\xff\n", "not UTF-8"),
        (b"a,b\n", "holds no rows"),
        (b"", "holds no rows"),
    ],
)
def test_bad_tables(tmp_path, content, told):
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match="bad.csv") as error:
        list(read_rows(path))
    assert told in str(error.value)


def test_gzip(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode()))
    assert list(read_rows(path)) == ROWS == by_lines(path)
    for content in (path.read_bytes()[:-9], b"no gzip", path.read_bytes()[:20] + b"x" * 30):
        path.write_bytes(content)
        with pytest.raises(UserError, match="rows.jsonl.gz is damaged"):
            list(read_rows(path))


def test_zstd(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(zstandard.compress("\n".join(map(json.dumps, ROWS)).encode()))
    assert list(read_rows(path)) == ROWS == by_lines(path)
    path.write_bytes(b"no zstd")
    with pytest.raises(UserError, match="rows.jsonl.zst is damaged"):
        list(read_rows(path))


NESTED = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "id": 3}]


def test_parquet_and_arrow(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = pyarrow.Table.from_pylist(NESTED * 3000)
    parquet.write_table(rows, tmp_path / "rows.parquet")
    with pyarrow.ipc.new_file(tmp_path / "file.arrow", rows.schema) as writer:
        writer.write_table(rows)
    with pyarrow.ipc.new_stream(str(tmp_path / "stream.arrow"), rows.schema) as writer:
        writer.write_table(rows)
    for name in ("rows.parquet", "file.arrow", "stream.arrow"):
        assert list(read_rows(tmp_path / name)) == NESTED * 3000
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match=f"{name} (cannot be read as|is damaged)"):
            list(read_rows(tmp_path / name))


def test_nulls_that_a_table_puts_into_objects(tmp_path):
    """A table gives each object the fields of all of them; arguments of calls must not learn them. A field stays."""
    pyarrow = pytest.importorskip("pyarrow")
    rows = [
        {"calls": [{"arguments": {"city": "x"}}], "output": "b"},
        {"calls": [{"arguments": {"q": 1}}], "output": None},
    ]
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_file(tmp_path / "rows.arrow", table.schema) as writer:
        writer.write_table(table)
    assert list(read_rows(tmp_path / "rows.arrow")) == rows


def test_a_dataset_saved_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"instruction": f"{n}", "output": "b"} for n in range(20)])
    rows.shuffle(seed=3).select(range(5)).save_to_disk(str(tmp_path / "one"))
    found = list(read_rows(tmp_path / "one"))
    assert len(found) == 5 and {row["output"] for row in found} == {"b"}
    assert parse_sources(str(tmp_path / "one")) == [Source(str(tmp_path / "one"))]
    datasets.DatasetDict(train=rows).save_to_disk(str(tmp_path / "two"))
    assert len(list(read_rows(tmp_path / "two"))) == 20
    with mock.patch.object(datasets, "__version__", "3.6.0"), pytest.raises(UserError, match="datasets 4 or newer"):
        list(read_rows(tmp_path / "two"))
    datasets.DatasetDict(test=rows).save_to_disk(str(tmp_path / "three"))
    with pytest.raises(UserError, match="has the splits test, none named train"):
        list(read_rows(tmp_path / "three"))


@pytest.mark.parametrize(
    "name, package",
    [("a.parquet", "pyarrow"), ("a.arrow", "pyarrow"), ("a.json.zst", "zstandard"), ("a/b", "datasets")],
)
def test_what_is_missing_is_named(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    if "/" not in name:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=f"{name} .*needs the package {package}: pip install {package}"):
        list(read_rows(name))


def test_formats_that_hold_no_rows(tmp_path):
    for name, told in [("a.xlsx", "save it as CSV"), ("a.zip", "unpack it"), ("a.txt", "write JSON Lines")]:
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UserError, match=f"{name}: .*{told}"):
            list(read_rows(tmp_path / name))


def test_sources(tmp_path):
    (tmp_path / "b.json").write_text("{}")
    (tmp_path / "a.csv").write_text("")
    (tmp_path / ".hidden").write_text("")
    (tmp_path / "README.md").write_text("")
    names = [str(tmp_path / "a.csv"), str(tmp_path / "b.json")]
    assert parse_sources(str(tmp_path)) == [Source(name) for name in names]
    assert parse_sources(f"{names[1]}:0.5,{names[0]}") == [Source(names[1], Fraction(1, 2)), Source(names[0])]
    odd = tmp_path / "a,b:2"
    odd.write_text("{}")
    assert parse_sources(str(odd)) == [Source(str(odd))]
    odd.unlink()
    (tmp_path / "weights.bin").write_text("")
    with pytest.raises(UserError, match="the folder holds weights.bin, which is not read"):
        parse_sources(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no file of rows"):
        parse_sources(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="an empty path between commas"):
        parse_sources(f"{names[0]},,{names[1]}")


def test_values_longer_than_a_block(tmp_path):
    """Values and characters that are cut by the blocks that are read."""
    rows = [{"a": "é" * 700_000 + '\\"' * 5, "n": 12345678}, {"a": "x" * (1 << 21)}] * 2
    path = tmp_path / "rows.json"
    for text in (json.dumps(rows, ensure_ascii=False), "\n".join(json.dumps(row) for row in rows)):
        path.write_text(text)
        assert list(read_rows(path)) == rows
    path.write_bytes(json.dumps(rows, ensure_ascii=False).encode()[:-50] + b"\xff")
    with pytest.raises(UserError, match=r"line 1: byte \d+ is not UTF-8"):
        list(read_rows(path))
    with pytest.raises(UserError, match=f"byte {path.stat().st_size - 1} "):
        list(read_rows(path))


@pytest.mark.parametrize(("start", "suffix"), [(b"PAR1", ".parquet"), (b"ARROW1", ".arrow"), (b"\x1f\x8b", ".gz")])
def test_a_file_of_another_format_under_the_name_of_json_is_told(tmp_path, start, suffix):
    for name in ("rows.json", "rows.jsonl"):
        (tmp_path / name).write_bytes(start + b"\x00\xff\n")
        with pytest.raises(UserError, match=rf"is a {suffix[1:]} file by its first bytes: end its name in {suffix}"):
            list(read_rows(tmp_path / name))


@examples(60)
@given(
    suffix=st.sampled_from([".json", ".jsonl", ".csv", ".tsv", ".conll", ".json.gz", ".json.zst"]),
    data=st.binary(max_size=60) | st.text('{}[]",:0123456789e+-.\\\nuntrfalsemgc\t', max_size=80).map(str.encode),
    packed=st.booleans(),
)
def test_any_bytes(tmp_path_factory, suffix, data, packed):
    """Under any name they are rows or a line; packed right or not."""
    file = tmp_path_factory.getbasetemp() / f"any{suffix}"
    if packed and suffix.endswith(".zst") and zstandard is not None:
        data = zstandard.compress(data)
    file.write_bytes(gzip.compress(data) if packed and suffix.endswith(".gz") else data)
    ours_only(lambda: list(read_rows(file)))


def tables(folder) -> dict[str, bytes]:
    """The bytes of small tables with what rows have: texts, lists, objects, nulls, numbers; one file in several pieces.
    """
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = pyarrow.Table.from_pylist([{"a": "x" * n, "b": [n, None], "c": {"d": 0.5 * n, "e": None}} for n in range(9)])
    made = {}
    for codec in ("NONE", "SNAPPY", "ZSTD"):
        parquet.write_table(rows, folder / "a.parquet", compression=codec, row_group_size=4)
        made[f"{codec}.parquet"] = (folder / "a.parquet").read_bytes()
    for name, begin in (("file.arrow", pyarrow.ipc.new_file), ("stream.arrow", pyarrow.ipc.new_stream)):
        with begin(str(folder / name), rows.schema) as writer:
            writer.write_table(rows, max_chunksize=4)
        made[name] = (folder / name).read_bytes()
    return made


@pytest.fixture(scope="module")
def sound_tables(tmp_path_factory):
    return tables(tmp_path_factory.mktemp("tables"))


@examples(60)
@given(data=st.data())
def test_any_table(sound_tables, tmp_path, data):
    """Bytes changed anywhere, or the end missing: of parquet its end says what is where, of arrow its beginning."""
    name = data.draw(st.sampled_from(sorted(sound_tables)))
    whole, file = bytearray(sound_tables[name]), tmp_path / f"any{name[name.index('.') :]}"
    numbers = st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1]).map(lambda n: n.to_bytes(8, "little"))
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(whole) - 1))
        new = data.draw(st.binary(min_size=1, max_size=4) | numbers)
        whole[at : at + len(new)] = new
    file.write_bytes(whole[: data.draw(st.just(len(whole)) | st.integers(0, len(whole)))])
    ours_only(lambda: list(read_rows(file)))


def test_a_table_whose_offsets_lead_out_of_the_file(tmp_path):
    """They are followed unless they are checked, and the process dies."""
    pyarrow = pytest.importorskip("pyarrow")
    batch = pyarrow.record_batch({"a": ["hello", "world"]})
    with pyarrow.ipc.new_file(str(tmp_path / "rows.arrow"), batch.schema) as writer:
        writer.write_batch(batch)
    sound, wrong = struct.pack("<3i", 0, 5, 10), struct.pack("<3i", 0, 5, 2**30)
    content = (tmp_path / "rows.arrow").read_bytes()
    assert content.count(sound) == 1
    (tmp_path / "rows.arrow").write_bytes(content.replace(sound, wrong))
    with pytest.raises(UserError, match="rows.arrow cannot be read as arrow: .*: copy the file again"):
        list(read_rows(tmp_path / "rows.arrow"))
