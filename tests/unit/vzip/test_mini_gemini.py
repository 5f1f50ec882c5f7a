"""Mini-Gemini against a transcription of its formulas in plain loops."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from tests.helpers import tiny
from tests.helpers.mini_gemini import SIDE, WIDTHS, WORDS, batch, build, config, timm_names
from vzip import UserError
from vzip.checkpoints.original.mini_gemini import is_original
from vzip.checkpoints.shards import read_config
from vzip.models.mini_gemini import (
    MiniGeminiConfig,
    MiniGeminiForConditionalGeneration,
    make_processor,
)

# A transcription of the published formulas, by timm's names for the ConvNeXt


def layer_norm(x, weight, bias, eps):
    """Normalise the last dimension."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def bilinear(image, size):
    """[c, h, w] -> [c, size, size]: half-pixel centres, no antialiasing."""

    def weights(old):
        matrix = image.new_zeros(size, old)
        for row in range(size):
            place = max((row + 0.5) * old / size - 0.5, 0.0)
            low = min(int(place), old - 1)
            matrix[row, low] += 1 - (place - low)
            matrix[row, min(low + 1, old - 1)] += place - low
        return matrix

    return torch.einsum("yh,chw,xw->cyx", weights(image.shape[1]), image, weights(image.shape[2]))


def convolve_patches(x, weight, bias):
    """A convolution whose stride is its size."""
    size = weight.shape[-1]
    out = x.new_zeros(len(weight), x.shape[1] // size, x.shape[2] // size)
    for row, column in itertools.product(range(out.shape[1]), range(out.shape[2])):
        part = x[:, row * size : (row + 1) * size, column * size : (column + 1) * size]
        out[:, row, column] = torch.einsum("ochw,chw->o", weight, part) + bias
    return out


def norm_2d(x, p, name):
    return layer_norm(x.movedim(0, -1), p[f"{name}.weight"], p[f"{name}.bias"], 1e-6).movedim(-1, 0)


def block(x, p, name):
    """x + gamma * fc2(gelu(fc1(LN(depthwise 7 x 7 of x))))."""
    _, height, width = x.shape
    padded = torch.nn.functional.pad(x, (3, 3, 3, 3))
    y = p[f"{name}.conv_dw.bias"][:, None, None].expand_as(x)
    for dy, dx in itertools.product(range(7), range(7)):
        y = (
            y
            + p[f"{name}.conv_dw.weight"][:, 0, dy, dx, None, None]
            * padded[:, dy : dy + height, dx : dx + width]
        )
    y = norm_2d(y, p, f"{name}.norm").movedim(0, -1)
    y = gelu(y @ p[f"{name}.mlp.fc1.weight"].T + p[f"{name}.mlp.fc1.bias"])
    y = (y @ p[f"{name}.mlp.fc2.weight"].T + p[f"{name}.mlp.fc2.bias"]) * p[f"{name}.gamma"]
    return x + y.movedim(-1, 0)


def convnext(image, p):
    """The maps of all stages for one picture, resized to the first one's size."""
    x = norm_2d(convolve_patches(image, p["stem.0.weight"], p["stem.0.bias"]), p, "stem.1")
    maps = []
    for stage in range(4):
        if stage:
            x = norm_2d(x, p, f"stages.{stage}.downsample.0")
            x = convolve_patches(
                x, p[f"stages.{stage}.downsample.1.weight"], p[f"stages.{stage}.downsample.1.bias"]
            )
        x = block(x, p, f"stages.{stage}.blocks.0")
        maps.append(bilinear(x, maps[0].shape[1]) if stage else x)
    return torch.cat(maps)


def mine(low, high, p):
    """Mine one picture patch by patch, from low [N, d] and high [c, S, S]."""

    def project(x, name):
        x = layer_norm(x, p[f"{name}.0.weight"], p[f"{name}.0.bias"], 1e-5)
        return x @ p[f"{name}.1.weight"].T + p[f"{name}.1.bias"]

    side = high.shape[1] // tiny.GRID
    mined = []
    for index, patch in enumerate(low):
        top, left = side * (index // tiny.GRID), side * (index % tiny.GRID)
        region = [high[:, y, x] for y in range(top, top + side) for x in range(left, left + side)]
        query = project(patch, "query")
        scores = [query @ project(feature, "key") / math.sqrt(len(query)) for feature in region]
        weights = [math.e**score for score in scores]
        values = [project(feature, "value") for feature in region]
        total = sum(weight * value for weight, value in zip(weights, values, strict=True))
        mined.append(patch + total / sum(weights))
    return torch.stack(mined)


def plain_logits(model, inputs):
    inner = model.model
    high = timm_names(dict(inner.high_resolution_tower.named_parameters()))
    embeds = inner.language_model.embed_tokens(inputs["input_ids"]).clone()
    projector = inner.multi_modal_projector
    for index, image in enumerate(inputs["pixel_values"]):
        small = bilinear(image, tiny.SIDE)[None]
        low = inner.vision_tower(small, output_hidden_states=True).hidden_states[-2][0, 1:]
        mined = mine(low, convnext(image, high), dict(inner.mining.named_parameters()))
        hidden = gelu(mined @ projector.linear_1.weight.T + projector.linear_1.bias)
        embeds[index, inputs["input_ids"][index] == WORDS] = (
            hidden @ projector.linear_2.weight.T + projector.linear_2.bias
        )
    return model.lm_head(inner.language_model(inputs_embeds=embeds).last_hidden_state)


def test_logits_loss_and_gradients_are_those_of_the_formulas():
    model, inputs = build(torch.float64), batch(torch.float64)
    projector = list(model.model.multi_modal_projector.parameters())
    output = model(**inputs)
    gradients = torch.autograd.grad(output.loss, projector)
    logits = plain_logits(model, inputs)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
    torch.testing.assert_close(output.logits, logits, atol=1e-8, rtol=1e-8)
    # transformers computes the loss in float32.
    torch.testing.assert_close(output.loss.double(), loss, atol=1e-6, rtol=1e-6)
    for gradient, expected in zip(gradients, torch.autograd.grad(loss, projector), strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)


def test_an_example_of_a_batch_is_as_if_alone_and_generate_works():
    model, inputs = build(), batch()
    with torch.no_grad():
        together = model(**inputs).logits
        alone = model(**{name: value[1:] for name, value in inputs.items()}).logits
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=1e-5)
    del inputs["labels"]
    ids = model.generate(**inputs, max_new_tokens=2, do_sample=False, pad_token_id=0, eos_token_id=-1)
    assert ids.shape == (2, 24)
    assert torch.equal(ids[:, 22], together[:, -1].argmax(-1))


def test_half_precision_interpolates_in_float32():
    inner, pixels = build(torch.bfloat16).model, batch()["pixel_values"].bfloat16()
    expected = torch.nn.functional.interpolate(pixels.float(), size=(56, 56), mode="bilinear").bfloat16()
    assert torch.equal(inner.low_resolution(pixels), expected)
    assert inner.get_image_features(pixels).last_hidden_state.dtype == torch.bfloat16


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_what_is_saved_is_loaded(tmp_path, attention):
    model, inputs = build(), batch()
    model.save_pretrained(tmp_path)
    loaded = MiniGeminiForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=attention)
    assert not is_original(read_config(str(tmp_path)))
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_the_public_models_are_of_the_default_size():
    with torch.device("meta"):
        shallow = MiniGeminiConfig(text_config={"model_type": "llama", "num_hidden_layers": 1})
        inner = MiniGeminiForConditionalGeneration(shallow).model
        pixels = torch.empty(1, 3, 768, 768)
        assert inner.high_resolution_tower(pixels).shape == (1, 2880, 192, 192)
        assert inner.get_image_features(pixels).pooler_output[0].shape == (576, 4096)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"high_resolution_config": {"image_size": 40}}, "high_resolution_config.image_size=40"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy='full'"),
        ({"vision_feature_layer": [-2, -1]}, "vision_feature_layer"),
    ],
)
def test_a_config_that_mining_can_not_serve_is_refused(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        MiniGeminiForConditionalGeneration(config(**changes))


def test_pictures_and_patches_that_do_not_fit_are_refused():
    inner = build().model
    with pytest.raises(UserError, match="56 x 56 pixels"):
        inner.get_image_features(torch.zeros(1, 3, 56, 56))
    with pytest.raises(UserError, match="'full'"):
        inner.get_image_features(torch.zeros(1, 3, SIDE, SIDE), vision_feature_select_strategy="full")
    for num_patches, side in ((17, 16), (16, 18)):
        with pytest.raises(UserError, match=f"{num_patches} patches can't share {side} x {side}"):
            inner.mining(torch.zeros(1, num_patches, 32), torch.zeros(1, sum(WIDTHS), side, side))


# Processor


def plain_pixels(picture):
    """float[3, SIDE, SIDE]: the picture padded with the mean colour, resized and normalised."""
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    side = max(picture.size)
    square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in mean))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    pixels = np.array(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / 255
    return torch.tensor((pixels - mean) / std, dtype=torch.float32).movedim(-1, 0)


def test_the_processor_pads_and_gives_a_placeholder_for_each_small_patch(tmp_path):
    processor = make_processor(config(), tiny.tokenizer())
    pictures = [
        tiny.picture(0, 90).crop((0, 0, 90, 31)),
        tiny.picture(1, 80).crop((0, 0, 27, 80)),
        tiny.picture(2, 64),
    ]
    inputs = processor(images=pictures, text=["<image> a"] * 3, return_tensors="pt", padding=True)
    assert (inputs["input_ids"] == tiny.SPECIAL.index("<image>")).sum(1).tolist() == [16, 16, 16]
    torch.testing.assert_close(
        inputs["pixel_values"], torch.stack([plain_pixels(picture) for picture in pictures])
    )
    counts = processor._get_num_multimodal_tokens(image_sizes=[(31, 90)])
    assert list(counts.num_image_tokens) == [16]
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)(
        images=pictures, text=["<image> a"] * 3, return_tensors="pt", padding=True
    )
    assert torch.equal(again["pixel_values"], inputs["pixel_values"]) and torch.equal(
        again["input_ids"], inputs["input_ids"]
    )
