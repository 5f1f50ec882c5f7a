"""Drawings show what the reducer did, at the patches where it did it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import vzip
from tests.helpers import tiny
from vzip.media import MediaInputs
from vzip.overlay import (
    CONTEXTUAL,
    DOMINANT,
    RAMP,
    attention_map,
    kept_tokens,
    look,
    merged_tokens,
)
from vzip.reducers.identity import Identity
from vzip.reducers.random import Random
from vzip.reducers.visionzip import VisionZip

PICTURE = tiny.picture(3, 90, 60)
REDUCER = VisionZip(dominant=4, contextual=3)


def look_at(kind, reducer, picture=PICTURE, *, anyres="released"):
    """(tile, the tokens of the tile, the reducer's output for them)."""
    family = vzip.families.family_of(tiny.llava(kind), anyres=anyres)
    image_processor = tiny.processor(kind).image_processor
    tile = look(family, reducer, image_processor, picture)
    inputs = MediaInputs.from_processed("image", image_processor([[picture]], return_tensors="pt"))
    tokens, _ = family.look(VisionZip(dominant=1, contextual=0), inputs)
    return tile, tokens, reducer(family.look(reducer, inputs)[0])


@pytest.fixture(scope="module")
def tile():
    return look_at("clip", REDUCER)[0]


def patch_of(image, patch, grid=tiny.GRID):
    """int[height, width, 3]: the pixels of one patch."""
    side = image.width // grid
    row, column = divmod(patch, grid)
    return np.asarray(image.crop((column * side, row * side, (column + 1) * side, (row + 1) * side)))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_family_says_where_its_tokens_went(kind):
    tile, tokens, output = look_at(kind, REDUCER)
    num_cls = int(tokens.has_cls)
    dominant = [index - num_cls for index in output.dominant[0].tolist()]
    # 90 x 60 pixels have 16 tokens at least, as 5 x 4 groups.
    assert tile.grid == ((5, 4) if kind in tiny.NATIVE else (tiny.GRID, tiny.GRID))
    assert tile.has_cls == tokens.has_cls
    assert torch.equal(tile.saliency.flatten(), tokens.saliency[0])
    assert tile.dominant.tolist() == [patch for patch in dominant if patch >= 0]
    assert tile.contextual.tolist() == [index - num_cls for index in output.contextual[0].tolist()]
    assert tile.members[tile.contextual].tolist() == [0, 1, 2]
    assert set((tile.members < 0).nonzero().flatten().tolist()) == set(tile.dominant.tolist())
    rows, columns = tile.grid
    assert tile.picture.width * rows == tile.picture.height * columns


def test_the_tile_is_what_the_tower_sees():
    """CLIP's image processor cuts the middle out of a wide picture, and does not squeeze it."""
    wide = Image.new("RGB", (3 * tiny.SIDE, tiny.SIDE), "red")
    wide.paste("lime", (tiny.SIDE, 0, 2 * tiny.SIDE, tiny.SIDE))
    tile, *_ = look_at("clip", REDUCER, wide)
    assert np.asarray(tile.picture).reshape(-1, 3).mean(axis=0).tolist() == [0, 255, 0]


def test_spatial_tiles_are_reduced_without_their_cls():
    tile, *_ = look_at("next", REDUCER, anyres="spatial")
    assert not tile.has_cls and len(tile.dominant) == 4


def test_reducers_without_attention_are_drawn_too():
    tile, tokens, _ = look_at("clip", Identity())
    assert tile.dominant.tolist() == list(range(tiny.GRID**2)) and not len(tile.contextual)
    assert torch.equal(tile.saliency.flatten(), tokens.saliency[0])

    tile, *_ = look_at("clip", Random(budget=5))
    assert len(tile.dominant) == 5 and (tile.members == -1).all()
    assert merged_tokens(tile).size == kept_tokens(tile).size


def test_kept_tokens_frame_dominant_and_contextual_apart_and_dim_the_rest(tile):
    image, plain = kept_tokens(tile, side=160), tile.picture.resize((160, 160))
    dominant, contextual = tile.dominant.tolist(), tile.contextual.tolist()
    for patch in range(tiny.GRID**2):
        drawn, expected = patch_of(image, patch), patch_of(plain, patch)
        if patch in dominant + contextual:
            assert drawn[0, 0].tolist() == list(DOMINANT if patch in dominant else CONTEXTUAL)
            assert np.array_equal(drawn[6:-6, 6:-6], expected[6:-6, 6:-6])
        else:
            assert drawn.mean() < 0.5 * expected.mean()


def test_merged_tokens_tint_the_patches_of_a_contextual_token_alike(tile):
    grey = Image.new("RGB", tile.picture.size, (128, 128, 128))
    image = merged_tokens(replace(tile, picture=grey), side=160)
    colours = {}
    for patch, group in enumerate(tile.members.tolist()):
        if group >= 0 and patch not in tile.contextual.tolist():
            colours.setdefault(group, set()).add(tuple(patch_of(image, patch)[1, 1].tolist()))
    assert all(len(group_colours) == 1 for group_colours in colours.values())
    assert len(set.union(*colours.values())) == len(colours) > 1
    assert all(patch_of(image, patch)[0, 0].tolist() == list(DOMINANT) for patch in tile.dominant.tolist())


def test_attention_maps_are_brightest_where_attention_is(tile):
    black = Image.new("RGB", tile.picture.size)
    image = attention_map(replace(tile, picture=black), side=160)
    most = int(tile.saliency.argmax())
    assert np.allclose(patch_of(image, most)[5, 5], 0.75 * np.array(RAMP[-1]), atol=2)
    greens = [int(patch_of(image, patch)[5, 5][1]) for patch in tile.saliency.flatten().argsort().tolist()]
    assert greens == sorted(greens)
