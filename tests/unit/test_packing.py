"""Packed micro batches: which tokens are run, which rows share one, and that each row is run once on one of the ranks."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batches.collate import Collator, Packer
from data.batches.dataset import BatchPlan, MicroBatches, PackedLayout, has_media, loader
from data.batches.packing import num_tail_tokens, pack, shared_prefix
from data.examples import arrow
from data.examples.tokens import SCHEMA, Example, Examples
from tests.helpers.rows import Ready, padded
from tests.unit.test_dataset import IMAGE_ID, PAD_ID, PROCESSOR, equal, family
from train.engine import to_device
from vzip.reducers.random import Random
from vzip.templates.encode import IGNORED

STARTS = [[1, 40, 41, 42], [1, 40, 41], [1, 40, 41, 42, 43], [1, 40, 9, 42]]
"""Of rows: mostly alike."""
ROW_IDS = 1000
"""From here on, an id that only one row holds."""


@cache
def collator(num_tokens=2):
    """Of pictures that are features already, `num_tokens` each."""
    return Collator(PROCESSOR, family(), Random(budget=num_tokens), media=Ready(num_tokens))


@st.composite
def bodies(draw, *, pictures=True):
    """(ids, labels) as a template gives them: a start without labels, turns, an answer, and something behind it."""
    words = st.sampled_from([IMAGE_ID, 50, 51, 52] if pictures else [50, 51, 52])
    ids = draw(st.sampled_from(STARTS))
    labels = [IGNORED] * len(ids)
    for token, has_gradient in draw(st.lists(st.tuples(words, st.booleans()), max_size=10)):
        ids, labels = [*ids, token], [*labels, token if has_gradient and token != IMAGE_ID else IGNORED]
    behind = draw(st.lists(words, max_size=3))
    return [*ids, 60, *behind], [*labels, 60, *[IGNORED] * len(behind)]


def example_of(ids, labels, index=0):
    """The row with as many pictures as it has placeholders, none of which is there."""
    pictures = tuple(f"{index}-{number}.png" for number in range(ids.count(IMAGE_ID)))
    media = {"image": pictures} if pictures else {}
    return Example(ids, labels, media, sizes=((50, 50),) * len(pictures), index=index)


def examples_of(rows):
    return [example_of(ids, labels, index) for index, (ids, labels) in enumerate(rows)]


ROWS = st.lists(bodies(), min_size=1, max_size=8).map(examples_of)


def needed(example):
    """bool by place: whether a token is run, that is, whether it or one behind it has a label next to it, or is an image's."""
    following = [label != IGNORED for label in example.labels[1:]] + [False]
    wanted = [label or token == IMAGE_ID for token, label in zip(example.ids, following, strict=True)]
    return [any(wanted[place:]) for place in range(len(wanted))]


def plain_prefix(examples):
    """As `shared_prefix`, token by token."""
    prefix, has_gradient = [], [example for example in examples if IMAGE_ID in example.ids]
    for place, tokens in enumerate(map(set, zip(*(example.ids for example in has_gradient), strict=False))):
        labels = {label for example in has_gradient for label in example.labels[place : place + 2]}
        if len(tokens) > 1 or tokens == {IMAGE_ID} or labels != {IGNORED}:
            break
        prefix += tokens
    return prefix


# Which tokens are run


@settings(max_examples=50, deadline=None)
@given(ROWS)
def test_no_more_is_run_than_up_to_the_last_label_or_image(examples):
    assert num_tail_tokens(examples, [IMAGE_ID]).tolist() == [
        needed(example).count(False) for example in examples
    ]


@settings(max_examples=50, deadline=None)
@given(ROWS)
def test_the_shared_prefix_is_what_all_rows_with_images_begin_with(examples):
    assert shared_prefix(examples, [IMAGE_ID]) == plain_prefix(examples)


def test_the_shared_prefix_ends_before_labels_images_and_differences():
    def prefix(*rows):
        return shared_prefix(examples_of(rows), [IMAGE_ID])

    row = ([1, 10, 11, 12, IMAGE_ID, 13, 14], [*[IGNORED] * 6, 14])
    assert prefix(row) == prefix(row, row) == [1, 10, 11, 12]
    assert prefix(row, ([1, 10, 99, 12, IMAGE_ID, 14], [*[IGNORED] * 5, 14])) == [1, 10]
    assert prefix(row, ([1, 10, IMAGE_ID, 12, 13, 14], [*[IGNORED] * 5, 14])) == [1, 10]
    # The output of 11 is needed: a label follows.
    assert prefix(row, ([1, 10, 11, 12, IMAGE_ID, 14], [*[IGNORED] * 3, 12, IGNORED, 14])) == [1, 10]
    assert prefix(row, ([99, 99, 14], [IGNORED, IGNORED, 14])) == [1, 10, 11, 12]  # a row of text has no say
    assert prefix(([1, 10, 14], [IGNORED, IGNORED, 14])) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokens")


def mapped(rows, folder):
    """The rows in a file, a few a chunk, with rows that have no label in between, which are no examples."""

    def records():
        for ids, labels in rows:
            for shown in ([IGNORED] * len(ids), labels):
                num_images, num_labels = ids.count(IMAGE_ID), sum(label != IGNORED for label in shown)
                yield {
                    "id": "",
                    "source": "",
                    "ids": ids,
                    "labels": shown,
                    "images": ["a.png"] * num_images,
                    "videos": [],
                } | {
                    "sizes": [50] * (2 * num_images),
                    "num_images": num_images,
                    "num_videos": 0,
                    "num_tokens": len(ids),
                    "num_labels": num_labels,
                    "num_whole_tokens": len(ids),
                    "num_whole_labels": num_labels,
                }

    path = folder / "tokens.arrow"
    path.unlink(missing_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrow, "BATCH", 3)
        arrow.write_arrow(records(), SCHEMA, path)
    return Examples(path, folder)


@settings(max_examples=15, deadline=None)
@given(rows=st.lists(bodies(), min_size=1, max_size=6))
def test_mapped_rows_and_lists_agree(folder, rows):
    one, other = mapped(rows, folder), examples_of(rows)
    assert [(example.ids, example.labels) for example in one] == rows
    assert num_tail_tokens(one, [IMAGE_ID]).tolist() == num_tail_tokens(other, [IMAGE_ID]).tolist()
    assert shared_prefix(one, [IMAGE_ID]) == shared_prefix(other, [IMAGE_ID])
    assert has_media(one).tolist() == has_media(other).tolist()
    packer = Packer(collator(), num_prefix=1)
    assert packer.lengths(one).tolist() == packer.lengths(other).tolist()


# A packed micro batch


@settings(max_examples=40, deadline=None)
@given(ROWS, st.booleans(), st.sampled_from([1, 2, 5]))
def test_a_packed_batch_is_its_rows_one_behind_the_other(examples, behind_prefix, num_tokens):
    has_gradient = [example for example in examples if example.media]
    prefix = shared_prefix(examples, [IMAGE_ID]) if behind_prefix else []
    examples = (has_gradient if prefix else examples) or examples
    packer = Packer(collator(num_tokens), num_prefix=len(prefix), reducer=3)
    batch = packer(examples)

    ids, lengths, targets = [], [], {}
    for example in examples:
        assert example.ids[: len(prefix)] == prefix
        first = len(ids)
        run = needed(example)
        for place in range(len(prefix), run.count(True)):
            ids += [example.ids[place]] * (num_tokens if example.ids[place] == IMAGE_ID else 1)
            if place + 1 < len(run) and example.labels[place + 1] != IGNORED:
                targets[len(ids) - 1] = example.labels[place + 1]
        lengths.append(len(ids) - first)
    assert batch.input_ids.tolist() == ids
    assert list(batch.lengths) == packer.lengths(examples).tolist() == lengths and min(lengths) > 0
    assert dict(zip(batch.at_labels.tolist(), batch.targets.tolist(), strict=True)) == targets
    assert len(batch.targets) == len(targets) == sum(example.num_labels for example in examples)
    assert (batch.num_examples, batch.reducer) == (len(examples), 3)
    assert batch.num_placeholders == {"image": ids.count(IMAGE_ID)}
    pictures = [float(example.index) for example in examples for _ in example.media.get("image", ())]
    assert (
        batch.media["image"]["features"].flatten().tolist()
        == [n for n in pictures for _ in range(num_tokens)]
        or [0.0] * num_tokens
    )


def test_images_behind_the_last_label_are_run_and_nothing_behind_them():
    """A picture's features have to find their places, though nothing is learned from them."""
    row = example_of([1, 5, 6, 7, IMAGE_ID, 8, 9], [IGNORED, IGNORED, 6, IGNORED, IGNORED, IGNORED, IGNORED])
    batch = Packer(collator(), num_prefix=0)([row])
    assert batch.input_ids.tolist() == [1, 5, 6, 7, IMAGE_ID, IMAGE_ID] and batch.num_placeholders == {
        "image": 2
    }
    assert batch.at_labels.tolist() == [1] and batch.targets.tolist() == [6]


def test_a_part_without_rows_is_one_token_that_counts_nothing():
    batch = Packer(collator(), num_prefix=4)([])
    assert batch.input_ids.tolist() == [PAD_ID] and batch.lengths == (1,) and batch.num_examples == 0
    assert batch.at_labels.tolist() == [0] and batch.targets.tolist() == [PAD_ID]
    assert batch.num_placeholders == {"image": 0} and not batch.media["image"]["features"].any()
    assert batch.input_ids.dtype == batch.at_labels.dtype == batch.targets.dtype == torch.int64


# Which rows share a micro batch


@st.composite
def packings(draw):
    """(rows, lengths by reducer of more rows than these, tokens, ranks)."""
    num_examples, num_reducers = draw(st.integers(0, 30)), draw(st.integers(1, 3))
    column = st.lists(st.integers(1, 60), min_size=num_examples + 5, max_size=num_examples + 5)
    lengths = draw(st.lists(column, min_size=num_reducers, max_size=num_reducers))
    rows = draw(st.permutations(range(num_examples + 5)))[:num_examples]
    return rows, np.array(lengths), draw(st.integers(1, 200)), draw(st.integers(1, 4))


def loads_of(parts, lengths):
    return [int(lengths[part.reducer, part.rows].sum()) for part in parts]


@settings(max_examples=100, deadline=None)
@given(packings())
def test_each_row_is_packed_once_and_no_part_is_too_large(packing):
    rows, lengths, tokens, world_size = packing
    parts = pack(rows, lengths, tokens=tokens, world_size=world_size, seed=(0, 7))
    loads = loads_of(parts, lengths)
    assert sorted(row for part in parts for row in part.rows) == sorted(rows)
    assert all(load <= tokens or len(part.rows) == 1 for load, part in zip(loads, parts, strict=True))
    assert parts and len(parts) % world_size == 0  # as many on each rank
    assert max(loads) - min(loads) <= lengths[:, rows].max(initial=0)
    assert all(0 <= part.reducer < len(lengths) for part in parts)
    for part in parts:  # rows of like length lie side by side
        longest = lengths[:, part.rows].max(axis=0).tolist()
        assert longest == sorted(longest, reverse=True)
    assert pack(rows[::-1], lengths, tokens=tokens, world_size=world_size, seed=(0, 7)) == parts


def test_as_few_parts_as_the_tokens_need():
    lengths = np.array([[60, 50, 40, 30, 20]])
    for tokens, num_parts in ((200, 1), (199, 2), (110, 2), (109, 3), (70, 3), (69, 4), (59, 4), (1, 5)):
        assert len(pack(range(5), lengths, tokens=tokens, world_size=1, seed=(0, 0))) == num_parts
    assert len(pack(range(5), lengths, tokens=110, world_size=2, seed=(0, 0))) == 2
    assert len(pack(range(5), lengths, tokens=109, world_size=2, seed=(0, 0))) == 4
    assert len(pack(range(5), lengths, tokens=200, world_size=4, seed=(0, 0))) == 4


def test_ranks_have_like_loads():
    generator = np.random.default_rng(0)
    lengths = (120 * np.exp(0.6 * generator.normal(size=(1, 128)))).astype(int).clip(20, 900)
    for tokens in (2048, 4096, 16_384):
        loads = loads_of(pack(range(128), lengths, tokens=tokens, world_size=4, seed=(0, 0)), lengths)
        assert max(loads) < 1.05 * min(loads)


def test_each_part_draws_its_reducer_from_seed_and_step():
    lengths = np.array([[10] * 40, [20] * 40, [15] * 40])

    def drawn(*seed):
        return [part.reducer for part in pack(range(40), lengths, tokens=40, world_size=2, seed=seed)]

    assert {*drawn(0, 0)} == {0, 1, 2}
    assert (
        drawn(0, 0) == drawn(0, 0)
        and len({tuple(drawn(seed, step)) for seed in (0, 1, -1) for step in (0, 1)}) == 6
    )


# Steps of packed micro batches


def source_of(examples, *, world_size, tokens=60, num_steps=3, size=6, every=False, reducers=(2,)):
    """The micro batches of all ranks; with `every`, rows of text are learned from too."""
    plan = BatchPlan(size=size, world_size=world_size, num_steps=num_steps, seed=3)
    prefix = [] if every else shared_prefix(examples, [IMAGE_ID])
    packers = [
        Packer(collator(n), num_prefix=len(prefix), reducer=number) for number, n in enumerate(reducers)
    ]
    has_gradient, num_run = (
        has_media(examples) | every,
        torch.stack([packer.lengths(examples) for packer in packers]),
    )
    layout = PackedLayout(packers, examples, plan, tokens=tokens, num_run=num_run, has_gradient=has_gradient)
    return [MicroBatches(layout, plan, rank=rank, has_gradient=has_gradient) for rank in range(world_size)]


@st.composite
def numbered(draw):
    """Rows that hold their own number, the last one with a picture."""
    drawn = [
        *draw(st.lists(st.one_of(bodies(), bodies(pictures=False)), max_size=9)),
        ([1, IMAGE_ID, 6], [IGNORED, IGNORED, 6]),
    ]
    return examples_of(
        ([*ids[:-1], ROW_IDS + row, *ids[-1:]], [*labels[:-1], ROW_IDS + row, *labels[-1:]])
        for row, (ids, labels) in enumerate(drawn)
    )


def batches_of(source, step):
    return [source[source.num_before(step) + part] for part in range(source.num_parts(step))]


@settings(max_examples=25, deadline=None)
@given(numbered(), st.integers(1, 3), st.sampled_from([1, 40, 1000]), st.booleans())
def test_all_ranks_together_run_each_taught_row_of_a_step_once(examples, world_size, tokens, every):
    ranks = source_of(examples, world_size=world_size, tokens=tokens, every=every)
    plain = padded(examples, collator(), micro=6, num_steps=3, seed=3)
    has_gradient = [every or bool(example.media) for example in examples]
    assert torch.equal(ranks[0].rows, plain.rows)
    for step, rows in enumerate(plain.rows.tolist()):
        batches = [batch for rank in ranks for batch in batches_of(rank, step)]
        run, learned = (
            [row for row in rows if has_gradient[row]],
            sum(examples[row].num_labels for row in rows if has_gradient[row]),
        )
        found = [
            token - ROW_IDS for batch in batches for token in batch.input_ids.tolist() if token >= ROW_IDS
        ]
        targets = [
            token - ROW_IDS for batch in batches for token in batch.targets.tolist() if token >= ROW_IDS
        ]
        assert sorted(targets) == sorted(run)
        assert set(found) <= set(run)
        assert sum(batch.num_examples for batch in batches) == len(run)
        assert sum(len(batch.targets) for batch in batches if batch.num_examples) == learned
        for rank in ranks:
            assert rank.num_parts(step) == ranks[0].num_parts(step) >= 1
            assert (
                rank.num_labels(step)
                == plain.num_labels(step)
                == sum(examples[row].num_labels for row in rows)
            )
            assert rank.num_grad_labels(step) == learned
            assert rank.num_tokens(step) == plain.num_tokens(step)
    assert all(len(rank) == sum(rank.num_parts(step) for step in range(3)) for rank in ranks)


@settings(max_examples=10, deadline=None)
@given(numbered(), st.integers(0, 3))
def test_a_run_resumes_with_the_same_micro_batches(examples, step):
    for rank, again in zip(
        *(source_of(examples, world_size=2, reducers=(2, 3)) for _ in range(2)), strict=True
    ):
        whole = list(loader(rank, first=0, num_workers=0))
        rest = list(loader(again, first=step, num_workers=0))
        assert len(whole) == len(rank) and len(rest) == len(whole) - rank.num_before(step)
        assert all(equal(one, other) for one, other in zip(whole[rank.num_before(step) :], rest, strict=True))
    longer = source_of(examples, world_size=2, num_steps=5, reducers=(2, 3))[0]
    whole = batches_of(source_of(examples, world_size=2, reducers=(2, 3))[0], 2)
    assert all(equal(one, other) for one, other in zip(whole, batches_of(longer, 2), strict=True))


def test_a_micro_batch_has_the_tokens_of_its_reducer():
    row = ([1, IMAGE_ID, 6], [IGNORED, IGNORED, 6])
    (source,) = source_of(examples_of([row] * 6), world_size=1, tokens=12, reducers=(2, 5))
    batches = [source[index] for index in range(len(source))]
    assert {batch.reducer for batch in batches} == {0, 1}
    for batch in batches:
        num_tokens = (2, 5)[batch.reducer]
        assert len(batch.input_ids) <= 12 and batch.lengths == (num_tokens,) * batch.num_examples
        assert (
            batch.num_placeholders
            == {"image": batch.num_examples * num_tokens}
            == {"image": len(batch.media["image"]["features"])}
        )


def test_a_packed_batch_goes_to_the_device_as_a_whole():
    batch = Packer(collator(), num_prefix=0)([example_of([1, IMAGE_ID, 6], [IGNORED, IGNORED, 6])])
    there = to_device(batch, torch.device("meta"))
    tensors = [there.input_ids, there.at_labels, there.targets, there.media["image"]["features"]]
    assert {value.device.type for value in tensors} == {"meta"}
    assert (
        (there.lengths, there.num_examples, there.reducer)
        == (batch.lengths, batch.num_examples, batch.reducer)
        == ((3,), 1, 0)
    )
