"""Images of several tiles: how many tokens they take, and where each token stands, against slow transcriptions."""

import functools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image

import vzip
from tests.helpers import tiny
from vzip import UserError
from vzip.reducers.identity import Identity
from vzip.reducers.random import Random
from vzip.reducers.visionzip import VisionZip
from vzip.tap import run_tower, tower_layout

MARK = 777.0
"""What `image_newline` holds here, so that newlines are seen in the features."""
REDUCERS = {  # arguments of `vzip.attach`
    "identity": {"reducer": Identity()},
    "released": {"dominant": 4, "contextual": 2},
    "spatial": {"dominant": 4, "contextual": 2, "anyres": "spatial"},
    "random": {"reducer": Random(budget=5)},
    "random-spatial": {"reducer": Random(budget=5), "anyres": "spatial"},
}
GRIDS = {  # (height, width), by what is special
    "landscape": (56, 112),
    "portrait": (112, 56),
    "square": (112, 112),
    "wide": (56, 168),
    "tall": (168, 56),
    "3x3": (168, 168),
}
PADDED = {
    "landscape, padded above": (40, 112),
    "landscape, padded at the side": (56, 70),
    "portrait, padded at the side": (112, 30),
    "square, padded by rows": (80, 112),
    "square, padded by columns": (112, 71),
    "3x3, padded by rows": (120, 168),
    "3x3, padded by columns": (168, 130),
    "a line": (1, 2000),
    "a column": (2000, 1),
    "a dot": (1, 1),
}
EVERY = GRIDS | PADDED


@functools.cache
def llava(kind, pinpoints=None, **shape):
    """A tiny model, made once; tests attach to it for a `with` block only."""
    model = tiny.llava(kind, layers=3, **shape).requires_grad_(False)
    model.model.image_newline.fill_(MARK)
    if pinpoints:
        model.config.image_grid_pinpoints = [list(size) for size in pinpoints]
    return model


def grid_of(model, size):
    """(rows, columns) of the tiles that an image of (height, width) is fitted into."""
    height, width = select_best_resolution(size, model.config.image_grid_pinpoints)
    return height // tiny.SIDE, width // tiny.SIDE


def pictures(model, sizes, seed=0):
    """Random tiles of images of these sizes, as a processor gives them; NaN, which no image may show, behind the last."""
    generator = torch.Generator().manual_seed(seed)
    side = model.config.vision_config.image_size
    best = [select_best_resolution(size, model.config.image_grid_pinpoints) for size in sizes]
    counts = [1 + (height // side) * (width // side) for height, width in best]
    pixel_values = torch.full((len(sizes), max(counts), 3, side, side), torch.nan)
    for image, count in enumerate(counts):
        pixel_values[image, :count] = torch.randn(count, 3, side, side, generator=generator)
    return {"pixel_values": pixel_values, "image_sizes": torch.tensor(sizes)}


@torch.no_grad()
def features(model, inputs):
    """float[n, d_llm] of each image, as the model makes them now."""
    torch.manual_seed(0)
    images = model.model.get_image_features(**inputs).pooler_output
    assert all(image.isfinite().all() for image in images)
    return images


def newlines(image):
    return (image == MARK).all(dim=1)


# How many tokens

SIDES = st.one_of(st.integers(1, 2000), st.integers(1, 130))
SIZES = st.one_of(
    st.tuples(SIDES, SIDES), st.sampled_from([(1, 2000), (2000, 1), (1, 1), (3, 2000), (2000, 2000)])
)


@pytest.mark.parametrize("reducer", list(REDUCERS))
@pytest.mark.parametrize("kind", tiny.TILED)
@settings(deadline=None, derandomize=True, max_examples=30)
@given(grid=st.sampled_from([3, 4]), sizes=st.lists(SIZES, min_size=1, max_size=3))
@example(grid=3, sizes=[(1, 2000), (2000, 1)])
@example(grid=4, sizes=[(1, 2000), (2000, 1)])
def test_handle_processor_and_model_agree_on_the_number_of_tokens(kind, grid, reducer, sizes):
    model, processor = llava(kind, grid=grid), tiny.processor(kind, grid=grid)
    inputs = pictures(model, sizes)
    with vzip.attach(model, **REDUCERS[reducer]) as handle:
        counts = [handle.num_image_tokens(size) for size in sizes]
        assert (
            handle.processor(processor)._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens
            == counts
        )
        assert [len(image) for image in features(model, inputs)] == counts
    if reducer == "identity":
        assert processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens == counts
        assert [len(image) for image in features(model, inputs)] == counts


@pytest.mark.parametrize("kind", tiny.TILED)
@settings(deadline=None, derandomize=True, max_examples=10)
@given(sizes=st.lists(st.tuples(st.integers(1, 180), st.integers(1, 180)), min_size=1, max_size=3))
@example(sizes=[(1, 2000), (2000, 1), (1, 1)])
def test_real_pictures_expand_to_what_the_model_returns(kind, sizes):
    model, processor = llava(kind), tiny.processor(kind)
    rows = [[tiny.picture(index, *size)] for index, size in enumerate(sizes)]
    given_rows = {"images": rows, "text": ["<image>a"] * len(rows), "padding": True, "return_tensors": "pt"}
    plain = processor(**given_rows)
    for name, arguments in REDUCERS.items():
        with vzip.attach(model, **arguments) as handle:
            inputs = handle.processor(processor)(**given_rows)
            counts = (inputs["input_ids"] == model.config.image_token_id).sum(dim=1).tolist()
            assert counts == [handle.num_image_tokens(size) for size in sizes]
            media = {key: inputs[key] for key in inputs if key not in ("input_ids", "attention_mask")}
            assert [len(image) for image in features(model, media)] == counts
        if name == "identity":
            assert torch.equal(inputs["input_ids"], plain["input_ids"])


@pytest.mark.parametrize(
    ("kind", "grid", "tiles"),
    [
        ("next", 24, [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]),
        ("onevision", 27, [(r, c) for r in range(1, 7) for c in range(1, 7)]),
    ],
)
@settings(deadline=None, derandomize=True, max_examples=50)
@given(size=SIZES)
def test_real_grids_have_the_counts_of_the_models_own_processor(kind, grid, tiles, size):
    """24 x 24 patches and 5 grids as LLaVA-NeXT has, 27 x 27 and 36 grids, pooled, as OneVision has."""
    pinpoints = tuple((rows * grid * tiny.PATCH, columns * grid * tiny.PATCH) for rows, columns in tiles)
    model, processor = llava(kind, grid=grid, pinpoints=pinpoints), tiny.processor(kind, grid=grid)
    processor.image_processor.image_grid_pinpoints = [list(pinpoint) for pinpoint in pinpoints]
    if kind == "onevision":
        model.config.vision_aspect_ratio = processor.vision_aspect_ratio = "anyres_max_9"
    (want,) = processor._get_num_multimodal_tokens(image_sizes=[size]).num_image_tokens
    with vzip.attach(model, reducer=Identity()) as handle:
        assert handle.num_image_tokens(size) == want
    with vzip.attach(model, dominant=grid**2, contextual=0, anyres="spatial") as handle:
        # Nothing to drop: all patches of the picture, and the model's own number of newlines.
        own = handle.family.grid_of(size)
        assert handle.num_image_tokens(size) == grid**2 + own.num_rows * own.num_columns + own.pooled[0]
        assert want == grid**2 + own.pooled[0] * (own.pooled[1] + 1)


@pytest.mark.parametrize("kind", tiny.TILED)
def test_without_a_size_the_image_is_a_square_of_two_tiles_a_side(kind):
    for arguments in REDUCERS.values():
        with vzip.attach(llava(kind), **arguments) as handle:
            assert handle.num_image_tokens() == handle.num_image_tokens((2 * tiny.SIDE, 2 * tiny.SIDE))
    with vzip.attach(llava(kind), dominant=4, contextual=2) as handle:
        assert handle.num_image_tokens() == 5 * 6


def test_a_budget_of_next_is_the_total_of_five_tiles_and_of_others_that_of_one():
    for kind in ("next", "next-siglip"):
        with vzip.attach(llava(kind), budget=35) as handle:
            assert handle.reducer.dominant + handle.reducer.contextual == 7
            assert handle.num_image_tokens((112, 112)) == 35
            assert handle.num_image_tokens((56, 112)) == 21  # 3 tiles
    with vzip.attach(llava("onevision"), budget=7) as handle:
        assert handle.num_image_tokens((112, 112)) == 35
        assert handle.num_image_tokens((168, 168)) == 70


# The order "released"


def released(grid, dominant, num_tokens, *, num_cls, first):
    """(tile, token) in the order of the language model, by the words of section "Anyres" of the method."""
    rows, columns = grid
    tiles = range(1, 1 + rows * columns)
    order = [(0, token) for token in range(num_tokens)]
    for y in range(rows * tiny.GRID):
        for x in range(columns * tiny.GRID):
            tile = 1 + (y // tiny.GRID) * columns + x // tiny.GRID
            patch = (y % tiny.GRID) * tiny.GRID + x % tiny.GRID
            kept = dominant[tile][num_cls:]
            if patch + first in kept:
                order.append((tile, num_cls + kept.index(patch + first)))
    for tile in tiles:
        order += [(tile, token) for token in range(num_cls)]
    for tile in tiles:
        order += [(tile, token) for token in range(len(dominant[tile]), num_tokens)]
    return order


SETTINGS = {
    "both": {"dominant": 5, "contextual": 3},
    "without CLS": {"dominant": 5, "contextual": 3, "keep_cls": False},
    "no dominant": {"dominant": 0, "contextual": 4},
    "no contextual": {"dominant": 6, "contextual": 0},
    "one dominant": {"dominant": 1, "contextual": 2},
    "average": {"dominant": 3, "contextual": 4, "merge": "average"},
}


@pytest.mark.parametrize("chosen", list(SETTINGS))
@pytest.mark.parametrize("kind", tiny.TILED)
def test_released_order_is_the_authors(kind, chosen):
    model, first = llava(kind), int(kind == "next")
    reducer = VisionZip(**SETTINGS[chosen])
    num_cls = int(kind == "next" and reducer.keep_cls and reducer.dominant > 0)
    for name, size in EVERY.items():
        inputs = pictures(model, [size])
        with vzip.attach(model, reducer=reducer) as handle, torch.no_grad():
            reduction = tiny.reduce(handle, inputs["pixel_values"][0])
            tokens = handle.family.projector(reduction.features)
            order = released(
                grid_of(model, size),
                reduction.dominant.tolist(),
                tokens.shape[1],
                num_cls=num_cls,
                first=first,
            )
            (got,) = features(model, inputs)
        assert len(order) == len(set(order)) == tokens.shape[0] * tokens.shape[1], name
        assert torch.equal(got, torch.stack([tokens[place] for place in order])), name
        assert not newlines(got).any()


@pytest.mark.parametrize("size", [(40, 112), (112, 30), (168, 130)])
def test_released_order_of_random_patches(size):
    model = llava("next")
    inputs = pictures(model, [size])
    with vzip.attach(model, reducer=Random(budget=6)) as handle, torch.no_grad():
        torch.manual_seed(0)
        reduction = tiny.reduce(handle, inputs["pixel_values"][0])
        tokens = handle.family.projector(reduction.features)
        order = released(grid_of(model, size), reduction.dominant.tolist(), 6, num_cls=0, first=1)
        (got,) = features(model, inputs)
    assert torch.equal(got, torch.stack([tokens[place] for place in order]))


# Images that are one tile alone


@pytest.mark.parametrize("reducer", list(REDUCERS))
def test_several_images_of_a_onevision_row_are_single_tiles(reducer):
    model, processor = llava("onevision"), tiny.processor("onevision")
    sizes = [[(112, 112), (30, 150)], [(80, 112)]]
    rows = [[tiny.picture(index, *size) for index, size in enumerate(row)] for row in sizes]
    given_rows = {
        "images": rows,
        "text": ["<image>a<image>", "<image>"],
        "padding": True,
        "return_tensors": "pt",
    }
    plain = processor(**given_rows)
    media = {key: plain[key] for key in ("pixel_values", "image_sizes", "batch_num_images")}
    whole = features(model, media)
    with vzip.attach(model, **REDUCERS[reducer]) as handle, torch.no_grad():
        ids = handle.processor(processor)(**given_rows)["input_ids"]
        got = features(model, media)
        single = (
            handle.num_image_tokens((112, 112)) // 5 if reducer in ("released", "random") else len(got[0]) - 1
        )
        assert [len(got[0]), len(got[1])] == [single + 1] * 2
        assert len(got[2]) == handle.num_image_tokens((80, 112))
        assert (ids == model.config.image_token_id).sum(dim=1).tolist() == [
            len(got[0]) + len(got[1]),
            len(got[2]),
        ]
        assert [newlines(image).tolist() for image in got[:2]] == [[False] * single + [True]] * 2
        if reducer == "released":
            base = tiny.reduce(handle, media["pixel_values"][:2, 0])
            tokens = handle.family.projector(base.features)
            torch.testing.assert_close(torch.stack(got[:2])[:, :-1], tokens)
        if reducer == "spatial":  # the same tokens, each at its place
            base = tiny.reduce(handle, media["pixel_values"][:2, 0])
            places = torch.cat([base.dominant, base.contextual], dim=1).argsort(dim=1)
            tokens = handle.family.projector(base.features)
            want = torch.stack([image[order] for image, order in zip(tokens, places, strict=True)])
            torch.testing.assert_close(torch.stack(got[:2])[:, :-1], want)
        if reducer == "identity":
            assert all(torch.equal(a, b) for a, b in zip(got, whole, strict=True))
            assert torch.equal(ids, plain["input_ids"])


# The order "spatial"


def cosine(a, b):
    return (torch.dot(a, b) / a.norm() / b.norm()).item()


def slow_tile(tokens, tile, patches, reducer):
    """{patch: feature}: VisionZip of the patches of one tile that show the picture, each token at its place."""
    own = {patch: tokens.features[tile, patch + int(tokens.has_cls)] for patch in patches}
    keys = {patch: tokens.keys[tile, patch + int(tokens.has_cls)] for patch in patches}
    if len(patches) <= reducer.dominant + reducer.contextual:
        return own
    kept = sorted(patches, key=lambda patch: -tokens.saliency[tile, patch].item())[: reducer.dominant]
    rest = [patch for patch in patches if patch not in kept]
    targets = (
        rest[:: max(1, len(rest) // reducer.contextual)][: reducer.contextual] if reducer.contextual else []
    )
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
    """[(tile, patch)] by row of the unpadded picture; transformers' own code finds the padding."""
    rows, columns = grid
    places = torch.arange(rows * columns * tiny.GRID**2).view(1, rows * tiny.GRID, columns * tiny.GRID)
    table = []
    for line in unpad_image(places, size)[0].tolist():
        positions = [divmod(place, columns * tiny.GRID) for place in line]
        table.append(
            [
                (1 + y // tiny.GRID * columns + x // tiny.GRID, y % tiny.GRID * tiny.GRID + x % tiny.GRID)
                for y, x in positions
            ]
        )
    return table


def flat(table):
    return [place for line in table for place in line]


def spatial(tokens, size, grid, reducer, num_newlines):
    """Features before the projector in the order of the language model; None where a newline stands."""
    table = stitched(size, grid)
    base = slow_tile(tokens, 0, range(tiny.GRID**2), reducer)
    order = [base[patch] for patch in sorted(base)]
    tiles = {}
    for tile in range(1, 1 + grid[0] * grid[1]):
        patches = sorted(patch for owner, patch in flat(table) if owner == tile)
        tiles[tile] = slow_tile(tokens, tile, patches, reducer)
        assert len(tiles[tile]) == min(reducer.dominant + reducer.contextual, len(patches))
    for row, line in enumerate(table):
        order += [tiles[tile][patch] for tile, patch in line if patch in tiles[tile]]
        done, before = ((rows * num_newlines) // len(table) for rows in (row + 1, row))
        order += [None] * (done - before)
    return order


def check_spatial(model, size, reducer):
    inputs = pictures(model, [size])
    (whole,) = features(model, inputs)
    num_newlines = int(newlines(whole).sum())  # of the model's own packing
    tokens = run_tower(
        model.model.vision_tower,
        inputs["pixel_values"][0],
        feature_layer=-2,
        num_dropped=0,
        attention_layer=-2,
    )
    order = spatial(tokens, size, grid_of(model, size), reducer, num_newlines)
    with vzip.attach(model, reducer=reducer, anyres="spatial") as handle:
        (got,) = features(model, inputs)
        assert handle.num_image_tokens(size) == len(got) == len(order)
    assert newlines(got).tolist() == [feature is None for feature in order]
    want = model.model.multi_modal_projector(
        torch.stack([feature for feature in order if feature is not None])
    )
    torch.testing.assert_close(got[~newlines(got)], want, rtol=1e-5, atol=1e-5)
    assert num_newlines == newlines(got).sum()


@pytest.mark.parametrize(
    "chosen",
    [{"dominant": 5, "contextual": 3}, {"dominant": 0, "contextual": 4}, {"dominant": 6, "contextual": 0}],
    ids=str,
)
@pytest.mark.parametrize("kind", tiny.TILED)
@torch.no_grad()
def test_spatial_order_is_the_raster_of_the_picture(kind, chosen):
    for size in EVERY.values():
        check_spatial(llava(kind), size, VisionZip(**chosen))


LARGE = ((168, 168),)
HIDDEN = [(30, 168), (168, 30), (5, 300), (1, 2000), (2000, 1), (100, 168)]
"""Fitted into 3 x 3 tiles, which is then all that there is: outer tiles that show little or nothing of the picture."""


@pytest.mark.parametrize("kind", tiny.TILED)
@torch.no_grad()
def test_spatial_order_where_tiles_show_nothing(kind):
    model = llava(kind, pinpoints=LARGE)
    for size in HIDDEN:
        check_spatial(model, size, VisionZip(dominant=5, contextual=3))
    shown = {tile for tile, _ in flat(stitched((30, 168), (3, 3)))}
    assert shown == {4, 5, 6}  # the sizes do what they are here for
    assert stitched((1, 2000), (3, 3)) == []
    with vzip.attach(model, dominant=5, contextual=3, anyres="spatial") as handle:
        assert handle.num_image_tokens((1, 2000)) == 8


@pytest.mark.parametrize("kind", tiny.TILED)
@torch.no_grad()
def test_with_a_budget_that_holds_all_spatial_is_the_models_own_packing(kind):
    """Every patch of the picture, and a newline behind each row: the unreduced model's features."""
    model = llava(kind)
    for size in EVERY.values():
        inputs = pictures(model, [size])
        (want,) = features(model, inputs)
        with vzip.attach(model, dominant=tiny.GRID**2, contextual=0, anyres="spatial"):
            (got,) = features(model, inputs)
        if kind == "onevision" and grid_of(model, size) == (3, 3) and len(got) != len(want):
            assert newlines(got).sum() == newlines(want).sum()  # the model pools, a reduced one does not
        else:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reducer", [Random(budget=5), VisionZip(dominant=5, contextual=0)], ids=repr)
@pytest.mark.parametrize("kind", tiny.TILED)
@torch.no_grad()
def test_tokens_that_are_not_merged_stand_at_their_patch_in_raster_order(kind, reducer):
    model = llava(kind)
    for size in EVERY.values():
        inputs = pictures(model, [size])
        with vzip.attach(model, reducer=reducer, anyres="spatial"):
            (got,) = features(model, inputs)
        tokens = run_tower(
            model.model.vision_tower,
            inputs["pixel_values"][0],
            feature_layer=-2,
            num_dropped=0,
            attention_layer=None,
        )
        patches = model.model.multi_modal_projector(tokens.features[:, int(tokens.has_cls) :])
        raster = [(0, patch) for patch in range(tiny.GRID**2)] + flat(stitched(size, grid_of(model, size)))
        near = torch.cdist(got[~newlines(got)], torch.stack([patches[place] for place in raster])).min(dim=1)
        assert near.values.max() < 1e-3  # only what shows the picture, and never CLS
        assert near.indices.diff().gt(0).all()
        tiles = [raster[index][0] for index in near.indices]
        shown = [owner for owner, _ in raster]
        assert all(tiles.count(tile) == min(5, shown.count(tile)) for tile in range(len(patches)))


@pytest.mark.parametrize("kind", tiny.TILED)
@torch.no_grad()
def test_spatial_order_never_shows_padding(kind):
    """The tapped layer's output is NaN where there is padding: nothing of it may be left in the features, kept or merged."""
    model, seen = llava(kind, pinpoints=(*LARGE, (56, 112), (112, 112))), 0
    tower = model.model.vision_tower
    layer = list(tower.get_submodule(tower_layout(tower.config).layers).children())[-2]
    for size in (*PADDED.values(), *HIDDEN):
        grid, first = grid_of(model, size), int(tower_layout(tower.config).has_cls)
        hidden = torch.ones(1 + grid[0] * grid[1], tiny.GRID**2, dtype=torch.bool)
        hidden[0] = False
        for place in flat(stitched(size, grid)):
            hidden[place] = False

        def spoil(module, args, output, hidden=hidden, first=first):
            output = output.clone()
            output[:, first:][hidden] = torch.nan
            return output

        inputs = pictures(model, [size])
        for reducer in (VisionZip(dominant=5, contextual=3), Random(budget=5)):
            with vzip.attach(model, reducer=reducer, anyres="spatial"):
                (clean,) = features(model, inputs)
                hook = layer.register_forward_hook(spoil)
                (spoilt,) = features(model, inputs)
                hook.remove()
            assert torch.equal(clean, spoilt)
        with vzip.attach(model, dominant=5, contextual=3):  # the mark is one: "released" does show padding
            hook = layer.register_forward_hook(spoil)
            seen += model.model.get_image_features(**inputs).pooler_output[0].isnan().any().item()
            hook.remove()
    assert seen > 8


# The model's own order


@pytest.mark.parametrize("kind", tiny.TILED)
def test_identity_is_the_models_own_packing_bit_for_bit(kind):
    for pinpoints in (None, LARGE):
        model = llava(kind, pinpoints=pinpoints)
        inputs = pictures(model, [*EVERY.values(), *HIDDEN])
        want = features(model, inputs)
        with vzip.attach(model, reducer=Identity()):
            got = features(model, inputs)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_onevision_pools_the_largest_picture_here():
    """Else the tests above would hold nothing of pooling."""
    model = llava("onevision")
    (image,) = features(model, pictures(model, [(168, 168)]))
    assert len(image) == 16 + 8 * (8 + 1)
    assert newlines(image).sum() == 8
    with vzip.attach(model, dominant=4, contextual=2, anyres="spatial"):
        (image,) = features(model, pictures(model, [(168, 168)]))
    assert newlines(image).sum() == 8 and len(image) == 10 * 6 + 8


# Batches and gradients


@pytest.mark.parametrize("reducer", ["identity", "released", "spatial"])
@pytest.mark.parametrize("kind", tiny.TILED)
def test_a_batch_of_mixed_tile_counts_is_its_images_one_by_one(kind, reducer):
    model, sizes = llava(kind), [(56, 112), (168, 168), (1, 2000), (80, 112), (2000, 1)]
    inputs = pictures(model, sizes)
    assert len({grid_of(model, size) for size in sizes}) >= 3
    with vzip.attach(model, **REDUCERS[reducer]):
        together = features(model, inputs)
        stacked = torch.cat(
            [
                image[: 1 + rows * columns]
                for image, (rows, columns) in zip(
                    inputs["pixel_values"], (grid_of(model, size) for size in sizes), strict=True
                )
            ]
        )
        for image, want in zip(features(model, {**inputs, "pixel_values": stacked}), together, strict=True):
            assert torch.equal(image, want)  # tiles without the batch's padding are taken too
        for image in range(len(sizes)):
            (alone,) = features(model, {name: values[image : image + 1] for name, values in inputs.items()})
            assert len(alone) == len(together[image])
            torch.testing.assert_close(together[image], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("anyres", ["released", "spatial"])
@pytest.mark.parametrize("kind", tiny.TILED)
def test_gradients_reach_the_projector_and_are_finite(kind, anyres):
    model = llava(kind)
    projector = model.model.multi_modal_projector.requires_grad_(True)
    for sizes in ([(1, 2000)], [(80, 112), (168, 168), (1, 1)]):
        with vzip.attach(model, dominant=4, contextual=2, anyres=anyres):
            images = model.model.get_image_features(**pictures(model, sizes)).pooler_output
            gradients = torch.autograd.grad(
                torch.cat(list(images)).square().mean(), list(projector.parameters())
            )
        assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in gradients)
    projector.requires_grad_(False)


# Mistakes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_sizes": None}, ["image_sizes", "processor"]),
        (
            {"pixel_values": torch.zeros(1, 0, 3, tiny.SIDE, tiny.SIDE)},
            ["[1, 0, 3, 56, 56]", "[5] tiles", "processor"],
        ),
        (
            {"pixel_values": torch.zeros(1, 4, 3, tiny.SIDE, tiny.SIDE)},
            ["[1, 4, 3, 56, 56]", "[5] tiles", "processor"],
        ),
        (
            {"pixel_values": torch.zeros(2, 5, 3, tiny.SIDE, tiny.SIDE)},
            ["[2, 5, 3, 56, 56]", "1 images", "processor"],
        ),
        ({"pixel_values": torch.zeros(4, 3, tiny.SIDE, tiny.SIDE)}, ["4 tiles", "[5]", "processor"]),
        ({"pixel_values": torch.zeros(1, 5, 1, tiny.SIDE, tiny.SIDE)}, ["[5, 1, 56, 56]", "no pictures"]),
        ({"pixel_values": torch.zeros(5, 1, tiny.SIDE, tiny.SIDE)}, ["[5, 1, 56, 56]", "no pictures"]),
        ({"image_sizes": torch.tensor([[0, 112]])}, ["(0, 112)", "at least 1"]),
    ],
    ids=[
        "no sizes",
        "no tiles",
        "few tiles",
        "many images",
        "few stacked",
        "grey",
        "grey stacked",
        "no height",
    ],
)
@pytest.mark.parametrize("reducer", ["identity", "released", "spatial"])
@pytest.mark.parametrize("kind", tiny.TILED)
def test_pixels_that_do_not_fit_are_named(kind, reducer, change, words):
    model = llava(kind)
    with vzip.attach(model, **REDUCERS[reducer]):
        with pytest.raises(UserError) as error:
            features(model, pictures(model, [(112, 112)]) | change)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0), (-3, 5)])
@pytest.mark.parametrize("kind", tiny.TILED)
def test_a_size_without_pixels_is_named(kind, size):
    with vzip.attach(llava(kind), dominant=4, contextual=2) as handle:
        with pytest.raises(UserError) as error:
            handle.num_image_tokens(size)
        assert f"image_size={size}" in str(error.value) and "at least 1" in str(error.value)


@pytest.mark.parametrize(
    ("kind", "given_settings", "words"),
    [
        ("next", {"budget": 32}, ["reducer.budget=32", "5 tiles", "30 or 35"]),
        ("next", {"budget": 3}, ["reducer.budget=3", "choose 5"]),
        ("next", {"dominant": 16, "contextual": 2}, ["18", "17 tokens", "at most 17"]),
        (
            "next",
            {"dominant": 15, "contextual": 2, "anyres": "spatial"},
            ["17", "16 tokens", "at most 16"],
        ),  # no CLS there
        ("next", {"reducer": Random(budget=17)}, ["17", "at most 16"]),
        ("next-siglip", {"dominant": 15, "contextual": 2}, ["17", "16 tokens", "at most 16"]),
        ("onevision", {"budget": 17}, ["reducer.budget=17", "16 tokens", "at most 16"]),
        ("next", {"budget": 35, "anyres": "x"}, ["anyres='x'", "released, spatial"]),
        ("onevision", {"reducer": Identity(), "anyres": "x"}, ["anyres='x'", "released, spatial"]),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused_at_attach(kind, given_settings, words):
    with pytest.raises(UserError) as error:
        vzip.attach(llava(kind), **given_settings)
    assert all(word in str(error.value) for word in words), error.value
    assert "get_image_features" not in vars(llava(kind).model)
