"""Rows become padded micro batches, the same ones however a global batch is cut and wherever a run resumes."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.conversations import parse_row, read_rows
from data.dataset import BatchPlan, Collator, Example, MicroBatches, loader, tokenize
from data.pictures import open_picture
from tests import tiny
from vzip import UserError
from vzip.templates import IGNORED, chatml, encode, vicuna

IMAGE_ID, PAD_ID = tiny.SPECIAL.index("<image>"), tiny.SPECIAL.index("<unk>")
PROCESSOR = tiny.processor()
SPLITS = [(m, a, 8 // m // a) for m in (1, 2, 4, 8) for a in (1, 2, 4, 8) if m * a <= 8]


def collator(num_image_tokens=6):
    return Collator.of(PROCESSOR, num_image_tokens)


def numbered(count):
    """Text-only examples of one token that tells them apart, with 1, 2 or 3 label tokens."""
    return [
        Example([100 + row] * 4, [IGNORED, *[100 + row] * (1 + row % 3), *[IGNORED] * (2 - row % 3)], ())
        for row in range(count)
    ]


def batches(examples, *, micro, accumulation, world_size, num_steps, seed=0, rank=0):
    plan = BatchPlan(micro=micro, accumulation=accumulation, world_size=world_size, num_steps=num_steps, seed=seed)
    return MicroBatches(examples, collator(), plan, rank=rank)


def rows_by_step(examples, split, *, num_steps, seed=0):
    """What all ranks and parts take, step by step, as sorted row numbers."""
    micro, accumulation, world_size = split
    settings = {"micro": micro, "accumulation": accumulation, "world_size": world_size, "num_steps": num_steps, "seed": seed}
    ranks = [batches(examples, **settings, rank=rank) for rank in range(world_size)]
    assert all(len(rank) == num_steps * accumulation for rank in ranks)
    return [
        sorted(
            int(row) - 100
            for rank in ranks
            for part in range(accumulation)
            for row in rank[step * accumulation + part].input_ids[:, 0]
        )
        for step in range(num_steps)
    ]


def equal(one, other):
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in fields(one)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def pictures(folder, count):
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        tiny.picture(number).save(path)
    return paths


def test_the_collator_finds_its_ids_in_the_processor():
    collate = collator(9)
    assert (collate.image_id, collate.pad_id, collate.num_image_tokens) == (IMAGE_ID, PAD_ID, 9)


def test_without_a_pad_token_the_end_token_pads():
    processor = tiny.processor()
    processor.tokenizer.pad_token = None
    assert Collator.of(processor, 6).pad_id == tiny.SPECIAL.index("</s>")


@pytest.mark.parametrize("left", [False, True])
def test_rows_are_expanded_and_padded(tmp_path, left):
    (picture,) = pictures(tmp_path, 1)
    long = Example([50, IMAGE_ID, 51, 52], [IGNORED, IGNORED, 51, 52], (picture,))
    short = Example([60, 61], [IGNORED, 61], ())
    batch = collator(3)([long, short], left=left)

    def padded(values, value):
        padding = [value] * 4
        return padding + values if left else values + padding

    assert batch.input_ids.tolist() == [[50, *[IMAGE_ID] * 3, 51, 52], padded([60, 61], PAD_ID)]
    assert batch.attention_mask.tolist() == [[1] * 6, padded([1, 1], 0)]
    assert batch.labels.tolist() == [[*[IGNORED] * 4, 51, 52], padded([IGNORED, 61], IGNORED)]
    assert batch.has_images and batch.pixel_values.shape == (1, 3, tiny.SIDE, tiny.SIDE)
    assert batch.input_ids.dtype == batch.labels.dtype == batch.attention_mask.dtype == torch.int64


def test_pictures_keep_their_order_over_rows(tmp_path):
    paths = pictures(tmp_path, 4)
    rows = [Example([IMAGE_ID, IMAGE_ID, 7], [IGNORED] * 3, (paths[2], paths[0])), Example([7], [7], ())]
    rows += [Example([IMAGE_ID, 7], [IGNORED, 7], (paths[3],)), Example([IMAGE_ID, 7], [IGNORED, 7], (paths[2],))]
    batch = collator()(rows)

    expected = [open_picture(paths[number]) for number in (2, 0, 3, 2)]
    assert torch.equal(batch.pixel_values, PROCESSOR.image_processor(expected, return_tensors="pt")["pixel_values"])
    assert not torch.equal(batch.pixel_values[0], batch.pixel_values[1])
    assert (batch.input_ids == IMAGE_ID).sum(dim=1).tolist() == [12, 0, 6, 6]


def test_text_alone_comes_with_a_blank_picture():
    batch = collator()(numbered(3))
    assert not batch.has_images
    assert batch.pixel_values.shape == (1, 3, tiny.SIDE, tiny.SIDE) and not batch.pixel_values.any()
    assert batch.pixel_values.dtype == torch.float32


@pytest.mark.parametrize("content", [None, b"", b"no picture"])
def test_a_picture_that_vanishes_or_breaks_later_is_a_user_error(tmp_path, content):
    (picture,) = pictures(tmp_path, 1)
    example = Example([IMAGE_ID, 7], [IGNORED, 7], (picture,))
    collator()([example])
    picture.unlink() if content is None else picture.write_bytes(content)
    with pytest.raises(UserError, match=r"0\.png"):
        collator()([example])


@settings(max_examples=25, deadline=None)
@given(split=st.sampled_from(SPLITS), count=st.integers(3, 20), seed=st.integers(0, 3), num_steps=st.integers(1, 4))
def test_every_split_of_a_global_batch_takes_the_same_rows(split, count, seed, num_steps):
    examples = numbered(count)
    whole = rows_by_step(examples, (8, 1, 1), num_steps=num_steps, seed=seed)
    assert all(len(rows) == 8 for rows in whole)
    assert rows_by_step(examples, split, num_steps=num_steps, seed=seed) == whole


def test_there_are_ten_splits_of_eight():
    assert len(SPLITS) == 10 and all(m * a * w == 8 for m, a, w in SPLITS)


@pytest.mark.parametrize("count", [24, 20])
def test_an_epoch_sees_every_row_once_and_the_next_one_in_another_order(count):
    stream = batches(numbered(count), micro=4, accumulation=1, world_size=1, num_steps=15).order[:60]
    epochs = [stream[start : start + count] for start in range(0, 60 - count + 1, count)]

    assert len(epochs) >= 2 and all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    taken = rows_by_step(numbered(count), (4, 1, 1), num_steps=count // 4)
    assert sorted(row for rows in taken for row in rows) == list(range(count))


def test_the_order_is_a_function_of_the_seed_alone():
    shape = {"micro": 2, "accumulation": 2, "num_steps": 9}
    first = batches(numbered(24), **shape, world_size=2, seed=3).order
    torch.manual_seed(99)
    other_rank = batches(numbered(24), **shape, world_size=2, seed=3, rank=1).order

    assert other_rank == first
    assert batches(numbered(24), **shape, world_size=2, seed=4).order != first
    assert batches(numbered(24), micro=8, accumulation=1, num_steps=6, world_size=1, seed=3).order == first[:48]


@pytest.mark.parametrize("split", SPLITS)
def test_num_labels_counts_the_whole_global_batch(split):
    micro, accumulation, world_size = split
    settings = {"micro": micro, "accumulation": accumulation, "world_size": world_size, "num_steps": 4}
    ranks = [batches(numbered(11), **settings, rank=rank) for rank in range(world_size)]
    for step in range(4):
        parts = [rank[step * accumulation + part] for rank in ranks for part in range(accumulation)]
        expected = sum(int((part.labels != IGNORED).sum()) for part in parts)
        assert 8 <= expected == ranks[0].num_labels(step) == ranks[-1].num_labels(step)


def examples_of(data_folder):
    rows, bad = read_rows(data_folder / "train.json")
    assert len(rows) == 24 and not bad
    return tokenize(rows, vicuna(), PROCESSOR.tokenizer, data_folder / "images", max_tokens=2048)[0]


def test_a_loader_from_the_middle_continues_exactly(data_folder):
    source = batches(examples_of(data_folder), micro=3, accumulation=2, world_size=1, num_steps=4)
    whole = list(loader(source, first=0, num_workers=0))
    rest = list(loader(source, first=5, num_workers=0))

    assert len(whole) == 8 and len(rest) == 3
    assert all(equal(one, other) for one, other in zip(whole[5:], rest, strict=True))
    assert not equal(whole[0], whole[1])
    assert list(loader(source, first=8, num_workers=0)) == []


def test_a_worker_process_gives_the_same_batches(data_folder):
    source = batches(examples_of(data_folder), micro=3, accumulation=1, world_size=1, num_steps=4)
    here, there = (list(loader(source, first=1, num_workers=workers)) for workers in (0, 1))
    assert len(here) == len(there) == 3
    assert all(equal(one, other) for one, other in zip(here, there, strict=True))


def test_a_mistake_in_a_worker_process_has_no_traceback_in_its_message(tmp_path):
    # Commands print the message alone.
    example = Example([IMAGE_ID, 7], [IGNORED, 7], (tmp_path / "gone.png",))
    source = batches([example], micro=1, accumulation=1, world_size=1, num_steps=1)
    with pytest.raises(UserError, match=r"gone\.png") as error:
        list(loader(source, first=0, num_workers=1))
    assert "Traceback" not in str(error.value)


def talk(*texts, **extra):
    messages = [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]
    return parse_row({"conversations": messages, **extra})


@pytest.mark.parametrize("template", [vicuna(), chatml("be kind")], ids=lambda template: template.name)
def test_tokenize_keeps_what_fits(tmp_path, template):
    rows = [talk("<image>\nwhat?", "a cat", image="coco/1.jpg"), talk("q", "a")]
    examples, num_cut = tokenize(rows, template, PROCESSOR.tokenizer, tmp_path, max_tokens=2048)

    assert num_cut == 0
    assert [(e.ids, e.labels) for e in examples] == [encode(template, PROCESSOR.tokenizer, row.turns) for row in rows]
    assert [e.images for e in examples] == [(tmp_path / "coco/1.jpg",), ()]
    assert all(e.num_labels == sum(label != IGNORED for label in e.labels) > 0 for e in examples)


def test_tokenize_cuts_at_max_tokens_and_counts():
    rows = [talk("q", "a" * count) for count in (10, 20, 30)]
    lengths = [len(encode(vicuna(), PROCESSOR.tokenizer, row.turns)[0]) for row in rows]
    whole, _ = tokenize(rows, vicuna(), PROCESSOR.tokenizer, folder := Path(), max_tokens=2048)
    cut, num_cut = tokenize(rows, vicuna(), PROCESSOR.tokenizer, folder, max_tokens=lengths[1])

    assert num_cut == 1
    assert [len(e.ids) for e in cut] == [len(e.labels) for e in cut] == [lengths[0], lengths[1], lengths[1]]
    assert cut[:2] == whole[:2] and cut[2].ids == whole[2].ids[: lengths[1]]


def test_a_cut_row_keeps_as_many_placeholders_as_pictures(tmp_path):
    # A picture without its placeholder makes the model refuse the batch in the middle of a run.
    row = talk("<image>\nwhat?", "a cat", "and <image>?", "a dog", image=["1.jpg", "2.jpg"])
    length = len(encode(vicuna(), PROCESSOR.tokenizer, row.turns[:1])[0])
    examples, num_cut = tokenize([row], vicuna(), PROCESSOR.tokenizer, tmp_path, max_tokens=length + 3)

    assert num_cut == 1
    assert [e.ids.count(IMAGE_ID) for e in examples] == [len(e.images) for e in examples]
