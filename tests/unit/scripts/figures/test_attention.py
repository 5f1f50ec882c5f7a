"""The numbers about attention, against plain references."""

import copy

import pytest
import torch

from scripts.figures.attention import (
    SMALLEST,
    LayerAttention,
    attention_of_layers,
    num_holding,
    softmax_gradient,
    top_shares,
)
from tests.helpers import tiny
from vzip import UserError
from vzip.families import family_of
from vzip.overlay import first_tile
from vzip.tap import MAX_SCORES


def layers_of(kind):
    """(attention of all layers, eager attention maps of all layers [B, H, N, N]) of a tiny tower."""
    family = family_of(tiny.llava(kind))
    pixels = torch.randn(2, 3, tiny.SIDE, tiny.SIDE)
    eager = copy.deepcopy(family.tower)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        maps = eager(pixels, output_attentions=True).attentions
    return attention_of_layers(family, pixels), maps


@pytest.mark.parametrize("kind", ["clip", "dinov2", "siglip"])
@torch.no_grad()
def test_the_attention_of_every_layer_is_that_of_an_eager_tower(kind):
    layers, maps = layers_of(kind)
    assert len(layers) == tiny.LAYERS == len(maps)
    for layer, weights in zip(layers, maps, strict=True):
        received = weights.mean(dim=(1, 2)) if kind == "siglip" else weights[:, :, 0, 1:].mean(dim=1)
        torch.testing.assert_close(layer.shares(), received / received.sum(dim=1, keepdim=True))
        rows = weights if kind == "siglip" else weights[:, :, :1]
        torch.testing.assert_close(torch.cat(list(layer.rows())), rows.flatten(0, 2))
    assert not torch.allclose(layers[0].shares(), layers[1].shares(), rtol=0.1)

    # Chunks of rows are the same rows.
    layer = layers[0]
    rows_at_once = 3 * len(layer.keys) * layer.keys.shape[1]
    chunks = list(layer.rows(rows_at_once * layer.keys.shape[2]))
    if kind == "siglip":
        assert {len(chunk) for chunk in chunks[:-1]} == {rows_at_once}
    whole = torch.cat(list(layer.rows(MAX_SCORES)))
    torch.testing.assert_close(torch.cat(chunks).sort(dim=0).values, whole.sort(dim=0).values)


ONE_SIZE = [kind for kind in tiny.KINDS if kind not in (*tiny.TOWERS, *tiny.NATIVE)]


@pytest.mark.parametrize("kind", tiny.NATIVE)
def test_towers_for_pictures_of_any_size_are_refused(kind):
    with pytest.raises(UserError, match="pictures of any size"):
        first_tile(family_of(tiny.llava(kind)), tiny.processor(kind).image_processor, tiny.picture())


@pytest.mark.parametrize("kind", ONE_SIZE)
@torch.no_grad()
def test_the_first_tile_of_every_family_has_attention(kind):
    family = family_of(tiny.llava(kind))
    tile = first_tile(family, tiny.processor(kind).image_processor, tiny.picture(height=40, width=90))
    assert tile.shape[:2] == (1, 3)
    layers = attention_of_layers(family, tile)
    assert len(layers) == tiny.LAYERS
    for layer in layers:
        assert layer.shares().shape == (1, family.num_patches)
        torch.testing.assert_close(layer.shares().sum(), torch.tensor(1.0))


def test_shares_of_the_most_attended_patches():
    shares = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.7, 0.1, 0.1, 0.1]])
    assert top_shares(shares, [1, 2, 4]) == pytest.approx([(0.4 + 0.7) / 2, (0.7 + 0.8) / 2, 1])
    assert num_holding(shares, 0.5) == [2, 1]
    assert num_holding(shares, 0.75) == [3, 2]


def layer_with_scores(scores):
    """A layer whose softmax rows have these scores: float[rows, N], as the coordinates of the queries."""
    width = scores.shape[1]
    queries = scores[None, None] * width**0.5
    return LayerAttention(queries=queries, keys=torch.eye(width)[None, None], has_cls=False)


def test_the_gradient_of_the_softmax_is_that_of_autograd():
    scores = 3 * torch.randn(20, 20)
    measured = softmax_gradient([layer_with_scores(scores)])
    rows = scores.softmax(dim=1)
    jacobians = [torch.autograd.functional.jacobian(lambda z: z.softmax(0), row) for row in scores]
    gradient = torch.stack([jacobian.diagonal() for jacobian in jacobians])

    assert measured["num_rows"] == 20 and measured["num_tokens"] == 20
    assert sum(each["weights"] for each in measured["bins"]) == rows.numel()
    assert len(measured["bins"]) > 5
    for each in measured["bins"]:
        above = rows > each["from"] if each["from"] > 1.1 * SMALLEST else rows >= 0
        inside = above & (rows <= each["to"])
        assert each["weights"] == inside.sum()
        assert each["mean_weight"] == pytest.approx(rows[inside].mean().item(), rel=1e-4)
        assert each["mean_gradient"] == pytest.approx(gradient[inside].mean().item(), rel=1e-4)

    top = rows.topk(2, dim=1).indices
    share_of_gradient = gradient.gather(1, top).sum() / gradient.sum()
    assert measured["top_tenth"] == {
        "tokens": 2,
        "attention": pytest.approx(rows.gather(1, top).sum().item() / 20, rel=1e-4),
        "gradient": pytest.approx(share_of_gradient.item(), rel=1e-4),
    }
