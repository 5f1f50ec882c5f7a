"""Pictures of tokens show what the reducer did, at the patches where it did it."""

import numpy as np
import pytest
import torch
from PIL import Image

import vzip
from tests.helpers import tiny
from vzip.overlay import CONTEXTUAL, DOMINANT, RAMP, attention_map, kept_tokens, look, merged_tokens
from vzip.reducers.identity import Identity
from vzip.reducers.random import Random
from vzip.reducers.visionzip import VisionZip

PICTURE = tiny.picture(3, 90, 60)


def seen(kind, reducer, picture=PICTURE, *, anyres="released"):
    """(tile, what the attached model's reducer gives for the same tile)."""
    model, processor = tiny.llava(kind), tiny.processor(kind)
    family = vzip.families.family_of(model, anyres=anyres)
    tile = look(family, reducer, processor.image_processor, picture)
    processed = processor.image_processor([[picture]], return_tensors="pt")
    pixels = next(value for name, value in processed.items() if name.startswith("pixel_values")).flatten(
        0, -4
    )[:1]
    return (
        tile,
        family.vision_tokens(VisionZip(dominant=1, contextual=0), pixels),
        reducer(family.vision_tokens(reducer, pixels)),
    )


def patch_of(image, patch, grid=tiny.GRID):
    side = image.width // grid
    row, column = divmod(patch, grid)
    return np.asarray(image.crop((column * side, row * side, (column + 1) * side, (row + 1) * side)))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_family_says_where_its_tokens_went(kind):
    tile, tokens, reduction = seen(kind, VisionZip(dominant=4, contextual=3))
    first = int(tokens.has_cls)
    assert tile.grid == (tiny.GRID, tiny.GRID)
    assert tile.has_cls == tokens.has_cls
    assert torch.equal(tile.saliency.flatten(), tokens.saliency[0])
    assert tile.dominant.tolist() == [
        index - first for index in reduction.dominant[0].tolist() if index >= first
    ]
    assert tile.contextual.tolist() == [index - first for index in reduction.contextual[0].tolist()]
    assert [tile.members[patch].item() for patch in tile.contextual] == [0, 1, 2]
    assert set((tile.members < 0).nonzero().flatten().tolist()) == set(tile.dominant.tolist())
    assert tile.picture.width == tile.picture.height


def test_the_tile_is_what_the_tower_sees_and_not_the_picture_squeezed():
    wide = Image.new("RGB", (3 * tiny.SIDE, tiny.SIDE), "red")
    wide.paste("lime", (tiny.SIDE, 0, 2 * tiny.SIDE, tiny.SIDE))
    tile, *_ = seen("clip", VisionZip(dominant=4, contextual=3), wide)
    assert np.asarray(tile.picture).reshape(-1, 3).mean(axis=0).tolist() == [
        0,
        255,
        0,
    ]  # CLIP cuts the middle out


def test_spatial_tiles_are_reduced_without_their_cls():
    tile, *_ = seen("next", VisionZip(dominant=4, contextual=3), anyres="spatial")
    assert not tile.has_cls and len(tile.dominant) == 4


def test_reducers_without_attention_are_drawn_too():
    tile, tokens, _ = seen("clip", Identity())
    assert tile.dominant.tolist() == list(range(tiny.GRID**2)) and not len(tile.contextual)
    assert torch.equal(tile.saliency.flatten(), tokens.saliency[0])
    tile, *_ = seen("clip", Random(budget=5))
    assert len(tile.dominant) == 5 and (tile.members == -1).all()
    assert merged_tokens(tile).size == kept_tokens(tile).size


def test_kept_tokens_frame_dominant_and_contextual_apart_and_dim_the_rest():
    tile, *_ = seen("clip", VisionZip(dominant=4, contextual=3))
    image, plain = kept_tokens(tile, side=160), tile.picture.resize((160, 160))
    dominant, contextual = tile.dominant.tolist(), tile.contextual.tolist()
    for patch in range(tiny.GRID**2):
        drawn, under = patch_of(image, patch), patch_of(plain, patch)
        if patch in dominant + contextual:
            assert drawn[0, 0].tolist() == list(DOMINANT if patch in dominant else CONTEXTUAL)
            assert np.array_equal(drawn[6:-6, 6:-6], under[6:-6, 6:-6])
        else:
            assert drawn.mean() < 0.5 * under.mean()


def test_merged_tokens_tint_the_patches_of_a_contextual_token_alike():
    tile, *_ = seen("clip", VisionZip(dominant=4, contextual=3))
    flat = Image.new("RGB", tile.picture.size, (128, 128, 128))
    image = merged_tokens(type(tile)(**{**vars(tile), "picture": flat}), side=160)
    targets = set(tile.contextual.tolist())
    corners = {}
    for patch, group in enumerate(tile.members.tolist()):
        if group >= 0 and patch not in targets:
            corners.setdefault(group, set()).add(tuple(patch_of(image, patch)[1, 1].tolist()))
    assert all(len(colours) == 1 for colours in corners.values())
    assert len(set.union(*corners.values())) == len(corners) > 1
    assert all(patch_of(image, patch)[0, 0].tolist() == list(DOMINANT) for patch in tile.dominant.tolist())


def test_attention_maps_are_brightest_where_attention_is():
    tile, *_ = seen("clip", VisionZip(dominant=4, contextual=3))
    black = Image.new("RGB", tile.picture.size)
    image = attention_map(type(tile)(**{**vars(tile), "picture": black}), side=160)
    most = int(tile.saliency.argmax())
    assert np.allclose(patch_of(image, most)[5, 5], 0.75 * np.array(RAMP[-1]), atol=2)
    yellow = [int(patch_of(image, patch)[5, 5][1]) for patch in range(tiny.GRID**2)]
    order = tile.saliency.flatten().argsort().tolist()
    assert [yellow[patch] for patch in order] == sorted(yellow)
