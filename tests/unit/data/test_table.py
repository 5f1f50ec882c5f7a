"""Instruction files as tables: read as `json` reads them, in little memory; broken ones named; made once."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.conversations import Conversation
from data.examples import json_stream
from data.examples.json_stream import read_list
from data.examples.table import open_table
from tests.conftest import ROOT
from vzip import UserError


def entry(number=0, **more):
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": f"a cat {number}"}]
    return {"id": f"row-{number}", "image": f"coco/{number}.jpg", "conversations": turns, **more}


def write(folder, content, name="rows.json"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture(autouse=True)
def _own_data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("VZIP_DATA", str(tmp_path / "vzip"))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(VALUES, max_size=5),
    chunk=st.integers(1, 9),
    indent=st.sampled_from([None, 1]),
    ascii=st.booleans(),
)
def test_a_list_is_read_as_json_reads_it_however_it_is_cut(values, chunk, indent, ascii):
    text = json.dumps(values, indent=indent, ensure_ascii=ascii)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK", chunk)
        assert list(read_list(io.StringIO(text), Path("x"))) == json.loads(text)


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(VALUES, min_size=1, max_size=3),
    at=st.integers(0, 999),
    what=st.sampled_from(["", ",", "]", "}", '"', "x", "1 "]),
    chunk=st.sampled_from([1, 7, 2**20]),
)
def test_a_mistake_is_found_where_json_finds_one(values, at, what, chunk):
    text = json.dumps(values, indent=1)
    text = text[: at % len(text)] + what + text[at % len(text) + 1 :]
    try:
        expected = json.loads(text)
    except ValueError:
        expected = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK", chunk)
        if isinstance(expected, list):
            assert list(read_list(io.StringIO(text), Path("x"))) == expected
        else:
            with pytest.raises(UserError, match=r"x, line \d+, column \d+: not valid JSON"):
                list(read_list(io.StringIO(text), Path("x")))


def test_what_only_python_takes_is_taken():
    assert str(list(read_list(io.StringIO('[NaN, 1e400, 18446744073709551616, "\\ud83d"]'), Path("x")))) == (
        "[nan, inf, 18446744073709551616, '\\ud83d']"
    )


def test_a_mistake_in_the_middle_is_found_without_reading_to_the_end(monkeypatch):
    monkeypatch.setattr(json_stream, "CHUNK", 100)
    monkeypatch.setattr(json_stream, "MAX_ENTRY", 500)
    file = io.StringIO(json.dumps(list(range(100)))[:-1] + ', {"a": }' + ", 1" * 10_000 + "]")
    with pytest.raises(UserError, match="not valid JSON"):
        list(read_list(file, Path("x")))
    assert file.tell() < 3000


@pytest.mark.parametrize(
    "form", ["json", "indented", "jsonl", "jsonl with blank lines", "with a byte order mark"]
)
def test_every_form_gives_the_same_rows(tmp_path, form):
    entries = [entry(number, note="é \U0001f600") for number in range(5)]
    lines = "\n".join(map(json.dumps, entries))
    texts = {
        "json": json.dumps(entries),
        "indented": json.dumps(entries, indent=2),
        "jsonl": lines,
        "jsonl with blank lines": lines.replace("\n", "\n\n") + "\n",
        "with a byte order mark": "\ufeff" + json.dumps(entries, ensure_ascii=False),
    }
    table = open_table(write(tmp_path, texts[form]))
    reference = open_table(write(tmp_path, texts["json"], "reference.json"))
    assert [table.conversation(position) for position in range(5)] == [
        reference.conversation(position) for position in range(5)
    ]
    assert table.sha256 == reference.sha256 and not table.bad_examples()
    assert isinstance(table.conversation(3), Conversation) and table.conversation(3).id == "row-3"


def test_bad_rows_are_listed_and_the_others_survive(tmp_path):
    table = open_table(
        write(tmp_path, [entry(0), {"id": 41}, {}, None, entry(4, image="../x.jpg"), entry(5)])
    )
    assert len(table) == 6
    assert [row.id for row in table.bad_examples()] == ["41", "#2", "#3", "row-4"]
    assert table.column("fault")[0] is None and "leaves the image folder" in table.column("fault")[4]
    assert [table.conversation(position).id for position in (0, 5)] == ["row-0", "row-5"]


def test_a_broken_line_is_one_bad_row(tmp_path):
    lines = [json.dumps(entry(0)), '{"id": 1,,}', json.dumps(entry(2))]
    table = open_table(write(tmp_path, "\n".join(lines), "rows.jsonl"))
    (bad,) = table.bad_examples()
    assert bad.id == "#1" and "line 2 is not valid JSON" in bad.reason and table.conversation(2).id == "row-2"


def test_a_line_that_is_not_utf8_harms_no_other(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(entry(0)).encode() + b'\n{"id": "\xe9"}\n' + json.dumps(entry(2)).encode())
    table = open_table(path)
    assert len(table.bad_examples()) == 1 and table.conversation(2).id == "row-2"


def test_broken_json_names_file_line_and_column(tmp_path):
    path = write(tmp_path, '[\n{"id": 1},\n{"id": }\n]')
    with pytest.raises(UserError, match=r"rows\.json, line 3, column 8"):
        open_table(path)


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes('[{"id": "é"}]'.encode("latin-1"))
    with pytest.raises(UserError, match=r"rows\.json.*not UTF-8"):
        open_table(path)


@pytest.mark.parametrize("content", ['"rows"', "3", "null", "", "  "])
def test_json_without_rows_is_refused(tmp_path, content):
    with pytest.raises(UserError, match="expected a JSON list of examples in UTF-8, or one example a line"):
        open_table(write(tmp_path, content))


def test_a_missing_file_names_the_setting(tmp_path):
    with pytest.raises(UserError, match=r"data\.path"):
        open_table(tmp_path / "nowhere.json")
    with pytest.raises(UserError, match=r"data\.path"):
        open_table(tmp_path)  # a folder, but not of a data set


def test_a_table_is_made_once_and_anew_when_the_file_changes(tmp_path):
    path = write(tmp_path, [entry(0)])
    open_table(path)
    (made,) = (tmp_path / "vzip" / "tables").glob("*.arrow")
    before = made.stat().st_mtime_ns
    open_table(path)
    assert made.stat().st_mtime_ns == before
    write(tmp_path, [entry(0), entry(1)])
    assert len(open_table(path)) == 2
    assert len(list((tmp_path / "vzip" / "tables").glob("*.arrow"))) == 1


def test_a_table_that_a_kill_cut_short_is_made_anew(tmp_path):
    path = write(tmp_path, [entry(0), entry(1)])
    open_table(path)
    (made,) = (tmp_path / "vzip" / "tables").glob("*.arrow")
    made.write_bytes(made.read_bytes()[:100])
    made.with_suffix(".sha256").unlink()
    assert open_table(path).conversation(1).id == "row-1"


@pytest.mark.integration
def test_a_large_file_takes_little_memory(tmp_path):
    """30 MB of JSON, as Python objects five times as much."""
    path = tmp_path / "rows.json"
    row = json.dumps(entry(0, note="x" * 200, extra=[{"a": number} for number in range(60)]))
    path.write_text("[" + ",\n".join([row] * 30_000) + "]")
    assert path.stat().st_size > 3e7
    code = (
        "import resource, sys; from data.examples.table import open_table; before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(len(open_table(sys.argv[1])), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        check=True,
    )
    num_examples, megabytes = map(int, done.stdout.split())
    assert num_examples == 30_000 and megabytes < 100
