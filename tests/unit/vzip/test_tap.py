"""One layer of a vision tower gives the numbers of an eager tower, and the tower is left unchanged."""

import copy
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vzip
from tests.helpers import tiny
from tests.helpers.models import marks
from vzip import UserError
from vzip.families.base import num_dropped_tokens
from vzip.reducers.identity import Identity
from vzip.reducers.random import Random
from vzip.reducers.visionzip import VisionZip
from vzip.tap import MAX_SCORES, layer_index, received_attention, run_tower, tower_layout

TOWERS = sorted(tiny.TOWERS)


@pytest.fixture(params=TOWERS)
def tower(request):
    return tiny.llava(request.param).model.vision_tower


@pytest.fixture
def pixels():
    return torch.randn(2, 3, tiny.SIDE, tiny.SIDE)


def run(tower, pixels, feature_layer=-2, *, attention_layer=None):
    return run_tower(
        tower, pixels, feature_layer=feature_layer, num_dropped=0, attention_layer=attention_layer
    )


def layers_of(tower):
    return list(tower.get_submodule(tower_layout(tower.config).layers).children())


def count_layers(tower):
    """Return a list that counts, from now on, how often each layer runs."""
    calls = [0] * tiny.LAYERS
    for index, layer in enumerate(layers_of(tower)):

        def count(module, args, output, index=index):
            calls[index] += 1

        layer.mlp.register_forward_hook(count)
    return calls


# ---- Attention ----


def plain_attention(queries, keys):
    """float[B, H, N, N]: all of softmax(QK^T / sqrt(d))."""
    return torch.softmax(torch.einsum("bhqd,bhkd->bhqk", queries, keys) / queries.shape[-1] ** 0.5, dim=-1)


class Peak(TorchDispatchMode):
    """Measures the elements of the largest tensor that an operation makes, and the most that are alive
    at once.
    """

    def __init__(self):
        super().__init__()
        self.largest = self.alive = 0
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if not isinstance(tensor, torch.Tensor):
                continue
            self.largest = max(self.largest, tensor.numel())
            storage = tensor.untyped_storage()
            if storage._cdata not in self.storages:
                self.storages[storage._cdata] = storage.nbytes() // tensor.element_size()
                weakref.finalize(storage, self.storages.pop, storage._cdata, None)
            self.alive = max(self.alive, sum(self.storages.values()))
        return output


MANY_TOKENS = (6, 4, 300, 4)
"""Tiles, heads, tokens, width of a head: 2,160,000 scores, 7,200 for each query."""
SIGLIP = (10, 16, 729, 72)
"""The shape of SigLIP-so400m on 10 tiles."""


@pytest.mark.parametrize(
    ("shape", "max_scores"),
    [
        *((MANY_TOKENS, max_scores) for max_scores in (1, 7200, 50_000, 2**25)),
        pytest.param(SIGLIP, MAX_SCORES, marks=pytest.mark.slow, id="siglips_shape"),
    ],
)
@torch.no_grad()
def test_received_attention_is_the_mean_of_all_rows_and_holds_no_more_scores_than_allowed(shape, max_scores):
    queries, keys = torch.randn(2, *shape)
    with Peak() as plain:
        want = plain_attention(queries, keys).mean(dim=1).mean(dim=1)
    with Peak() as peak:
        got = received_attention(queries, keys, max_scores)

    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-8)
    tiles, heads, num_tokens, _ = shape
    assert plain.largest == tiles * heads * num_tokens**2
    allowed = min(max(max_scores, tiles * heads * num_tokens), plain.largest)
    assert peak.largest <= max(allowed, keys.numel())
    # Scores and their softmax, its mean over heads, and copies of the inputs that matmul makes.
    assert peak.alive <= 2.25 * allowed + 4 * keys.numel()


# ---- One layer of a tower ----


def eager_attention(tower, pixels, layer):
    """Compute (saliency, keys) of the layer behind `hidden_states[layer]` from its full attention map."""
    eager = copy.deepcopy(tower)
    eager.set_attn_implementation("eager")
    index = layer_index(layer, tiny.LAYERS)
    raw = []
    projection = layers_of(eager)[index].get_submodule(tower_layout(tower.config).keys)
    projection.register_forward_hook(lambda module, args, output: raw.append(output))

    weights = eager(pixels, output_attentions=True).attentions[index]  # float[B, H, N, N]
    keys = torch.stack(raw[0].chunk(tower.config.num_attention_heads, dim=-1)).mean(dim=0)
    rows = weights[:, :, 0, 1:] if tower_layout(tower.config).has_cls else weights.mean(dim=2)
    return rows.mean(dim=1), keys


@pytest.mark.parametrize("feature_layer", [-1, -2, -4, 1, 3])
@torch.no_grad()
def test_features_are_the_hidden_states_of_the_tower_bit_for_bit(tower, pixels, feature_layer):
    want = tower(pixels, output_hidden_states=True).hidden_states[feature_layer]
    with_attention = run(tower, pixels, feature_layer, attention_layer=feature_layer)
    assert torch.equal(with_attention.features, want)

    alone = run(tower, pixels, feature_layer)
    assert torch.equal(alone.features, want)
    assert alone.saliency is None and alone.keys is None
    assert alone.has_cls == (tower.config.model_type != "siglip_vision_model")


@pytest.mark.parametrize(
    ("feature_layer", "attention_layer"),
    [(-2, -2), (1, 1), (-2, 1), (3, -3), (-2, 4), (1, -1), (-2, 3)],  # the same, earlier and later layers
)
@torch.no_grad()
def test_saliency_and_keys_are_those_of_an_eager_tower(tower, pixels, feature_layer, attention_layer):
    features = tower(pixels, output_hidden_states=True).hidden_states[feature_layer]
    saliency, keys = eager_attention(tower, pixels, attention_layer)

    tokens = run(tower, pixels, feature_layer, attention_layer=attention_layer)
    assert torch.equal(tokens.features, features)
    torch.testing.assert_close(tokens.saliency, saliency)
    torch.testing.assert_close(tokens.keys, keys)
    assert tokens.saliency.shape[1] == tiny.GRID**2
    assert tower.config._attn_implementation == "sdpa"

    # The layers of this tower differ, and none is so flat that any row would pass.
    assert tokens.saliency.std() > 0.05 * tokens.saliency.mean()
    if layer_index(attention_layer, tiny.LAYERS) != layer_index(feature_layer, tiny.LAYERS):
        own = run(tower, pixels, feature_layer, attention_layer=feature_layer)
        assert (tokens.saliency - own.saliency).abs().mean() > 0.05 * own.saliency.mean()
        assert not torch.allclose(tokens.keys, own.keys, rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_towers_have_float32_saliency(tower, pixels, dtype):
    tokens = run(tower.to(dtype), pixels.to(dtype), attention_layer=-2)
    assert tokens.features.dtype == dtype
    assert tokens.saliency.dtype == tokens.keys.dtype == torch.float32


@pytest.mark.parametrize(
    ("feature_layer", "attention_layer", "runs"),
    [
        (-2, None, [1, 1, 1, 0]),
        (-1, None, [1, 1, 1, 1]),
        (1, None, [1, 0, 0, 0]),
        (-2, 1, [1, 1, 1, 0]),
        (1, 2, [1, 1, 0, 0]),
        (-2, -1, [1, 1, 1, 1]),
    ],
)
@torch.no_grad()
def test_layers_after_the_last_one_needed_do_not_run(tower, pixels, feature_layer, attention_layer, runs):
    calls = count_layers(tower)
    run(tower, pixels, feature_layer, attention_layer=attention_layer)
    assert calls == runs


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize(
    ("reducer", "runs"),
    [
        (VisionZip(dominant=4, contextual=2), [1, 1, 1, 0]),
        (VisionZip(dominant=4, contextual=2, layer=1), [1, 1, 1, 0]),
        (VisionZip(dominant=4, contextual=2, layer=-1), [1, 1, 1, 1]),
        (Random(budget=6), [1, 1, 1, 0]),
        (Identity(), [1, 1, 1, 0]),
    ],
    ids=repr,
)
@torch.no_grad()
def test_an_attached_reducer_reads_its_layer_and_runs_no_more(pixels, kind, reducer, runs):
    model = tiny.llava(kind)
    tower = model.model.vision_tower
    attention_layer = (reducer.layer or -2) if reducer.uses_attention else None
    tokens = run(tower, pixels, attention_layer=attention_layer)
    tokens = replace(tokens, num_dropped=num_dropped_tokens(model.config))
    torch.manual_seed(5)
    want = reducer(tokens)

    calls = count_layers(tower)
    torch.manual_seed(5)
    with vzip.attach(model, reducer=reducer) as handle:
        got = tiny.reduce(handle, pixels)
        assert calls == runs
        assert sum(runs) == handle.family.num_layers_run(reducer)
    assert torch.equal(got.features, want.features) and torch.equal(got.slots, want.slots)


# ---- The tower is left unchanged ----


@torch.no_grad()
def test_the_tower_is_left_unchanged(tower, pixels):
    before = tower(pixels, output_hidden_states=True)  # transformers adds its own hooks here, once
    marked, keys = marks(tower), list(tower.state_dict())
    run(tower, pixels, attention_layer=-2)
    after = tower(pixels, output_hidden_states=True)

    assert torch.equal(before.last_hidden_state, after.last_hidden_state)
    for hidden, wanted in zip(after.hidden_states, before.hidden_states, strict=True):
        assert torch.equal(hidden, wanted)
    assert marks(tower) == marked
    assert list(tower.state_dict()) == keys


@pytest.mark.parametrize("failing", [0, -2])  # before the hooked layer, and in it
@torch.no_grad()
def test_a_tower_that_raises_is_left_unchanged(tower, pixels, failing):
    before = tower(pixels).last_hidden_state

    def fail(module, args):
        raise RuntimeError("out of memory")

    hook = layers_of(tower)[failing].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(tower, pixels, attention_layer=-2)
    hook.remove()
    assert marks(tower) == []
    assert torch.equal(tower(pixels).last_hidden_state, before)


@torch.no_grad()
def test_a_forward_that_a_layer_already_has_comes_back(tower, pixels):
    last = layers_of(tower)[-1]
    original = last.forward

    def wrapped(*args, **kwargs):
        return original(*args, **kwargs) + 1

    last.forward = wrapped
    before = tower(pixels).last_hidden_state
    run(tower, pixels)
    assert vars(last)["forward"] is wrapped
    assert torch.equal(tower(pixels).last_hidden_state, before)


# ---- Mistakes ----


def test_an_unknown_tower_is_refused():
    text = tiny.llava().model.language_model
    with pytest.raises(UserError, match="'llama' is not supported") as error:
        run(text, torch.zeros(1, 3, 8, 8))
    assert "clip_vision_model" in str(error.value)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (0, ["=0", "which has 4"]),  # the embeddings, which no layer computes
        (5, ["=5", "which has 4"]),
        (-5, ["=-5", "which has 4"]),
        ([-2, -1], ["=[-2, -1]", "not one layer"]),
        ("late", ["='late'", "not one layer"]),
        (1.5, ["=1.5", "not one layer"]),
    ],
)
def test_a_layer_that_does_not_exist_is_refused_under_the_name_of_its_setting(pixels, layer, words):
    tower = tiny.llava().model.vision_tower
    calls = count_layers(tower)
    marked = marks(tower)
    with pytest.raises(UserError, match=r"^vision_feature_layer=") as error:
        run(tower, pixels, layer)
    assert all(word in str(error.value) for word in words), error.value
    with pytest.raises(UserError, match=r"^reducer\.layer=") as error:
        run(tower, pixels, attention_layer=layer)
    assert all(word in str(error.value) for word in words), error.value
    assert calls == [0] * tiny.LAYERS and marks(tower) == marked


def test_an_attention_layer_that_does_not_exist_is_refused_at_attach():
    model = tiny.llava()
    for layer in (0, 5, -5, "late"):
        with pytest.raises(UserError, match=r"^reducer\.layer="):
            vzip.attach(model, reducer=VisionZip(dominant=4, contextual=2, layer=layer))
    vzip.attach(model, budget=6)  # nothing was left behind


@pytest.mark.parametrize("shape", [[2, 4, 56, 56], [3, 56, 56], [0, 3, 56, 56]])
def test_pixels_of_another_shape_are_refused(shape):
    with pytest.raises(UserError, match="are no pictures"):
        run(tiny.llava().model.vision_tower, torch.zeros(shape))
