"""A list is read as `json` reads it, however the file is cut into pieces."""

import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.examples import json_stream
from data.examples.json_stream import read_list
from vzip import UserError

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


def read(text, *, chunk=2**20):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK", chunk)
        return list(read_list(io.StringIO(text), Path("x")))


@given(
    values=st.lists(VALUES, max_size=5),
    chunk=st.integers(1, 9),
    indent=st.sampled_from([None, 1]),
    is_ascii=st.booleans(),
)
def test_a_list_is_read_as_json_reads_it(values, chunk, indent, is_ascii):
    text = json.dumps(values, indent=indent, ensure_ascii=is_ascii)
    assert read(text, chunk=chunk) == json.loads(text)


@given(
    values=st.lists(VALUES, min_size=1, max_size=3),
    position=st.integers(0, 999),
    replacement=st.sampled_from(["", ",", "]", "}", '"', "x", "1 "]),
    chunk=st.sampled_from([1, 7, 2**20]),
)
def test_a_mistake_is_found_where_json_finds_one(values, position, replacement, chunk):
    text = json.dumps(values, indent=1)
    position %= len(text)
    text = text[:position] + replacement + text[position + 1 :]
    try:
        expected = json.loads(text)
    except ValueError:
        expected = None

    if isinstance(expected, list):
        assert read(text, chunk=chunk) == expected
    else:
        with pytest.raises(UserError, match=r"x, line \d+, column \d+: not valid JSON"):
            read(text, chunk=chunk)


def test_values_that_only_python_accepts_are_read():
    values = read('[NaN, 1e400, 18446744073709551616, "\\ud83d"]')
    assert str(values) == "[nan, inf, 18446744073709551616, '\\ud83d']"


def test_a_mistake_in_the_middle_is_found_without_reading_to_the_end(monkeypatch):
    monkeypatch.setattr(json_stream, "MAX_ENTRY", 500)
    monkeypatch.setattr(json_stream, "CHUNK", 100)
    start = json.dumps(list(range(100))).removesuffix("]")
    file = io.StringIO(start + ', {"a": }' + ", 1" * 10_000 + "]")
    with pytest.raises(UserError, match="not valid JSON"):
        list(read_list(file, Path("x")))
    assert file.tell() < 3000
