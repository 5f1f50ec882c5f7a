"""Rows become padded micro batches, the same ones however a global batch is cut and wherever a run resumes."""

import json
import shutil
from dataclasses import fields
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vzip
from data.batches.collate import Collator
from data.batches.dataset import loader
from data.conversations import parse_conversation
from data.examples.tokens import Example, kinds_of
from tests.helpers import tiny
from tests.helpers.rows import (
    IMAGE_ROWS,
    NUM_FRAMES,
    NUM_LABELS,
    VIDEO_ROWS,
    examples_of,
    padded,
    processed,
    rows_of,
    tokenized,
    without_padding,
)
from vzip import UserError
from vzip.families import family_of
from vzip.media import model_inputs, normalised, pixels_of
from vzip.pictures import open_picture
from vzip.reducers.identity import Identity
from vzip.reducers.random import Random
from vzip.reducers.visionzip import VisionZip
from vzip.templates.encode import IGNORED, chatml, encode, vicuna

IMAGE_ID, VIDEO_ID, PAD_ID = (tiny.SPECIAL.index(token) for token in ("<image>", "<video>", "<unk>"))
PROCESSOR = tiny.processor()
SPLITS = [(m, a, 8 // m // a) for m in (1, 2, 4, 8) for a in (1, 2, 4, 8) if m * a <= 8]


@cache
def family(kind="clip"):
    return family_of(tiny.llava(kind))


def collator(num_image_tokens=6):
    return Collator(PROCESSOR, family(), VisionZip(dominant=num_image_tokens - 1, contextual=1))


def numbered(count):
    """Text-only examples of one token that tells them apart, with 1, 2 or 3 label tokens."""
    return [
        Example([100 + row] * 4, [IGNORED, *[100 + row] * (1 + row % 3), *[IGNORED] * (2 - row % 3)], {})
        for row in range(count)
    ]


def batches(examples, **settings):
    return padded(examples, collator(), **settings)


def rows_by_step(examples, split, *, num_steps, seed=0):
    """What all ranks and parts take, step by step, as sorted row numbers."""
    micro, accumulation, world_size = split
    settings = {
        "micro": micro,
        "accumulation": accumulation,
        "world_size": world_size,
        "num_steps": num_steps,
        "seed": seed,
    }
    ranks = [batches(examples, **settings, rank=rank) for rank in range(world_size)]
    assert all(len(rank) == num_steps * accumulation for rank in ranks)
    assert all(rank.num_parts(step) == accumulation for rank in ranks for step in range(num_steps))
    return [
        sorted(
            int(row) - 100
            for rank in ranks
            for part in range(accumulation)
            for row in rank[step * accumulation + part].input_ids[:, 0]
        )
        for step in range(num_steps)
    ]


def floats(inputs):
    """What the model gets, in float32."""
    return normalised(inputs, torch.float32)


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def equal(one, other):
    return all(same(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))


def pictures(folder, count):
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        tiny.picture(number).save(path)
    return paths


def test_without_a_pad_token_the_end_token_pads():
    processor = tiny.processor()
    processor.tokenizer.pad_token = None
    batch = Collator(processor, family(), Identity())([Example([7, 8], [7, 8], {}), Example([7], [7], {})])
    assert batch.input_ids.tolist() == [[7, 8], [7, tiny.SPECIAL.index("</s>")]]


@pytest.mark.parametrize("left", [False, True])
def test_rows_are_expanded_and_padded(tmp_path, left):
    (picture,) = pictures(tmp_path, 1)
    long = Example([50, IMAGE_ID, 51, 52], [IGNORED, IGNORED, 51, 52], {"image": (picture,)})
    short = Example([60, 61], [IGNORED, 61], {})
    batch = collator(3)([long, short], left=left)

    def padded(values, value):
        padding = [value] * 4
        return padding + values if left else values + padding

    assert batch.input_ids.tolist() == [[50, *[IMAGE_ID] * 3, 51, 52], padded([60, 61], PAD_ID)]
    assert batch.attention_mask.tolist() == [[1] * 6, padded([1, 1], 0)]
    assert batch.labels.tolist() == [[*[IGNORED] * 4, 51, 52], padded([IGNORED, 61], IGNORED)]
    assert batch.num_placeholders == {"image": 3}
    assert list(batch.media) == ["image"] and batch.media["image"]["pixel_values"].shape == (
        1,
        3,
        tiny.SIDE,
        tiny.SIDE,
    )
    assert batch.input_ids.dtype == batch.labels.dtype == batch.attention_mask.dtype == torch.int64


def test_pictures_keep_their_order_over_rows(tmp_path):
    paths = pictures(tmp_path, 4)
    rows = [
        Example([IMAGE_ID, IMAGE_ID, 7], [IGNORED] * 3, {"image": (paths[2], paths[0])}),
        Example([7], [7], {}),
    ]
    rows += [Example([IMAGE_ID, 7], [IGNORED, 7], {"image": (paths[number],)}) for number in (3, 2)]
    batch = collator()(rows)

    expected = [open_picture(paths[number]) for number in (2, 0, 3, 2)]
    pixel_values = floats(batch.media["image"])["pixel_values"]
    assert torch.equal(pixel_values, PROCESSOR.image_processor(expected, return_tensors="pt")["pixel_values"])
    assert not torch.equal(pixel_values[0], pixel_values[1])
    assert (batch.input_ids == IMAGE_ID).sum(dim=1).tolist() == [12, 0, 6, 6]


@pytest.mark.parametrize("damage", ["vanish", "empty", "no picture", "truncate"])
def test_a_picture_that_vanishes_or_breaks_later_is_a_user_error_that_names_it(tmp_path, damage):
    (picture,) = pictures(tmp_path, 1)
    example = Example([IMAGE_ID, 7], [IGNORED, 7], {"image": (picture,)})
    collator()([example])
    whole = picture.read_bytes()
    picture.unlink()
    if damage != "vanish":
        picture.write_bytes({"empty": b"", "no picture": b"no picture", "truncate": whole[:-1000]}[damage])
    with pytest.raises(UserError, match=r"0\.png"):
        collator()([example])


@settings(max_examples=25, deadline=None)
@given(
    split=st.sampled_from(SPLITS),
    count=st.integers(3, 20),
    seed=st.integers(0, 3),
    num_steps=st.integers(1, 4),
)
def test_every_split_of_a_global_batch_takes_the_same_rows(split, count, seed, num_steps):
    examples = numbered(count)
    whole = rows_by_step(examples, (8, 1, 1), num_steps=num_steps, seed=seed)
    assert all(len(rows) == 8 for rows in whole)
    assert rows_by_step(examples, split, num_steps=num_steps, seed=seed) == whole


def test_there_are_ten_splits_of_eight():
    assert len(SPLITS) == 10 and all(m * a * w == 8 for m, a, w in SPLITS)


@pytest.mark.parametrize("count", [24, 20])
def test_an_epoch_sees_every_row_once_and_the_next_one_in_another_order(count):
    stream = batches(numbered(count), micro=4, num_steps=15).rows.flatten().tolist()
    epochs = [stream[start : start + count] for start in range(0, 60 - count + 1, count)]

    assert len(epochs) >= 2 and all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    taken = rows_by_step(numbered(count), (4, 1, 1), num_steps=count // 4)
    assert sorted(row for rows in taken for row in rows) == list(range(count))


def test_the_order_is_a_function_of_the_seed_alone():
    shape = {"micro": 2, "accumulation": 2, "num_steps": 9}
    first = batches(numbered(24), **shape, world_size=2, seed=3).rows
    torch.manual_seed(99)
    other_rank = batches(numbered(24), **shape, world_size=2, seed=3, rank=1).rows

    assert torch.equal(other_rank, first)
    assert not torch.equal(batches(numbered(24), **shape, world_size=2, seed=4).rows, first)
    assert torch.equal(batches(numbered(24), micro=8, num_steps=6, seed=3).rows, first[:6])


@pytest.mark.parametrize("split", SPLITS)
def test_num_labels_counts_the_whole_global_batch(split):
    micro, accumulation, world_size = split
    settings = {"micro": micro, "accumulation": accumulation, "world_size": world_size, "num_steps": 4}
    ranks = [batches(numbered(11), **settings, rank=rank) for rank in range(world_size)]
    for step in range(4):
        parts = [rank[step * accumulation + part] for rank in ranks for part in range(accumulation)]
        expected = sum(int((part.labels != IGNORED).sum()) for part in parts)
        assert 8 <= expected == ranks[0].num_labels(step) == ranks[-1].num_labels(step)


@pytest.fixture(scope="module")
def training_examples(data_folder):
    rows = [parse_conversation(row) for row in json.loads((data_folder / "train.json").read_text())]
    examples = tokenized(rows, vicuna(), data_folder / "images")
    assert len(examples) == 24
    return examples


def test_a_loader_from_the_middle_continues_exactly(training_examples):
    source = batches(training_examples, micro=3, accumulation=2, num_steps=4)
    whole = list(loader(source, first=0, num_workers=0))
    rest = list(loader(source, first=3, num_workers=0))

    assert len(whole) == 8 and len(rest) == 2
    assert all(equal(one, other) for one, other in zip(whole[6:], rest, strict=True))
    assert not equal(whole[0], whole[1])
    assert list(loader(source, first=4, num_workers=0)) == []


def test_a_worker_process_gives_the_same_batches(training_examples):
    source = batches(training_examples, micro=3, num_steps=4)
    here, there = (list(loader(source, first=1, num_workers=workers)) for workers in (0, 1))
    assert len(here) == len(there) == 3
    assert all(equal(one, other) for one, other in zip(here, there, strict=True))


def test_a_mistake_in_a_worker_process_has_no_traceback_in_its_message(tmp_path):
    # Commands print the message alone.
    example = Example([IMAGE_ID, 7], [IGNORED, 7], {"image": (tmp_path / "gone.png",)})
    source = batches([example], micro=1, num_steps=1)
    with pytest.raises(UserError, match=r"gone\.png") as error:
        list(loader(source, first=0, num_workers=1))
    assert "Traceback" not in str(error.value)


def talk(*texts, **extra):
    messages = [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]
    return parse_conversation({"conversations": messages, **extra})


TEMPLATES = pytest.mark.parametrize(
    "template", [vicuna(), chatml("be kind")], ids=lambda template: template.name
)
MEDIA_ROW = talk(
    "<image>\nwhat?", "a cat", "and <image><video>?", "a dog", image=["1.jpg", "2.jpg"], video="1.mp4"
)


@TEMPLATES
def test_a_cut_row_keeps_as_many_placeholders_as_pictures_and_videos(tmp_path, template):
    # A picture without its placeholder makes the model refuse the batch in the middle of a run.
    length = len(encode(template, PROCESSOR.tokenizer, MEDIA_ROW.turns)[0])
    found = set()
    for max_tokens in range(1, length + 1):
        for example in tokenized(
            [MEDIA_ROW], template, tmp_path, max_tokens=max_tokens
        ):  # none without a label
            counts = {"image": example.ids.count(IMAGE_ID), "video": example.ids.count(VIDEO_ID)}
            assert {kind: len(paths) for kind, paths in example.media.items()} == {
                kind: n for kind, n in counts.items() if n
            }
            assert all(path.parent == tmp_path for paths in example.media.values() for path in paths)
            assert len(example.sizes) == counts["image"]
            found.add(tuple(path.name for paths in example.media.values() for path in paths))
    assert found == {("1.jpg",), ("1.jpg", "2.jpg"), ("1.jpg", "2.jpg", "1.mp4")}  # the first ones are kept


# Kinds of media


def collated(kind, examples, *, reducer=None, kinds=None, left=False):
    """The micro batch of a model of a kind in `tiny.KINDS`."""
    reducer, kinds = reducer or VisionZip(dominant=4, contextual=2), kinds or kinds_of(examples)
    collate = Collator(tiny.processor(kind), family(kind), reducer, kinds=kinds, num_frames=NUM_FRAMES)
    return collate(examples, left=left)


BATCHES = {
    "one picture a row": ["<image>one", "<image>and another"],
    "several and none": IMAGE_ROWS,
    "several in one row": ["<image><image><image>row"],
    "videos and pictures": VIDEO_ROWS,
    "videos alone": ["<video>one", "text", "<video><video>two"],
    "all": IMAGE_ROWS + VIDEO_ROWS,
    "text alone": ["no picture", "and none"],
}
CASES = [
    (kind, name)
    for kind in tiny.KINDS
    for name in BATCHES
    if kind in tiny.VIDEO or "<video>" not in str(BATCHES[name])
]


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_micro_batch_is_what_the_models_reduced_processor_makes(tmp_path, kind, name, left):
    texts, reducer = BATCHES[name], VisionZip(dominant=4, contextual=2)
    examples = examples_of(texts, tmp_path)
    batch = collated(kind, examples, reducer=reducer, left=left)
    with vzip.attach(family(kind).model, reducer=reducer) as handle:
        expected = processed(
            handle.processor(tiny.processor(kind)), texts, examples, side="left" if left else "right"
        )

    assert torch.equal(batch.input_ids, expected["input_ids"])
    assert torch.equal(batch.attention_mask, expected["attention_mask"])
    for media, inputs in batch.media.items():
        assert (
            batch.num_placeholders[media]
            == (expected["input_ids"] == family(kind).placeholder_id(media)).sum()
        )
        if batch.num_placeholders[media]:
            assert pixels_of(inputs).dtype == torch.uint8  # on its way to the device
            wanted = model_inputs(media, expected)
            assert same(without_padding(floats(inputs), wanted), wanted)
    for row, example in enumerate(examples):
        labels, there = batch.labels[row], batch.attention_mask[row].bool()
        assert labels[there][-NUM_LABELS:].tolist() == example.ids[-NUM_LABELS:]
        assert (labels != IGNORED).sum() == NUM_LABELS


REDUCERS = [
    Identity(),
    Random(budget=5),
    VisionZip(dominant=4, contextual=2),
    VisionZip(dominant=4, contextual=2, anyres="spatial"),
    VisionZip(dominant=3, contextual=4, keep_cls=False),
]


@pytest.mark.parametrize("reducer", REDUCERS, ids=repr)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_there_are_as_many_placeholders_as_features(tmp_path, kind, reducer):
    examples = examples_of(rows_of(kind), tmp_path)
    batch = collated(kind, examples, reducer=reducer)
    assert list(batch.media) == (["image", "video"] if kind in tiny.VIDEO else ["image"])
    with torch.no_grad():
        for media, inputs in batch.media.items():
            features = family(kind).media_features(reducer, media, floats(inputs))
            places = (batch.input_ids == family(kind).placeholder_id(media)).sum()
            assert len(features) == batch.num_placeholders[media] == places > 0
            assert features.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "media"), [(kind, media) for kind in tiny.KINDS for media in family(kind).kinds]
)
def test_media_that_no_row_has_are_blank(tmp_path, kind, media):
    """Under ZeRO 3 every rank must run the same modules: with the shapes of real pictures, but one and without noise."""
    rows = {"image": "<image>one", "video": "<video>one"}
    kinds, others = family(kind).kinds, [rows[other] for other in family(kind).kinds if other != media]
    batch = collated(kind, examples_of([*others, "text"], tmp_path), kinds=kinds)
    real = collated(kind, examples_of([rows[media], "text"], tmp_path), kinds=kinds)

    assert list(batch.media) == list(kinds)
    assert {name for name, count in batch.num_placeholders.items() if not count} == {media}
    assert not (batch.input_ids == family(kind).placeholder_id(media)).any()
    assert batch.media[media].keys() == real.media[media].keys()
    for name, values in floats(batch.media[media]).items():
        there = floats(real.media[media])[name]
        assert len(values) == 1 and values.dtype == there.dtype and values.dim() == there.dim()
    assert not pixels_of(batch.media[media]).any() and pixels_of(real.media[media]).any()  # black
    with torch.no_grad():
        features = family(kind).media_features(
            VisionZip(dominant=4, contextual=2), media, floats(batch.media[media])
        )
        assert features.isfinite().all()


@pytest.mark.parametrize(
    ("texts", "kinds"),
    [
        (["no", "none"], ("image",)),
        (["no", "<image>one"], ("image",)),
        (["<video>one", "none"], ("video",)),
        (["<video>one", "<image>one"], ("image", "video")),
        (["<video><image>both"], ("image", "video")),
    ],
)
def test_kinds_of_are_those_of_all_rows(tmp_path, texts, kinds):
    assert kinds_of(examples_of(texts, tmp_path)) == kinds


def test_a_row_that_a_cut_left_one_of_two_pictures_is_a_row_of_one(tmp_path):
    """LLaVA-OneVision cuts only an image that is alone in its row into tiles."""
    (two,) = examples_of(["<image>a <image>b"], tmp_path)
    row = talk("<image>a", "yes", "<image>b", "no", image=[path.name for path in two.media["image"]])
    length = len(encode(chatml("x"), PROCESSOR.tokenizer, row.turns[:1])[0])
    (one,) = tokenized([row], chatml("x"), tmp_path, max_tokens=length)
    assert one.media == {"image": two.media["image"][:1]}

    whole, cut = (collated("onevision", [example]) for example in (two, one))
    tiles = family("onevision").num_tiles((tiny.SIDE, tiny.SIDE))
    assert whole.media["image"]["batch_num_images"].tolist() == [2] and whole.num_placeholders[
        "image"
    ] == 2 * (6 + 1)
    assert (
        cut.media["image"]["batch_num_images"].tolist() == [1]
        and cut.num_placeholders["image"] == 6 * tiles > 6
    )


@pytest.mark.parametrize("kind", tiny.VIDEO)
@pytest.mark.parametrize("damage", ["vanish", "empty", "a frame is no picture"])
def test_a_video_that_vanishes_or_breaks_later_is_a_user_error_that_names_it(tmp_path, kind, damage):
    examples = examples_of(["<video>one"], tmp_path)
    (path,) = examples[0].media["video"]
    collated(kind, examples)
    if damage == "a frame is no picture":
        for frame in path.iterdir():
            frame.write_bytes(b"no picture")
    else:
        shutil.rmtree(path)
    if damage == "empty":
        path.mkdir()
    with pytest.raises(UserError, match=path.name):
        collated(kind, examples)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_collator_is_light_enough_for_workers_that_are_sent_a_copy(kind):
    """Where workers are not forked they get a pickle: it must not hold the model."""
    family = family_of(tiny.llava(kind))
    collate = Collator(tiny.processor(kind), family, VisionZip(dominant=4, contextual=2))
    held = [getattr(collate.family.model, name, None) for name in ("model", "lm_head")]
    assert held == [None, None]
    assert collate.family.num_image_tokens(collate.reducer, (40, 90)) == family.num_image_tokens(
        collate.reducer, (40, 90)
    )
