"""Pixels travel as uint8, and become what the processor makes to the bit."""

from functools import partial

import pytest
import torch
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    LlavaImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaOnevisionImageProcessorPil,
    VideoLlavaImageProcessor,
)

from tests.helpers import tiny
from tests.helpers.examples import without_padding
from vzip.media import FrameProcessor, MediaInputs, lookup_table

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
OTHER_VALUES = {"rescale_factor": 1 / 127, "image_mean": [0.1, 0.5, 0.9], "image_std": [0.9, 0.5, 0.3]}
SETTINGS = [
    {},
    {"do_rescale": False},
    {"do_normalize": False},
    {"do_rescale": False, "do_normalize": False},
    OTHER_VALUES,
]
PICTURES = [
    [tiny.picture(0, 40, 90)],
    [tiny.picture(1, 150, 60), tiny.picture(2, 20, 200)],
    [tiny.picture(3, SIDE, SIDE)],
]
VIDEOS = [[tiny.picture(10 * video + frame, 40, 90) for frame in range(3)] for video in range(2)]


def uint8_inputs(kind, processor, media):
    """What data workers make: pixels that are neither rescaled nor normalized."""
    processed = processor(media, return_tensors="pt", do_rescale=False, do_normalize=False)
    inputs = MediaInputs.from_processed(kind, processed, lookup=lookup_table(kind, processor))
    assert inputs.pixels.dtype == torch.uint8
    return inputs


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_what_the_processor_makes_to_the_bit(name):
    for settings in SETTINGS:
        processor = PROCESSORS[name](**settings)
        for kind, media, process in (
            ("image", PICTURES, processor),
            ("video", VIDEOS, FrameProcessor(processor)),
        ):
            expected = MediaInputs.from_processed(kind, process(media, return_tensors="pt"))
            inputs = uint8_inputs(kind, process, media).normalized(torch.float32)
            pixels = expected.pixels.float()
            assert torch.equal(without_padding(inputs.pixels, pixels), pixels)
            assert inputs.pixel_name == expected.pixel_name
            assert inputs.extra.keys() == expected.extra.keys()
            assert all(torch.equal(value, expected.extra[key]) for key, value in inputs.extra.items())
            assert inputs.arguments.keys() == expected.arguments.keys()


def test_the_lookup_table_follows_the_settings():
    plain = lookup_table("image", PROCESSORS["CLIP"]())
    other = lookup_table("image", PROCESSORS["CLIP"](**OTHER_VALUES))
    for lookup in (plain, other):
        assert lookup.shape == (3, 256)
        assert (lookup.diff(dim=1) > 0).all()
    assert not torch.equal(plain, other)


def test_in_half_precision_pixels_are_the_rounded_ones():
    inputs = uint8_inputs("image", PROCESSORS["NeXT"](), PICTURES)
    rounded = inputs.normalized(torch.bfloat16)
    assert rounded.pixels.dtype == torch.bfloat16
    assert torch.equal(rounded.pixels, inputs.normalized(torch.float32).pixels.bfloat16())

    # A side of more than 256 px would be rounded too.
    assert torch.equal(rounded.extra["image_sizes"], inputs.extra["image_sizes"])
