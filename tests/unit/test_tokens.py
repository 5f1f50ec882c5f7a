"""Token ids and labels on disk: what `run_vision_tower` gives, opened at once, also in other processes."""

import pickle

import numpy as np
import pytest

from data.conversations import parse_conversation
from data.examples.tokens import Examples, example_of, kinds_of, tokens_key, write_tokens
from tests.helpers import tiny
from vzip import UserError
from vzip.templates.encode import chatml, encode, plain, vicuna

TOKENIZER = tiny.tokenizer()


def row(number, *turns, **media):
    messages = [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(turns)]
    return parse_conversation({"id": f"row-{number}", "conversations": messages, **media})


ROWS = [
    row(0, "<image>\nwhat?", "a cat", image="coco/1.jpg"),
    row(1, "hello", "hi", "and?", "so"),
    row(2, "<image><image>both?", "yes", "sure?", "no", image=["vg/1.jpg", "vg/2.jpg"]),
    row(3, "<video>\nwhat?", "a dog", video="clips/1.mp4"),
]
SIZES = {"coco/1.jpg": (480, 640), "vg/1.jpg": (10, 20), "vg/2.jpg": (30, 40)}


def written(folder, rows=ROWS, template=None, *, max_tokens=2048):
    target = folder / "tokens.arrow"
    write_tokens(rows, template or vicuna(), TOKENIZER, target, max_tokens=max_tokens, sizes=SIZES)
    return Examples(target, folder / "images")


@pytest.mark.parametrize("template", [vicuna(), chatml("Be kind.")], ids=lambda template: template.name)
def test_an_example_is_what_encode_gives(tmp_path, template):
    examples = written(tmp_path, template=template)
    assert len(examples) == len(ROWS)
    for index, (example, row) in enumerate(zip(examples, ROWS, strict=True)):
        ids, labels = encode(template, TOKENIZER, row.turns)
        expected = example_of(ids, labels, row, TOKENIZER, tmp_path / "images")
        assert (example.ids, example.labels, example.media) == (ids, labels, expected.media)
        assert example.index == index
        assert example.sizes == tuple(SIZES[path] for path in row.images)


def test_columns_say_how_long_rows_are(tmp_path):
    examples = written(tmp_path)
    assert examples.column("num_tokens").tolist() == [len(example.ids) for example in examples]
    assert examples.column("num_labels").tolist() == [example.num_labels for example in examples]
    assert examples.column("num_labels").dtype == np.int32
    assert examples.kinds == kinds_of(list(examples)) == ("image", "video")


@pytest.mark.parametrize(
    ("chosen", "kinds"), [([1], ("image",)), ([0, 1], ("image",)), ([3], ("video",)), ([], ("image",))]
)
def test_kinds_are_those_of_the_rows(tmp_path, chosen, kinds):
    assert written(tmp_path, [ROWS[number] for number in chosen]).kinds == kinds


def test_a_cut_is_recorded_and_a_row_without_an_answer_left_out(tmp_path):
    whole = [encode(vicuna(), TOKENIZER, row.turns)[0] for row in ROWS]
    limit = (
        len(encode(vicuna(), TOKENIZER, [(ROWS[1].turns[0][0], None)])[0]) + 1
    )  # within the first answer of row 1
    examples = written(tmp_path, max_tokens=limit)
    assert examples.table.num_examples == len(ROWS)
    assert examples.table["num_whole_tokens"].to_pylist() == [len(ids) for ids in whole]
    assert [example.ids for example in examples] == [whole[1][:limit]] and examples[0].num_labels == 1


def test_other_processes_get_the_path_and_not_the_arrays(tmp_path):
    examples = written(tmp_path, ROWS * 300)
    examples[0]
    sent = pickle.dumps(examples)
    assert len(sent) < 1000
    assert pickle.loads(sent)[2] == examples[2]


def test_many_batches_of_rows_are_one_sequence(tmp_path):
    examples = written(tmp_path, ROWS * 600)
    assert [len(examples[index].ids) for index in (0, 999, 1000, 2399)] == [
        len(examples[index % 4].ids) for index in (0, 999, 1000, 2399)
    ]
    with pytest.raises(IndexError):
        examples[2400]


def test_a_kill_leaves_no_half_file(tmp_path):
    def rows():
        yield ROWS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, rows())
    assert list(tmp_path.iterdir()) == []


def test_a_row_that_can_not_be_tokenized_is_named(tmp_path):
    with pytest.raises(UserError, match=r"row row-1: .*'plain' template.*take such rows out"):
        written(tmp_path, [ROWS[0], row(1, "no picture", "here")], plain())


def test_the_key_changes_with_what_the_arrays_depend_on():
    def key(template=None, tokenizer=TOKENIZER, max_tokens=2048, digest="a"):
        return tokens_key(template or vicuna(), tokenizer, max_tokens=max_tokens, digest=digest)

    other = tiny.tokenizer([*tiny.SPECIAL, "<more>"])
    keys = [
        key(),
        key(chatml("x")),
        key(vicuna("")),
        key(tokenizer=other),
        key(max_tokens=9),
        key(digest="b"),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == key(tokenizer=tiny.tokenizer())
