"""Instruction files as tables: every form gives the same examples, broken ones are named, and a table
is made once.
"""

import json
import os
import sys

import pytest

from data.conversations import parse_conversation
from data.examples import table as table_module
from data.examples.table import open_table
from tests.helpers.broken import good, messages
from tests.helpers.commands import start
from vzip import UserError


def write(folder, content, name="examples.json"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


ENTRIES = [
    good(0) | {"note": "é \U0001f600"},
    good(1) | {"image": ["coco/1.jpg"], "source": "mine", "type": "colour"},
    {"id": 2, "video": "valley/1.mp4", "conversations": messages("<video>", "a dog")},
    {"conversations": messages("hello", "hi", "what?", "nothing")},
]
LINES = "\n".join(map(json.dumps, ENTRIES))
FORMS = {
    "json": json.dumps(ENTRIES),
    "indented": json.dumps(ENTRIES, indent=2),
    "jsonl": LINES,
    "jsonl with blank lines": LINES.replace("\n", "\n\n") + "\n",
    "with a byte order mark": "\ufeff" + json.dumps(ENTRIES, ensure_ascii=False),
}


def test_every_form_gives_the_same_examples(tmp_path, monkeypatch):
    opened = [open_table(write(tmp_path, text, name)) for name, text in FORMS.items()]
    assert len({table.sha256 for table in opened}) == 1

    expected = [parse_conversation(entry) for entry in ENTRIES]
    # An example is made from the columns: it is not parsed and hashed again at every read.
    monkeypatch.setattr(table_module, "parse_conversation", None)
    monkeypatch.setattr("data.conversations._digest", None)
    for table in opened:
        assert [table.conversation(position) for position in range(len(table))] == expected
        assert not table.bad_examples()


def test_bad_examples_are_listed_and_the_others_survive(tmp_path):
    outside = good(4) | {"image": "../x.jpg"}
    table = open_table(write(tmp_path, [good(0), {"id": 41}, {}, None, outside, good(5)]))

    assert len(table) == 6
    assert [example.id for example in table.bad_examples()] == ["41", "#2", "#3", "row-4"]
    assert table.column("fault")[0] is None
    assert "leaves the image folder" in table.column("fault")[4]
    assert table.conversation(0).id == "row-0"
    assert table.conversation(5).id == "row-5"


WITH_ACCENT = json.dumps(good() | {"conversations": messages("<image>", "un café")}, ensure_ascii=False)
BROKEN_LINES = {
    b'{"id": 1,,}': "line 2 is not valid JSON",
    WITH_ACCENT.encode("latin-1"): "line 2 is not UTF-8 text",
    json.dumps(good() | {"x": "\ud800"}).encode(): "surrogates not allowed",
}


@pytest.mark.parametrize(("line", "reason"), BROKEN_LINES.items(), ids=BROKEN_LINES.values())
def test_a_broken_line_is_one_bad_example(tmp_path, line, reason):
    path = tmp_path / "examples.jsonl"
    path.write_bytes(b"\n".join([json.dumps(good(0)).encode(), line, WITH_ACCENT.encode()]))
    table = open_table(path)

    (bad,) = table.bad_examples()
    assert reason in bad.reason
    assert table.conversation(2).turns[0][1] == "un café"


@pytest.mark.parametrize("entries", [json.dumps(good()), json.dumps(good()) * 20], ids=["one", "twenty"])
def test_lines_without_an_end_are_refused(tmp_path, monkeypatch, entries):
    monkeypatch.setattr(table_module, "MAX_ENTRY", len(json.dumps(good())))
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: it has more than .* each example on a line"):
        open_table(write(tmp_path, entries, "a.jsonl"))


LONG = {
    "answer": ({"conversations": messages("<image>", "x" * 10**6)}, "the texts have 1,000,007 characters"),
    "messages": (
        {"conversations": messages("<image>", *"ab" * 6000, "c")},
        "it has 12,002 messages; at most",
    ),
    "path": ({"image": "x" * 200_000}, "a path of image has 200,000 characters; at most 1,000"),
    "name": ({"id": "x" * 10**5, "image": "../a.jpg"}, "leaves the image folder"),
}


@pytest.mark.parametrize("change", LONG)
def test_a_row_of_great_length_is_listed_in_few_words_and_long_names_are_cut(tmp_path, change):
    entry, reason = LONG[change]
    names = {"id": 10**1000, "source": "s" * 999, "type": "t" * 999}
    table = open_table(write(tmp_path, [good(0) | entry, good(1) | names]))
    (bad,) = table.bad_examples()
    assert reason in bad.reason
    assert len(bad.id) + len(bad.source) + len(bad.reason) < 500
    example = table.conversation(1)
    assert max(map(len, (example.id, example.source, example.kind))) < 300


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    for path in (tmp_path / "a.jsonl", "/dev/zero", tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(UserError, match=r"data\.path"):
            open_table(path)


def test_a_name_may_use_all_characters_that_a_file_system_allows(tmp_path):
    assert len(open_table(write(tmp_path, [good()], "x" * 250 + ".json"))) == 1


def test_a_broken_list_is_named_with_file_line_and_column(tmp_path):
    with pytest.raises(UserError, match=r"examples\.json, line 3, column 8"):
        open_table(write(tmp_path, '[\n{"id": 1},\n{"id": }\n]'))

    path = tmp_path / "latin.json"
    path.write_bytes('[{"id": "é"}]'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.json.*not UTF-8"):
        open_table(path)


@pytest.mark.parametrize("content", ['"rows"', "3", "null", "", "  "])
def test_json_without_examples_is_refused(tmp_path, content):
    with pytest.raises(UserError, match="expected a JSON list of examples in UTF-8, or one example a line"):
        open_table(write(tmp_path, content))


def test_a_table_is_made_once_and_anew_when_it_or_the_file_changes(tmp_path):
    path = write(tmp_path, [good(0)])
    open_table(path)
    (file,) = (tmp_path / "vzip" / "tables").glob("*.arrow")
    before = file.stat().st_mtime_ns
    open_table(path)
    assert file.stat().st_mtime_ns == before

    write(tmp_path, [good(0), good(1)])
    assert len(open_table(path)) == 2
    (file,) = file.parent.glob("*.arrow")

    # A kill may cut a table short.
    file.write_bytes(file.read_bytes()[:100])
    file.with_suffix(".sha256").unlink()
    assert open_table(path).conversation(1).id == "row-1"


def test_a_damaged_table_is_refused_with_the_cure(tmp_path):
    path = write(tmp_path, [good(number) for number in range(50)])
    open_table(path)
    (file,) = (tmp_path / "vzip" / "tables").glob("*.arrow")
    content = file.read_bytes()
    middle = content.index(b"a cat")

    # The last one changes offsets of texts, and reading them would end this process.
    offsets = content[: middle - 512] + b"\xff\x7f" * 128 + content[middle - 256 :]
    for damaged in (content[:-100], content[:middle] + bytes(len(content) - middle), b"", offsets):
        file.write_bytes(damaged)
        with pytest.raises(
            UserError, match=r"\.arrow is damaged .*delete it, and run the same command again"
        ):
            open_table(path)

    file.write_bytes(content)
    file.with_suffix(".sha256").write_bytes(bytes(64))
    with pytest.raises(UserError, match=r"\.sha256 is damaged; delete it"):
        open_table(path)


@pytest.mark.integration
def test_a_large_file_takes_little_memory(tmp_path):
    """15 MB of JSON, five times as much as Python objects."""
    example = json.dumps(good() | {"note": "x" * 200, "extra": [{"a": number} for number in range(60)]})
    path = write(tmp_path, "[" + ",\n".join([example] * 15_000) + "]")
    assert path.stat().st_size > 1.5e7

    code = (
        "import resource, sys\n"
        "from data.examples.table import open_table\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "print(len(open_table(sys.argv[1])), (peak() - before) // 1024)\n"
    )
    num_examples, megabytes = map(int, start([sys.executable, "-c", code, str(path)]).stdout.split())
    assert num_examples == 15_000
    assert megabytes < 50, megabytes
