"""The reducers beside VisionZip: cells, greedy coverage, anchors, and merging that they share."""

import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.errors import refused
from vzip.reducers import VisionTokens, create, names, with_budget
from vzip.reducers.cells import cells_of, rows_of_cells
from vzip.reducers.divprune import DivPrune
from vzip.reducers.fastervlm import FasterVLM
from vzip.reducers.grid import EvenGrid
from vzip.reducers.hiprune import HiPrune
from vzip.reducers.merging import split_budget
from vzip.reducers.mmtok import MMTok
from vzip.reducers.pool import Pool
from vzip.reducers.scope import Scope
from vzip.reducers.selection import cosines, cover
from vzip.reducers.visionzip import VisionZip

SELECTORS = ("divprune", "fastervlm", "hiprune", "mmtok", "scope")
NEW = (*SELECTORS, "grid", "pool")


def tokens_of(rows=4, columns=4, *, images=2, has_cls=True, dtype=torch.float32, seed=0):
    """Draw the tokens of a tower, with all that reducers can read."""
    generator = torch.Generator().manual_seed(seed)
    num_patches = rows * columns
    num_tokens = num_patches + has_cls
    return VisionTokens(
        features=torch.randn(images, num_tokens, 6, generator=generator).to(dtype),
        has_cls=has_cls,
        num_dropped=int(has_cls),
        saliency=torch.rand(images, num_patches, generator=generator),
        keys=torch.randn(images, num_tokens, 3, generator=generator),
        received=tuple(torch.rand(2, images, num_patches, generator=generator)),
        grid=(rows, columns),
    )


# ---- All of them ----


@pytest.mark.parametrize("has_cls", [True, False])
@pytest.mark.parametrize("name", NEW)
def test_every_token_is_a_patch_and_slots_say_where_it_is(name, has_cls):
    tokens = tokens_of(3, 5, has_cls=has_cls)
    output = create(name, {"budget": 6})(tokens)
    source = torch.cat([output.dominant, output.contextual], dim=1)
    assert source.shape == (2, 6) and output.features.shape == (2, 6, 6)
    assert (source.diff(dim=1) > 0).all() and (source >= has_cls).all()
    assert torch.equal(output.slots.gather(1, source), torch.arange(6).expand(2, 6))
    assert (output.slots[:, : int(has_cls)] == -1).all()


@pytest.mark.parametrize("name", NEW)
def test_all_patches_can_be_kept(name):
    tokens = tokens_of(3, 5)
    output = create(name, {"budget": 15})(tokens)
    torch.testing.assert_close(output.features, tokens.features[:, 1:])


@pytest.mark.parametrize("name", NEW)
def test_a_share_is_a_budget_for_each_size(name):
    tokens = tokens_of(4, 6)
    share = create(name, {"keep": 0.25})
    assert share.num_tokens(24, has_cls=True, num_dropped=1) == 6
    assert torch.equal(share(tokens).features, create(name, {"budget": 6})(tokens).features)


@pytest.mark.parametrize("name", NEW)
def test_settings_of_new_reducers_make_them_again(name):
    for settings in ({"budget": 40, "tiles": 5}, {"keep": 0.25}):
        reducer = create(name, settings)
        again = create(name, json.loads(json.dumps(reducer.settings())))
        assert again.settings() == reducer.settings() and repr(again) == repr(reducer)
        assert again.uses_attention == reducer.uses_attention
    assert with_budget(create(name, {"budget": 3}), 10, tiles=5).settings()["budget"] == 2


@pytest.mark.parametrize("name", NEW)
def test_budgets_that_do_not_fit_are_refused(name):
    tokens = tokens_of()
    refused(lambda: create(name, {"budget": 17})(tokens), words=["reducer.budget=17", "16 patches"])
    refused(lambda: create(name, {"budget": 0}), words=["reducer.budget=0", "at least 1"])
    refused(lambda: create(name, {}), words=["reducer.budget", "reducer.keep"])
    refused(lambda: create(name, {"budget": 161, "tiles": 5}), words=["160 or 165"])
    refused(lambda: create(name, {"budget": 8, "keep": 0.5}), words=["reducer.keep=0.5", "not both"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NEW)
def test_half_precision_selects_as_float32_does(name, dtype):
    half = tokens_of(dtype=dtype)
    exact = VisionTokens(**{**vars(half), "features": half.features.float()})
    output = create(name, {"budget": 5})(half)
    assert output.features.dtype == dtype
    expected = create(name, {"budget": 5})(exact)
    assert torch.equal(output.slots, expected.slots)
    torch.testing.assert_close(output.features, expected.features.to(dtype))


@pytest.mark.parametrize("name", NEW)
def test_a_batch_is_its_pictures_one_by_one(name):
    reducer = create(name, {"budget": 5})
    both = reducer(tokens_of())
    for image in range(2):
        tokens = tokens_of()
        one = VisionTokens(
            features=tokens.features[image : image + 1],
            has_cls=True,
            saliency=tokens.saliency[image : image + 1],
            received=tuple(layer[image : image + 1] for layer in tokens.received),
        )
        assert torch.equal(reducer(one).slots[0], both.slots[image])


# ---- Merging ----


@pytest.mark.parametrize("merge", ["sum", "average"])
def test_fastervlm_with_merging_is_visionzip_without_cls(merge):
    tokens = tokens_of(5, 5)
    output = FasterVLM(budget=16, merge=merge)(tokens)
    dominant, contextual = split_budget(16)
    expected = VisionZip(dominant=dominant, contextual=contextual, merge=merge, keep_cls=False)(tokens)
    assert torch.equal(output.features, expected.features) and torch.equal(output.slots, expected.slots)


@pytest.mark.parametrize("name", SELECTORS)
def test_merging_keeps_the_selection_and_drops_no_patch(name):
    tokens = tokens_of(5, 5)
    dominant, contextual = split_budget(12)
    output = create(name, {"budget": 12, "merge": "sum"})(tokens)
    alone = create(name, {"budget": dominant})(tokens)
    assert torch.equal(output.dominant, alone.dominant) and output.contextual.shape[1] == contextual
    assert torch.equal(output.features[:, :dominant], alone.features)
    assert (output.slots[:, 1:] >= 0).all() and (output.slots[:, 0] == -1).all()


@pytest.mark.parametrize("name", SELECTORS)
def test_merging_needs_the_attention_of_the_tower(name):
    reducer = create(name, {"budget": 12, "merge": "sum"})
    assert reducer.uses_attention
    without_keys = VisionTokens(**{**vars(tokens_of()), "keys": None})
    refused(lambda: reducer(without_keys), words=["merging", "keys"])
    refused(lambda: create(name, {"budget": 8, "merge": "mean"}), words=["reducer.merge='mean'", "average"])


def test_attention_is_computed_only_for_reducers_that_read_it():
    reading = [name for name in NEW if create(name, {"budget": 4}).uses_attention]
    assert reading == ["fastervlm", "hiprune", "scope"]
    assert not Scope(budget=4, alpha=0).uses_attention
    bare = VisionTokens(features=tokens_of().features, has_cls=True)
    refused(lambda: FasterVLM(budget=4)(bare), words=["fastervlm", "attention"])
    refused(lambda: HiPrune(budget=4)(bare), words=["hiprune", "two layers", "0"])


# ---- Cells ----


@pytest.mark.parametrize(
    ("num_cells", "grid", "rows"),
    [
        (64, (24, 24), [8] * 8),
        (8, (8, 8), [4, 4]),
        (32, (24, 24), [8] * 4),
        (192, (24, 24), [16] * 12),
        (81, (27, 27), [9] * 9),
        (17, (16, 16), [4, 4, 4, 5]),  # a prime number has no such grid
        (8, (4, 16), [8]),  # cells of a wide picture are square, too
        (8, (16, 4), [2] * 4),
        (64, (24, 3), None),  # only three columns
        (575, (24, 24), None),
    ],
)
def test_cells_are_as_square_as_the_budget_allows(num_cells, grid, rows):
    cells = rows_of_cells(num_cells, *grid)
    assert sum(cells) == num_cells and len(cells) <= grid[0] and max(cells) <= grid[1]
    assert rows is None or cells == rows


@given(rows=st.integers(1, 12), columns=st.integers(1, 12), data=st.data())
def test_each_patch_has_one_cell_and_each_cell_its_middle(rows, columns, data):
    num_cells = data.draw(st.integers(1, rows * columns))
    cell_of, middles = cells_of(num_cells, rows, columns)
    assert sorted(set(cell_of.tolist())) == list(range(num_cells))
    assert cell_of[middles].tolist() == list(range(num_cells))
    assert middles.tolist() == sorted(middles.tolist())


def test_pool_is_average_pooling():
    tokens = tokens_of(6, 6, dtype=torch.float64)
    output = Pool(budget=9)(tokens)
    picture = tokens.features[:, 1:].transpose(1, 2).view(2, 6, 6, 6)
    expected = F.avg_pool2d(picture, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(output.features, expected)
    assert output.slots[0, 1:].bincount().tolist() == [4] * 9


def test_grid_keeps_the_middles():
    output = EvenGrid(budget=4)(tokens_of(6, 6))
    assert output.dominant[0].tolist() == [1 + patch for patch in (7, 10, 25, 28)]
    assert (output.slots >= 0).sum() == 2 * 4


def test_patches_of_an_unknown_grid_are_refused():
    tokens = VisionTokens(features=torch.randn(1, 15, 4), has_cls=False)
    refused(lambda: Pool(budget=4)(tokens), words=["15 patches", "grid=(rows, columns)"])


# ---- Coverage ----


def plain_cover(coverage, weights, num_selected):
    """Compute all gains anew in each step, for one picture."""
    covered = torch.zeros_like(coverage[0])
    selected = []
    for _ in range(num_selected):
        scores = (coverage - covered).clamp(min=0).sum(dim=1) * weights
        scores[selected] = -1
        selected.append(int(scores.argmax()))
        covered = torch.maximum(covered, coverage[selected[-1]])
    return selected


@given(side=st.integers(1, 6), seed=st.integers(0, 999), data=st.data())
def test_coverage_is_that_of_the_plain_way(side, seed, data):
    num_patches = side * side
    num_selected = data.draw(st.integers(1, num_patches))
    generator = torch.Generator().manual_seed(seed)
    coverage = torch.randn(2, num_patches, num_patches, generator=generator, dtype=torch.float64)
    weights = torch.rand(2, num_patches, generator=generator, dtype=torch.float64)
    selected = cover(coverage, weights, num_selected)
    for image in range(2):
        assert selected[image].tolist() == plain_cover(coverage[image], weights[image], num_selected)


def test_equal_scores_go_to_the_first_patch():
    # All patches are copies, so after the first one nothing is gained.
    features = torch.ones(1, 30, 4)
    for reducer in (Scope(budget=20, alpha=0), MMTok(budget=20), DivPrune(budget=20)):
        output = reducer(VisionTokens(features=features, has_cls=False, grid=(5, 6)))
        assert output.dominant[0].tolist() == list(range(20)), reducer


def test_divprune_starts_with_the_most_isolated_patch():
    features = torch.eye(4)[[0, 0, 1, 1, 2]][None] + 0.01 * torch.eye(5, 4)[None]
    output = DivPrune(budget=3)(VisionTokens(features=features, has_cls=False, grid=(1, 5)))
    kept = output.dominant[0].tolist()
    assert kept[-1] == 4 and kept[0] in (0, 1) and kept[1] in (2, 3)


def test_cosines_are_symmetric_and_at_least_float32():
    similar = cosines(torch.randn(1, 9, 4).bfloat16())
    assert similar.dtype == torch.float32
    torch.testing.assert_close(similar, similar.transpose(1, 2))
    torch.testing.assert_close(similar.diagonal(dim1=1, dim2=2), torch.ones(1, 9))


# ---- HiPrune ----


@pytest.mark.parametrize(("anchor", "near"), [(5, {1, 4, 5, 6, 9}), (0, {0, 1, 4}), (3, {2, 3, 4, 7})])
def test_an_anchor_stays_with_its_neighbours(anchor, near):
    middle = torch.zeros(1, 16).index_fill(1, torch.tensor([anchor]), 1)
    deep = torch.arange(16.0).flip(0)[None] / 100
    tokens = VisionTokens(features=torch.randn(1, 16, 4), has_cls=False, received=(middle, deep))
    kept = HiPrune(budget=7, alpha=0.7)(tokens).dominant[0].tolist()
    registers = [patch for patch in range(16) if patch not in near][: 7 - len(near)]
    assert kept == sorted([*near, *registers])


def test_more_neighbours_than_the_budget_do_not_exceed_it():
    assert HiPrune(budget=3, alpha=1)(tokens_of(6, 6)).dominant.shape == (2, 3)


@pytest.mark.parametrize(
    ("layers", "chosen"), [(range(1, 25), 9), ([8, 16, 24, 32], 16), (range(1, 5), 2), ([1], 1)]
)
def test_the_object_layer_is_that_of_the_paper(layers, chosen):
    assert HiPrune(budget=4).received_layers(layers) == (chosen, None)
    assert HiPrune(budget=4, object_layer=-3, layer=-2).received_layers(layers) == (-3, -2)


# ---- Mistakes ----


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("scope", {"alpha": -1}, ["reducer.alpha=-1", "at least 0"]),
        ("scope", {"alpha": "much"}, ["reducer.alpha=much", "number"]),
        ("scope", {"alpha": float("nan")}, ["reducer.alpha=nan"]),
        ("hiprune", {"alpha": 1.5}, ["reducer.alpha=1.5", "from 0 to 1"]),
        ("mmtok", {"temperature": 0}, ["reducer.temperature=0", "at least 0.001"]),
        ("pool", {"merge": "sum"}, ["pool", "merge"]),
    ],
)
def test_wrong_settings_are_named(name, settings, words):
    refused(lambda: create(name, {"budget": 4, **settings}), words=words)


def test_shared_modules_are_no_reducers():
    assert set(names()) == {"identity", "random", "visionzip", *NEW}
