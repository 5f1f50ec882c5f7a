"""Padding to a square: pixels are LLaVA's, and a run keeps what it was tuned with."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    LlavaImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaProcessor,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)

import vzip
from data.cache.features import cache_settings
from tests.helpers import tiny
from tests.helpers.configs import composed
from tests.helpers.errors import refused
from tests.helpers.original import save_original
from tests.helpers.runs import attached, edit_meta, family_class, save_run, tune
from train.models import load_family, load_unreduced_processor
from vzip import Comparison
from vzip.media import image_aspect_ratio, set_aspect_ratio
from vzip.runs.export import write_hf, write_llava
from vzip.runs.meta import META, WEIGHTS

CROPPING = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
SQUEEZING = {"size": {"height": 56, "width": 56}}
SIZES = [(90, 41), (33, 70), (64, 64), (600, 400), (57, 56), (1, 30)]


def photograph(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def llavas_square(picture, mean):
    """LLaVA's `expand2square` (llava/mm_utils.py), which its `process_images` calls for "pad"."""
    side = max(picture.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in mean))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def pixels_of(processor, picture):
    return processor.image_processor(picture, return_tensors="pt")["pixel_values"]


def processor_with(images):
    return LlavaProcessor(images, tiny.tokenizer(), patch_size=14)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("processor_class", "settings"),
    [
        (CLIPImageProcessorPil, CROPPING),
        (BitImageProcessorPil, CROPPING),
        (SiglipImageProcessorPil, SQUEEZING),
        (ViTImageProcessorPil, SQUEEZING),
        (LlavaImageProcessorPil, CROPPING),
    ],
)
def test_padded_pixels_are_those_of_llava(processor_class, settings, size, tmp_path):
    picture = photograph(*size)
    original = processor_class(**settings)
    square = llavas_square(picture, original.image_mean)
    expected = original(square, return_tensors="pt")["pixel_values"]

    processor = set_aspect_ratio(processor_with(processor_class(**settings)), "pad")
    assert image_aspect_ratio(processor) == "pad"
    assert torch.equal(pixels_of(processor, picture), expected)

    # A saved processor pads too, without the setting.
    processor.save_pretrained(tmp_path)
    assert torch.equal(pixels_of(AutoProcessor.from_pretrained(tmp_path), picture), expected)


def test_the_default_leaves_the_processor_as_it_is():
    images = CLIPImageProcessorPil(**CROPPING)
    processor = set_aspect_ratio(processor_with(images), None)
    assert processor.image_processor is images and image_aspect_ratio(processor) == "square"
    assert set_aspect_ratio(processor, "square").image_processor is images

    picture = photograph(600, 400)
    cropped = pixels_of(processor, picture)
    set_aspect_ratio(processor, "pad")
    assert not torch.equal(pixels_of(processor, picture), cropped)
    set_aspect_ratio(processor, "square")
    assert torch.equal(pixels_of(processor, picture), cropped)


def test_processors_that_make_tiles_are_refused():
    processor = processor_with(LlavaNextImageProcessorPil(**CROPPING))
    assert image_aspect_ratio(processor) is None
    words = ["model.image_aspect_ratio=pad", "LlavaNextImageProcessor", "model.image_aspect_ratio=null"]
    refused(set_aspect_ratio, processor, "pad", words=words)
    refused(set_aspect_ratio, processor, "wide", words=["model.image_aspect_ratio", "wide", "pad, square"])


# Settings


def test_llavas_and_mini_geminis_configs_pad():
    for model in ("llava-7b", "llava-13b", "mini-gemini-7b", "mini-gemini-13b"):
        assert composed(f"model={model}").model.image_aspect_ratio == "pad"
    for model in ("smol", "next-7b", "onevision-7b", "video-llava-7b"):
        assert composed(f"model={model}").model.image_aspect_ratio is None


def test_the_recipe_pads_and_says_so(tiny_folder, capsys):
    cfg = composed("model=llava-7b", f"model.id={tiny_folder}")
    assert image_aspect_ratio(load_unreduced_processor(cfg)) == "pad"
    assert "image_aspect_ratio=pad" in capsys.readouterr().out

    cfg = composed("model=llava-7b", f"model.id={tiny_folder}", "model.image_aspect_ratio=null")
    assert image_aspect_ratio(load_unreduced_processor(cfg)) == "square"
    assert capsys.readouterr().out == ""


# Runs


@pytest.fixture(params=["pad", "square"])
def ratio(request):
    return request.param


@pytest.fixture
def run(tmp_path, tiny_folder, ratio):
    return save_run(tmp_path / "run", tune(attached(tiny_folder)), tiny_folder, image_aspect_ratio=ratio)


def test_a_run_is_opened_with_its_own_pictures_also_on_a_base_that_pads_in_another_way(run, ratio, tmp_path):
    """The same weights in LLaVA's layout, whose config.json has the other ratio."""
    other = {"pad": "square", "square": "pad"}[ratio]
    base = tmp_path / "base"
    tiny.llava().save_pretrained(base)
    set_aspect_ratio(tiny.processor(), other).save_pretrained(base)
    for source in (None, str(base)):
        comparison = Comparison.open(run, base=source, device="cpu")
        _, loaded = vzip.load(run, base=source, device="cpu")
        assert image_aspect_ratio(comparison.processor) == image_aspect_ratio(loaded) == ratio


def test_a_run_that_records_nothing_has_the_processor_as_it_is(run):
    edit_meta(run, lambda meta: meta.pop("image_aspect_ratio"))
    assert image_aspect_ratio(Comparison.open(run, device="cpu").processor) == "square"

    edit_meta(run, lambda meta: meta.update(image_aspect_ratio="wide"))
    refused(Comparison.open, run, device="cpu", words=[META, "image_aspect_ratio", "wide"])


def test_a_projector_refuses_a_processor_with_other_pictures(run, ratio, tiny_folder):
    handle = attached(tiny_folder)
    vzip.load_projector(handle, run)
    processor = tiny.processor()
    if ratio == "square":
        handle.processor(processor)
        set_aspect_ratio(processor, "pad")

    words = [f"tuned with image_aspect_ratio={ratio}", f"set_aspect_ratio(processor, '{ratio}')"]
    refused(handle.processor, processor, words=words)
    handle.processor(set_aspect_ratio(processor, ratio))


def test_a_starting_projector_of_other_pictures_is_named(run, ratio, tiny_folder, capsys):
    settings = ["model=llava-7b", f"model.id={tiny_folder}", "reducer.budget=6", "model.dtype=float32"]
    load_family(composed(*settings, f"model.projector={run / WEIGHTS}"))
    named = "was tuned with image_aspect_ratio=square, and this run has pad"
    assert (named in capsys.readouterr().out) == (ratio == "square")


def test_an_export_keeps_it(run, ratio, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    write_hf(run, folder)
    assert image_aspect_ratio(AutoProcessor.from_pretrained(folder)) == ratio
    assert image_aspect_ratio(vzip.load(folder, device="cpu")[1]) == ratio
    assert json.loads((folder / "config.json").read_text())["vzip"]["image_aspect_ratio"] == ratio


def test_an_export_for_llavas_code_says_it(tmp_path, ratio):
    # The base's own config.json has the other ratio.
    other = {"pad": "square", "square": "pad"}[ratio]
    base = save_original(tmp_path / "base", tiny.llava(), image_aspect_ratio=other)
    run = save_run(tmp_path / "run", tune(attached(base)), base, image_aspect_ratio=ratio)
    folder = tmp_path / "llava"
    folder.mkdir()
    write_llava(run, folder)
    assert json.loads((folder / "config.json").read_text())["image_aspect_ratio"] == ratio


def test_a_feature_cache_belongs_to_one_of_them(tiny_folder):
    handle = attached(tiny_folder)
    names = {"base_fingerprint": "", "examples_name": "", "num_frames": 1}
    settings = []
    for ratio in ("pad", "square"):
        processor = set_aspect_ratio(family_class().load_processor(str(tiny_folder)), ratio)
        settings.append(cache_settings(handle.family, handle.reducer, processor, **names))
    assert settings[0] != settings[1]
