"""Public checkpoints of Mini-Gemini against the model that they hold."""

import pytest
import torch

from tests.helpers import tiny
from tests.helpers.errors import refused
from tests.helpers.mini_gemini import GROWN, WIDTHS, WORDS, batch, build, config, save_public, timm_names
from vzip.checkpoints.original.mini_gemini import (
    convnext_weights,
    is_original,
    load_model,
    load_processor,
)
from vzip.checkpoints.shards import read_config
from vzip.models.mini_gemini import HighResolutionTower


def load(path):
    return load_model(path, dtype=torch.float32)


@pytest.mark.parametrize("towers", [True, False], ids=["towers inside", "towers outside"])
def test_a_public_checkpoint_gives_the_same_logits(tmp_path, towers):
    model, inputs = build(), batch()
    path = save_public(tmp_path, model, towers=towers)
    loaded = load(path)
    assert is_original(read_config(path)) and not loaded.training
    assert (loaded.config.image_token_index, loaded.config.image_seq_length) == (WORDS, 16)
    assert loaded.config.high_resolution_config.hidden_sizes == WIDTHS
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_the_processor_of_a_public_checkpoint_fits_its_model(tmp_path):
    path = save_public(tmp_path, build())
    processor = load_processor(path)
    inputs = processor(images=[tiny.picture(0, 31, 90)], text=["w1 <image> w2"], return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[4, *[WORDS] * 16, 5]]
    assert load(path)(**inputs).logits.shape == (1, 18, GROWN)


HIGH = "model.vision_tower_aux.vision_"
LOW = "model.vision_tower.vision_tower.vision_model."


def without(name):
    return lambda weights: weights.pop(name)


def with_wrong(name):
    return lambda weights: weights.update({name: torch.zeros(3, 5)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("model.vlm_uni_aux_projector.1.bias"), ["missing are model.mining.key.1.bias"]),
        (without(f"{HIGH}stages.3.blocks.0.gamma"), ["stages.3.layers.0.layer_scale_parameter"]),
        (without(f"{HIGH}stages.2.blocks.0.conv_dw.weight"), ["stages.2.blocks.*.conv_dw.weight"]),
        (without(f"{LOW}pre_layrnorm.bias"), ["model.vision_tower.pre_layrnorm.bias"]),
        (without("model.layers.0.mlp.up_proj.weight"), ["language_model.layers.0.mlp.up_proj.weight"]),
        (without("model.mm_projector.2.weight"), ["mm_projector"]),
        (with_wrong("model.vision_fpn.weight"), ["not part of the model are model.vision_fpn.weight"]),
        (with_wrong("model.vlm_uni_val_projector.1.weight"), ["mining.value.1.weight (3, 5), not (32, 56)"]),
        (with_wrong(f"{HIGH}stem.0.weight"), ["embeddings.patch_embeddings.weight"]),
    ],
)
def test_weights_that_are_not_the_models_are_refused_by_name(tmp_path, change, words):
    refused(load, save_public(tmp_path, build(), change=change), words=words)


@pytest.mark.parametrize(
    "settings",
    [
        {"image_grid": 2},
        {"image_global": True},
        {"mm_projector_type": "linear"},
        {"model_type": "mgm_gemma"},
        {"image_size_aux": None},
        {"mm_vision_tower_aux": "openclip-convnext-xxlarge-laion2b-s34b-b82k-augreg-soup"},
        {"mm_vision_select_feature": "cls_patch"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_setting_of_another_model_is_refused(tmp_path, settings):
    path = save_public(tmp_path, build(), **settings)
    for call in (load, load_processor):
        refused(call, path, words=[f"config.json: {next(iter(settings))} "])


def test_towers_that_can_not_be_found_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def drop_high_tower(weights):
        for name in list(weights):
            if "_aux." in name:
                del weights[name]

    refused(load, save_public(tmp_path, build(), change=drop_high_tower), words=["mm_vision_tower_aux"])
    path = save_public(tmp_path, build(), mm_vision_tower="a/b/clip")
    refused(load, path, words=["mm_vision_tower 'a/b/clip'"])


def test_unknown_tensors_in_openclips_file_are_refused(tmp_path):
    path = save_public(tmp_path, build(), towers=False)
    file = tmp_path / "zoo" / "openclip" / "open_clip_pytorch_model.bin"
    torch.save(torch.load(file, weights_only=True) | {"visual.conv1.weight": torch.ones(1)}, file)
    refused(load, path, words=["visual.conv1.weight"])


def test_the_renaming_covers_timms_names_of_a_convnext():
    tower = HighResolutionTower(config().high_resolution_config).state_dict()
    theirs = {f"visual.trunk.{name}": tensor for name, tensor in timm_names(tower).items()}
    assert not any("layernorm" in name or "layers" in name for name in theirs)
    assert convnext_weights(theirs).keys() == tower.keys()
