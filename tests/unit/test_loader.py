"""Pixels travel as uint8 and become what the processor makes, to the bit; rows of like length go together; workers may die."""

import multiprocessing
import os
import signal
import time
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.utils.data import get_worker_info
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    LlavaImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaOnevisionImageProcessorPil,
    VideoLlavaImageProcessor,
)

from data.batches.collate import Collator
from data.batches.dataset import explain_workers, loader
from data.examples.tokens import Example
from tests.helpers import tiny
from tests.helpers.rows import (
    IMAGE_ROWS,
    NUM_FRAMES,
    VIDEO_ROWS,
    Ready,
    examples_of,
    padded,
    rows_of,
    tokenized,
    without_padding,
)
from tests.unit.test_dataset import IMAGE_ID, PROCESSOR, SPLITS, family, talk
from train.engine import to_device
from train.losses import media_inputs
from vzip import UserError
from vzip.media import LOOKUP, FrameProcessor, lookup_table, model_inputs, normalised, pixels_of
from vzip.reducers.identity import Identity
from vzip.reducers.visionzip import VisionZip
from vzip.templates.encode import IGNORED, vicuna

SIDE = tiny.SIDE
SQUARE = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
TILES = {"image_grid_pinpoints": tiny.pinpoints()}
PROCESSORS = {
    "CLIP": partial(CLIPImageProcessorPil, **SQUARE),
    "BiT": partial(BitImageProcessorPil, **SQUARE),
    "LLaVA, padded": partial(LlavaImageProcessorPil, do_pad=True, **SQUARE),
    "NeXT": partial(LlavaNextImageProcessorPil, **TILES, **SQUARE),
    "OneVision": partial(LlavaOnevisionImageProcessorPil, **TILES, size={"height": SIDE, "width": SIDE}),
    "Video-LLaVA": partial(VideoLlavaImageProcessor, **SQUARE),
}
SETTINGS = {
    "as it is": {},
    "not rescaled": {"do_rescale": False},
    "not normalised": {"do_normalize": False},
    "neither": {"do_rescale": False, "do_normalize": False},
    "other values": {"rescale_factor": 1 / 127, "image_mean": [0.1, 0.5, 0.9], "image_std": [0.9, 0.5, 0.3]},
}
PICTURES = [
    [tiny.picture(0, 40, 90)],
    [tiny.picture(1, 150, 60), tiny.picture(2, 20, 200)],
    [tiny.picture(3, SIDE, SIDE)],
]
VIDEOS = [[tiny.picture(10 * video + frame, 40, 90) for frame in range(3)] for video in range(2)]


def on_the_device(kind, processor, media, dtype=torch.float32):
    """Pictures or videos the loader's way."""
    made = model_inputs(kind, processor(media, return_tensors="pt", do_rescale=False, do_normalize=False))
    assert pixels_of(made).dtype == torch.uint8
    return normalised(made | {LOOKUP: lookup_table(kind, processor)}, dtype)


def expected(kind, processor, media):
    (name, pixels), *more = model_inputs(kind, processor(media, return_tensors="pt")).items()
    return {name: pixels.float(), **dict(more)}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_what_the_processor_makes_to_the_bit(name, settings):
    processor = PROCESSORS[name](**SETTINGS[settings])
    for kind, media, process in (
        ("image", PICTURES, processor),
        ("video", VIDEOS, FrameProcessor(processor)),
    ):
        wanted = expected(kind, process, media)
        made = without_padding(on_the_device(kind, process, media), wanted)
        assert made.keys() == wanted.keys() and LOOKUP not in made
        assert all(torch.equal(made[name], wanted[name]) for name in made)
        assert pixels_of(wanted).dim() == (5 if kind == "video" or "image_sizes" in made else 4)


@pytest.mark.parametrize("settings", ["as it is", "other values"])
def test_settings_change_the_levels(settings):
    lookup = lookup_table("image", PROCESSORS["CLIP"](**SETTINGS[settings]))
    assert lookup.shape == (3, 256) and (lookup.diff(dim=1) > 0).all()
    assert torch.equal(lookup, lookup_table("image", PROCESSORS["CLIP"]())) == (settings == "as it is")


def test_in_half_precision_pixels_are_the_rounded_ones():
    processor = PROCESSORS["NeXT"]()
    one, other = (
        on_the_device("image", processor, PICTURES, dtype) for dtype in (torch.bfloat16, torch.float32)
    )
    assert pixels_of(one).dtype == torch.bfloat16 and torch.equal(pixels_of(one), pixels_of(other).bfloat16())
    assert torch.equal(one["image_sizes"], other["image_sizes"])  # 150 px and more are no bfloat16


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_micro_batch_brings_bytes_to_the_device(tmp_path, kind):
    batch = Collator(
        tiny.processor(kind), family(kind), Identity(), kinds=family(kind).kinds, num_frames=NUM_FRAMES
    )(examples_of(rows_of(kind), tmp_path))
    there = to_device(batch, torch.device("meta"))
    assert {value.device.type for inputs in there.media.values() for value in inputs.values()} == {"meta"}
    assert {getattr(there, name).device.type for name in ("input_ids", "attention_mask", "labels")} == {
        "meta"
    }
    for medium in batch.media:
        assert pixels_of(batch.media[medium]).dtype == torch.uint8
        assert pixels_of(media_inputs(there, medium, torch.bfloat16)).dtype == torch.bfloat16
        assert media_inputs(there, medium, torch.bfloat16).keys() == batch.media[medium].keys() - {LOOKUP}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_pixels_are_the_same_bits(tmp_path):
    processor = tiny.processor("next")
    examples = examples_of(IMAGE_ROWS, tmp_path)
    source = padded(examples, Collator(processor, family("next"), Identity()), micro=4, num_steps=1)
    (batch,) = loader(source, first=0, num_workers=1)
    assert batch.input_ids.is_pinned() and pixels_of(batch.media["image"]).is_pinned()
    there = media_inputs(to_device(batch, torch.device("cuda")), "image", torch.float32)
    assert all(
        torch.equal(value.cpu(), media_inputs(batch, "image", torch.float32)[name])
        for name, value in there.items()
    )


# The seam


def test_media_may_come_from_elsewhere_than_files(tmp_path):
    examples = examples_of(IMAGE_ROWS, tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    collate = Collator(PROCESSOR, family(), Identity(), media=Ready())
    batch = collate(examples)
    assert (batch.input_ids == IMAGE_ID).sum(dim=1).tolist() == [2, 0, 4, 2] and batch.num_placeholders == {
        "image": 8
    }
    assert media_inputs(batch, "image", torch.bfloat16)["features"].flatten().tolist() == [
        0,
        0,
        2,
        2,
        2,
        2,
        3,
        3,
    ]
    assert media_inputs(batch, "image", torch.bfloat16)["features"].dtype == torch.bfloat16
    assert collate(examples[1:2]).media["image"]["features"].tolist() == [[0], [0]]


# The order


def of_lengths(lengths):
    """Text-only rows of these lengths, with one label each; the first id tells the row."""
    return [
        Example([number, *[7] * (int(length) - 1)], [IGNORED] * (int(length) - 1) + [7], {})
        for number, length in lengths
    ]


def mixed(count, seed=0):
    """Lengths as of instruction data: half of the rows shorter than 280 tokens, a tenth longer than 600."""
    generator = torch.Generator().manual_seed(seed)
    return (280 * torch.exp(0.6 * torch.randn(count, generator=generator))).long().clamp(35, 2048).tolist()


def all_ranks(lengths, split, *, num_steps=3):
    micro, accumulation, world_size = split
    settings = {
        "micro": micro,
        "accumulation": accumulation,
        "world_size": world_size,
        "num_steps": num_steps,
    }
    examples, collate = of_lengths(enumerate(lengths)), Collator(PROCESSOR, family(), Identity())
    return [padded(examples, collate, **settings, rank=rank) for rank in range(world_size)]


def padding_share(batches):
    batches = list(batches)
    return 1 - sum(int(b.attention_mask.sum()) for b in batches) / sum(
        b.attention_mask.numel() for b in batches
    )


def test_the_longest_rows_of_a_step_come_first_and_the_set_is_the_permutations():
    lengths = mixed(50)
    (batches,) = all_ranks(lengths, (8, 1, 1), num_steps=10)
    (unsorted,) = all_ranks([50] * 50, (8, 1, 1), num_steps=10)
    taken, drawn = (
        [source[step].input_ids[:, 0].tolist() for step in range(10)] for source in (batches, unsorted)
    )
    assert drawn == batches.rows.tolist()
    for rows, drawn_rows in zip(taken, drawn, strict=True):
        assert sorted(rows) == sorted(drawn_rows)
        assert [lengths[row] for row in rows] == sorted((lengths[row] for row in rows), reverse=True)
    assert taken != drawn


@pytest.mark.parametrize(("micro", "most"), [(16, 0.31), (4, 0.1)])
def test_rows_of_like_length_need_little_padding(micro, most):
    (batches,) = all_ranks(mixed(768), (micro, 128 // micro, 1), num_steps=6)
    examples, (collate,) = batches.layout.examples, batches.layout.collates
    before = padding_share(collate(examples[first : first + micro]) for first in range(0, 768, micro))
    after = padding_share(batches[index] for index in range(len(batches)))
    assert after < before / 2 and after < most


@pytest.mark.parametrize("split", SPLITS)
def test_ranks_of_a_part_hold_neighbouring_lengths(split):
    micro, accumulation, _ = split
    ranks = all_ranks(mixed(48), split)
    for step in range(3):
        parts = [[rank[step * accumulation + part] for rank in ranks] for part in range(accumulation)]
        assert all(len(batch.input_ids) == micro for part in parts for batch in part)
        lengths = [
            sorted(int(n) for batch in part for n in batch.attention_mask.sum(dim=1)) for part in parts
        ]
        assert all(longer[0] >= shorter[-1] for longer, shorter in pairwise(lengths))
        taken = sorted(int(row) for part in parts for batch in part for row in batch.input_ids[:, 0])
        assert taken == sorted(ranks[0].rows[step].tolist())


def test_no_rank_has_the_longest_rows_of_every_part():
    lengths = torch.tensor(mixed(512)).clamp(
        max=600
    )  # no rank can make up for one row that is longer than all others
    ranks = all_ranks(lengths.tolist(), (2, 8, 8), num_steps=4)
    totals = [sum(int(rank[index].attention_mask.sum()) for index in range(len(rank))) for rank in ranks]
    longest_first = lengths[ranks[0].rows].sort(dim=1, descending=True).values
    in_line = longest_first.view(4 * 8, 8, 2).sum(dim=(0, 2)).tolist()
    assert max(totals) / min(totals) < 1.05 < max(in_line) / min(in_line)


@pytest.mark.parametrize("reducer", [Identity(), VisionZip(dominant=4, contextual=2)], ids=repr)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_lengths_are_those_of_the_expanded_rows(tmp_path, kind, reducer):
    texts = [
        "<image>one",
        "no picture",
        "<image>\nanother",
        "<image>a third one",
        "<image>4",
        "<image>two <image>",
    ]
    texts += VIDEO_ROWS[:1] if kind in tiny.VIDEO else []
    examples = examples_of(texts, tmp_path)
    collate = Collator(
        tiny.processor(kind), family(kind), reducer, kinds=family(kind).kinds, num_frames=NUM_FRAMES
    )
    assert collate.lengths(examples).tolist() == collate(examples).attention_mask.sum(dim=1).tolist()


def test_lengths_of_mapped_rows_are_the_same(tmp_path):
    rows = [
        talk("<image>\nwhat?", "a cat", image="1.png"),
        talk("q", "a long answer"),
        talk("q" * 200, "no room"),
    ]
    rows += [talk("<image>\nand <image>?", "two", image=["1.png", "2.png"])]
    examples = tokenized(
        rows, vicuna(), tmp_path, max_tokens=220, sizes={"1.png": (150, 60), "2.png": (30, 30)}
    )
    collate = Collator(tiny.processor("next"), family("next"), VisionZip(dominant=4, contextual=2))
    assert (
        len(examples) == 3 and examples.column("num_whole_tokens").max() < 220
    )  # the row without a label is not among them
    assert collate.lengths(examples).tolist() == collate.lengths(list(examples)).tolist()
    mapped, plain = (padded(given, collate, micro=3, num_steps=3) for given in (examples, list(examples)))
    for step in range(3):
        (one,), (other,) = (
            source.layout.parts(step, source.rows[step].tolist()) for source in (mapped, plain)
        )
        assert one == other and sorted(one.rows) == [0, 1, 2]
        for count in ("num_labels", "num_taught_labels", "num_tokens"):
            assert getattr(mapped, count)(step) == getattr(plain, count)(step) > 0


def test_an_image_of_unknown_size_counts_as_a_usual_one():
    collate = Collator(tiny.processor("next"), family("next"), Identity())
    examples = [Example([IMAGE_ID, 7], [IGNORED, 7], {"image": ("a.png",)})]
    assert collate.lengths(examples).tolist() == [1 + family("next").num_image_tokens(Identity())]


@pytest.mark.parametrize("split", SPLITS)
def test_num_tokens_counts_the_whole_global_batch(split):
    ranks = all_ranks(mixed(20), split)
    accumulation = split[1]
    for step in range(3):
        parts = [rank[step * accumulation + part] for rank in ranks for part in range(accumulation)]
        assert {rank.num_tokens(step) for rank in ranks} == {
            sum(int(part.attention_mask.sum()) for part in parts)
        }


# Workers


class Counting(Ready):
    """Tells how many threads the worker has."""

    def blank(self, kind):
        return {
            "threads": torch.tensor(torch.get_num_threads()),
            "workers": torch.tensor(get_worker_info().num_workers),
        }


class Dying(Ready):
    """A worker that the system ends, as it does where memory runs out."""

    def blank(self, kind):
        assert get_worker_info() is not None
        os.kill(os.getpid(), signal.SIGKILL)


def text_batches(media, num_steps=4):
    collate = Collator(PROCESSOR, family(), Identity(), media=media)
    return padded(of_lengths(enumerate([5] * 8)), collate, micro=2, num_steps=num_steps)


def test_a_worker_has_one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        batches = list(loader(text_batches(Counting()), first=0, num_workers=2))
    finally:
        torch.set_num_threads(threads)
    assert [batch.media["image"]["threads"].item() for batch in batches] == [1] * 4
    assert [batch.media["image"]["workers"].item() for batch in batches] == [2] * 4


def test_a_worker_that_the_system_ends_is_told_and_waits_for_nothing():
    with pytest.raises(UserError, match=r"memory ran out.*data\.num_workers.*resumes"):
        list(loader(text_batches(Dying()), first=0, num_workers=2))
    assert not multiprocessing.active_children()


def test_it_is_told_too_while_the_model_computes():
    batches = iter(loader(text_batches(Dying()), first=0, num_workers=1))
    with pytest.raises(UserError, match=r"memory ran out.*data\.num_workers"), explain_workers():
        next(batches)
        time.sleep(10)


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="CUDA error") as error, explain_workers():
        raise RuntimeError("CUDA error: out of memory")
    assert not isinstance(error.value, UserError)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_run_goes_on_where_a_picture_vanished(tmp_path, num_workers):
    examples = examples_of([f"<image>row {number}" for number in range(6)], tmp_path)
    source = padded(examples, Collator(PROCESSOR, family(), Identity()), micro=1, num_steps=6)
    whole = list(loader(source, first=0, num_workers=0))
    (path,) = examples[source.rows[3].item()].media["image"]
    away = path.rename(path.with_suffix(".gone"))

    seen = []
    with pytest.raises(UserError, match=rf"{path.name}.*resumes"):
        for batch in loader(source, first=0, num_workers=num_workers):
            seen.append(batch)
    assert len(seen) == 3 and not multiprocessing.active_children()
    away.rename(path)
    seen += loader(source, first=3, num_workers=num_workers)
    assert all(torch.equal(one.input_ids, other.input_ids) for one, other in zip(seen, whole, strict=True))
    assert all(
        torch.equal(pixels_of(one.media["image"]), pixels_of(other.media["image"]))
        for one, other in zip(seen, whole, strict=True)
    )
