"""Every reducer works with every family: the same tokens are counted and computed, and others are refused."""

import pytest
import torch

import vzip
from tests.contract.test_families import batch
from tests.helpers import tiny
from tests.helpers.errors import refused
from vzip.reducers import create, names
from vzip.reducers.hiprune import HiPrune
from vzip.reducers.scope import Scope
from vzip.tap import received_attention, run_tower, split_heads

pytestmark = pytest.mark.slow

SETTINGS = {name: {"budget": 7} for name in names() if name != "identity"}
SETTINGS["scope-merging"] = {"budget": 7, "merge": "sum"}
SETTINGS["hiprune-merging"] = {"budget": 7, "merge": "average", "object_layer": 2}


def made(name):
    return create(name.removesuffix("-merging"), SETTINGS[name])


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", tiny.KINDS)
@torch.no_grad()
def test_a_model_takes_the_tokens_of_every_reducer(kind, name):
    orders = ("released", "spatial") if kind.startswith(("next", "onevision")) else ("released",)
    for anyres in orders:
        # The model itself compares the number of placeholders with that of the tokens.
        model = tiny.llava(kind)
        with vzip.attach(model, reducer=made(name), anyres=anyres) as handle:
            inputs = batch(handle.processor(tiny.processor(kind)))
            assert model(**inputs).logits.isfinite().all()


@torch.no_grad()
def test_received_attention_is_read_in_both_layers():
    tower = tiny.llava().model.vision_tower
    pixels = torch.randn(2, 3, tiny.SIDE, tiny.SIDE)
    projections = {}
    for number in (1, 3):
        attention = tower.encoder.layers[number - 1].self_attn
        for name in ("q_proj", "k_proj"):

            def keep(module, args, output, place=(number, name)):
                projections[place] = split_heads(output, tower.config.num_attention_heads)

            attention.get_submodule(name).register_forward_hook(keep)

    tokens = run_tower(
        tower, pixels, feature_layer=-2, num_dropped=1, attention_layer=-2, received_layers=[1, -2]
    )
    for received, number in zip(tokens.received, (1, 3), strict=True):
        expected = received_attention(projections[number, "q_proj"], projections[number, "k_proj"])
        torch.testing.assert_close(received, expected[:, 1:])
    assert not torch.allclose(tokens.received[0], tokens.received[1], rtol=0.01)

    # Nothing else changes, and nothing is read that no reducer asked for.
    alone = run_tower(tower, pixels, feature_layer=-2, num_dropped=1, attention_layer=-2)
    assert torch.equal(alone.saliency, tokens.saliency) and torch.equal(alone.keys, tokens.keys)
    assert torch.equal(alone.features, tokens.features) and alone.received == ()


def test_a_later_object_layer_makes_the_tower_run_longer():
    family = vzip.families.family_of(tiny.llava())
    assert family.num_layers_run(HiPrune(budget=4)) == tiny.LAYERS - 1
    assert family.num_layers_run(HiPrune(budget=4, object_layer=-1)) == tiny.LAYERS


@pytest.mark.parametrize("kind", ["clip", "siglip", "qwen2.5-vl"])
def test_a_layer_that_the_tower_lacks_is_refused_at_attach(kind):
    model = tiny.llava(kind)
    refused(vzip.attach, model, reducer=HiPrune(budget=4, object_layer=30), words=["reducer.object_layer=30"])
    refused(vzip.attach, model, reducer=Scope(budget=4, layer=30), words=["reducer.layer=30"])
    with vzip.attach(model, budget=6):
        pass  # nothing was left behind


@torch.no_grad()
def test_pictures_of_equal_area_and_other_sides_keep_their_own_grids():
    """Two pictures of 4 x 9 and 6 x 6 groups: each is pooled by its own rows and columns."""
    model = tiny.llava("qwen2.5-vl")
    with vzip.attach(model, reducer=create("pool", {"budget": 4})) as handle:
        family = handle.family
        grids = torch.tensor([[1, 8, 18], [1, 12, 12]])
        patch = torch.randn(
            int(grids.prod(dim=1).sum()), model.model.visual.patch_embed.proj.weight[0].numel()
        )
        tokens = family.run_groups(handle.reducer, patch, grids)
        inputs = vzip.media.MediaInputs(patch, {"image_grid_thw": grids})
        features = family.visual_features("image", inputs, handle.reducer).features

    picture = tokens.features[0, 36:].view(2, 3, 2, 3, -1)
    expected = picture.mean(dim=(1, 3)).flatten(0, 1)
    torch.testing.assert_close(features[4:], expected)
    wide = tokens.features[0, :36].view(4, 9, -1)
    torch.testing.assert_close(features[0], wide[:, :2].mean(dim=(0, 1)))
