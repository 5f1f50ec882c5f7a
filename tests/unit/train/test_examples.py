"""A run starts, and goes on, with the pictures that its data was prepared with."""

import pytest

from data.examples.prepare import prepare
from tests.helpers import tiny
from train.config import compose_settings, selection
from train.examples import training_subset
from vzip import UserError


@pytest.fixture
def settings(overrides, tmp_path):
    """The words of a run on 9 examples and 8 questions in a folder of its own."""
    path = tiny.save_data(tmp_path, 9)
    questions = tiny.save_data(tmp_path, 8, text_only=0, held_out=True, seed=1)
    of_data = [f"data.path={path}", f"data.held_out={questions}", f"data.image_folder={tmp_path}/images"]
    return [*overrides, *of_data]


@pytest.mark.parametrize("name", ["train5", "test5"])
def test_a_picture_that_became_another_is_named(settings, tmp_path, name):
    cfg = compose_settings(*settings)
    training_subset(cfg)

    # One bit of a picture's end, so that the file has the same size.
    path = tmp_path / "images" / "noise" / f"{name}.png"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=rf"1 of \d pictures .*\n  noise/{name}\.png: it has another content"):
        training_subset(cfg)

    path.write_bytes(content)
    training_subset(cfg)


def test_a_run_from_a_cache_needs_no_pictures(settings, tmp_path):
    cfg = compose_settings(*settings, "data.cache=true", "data.held_out=null")
    prepare(selection(cfg))
    for path in (tmp_path / "images" / "noise").iterdir():
        path.unlink()
    training_subset(cfg)
