"""A feature cache holds the features of the pictures that the data was prepared with."""

import pytest

from scripts.prepare.cache import cache_features
from tests.helpers import tiny
from train.config import compose_settings
from vzip import UserError


@pytest.mark.slow
def test_a_picture_that_became_another_is_named(overrides, tmp_path):
    path = tiny.save_data(tmp_path, 9)
    of_data = [f"data.path={path}", "data.held_out=null", f"data.image_folder={tmp_path}/images"]
    cfg = compose_settings(*overrides, *of_data)
    assert len(list(cache_features(cfg).glob("*.safetensors"))) == 1

    tiny.picture(99).save(tmp_path / "images" / "noise" / "train3.png")
    with pytest.raises(UserError, match=r"1 of 7 pictures .*\n  noise/train3\.png"):
        cache_features(cfg)
