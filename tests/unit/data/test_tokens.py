"""Examples in columns: what `encode` gives, opened at once, also in other processes."""

import pickle

import numpy as np
import pytest

from data.examples.tokens import Example, Examples, example_of, kinds_of, tokens_key, write_tokens
from tests.helpers import tiny
from tests.helpers.conversations import conversation
from vzip import UserError
from vzip.templates.encode import chatml, encode, plain, vicuna

TOKENIZER = tiny.tokenizer()
CONVERSATIONS = [
    conversation("<image>\nwhat?", "a cat", image="coco/1.jpg"),
    conversation("hello", "hi", "and?", "so"),
    conversation("<image><image>both?", "yes", "sure?", "no", image=["vg/1.jpg", "vg/2.jpg"]),
    conversation("<video>\nwhat?", "a dog", video="clips/1.mp4"),
]
SIZES = {"coco/1.jpg": (480, 640), "vg/1.jpg": (10, 20), "vg/2.jpg": (30, 40)}


def write(folder, conversations=CONVERSATIONS, template=None, *, max_tokens=2048, sizes=SIZES):
    target = folder / "tokens.arrow"
    write_tokens(conversations, template or vicuna(), TOKENIZER, target, max_tokens=max_tokens, sizes=sizes)
    return Examples.open(target, folder / "images")


@pytest.mark.parametrize("template", [vicuna(), chatml("Be kind.")], ids=lambda template: template.name)
def test_examples_are_what_encode_gives(tmp_path, template):
    examples = write(tmp_path, template=template)
    assert len(examples) == len(CONVERSATIONS)
    assert examples.column("num_tokens").tolist() == [len(example.ids) for example in examples]
    assert examples.column("num_labels").tolist() == [example.num_labels for example in examples]
    assert examples.column("num_labels").dtype == np.int32

    for index, (example, source) in enumerate(zip(examples, CONVERSATIONS, strict=True)):
        ids, labels = encode(template, TOKENIZER, source.turns)
        expected = example_of(ids, labels, source, template, TOKENIZER, tmp_path / "images")
        assert (example.ids, example.labels, example.media) == (ids, labels, expected.media)
        assert example.index == index
        assert example.sizes == tuple(SIZES[path] for path in source.images)


def test_kinds_are_those_that_occur_images_first(tmp_path):
    cases = {
        (0, 1, 2, 3): ("image", "video"),
        (0, 1): ("image",),
        (1,): ("image",),
        (3, 1): ("video",),
        (): ("image",),
    }
    for chosen, kinds in cases.items():
        examples = write(tmp_path, [CONVERSATIONS[number] for number in chosen])
        assert examples.kinds == kinds_of(examples) == kinds


def test_examples_in_memory_are_those_of_a_file(tmp_path):
    # Several record batches, and in each of them conversations whose labels are cut off.
    examples = write(tmp_path, CONVERSATIONS * 600, vicuna(""), max_tokens=25)
    assert 0 < len(examples) < len(examples.table) > 2000
    in_memory = Examples.of(examples)

    for index in (0, 1, len(examples) // 2, len(examples) - 1):
        assert in_memory[index] == examples[index]
    for name in ("num_tokens", "num_labels", "num_images", "num_videos"):
        assert in_memory.column(name).tolist() == examples.column(name).tolist()

    mapped, joined = (source.flat_tokens() for source in (examples, in_memory))
    for index, example in enumerate(examples):
        for tokens in (mapped, joined):
            assert tokens.ids[tokens.starts[index] : tokens.stops[index]].tolist() == example.ids
            assert tokens.labels[tokens.starts[index] : tokens.stops[index]].tolist() == example.labels

    without_label = Example([1, 2], [-100, -100], {})
    assert len(Examples.of([without_label, examples[0]])) == 1
    with pytest.raises(IndexError):
        examples[len(examples)]

    # Other processes get the path of a file, and not its content.
    sent = pickle.dumps(examples)
    assert len(sent) < 1000
    assert pickle.loads(sent)[2] == examples[2]
    assert pickle.loads(pickle.dumps(in_memory))[1] == in_memory[1]


def test_a_cut_is_recorded_and_an_example_needs_a_label(tmp_path):
    whole = [encode(vicuna(), TOKENIZER, source.turns)[0] for source in CONVERSATIONS]
    first_question = [(CONVERSATIONS[1].turns[0][0], None)]
    limit = len(encode(vicuna(), TOKENIZER, first_question)[0]) + 1  # one token into the answer

    examples = write(tmp_path, max_tokens=limit)
    assert examples.table.num_rows == len(CONVERSATIONS)
    assert examples.table["num_whole_tokens"].to_pylist() == [len(ids) for ids in whole]
    assert [example.ids for example in examples] == [whole[1][:limit]]
    assert examples[0].num_labels == 1


def test_a_conversation_that_can_not_be_used_is_named_and_leaves_no_file(tmp_path):
    without_image = conversation("no picture", "here", name="this one")
    with pytest.raises(UserError, match=r"example this one: .*'plain' template.*remove such"):
        write(tmp_path, [CONVERSATIONS[0], without_image], plain())

    with pytest.raises(UserError, match=r"nothing is recorded about vg/1\.jpg; run `make data`"):
        write(tmp_path, sizes={"coco/1.jpg": (480, 640)})
    assert list(tmp_path.iterdir()) == []


def test_the_key_depends_on_all_that_the_tokens_depend_on():
    def key(template=None, tokenizer=TOKENIZER, max_tokens=2048, digest="a"):
        return tokens_key(template or vicuna(), tokenizer, max_tokens=max_tokens, digest=digest)

    other_tokenizer = tiny.tokenizer([*tiny.SPECIAL, "<more>"])
    keys = [key(), key(chatml("x")), key(vicuna("")), key(tokenizer=other_tokenizer)]
    keys += [key(max_tokens=9), key(digest="b")]
    assert len(set(keys)) == len(keys)
    assert key() == key(tokenizer=tiny.tokenizer())
