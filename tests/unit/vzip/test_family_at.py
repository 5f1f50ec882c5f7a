"""The family of a folder: every kind of model, in every layout that it is published in."""

import json

import pytest
import torch

from tests.helpers import tiny
from tests.helpers.errors import refused
from tests.helpers.mini_gemini import build, save_public
from tests.helpers.original import save_config
from vzip import Comparison
from vzip.families import families, family_at


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_layout_of_transformers(kind, tmp_path):
    family = families()[tiny.KINDS[kind][0]]
    family.model_class.config_class(**tiny.architecture(kind)).save_pretrained(tmp_path)
    assert family_at(str(tmp_path)) is family


@pytest.mark.parametrize("model_type", ["llava", "llava_llama", "absent"])
def test_the_layout_of_llavas_code(model_type, tmp_path):
    save_config(tmp_path, tiny.llava(), model_type=model_type)
    assert family_at(str(tmp_path)) is families()["llava"]


@pytest.mark.parametrize("model_type", ["mgm", "mini_gemini", "llava_llama"])
def test_the_layout_of_mini_geminis_code_is_not_taken_for_llavas(model_type, tmp_path):
    aux = {"mm_vision_tower_aux": "some/convnext", "image_size_aux": 32}
    save_config(tmp_path, tiny.llava(), model_type=model_type, **aux)
    assert family_at(str(tmp_path)) is families()["mini_gemini"]


def test_one_family_at_most_claims_a_folder(tmp_path):
    """The result must not depend on the order of the families' files."""
    llava = {"mm_vision_tower": "some/clip"}
    for config in ({}, llava, llava | {"mm_vision_tower_aux": "some/convnext"}):
        originals = [family.original for family in families().values() if family.original is not None]
        assert sum(original.is_original(config) for original in originals) == bool(config)


def test_a_public_mini_gemini_folder_is_a_base_model(tmp_path):
    comparison = Comparison.open(save_public(tmp_path, build()), dtype=torch.float32, device="cpu")
    assert type(comparison.family) is families()["mini_gemini"]
    with comparison.row("free", budget=6) as (model, processor):
        inputs = processor(images=[tiny.picture(0, 31, 90)], text=["w1 <image> w2"], return_tensors="pt")
        assert model(**inputs).logits.shape[1] == 2 + 6


def test_a_model_of_no_family_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    refused(family_at, str(tmp_path), words=["'bert'", "supported are", "mini_gemini"])
