"""Images of several tiles: how many tokens they take, and where each token stands, against slow
transcriptions.
"""

import functools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image

import vzip
from tests.helpers import tiny
from vzip import UserError
from vzip.reducers.identity import Identity
from vzip.reducers.random import Random
from vzip.reducers.visionzip import VisionZip
from vzip.tap import run_tower

pytestmark = pytest.mark.slow

NEWLINE = 777.0
"""All that `image_newline` holds here, so that newlines can be seen among the features."""

SETTINGS = {  # arguments of `vzip.attach`
    "identity": {"reducer": Identity()},
    "released": {"dominant": 4, "contextual": 2},
    "spatial": {"dominant": 4, "contextual": 2, "anyres": "spatial"},
    "random": {"reducer": Random(budget=5)},
    "random-spatial": {"reducer": Random(budget=5), "anyres": "spatial"},
}

GRIDS = [(56, 112), (112, 56), (112, 112), (56, 168), (168, 56), (168, 168)]
"""(height, width) of images that fill the grids of `tiny.pinpoints`."""
PADDED = [(40, 112), (56, 70), (112, 30), (80, 112), (112, 71), (120, 168), (168, 130)]
PADDED += [(1, 2000), (2000, 1), (1, 1)]
"""Images that need padding."""

LARGE = ((168, 168),)
"""The only grid of a model that fits every image into 3 x 3 tiles."""
HIDDEN = [(30, 168), (168, 30), (5, 300), (1, 2000), (2000, 1), (100, 168)]
"""Images of which the outer ones of 3 x 3 tiles show little or nothing."""


@functools.cache
def llava(kind, pinpoints=None, **shape):
    """A tiny model, built once. Tests attach to it only inside a `with` block."""
    model = tiny.llava(kind, layers=3, **shape).requires_grad_(False)
    model.model.image_newline.fill_(NEWLINE)
    if pinpoints:
        model.config.image_grid_pinpoints = [list(size) for size in pinpoints]
    return model


def grid_of(model, size):
    """(rows, columns) of the tiles that an image of (height, width) is fitted into."""
    height, width = select_best_resolution(size, model.config.image_grid_pinpoints)
    side = model.config.vision_config.image_size
    return height // side, width // side


def pictures(model, sizes, seed=0):
    """Random tiles of images of these sizes, as a processor returns them; NaN after an image's last tile."""
    generator = torch.Generator().manual_seed(seed)
    side = model.config.vision_config.image_size
    counts = []
    for size in sizes:
        rows, columns = grid_of(model, size)
        counts.append(1 + rows * columns)

    pixel_values = torch.full((len(sizes), max(counts), 3, side, side), torch.nan)
    for image, count in enumerate(counts):
        pixel_values[image, :count] = torch.randn(count, 3, side, side, generator=generator)
    return {"pixel_values": pixel_values, "image_sizes": torch.tensor(sizes)}


@torch.no_grad()
def features(model, inputs):
    """float[n, d_llm] of each image, as the model computes them now."""
    torch.manual_seed(0)
    images = model.model.get_image_features(**inputs).pooler_output
    assert all(image.isfinite().all() for image in images)
    return images


def newlines(image):
    return (image == NEWLINE).all(dim=1)


def tower_tokens(model, tiles):
    """Vision tokens of float[tiles, 3, side, side], with attention."""
    return run_tower(model.model.vision_tower, tiles, feature_layer=-2, num_dropped=0, attention_layer=-2)


# ---- How many tokens ----

SIDES = st.one_of(st.integers(1, 2000), st.integers(1, 130))
SIZES = st.one_of(
    st.tuples(SIDES, SIDES), st.sampled_from([(1, 2000), (2000, 1), (1, 1), (3, 2000), (2000, 2000)])
)


@pytest.mark.parametrize("kind", tiny.TILED)
@given(
    name=st.sampled_from(list(SETTINGS)),
    grid=st.sampled_from([3, 4]),
    sizes=st.lists(SIZES, min_size=1, max_size=3),
)
@example(name="identity", grid=3, sizes=[(1, 2000), (2000, 1)])
@example(name="released", grid=4, sizes=[(1, 2000), (2000, 1)])
@example(name="spatial", grid=4, sizes=[(1, 2000), (2000, 1)])
def test_handle_processor_and_model_agree_on_the_number_of_tokens(kind, grid, name, sizes):
    model, processor = llava(kind, grid=grid), tiny.processor(kind, grid=grid)
    inputs = pictures(model, sizes)
    with vzip.attach(model, **SETTINGS[name]) as handle:
        counts = [handle.num_image_tokens(size) for size in sizes]
        reduced = handle.processor(processor)._get_num_multimodal_tokens(image_sizes=sizes)
        assert reduced.num_image_tokens == counts
        assert [len(image) for image in features(model, inputs)] == counts
    if name == "identity":
        assert processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens == counts
        assert [len(image) for image in features(model, inputs)] == counts


@pytest.mark.parametrize("kind", tiny.TILED)
@given(
    name=st.sampled_from(list(SETTINGS)),
    sizes=st.lists(st.tuples(st.integers(1, 180), st.integers(1, 180)), min_size=1, max_size=3),
)
@example(name="identity", sizes=[(1, 2000), (2000, 1), (1, 1)])
@example(name="spatial", sizes=[(1, 2000), (2000, 1), (1, 1)])
def test_pictures_expand_to_what_the_model_returns(kind, name, sizes):
    model, processor = llava(kind), tiny.processor(kind)
    examples = {
        "images": [[tiny.picture(index, *size)] for index, size in enumerate(sizes)],
        "text": ["<image>a"] * len(sizes),
        "padding": True,
        "return_tensors": "pt",
    }
    with vzip.attach(model, **SETTINGS[name]) as handle:
        inputs = handle.processor(processor)(**examples)
        counts = (inputs["input_ids"] == model.config.image_token_id).sum(dim=1).tolist()
        assert counts == [handle.num_image_tokens(size) for size in sizes]
        media = tiny.media_arguments("image", inputs)
        assert [len(image) for image in features(model, media)] == counts
    if name == "identity":
        assert torch.equal(inputs["input_ids"], processor(**examples)["input_ids"])


@pytest.mark.parametrize(
    ("kind", "grid", "tiles"),
    [
        ("next", 24, [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]),
        ("onevision", 27, [(rows, columns) for rows in range(1, 7) for columns in range(1, 7)]),
    ],
)
@given(size=SIZES)
def test_full_size_grids_have_the_counts_of_the_original_processor(kind, grid, tiles, size):
    """LLaVA-NeXT has 24 x 24 patches and 5 grids; OneVision has 27 x 27, 36 grids, and pools."""
    pinpoints = tuple((rows * grid * tiny.PATCH, columns * grid * tiny.PATCH) for rows, columns in tiles)
    model, processor = llava(kind, grid=grid, pinpoints=pinpoints), tiny.processor(kind, grid=grid)
    processor.image_processor.image_grid_pinpoints = [list(pinpoint) for pinpoint in pinpoints]
    if kind == "onevision":
        model.config.vision_aspect_ratio = processor.vision_aspect_ratio = "anyres_max_9"
    (want,) = processor._get_num_multimodal_tokens(image_sizes=[size]).num_image_tokens
    with vzip.attach(model, reducer=Identity()) as handle:
        assert handle.num_image_tokens(size) == want

    # A budget that holds everything: all patches of the picture, and the model's own number of newlines.
    with vzip.attach(model, dominant=grid**2, contextual=0, anyres="spatial") as handle:
        own = handle.family.grid_of(size)
        assert handle.num_image_tokens(size) == grid**2 + own.num_rows * own.num_columns + own.pooled[0]
        assert want == grid**2 + own.pooled[0] * (own.pooled[1] + 1)


@pytest.mark.parametrize("kind", tiny.TILED)
def test_without_a_size_the_image_is_a_square_of_2_x_2_tiles(kind):
    for arguments in SETTINGS.values():
        with vzip.attach(llava(kind), **arguments) as handle:
            assert handle.num_image_tokens() == handle.num_image_tokens((2 * tiny.SIDE, 2 * tiny.SIDE))
    with vzip.attach(llava(kind), dominant=4, contextual=2) as handle:
        assert handle.num_image_tokens() == 5 * 6


def test_a_budget_counts_five_tiles_for_llava_next_and_one_for_onevision():
    for kind in ("next", "next-siglip"):
        with vzip.attach(llava(kind), budget=35) as handle:
            assert handle.reducer.dominant + handle.reducer.contextual == 7
            assert handle.num_image_tokens((112, 112)) == 35
            assert handle.num_image_tokens((56, 112)) == 21  # 3 tiles
    with vzip.attach(llava("onevision"), budget=7) as handle:
        assert handle.num_image_tokens((112, 112)) == 35
        assert handle.num_image_tokens((168, 168)) == 70


# ---- The order "released" ----


def released(grid, dominant, num_tokens, *, num_cls, first_patch):
    """List (tile, token) in the order of the language model, by the words of the method."""
    rows, columns = grid
    tiles = range(1, 1 + rows * columns)
    order = [(0, token) for token in range(num_tokens)]
    for y in range(rows * tiny.GRID):
        for x in range(columns * tiny.GRID):
            tile = 1 + (y // tiny.GRID) * columns + x // tiny.GRID
            patch = (y % tiny.GRID) * tiny.GRID + x % tiny.GRID
            kept = dominant[tile][num_cls:]
            if patch + first_patch in kept:
                order.append((tile, num_cls + kept.index(patch + first_patch)))
    for tile in tiles:
        order += [(tile, token) for token in range(num_cls)]
    for tile in tiles:
        order += [(tile, token) for token in range(len(dominant[tile]), num_tokens)]
    return order


@pytest.mark.parametrize(
    "reducer",
    [
        VisionZip(dominant=5, contextual=3),
        VisionZip(dominant=5, contextual=3, keep_cls=False),
        VisionZip(dominant=0, contextual=4),
        VisionZip(dominant=6, contextual=0),
        VisionZip(dominant=1, contextual=2),
        VisionZip(dominant=3, contextual=4, merge="average"),
        Random(budget=6),
    ],
    ids=repr,
)
@pytest.mark.parametrize("kind", tiny.TILED)
def test_the_released_order_is_that_of_the_authors(kind, reducer):
    model = llava(kind)
    has_cls = kind == "next"
    num_cls = int(has_cls and isinstance(reducer, VisionZip) and reducer.keep_cls and reducer.dominant > 0)
    for size in GRIDS + PADDED:
        inputs = pictures(model, [size])
        with vzip.attach(model, reducer=reducer) as handle, torch.no_grad():
            torch.manual_seed(0)
            output = tiny.reduce(handle, inputs["pixel_values"][0])
            tokens = handle.family.projector(output.features)
            (got,) = features(model, inputs)
        order = released(
            grid_of(model, size),
            output.dominant.tolist(),
            tokens.shape[1],
            num_cls=num_cls,
            first_patch=int(has_cls),
        )
        assert len(order) == len(set(order)) == tokens.shape[0] * tokens.shape[1], size
        assert torch.equal(got, torch.stack([tokens[position] for position in order])), size
        assert not newlines(got).any()


# ---- Images of a single tile ----


@pytest.mark.parametrize("name", SETTINGS)
def test_several_images_of_a_onevision_example_are_single_tiles(name):
    model, processor = llava("onevision"), tiny.processor("onevision")
    sizes = [[(112, 112), (30, 150)], [(80, 112)]]
    examples = {
        "images": [[tiny.picture(index, *size) for index, size in enumerate(row)] for row in sizes],
        "text": ["<image>a<image>", "<image>"],
        "padding": True,
        "return_tensors": "pt",
    }
    plain = processor(**examples)
    media = tiny.media_arguments("image", plain)
    unreduced = features(model, media)
    with vzip.attach(model, **SETTINGS[name]) as handle, torch.no_grad():
        ids = handle.processor(processor)(**examples)["input_ids"]
        got = features(model, media)
        num_tokens = handle.family.num_tile_tokens(handle.reducer)
        assert [len(image) for image in got] == [
            num_tokens + 1,
            num_tokens + 1,
            handle.num_image_tokens((80, 112)),
        ]
        assert (ids == model.config.image_token_id).sum(dim=1).tolist() == [
            len(got[0]) + len(got[1]),
            len(got[2]),
        ]
        assert [newlines(image).tolist() for image in got[:2]] == [[False] * num_tokens + [True]] * 2

        torch.manual_seed(0)
        base = tiny.reduce(handle, media["pixel_values"][:2, 0])
        tokens = handle.family.projector(base.features)

    if name == "identity":
        assert all(torch.equal(image, wanted) for image, wanted in zip(got, unreduced, strict=True))
        assert torch.equal(ids, plain["input_ids"])
    if name == "spatial":
        # The same tokens, in raster order.
        raster = torch.cat([base.dominant, base.contextual], dim=1).argsort(dim=1)
        tokens = torch.stack([image[order] for image, order in zip(tokens, raster, strict=True)])
    if name in ("released", "spatial"):
        torch.testing.assert_close(torch.stack(got[:2])[:, :-1], tokens)


# ---- The order "spatial" ----


def cosine(a, b):
    return (torch.dot(a, b) / a.norm() / b.norm()).item()


def slow_tile(tokens, tile, patches, reducer):
    """{patch: feature}: VisionZip of the visible patches of one tile, each token at its patch."""
    first_patch = int(tokens.has_cls)
    own = {patch: tokens.features[tile, patch + first_patch] for patch in patches}
    keys = {patch: tokens.keys[tile, patch + first_patch] for patch in patches}
    if len(patches) <= reducer.dominant + reducer.contextual:
        return own

    kept = sorted(patches, key=lambda patch: -tokens.saliency[tile, patch].item())[: reducer.dominant]
    rest = [patch for patch in patches if patch not in kept]
    targets = []
    if reducer.contextual:
        step = max(1, len(rest) // reducer.contextual)
        targets = rest[::step][: reducer.contextual]

    clusters = {target: [] for target in targets}
    for patch in rest:
        if targets and patch not in targets:
            nearest = max(targets, key=lambda target: cosine(keys[patch], keys[target]))
            clusters[nearest].append(own[patch])
    merged = {
        target: own[target] + (sum(members) / len(members) if members else 0)
        for target, members in clusters.items()
    }
    return {patch: own[patch] for patch in kept} | merged


def stitched(size, grid):
    """[(tile, patch)] for each row of the unpadded picture; transformers' own code finds the padding."""
    rows, columns = grid
    positions = torch.arange(rows * columns * tiny.GRID**2).view(1, rows * tiny.GRID, columns * tiny.GRID)
    table = []
    for row in unpad_image(positions, size)[0].tolist():
        patches = []
        for position in row:
            y, x = divmod(position, columns * tiny.GRID)
            tile = 1 + y // tiny.GRID * columns + x // tiny.GRID
            patches.append((tile, y % tiny.GRID * tiny.GRID + x % tiny.GRID))
        table.append(patches)
    return table


def visible_patches(size, grid):
    """All (tile, patch) that show the picture, by row."""
    return [position for row in stitched(size, grid) for position in row]


def slow_spatial(tokens, size, grid, reducer, num_newlines):
    """Features before the projector, in the order of the language model; None is a newline."""
    table = stitched(size, grid)
    base = slow_tile(tokens, 0, range(tiny.GRID**2), reducer)
    order = [base[patch] for patch in sorted(base)]
    tiles = {}
    for tile in range(1, 1 + grid[0] * grid[1]):
        patches = sorted(patch for owner, patch in visible_patches(size, grid) if owner == tile)
        tiles[tile] = slow_tile(tokens, tile, patches, reducer)
        assert len(tiles[tile]) == min(reducer.dominant + reducer.contextual, len(patches))
    for row, patches in enumerate(table):
        order += [tiles[tile][patch] for tile, patch in patches if patch in tiles[tile]]
        num_before = row * num_newlines // len(table)
        num_after = (row + 1) * num_newlines // len(table)
        order += [None] * (num_after - num_before)
    return order


@torch.no_grad()
def check_spatial(model, size, reducer):
    inputs = pictures(model, [size])
    (unreduced,) = features(model, inputs)
    num_newlines = int(newlines(unreduced).sum())
    tokens = tower_tokens(model, inputs["pixel_values"][0])
    order = slow_spatial(tokens, size, grid_of(model, size), reducer, num_newlines)
    with vzip.attach(model, reducer=reducer, anyres="spatial") as handle:
        (got,) = features(model, inputs)
        assert handle.num_image_tokens(size) == len(got) == len(order)
    assert newlines(got).tolist() == [feature is None for feature in order]
    assert newlines(got).sum() == num_newlines
    want = model.model.multi_modal_projector(torch.stack([token for token in order if token is not None]))
    torch.testing.assert_close(got[~newlines(got)], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "reducer",
    [
        VisionZip(dominant=5, contextual=3),
        VisionZip(dominant=0, contextual=4),
        VisionZip(dominant=6, contextual=0),
        VisionZip(dominant=tiny.GRID**2, contextual=0),
    ],
    ids=repr,
)
@pytest.mark.parametrize("kind", tiny.TILED)
def test_the_spatial_order_is_the_raster_of_the_picture_without_its_padding(kind, reducer):
    for size in GRIDS + PADDED:
        check_spatial(llava(kind), size, reducer)


@pytest.mark.parametrize("kind", tiny.TILED)
def test_the_spatial_order_where_tiles_show_nothing(kind):
    model = llava(kind, pinpoints=LARGE)
    for size in HIDDEN:
        check_spatial(model, size, VisionZip(dominant=5, contextual=3))
    with vzip.attach(model, dominant=5, contextual=3, anyres="spatial") as handle:
        assert handle.num_image_tokens((1, 2000)) == 8

    # These sizes do have tiles that show nothing.
    assert {tile for tile, _ in visible_patches((30, 168), (3, 3))} == {4, 5, 6}
    assert visible_patches((1, 2000), (3, 3)) == []


@pytest.mark.parametrize("kind", tiny.TILED)
@torch.no_grad()
def test_random_tokens_stand_at_their_patch(kind):
    model = llava(kind)
    for size in GRIDS + PADDED:
        inputs = pictures(model, [size])
        with vzip.attach(model, reducer=Random(budget=5), anyres="spatial"):
            (got,) = features(model, inputs)
        tokens = tower_tokens(model, inputs["pixel_values"][0]).without_cls()
        patches = model.model.multi_modal_projector(tokens.features)

        raster = [(0, patch) for patch in range(tiny.GRID**2)]
        raster += visible_patches(size, grid_of(model, size))
        in_raster = torch.stack([patches[position] for position in raster])
        nearest = torch.cdist(got[~newlines(got)], in_raster).min(dim=1)
        assert nearest.values.max() < 1e-3  # neither padding nor CLS
        assert nearest.indices.diff().gt(0).all()

        tiles = [raster[index][0] for index in nearest.indices]
        visible = [tile for tile, _ in raster]
        assert all(tiles.count(tile) == min(5, visible.count(tile)) for tile in range(len(patches)))


# ---- The model's own order ----


@pytest.mark.parametrize("kind", tiny.TILED)
def test_identity_is_the_packing_of_the_model_bit_for_bit(kind):
    for pinpoints in (None, LARGE):
        model = llava(kind, pinpoints=pinpoints)
        inputs = pictures(model, GRIDS + PADDED + HIDDEN)
        plain = features(model, inputs)
        with vzip.attach(model, reducer=Identity()):
            got = features(model, inputs)
        assert all(torch.equal(image, wanted) for image, wanted in zip(got, plain, strict=True))

        if kind == "onevision" and not pinpoints:
            # It pools the last of the larger pictures: 8 rows, and a newline behind each.
            assert len(plain[GRIDS.index((168, 168))]) == 16 + 8 * (8 + 1)


# ---- Batches and gradients ----


@pytest.mark.parametrize("name", ["identity", "released", "spatial"])
@pytest.mark.parametrize("kind", tiny.TILED)
def test_a_batch_of_mixed_tile_counts_is_its_images_one_by_one(kind, name):
    model = llava(kind)
    sizes = [(56, 112), (168, 168), (1, 2000), (80, 112), (2000, 1)]
    inputs = pictures(model, sizes)
    assert len({grid_of(model, size) for size in sizes}) >= 3
    with vzip.attach(model, **SETTINGS[name]):
        together = features(model, inputs)

        # Tiles may also be stacked, without the batch's padding.
        tiles = []
        for image, size in zip(inputs["pixel_values"], sizes, strict=True):
            rows, columns = grid_of(model, size)
            tiles.append(image[: 1 + rows * columns])
        stacked = features(model, {**inputs, "pixel_values": torch.cat(tiles)})
        assert all(torch.equal(image, wanted) for image, wanted in zip(stacked, together, strict=True))

        for image in range(len(sizes)):
            (alone,) = features(model, {key: values[image : image + 1] for key, values in inputs.items()})
            torch.testing.assert_close(together[image], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("anyres", ["released", "spatial"])
@pytest.mark.parametrize("kind", tiny.TILED)
def test_gradients_reach_the_projector_and_are_finite(kind, anyres):
    model = llava(kind)
    projector = model.model.multi_modal_projector.requires_grad_(True)
    for sizes in ([(1, 2000)], [(80, 112), (168, 168), (1, 1)]):
        with vzip.attach(model, dominant=4, contextual=2, anyres=anyres):
            images = model.model.get_image_features(**pictures(model, sizes)).pooler_output
        loss = torch.cat(list(images)).square().mean()
        gradients = torch.autograd.grad(loss, list(projector.parameters()))
        assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in gradients)
    projector.requires_grad_(False)


# ---- Mistakes ----


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_sizes": None}, ["image_sizes", "processor"]),
        ({"image_sizes": torch.tensor([[0, 112]])}, ["(0, 112)", "at least 1"]),
        ({"pixel_values": torch.zeros(1, 0, 3, tiny.SIDE, tiny.SIDE)}, ["[1, 0, 3, 56, 56]", "[5] tiles"]),
        ({"pixel_values": torch.zeros(1, 4, 3, tiny.SIDE, tiny.SIDE)}, ["[1, 4, 3, 56, 56]", "[5] tiles"]),
        ({"pixel_values": torch.zeros(2, 5, 3, tiny.SIDE, tiny.SIDE)}, ["[2, 5, 3, 56, 56]", "1 images"]),
        ({"pixel_values": torch.zeros(4, 3, tiny.SIDE, tiny.SIDE)}, ["4 tiles", "[5]", "processor"]),
        ({"pixel_values": torch.zeros(1, 5, 1, tiny.SIDE, tiny.SIDE)}, ["[5, 1, 56, 56]", "no pictures"]),
        ({"pixel_values": torch.zeros(5, 1, tiny.SIDE, tiny.SIDE)}, ["[5, 1, 56, 56]", "no pictures"]),
    ],
    ids=lambda value: "",
)
@pytest.mark.parametrize("name", ["identity", "released", "spatial"])
@pytest.mark.parametrize("kind", tiny.TILED)
def test_inputs_that_do_not_fit_are_refused(kind, name, change, words):
    model = llava(kind)
    with vzip.attach(model, **SETTINGS[name]), pytest.raises(UserError) as error:
        features(model, pictures(model, [(112, 112)]) | change)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("kind", tiny.TILED)
def test_a_size_without_pixels_is_refused(kind):
    with vzip.attach(llava(kind), dominant=4, contextual=2) as handle:
        for size in [(0, 5), (5, 0), (-3, 5)]:
            with pytest.raises(UserError) as error:
                handle.num_image_tokens(size)
            assert f"image_size={size}" in str(error.value) and "at least 1" in str(error.value)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("next", {"budget": 32}, ["reducer.budget=32", "5 tiles", "30 or 35"]),
        ("next", {"budget": 3}, ["reducer.budget=3", "choose 5"]),
        ("next", {"dominant": 16, "contextual": 2}, ["18", "17 tokens", "at most 17"]),
        # The order "spatial" has no CLS.
        ("next", {"dominant": 15, "contextual": 2, "anyres": "spatial"}, ["17", "16 tokens", "at most 16"]),
        ("next", {"reducer": Random(budget=17)}, ["17", "at most 16"]),
        ("next-siglip", {"dominant": 15, "contextual": 2}, ["17", "16 tokens", "at most 16"]),
        ("onevision", {"budget": 17}, ["reducer.budget=17", "16 tokens", "at most 16"]),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused_at_attach(kind, settings, words):
    with pytest.raises(UserError) as error:
        vzip.attach(llava(kind), **settings)
    assert all(word in str(error.value) for word in words), error.value
    assert "get_image_features" not in vars(llava(kind).model)
