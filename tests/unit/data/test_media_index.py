"""The index remembers what was told, and a damaged line costs only itself."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.fetch.media_index import Checked, MediaIndex


def test_entries_are_remembered(tmp_path):
    path = tmp_path / "checked.jsonl"
    index = MediaIndex(path)
    assert index.sizes() == {}
    assert not path.exists()

    good = Checked("a\n.jpg", 10, 3, 4, "ab")
    bad = Checked("b.jpg", -1, fault="gone ü", final=True, tried=("http://x/",))
    index.record(good)
    index.record(bad)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"path": "a\n.jpg", "bytes": 10, "height": 3, "width": 4, "digest": "ab"},
        {"path": "b.jpg", "bytes": -1, "fault": "gone ü", "final": True, "tried": ["http://x/"]},
    ]

    again = MediaIndex(path)
    assert again.sizes() == {"a\n.jpg": (3, 4)}
    (tmp_path / "a\n.jpg").write_bytes(bytes(10))
    assert again.lookup("a\n.jpg", tmp_path, []) == good
    assert again.lookup("b.jpg", tmp_path, ["http://x/"]) == bad
    assert again.lookup("b.jpg", tmp_path, ["http://x/", "http://new/"]) is None

    # The content is that of the files, in any order.
    names = ["a\n.jpg", "b.jpg"]
    content = again.content(names)
    assert content == again.content(names[::-1] + names)
    again.record(Checked("a\n.jpg", 10, 3, 4, "cd"))
    assert again.content(names) != content

    again.record(Checked("a\n.jpg", 10, fault="now it is damaged"))
    assert MediaIndex(path).sizes() == {}


BROKEN_LINES = [b"[]\n", b"3\n", b"{}\n", b'{"path": 1}\n', b"\xff\xfe\n", b"\n", b"null\n"]


@pytest.mark.parametrize("kind", ["cut", "mangled"])
@given(data=st.data())
def test_an_index_that_was_cut_or_mangled_loses_only_those_lines(tmp_path_factory, kind, data):
    path = tmp_path_factory.mktemp("index") / "checked.jsonl"
    index = MediaIndex(path)
    for number in range(4):
        index.record(Checked(f"{number}.jpg", 10 + number, 5, 6))

    content = path.read_bytes()
    if kind == "cut":
        content = content[: data.draw(st.integers(0, len(content)))]
        num_whole = content.count(b"\n") + content.endswith(b"}")
    else:
        _, rest = content.split(b"\n", 1)
        content = data.draw(st.sampled_from(BROKEN_LINES)) + rest
        num_whole = 3
    path.write_bytes(content)

    again = MediaIndex(path)
    assert len(again.sizes()) == num_whole
    again.record(Checked("new.jpg", 1, 2, 3))
    assert MediaIndex(path).sizes() == again.sizes()
    assert len(again.sizes()) == num_whole + 1
