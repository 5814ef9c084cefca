"""Files: every layout of a file gives the same rows, and what cannot be read is told with the place."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalora.data import read_rows
from megalora.data.readers import NotLines, read_chunks
from megalora.errors import UserError


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
    ],
)
def test_bad_files_are_told_with_the_place(tmp_path, content, told):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        list(read_rows(path))
    assert told in str(error.value) and "bad.json" in str(error.value)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError, match="cannot read the data file"):
            list(read_rows(path))
