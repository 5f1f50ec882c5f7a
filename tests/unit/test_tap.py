"""Reading one layer of a vision tower: the same numbers as an eager tower's, and a tower that is left as it was."""

import copy
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vzip
from tests.helpers import tiny
from vzip import UserError
from vzip.reducers.identity import Identity
from vzip.reducers.random import Random
from vzip.reducers.visionzip import VisionZip
from vzip.tap import MAX_SCORES, cls_attention, layer_index, received_attention, run_tower, tower_layout

TOWERS = sorted(tiny.TOWERS)


@pytest.fixture(params=TOWERS)
def tower(request):
    return tiny.llava(request.param).model.vision_tower


@pytest.fixture
def pixels():
    return torch.randn(2, 3, tiny.SIDE, tiny.SIDE)


def tap(tower, pixels, feature_layer=-2, *, attention=True, attention_layer=None):
    layer = (attention_layer or feature_layer) if attention else None
    return run_tower(tower, pixels, feature_layer=feature_layer, num_dropped=0, attention_layer=layer)


def layers_of(tower):
    return list(tower.get_submodule(tower_layout(tower.config).layers).children())


def marks(module):
    """Every hook and every instance-level `forward` in a module."""
    found = []
    for name, part in module.named_modules():
        found += [
            (name, key)
            for key in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
            for _ in vars(part)[key]
        ]
        found += [(name, "forward")] if "forward" in vars(part) else []
    return found


def plain_attention(queries, keys):
    """float[B, H, N, N]: the whole softmax(QK^T / sqrt(d))."""
    return torch.softmax(torch.einsum("bhqd,bhkd->bhqk", queries, keys) / queries.shape[-1] ** 0.5, dim=-1)


def test_cls_attention_is_the_first_row():
    queries, keys = torch.randn(2, 3, 2, 17, 4, dtype=torch.float64).unbind(0)
    want = plain_attention(queries, keys)[:, :, 0, 1:].mean(dim=1)
    torch.testing.assert_close(cls_attention(queries, keys), want)
    assert cls_attention(queries, keys).shape == (3, 16)


@pytest.mark.parametrize("chunk", [1, 3, 16, 17, 18, 1000])
def test_received_attention_is_the_column_means_for_any_chunk(chunk):
    queries, keys = torch.randn(2, 3, 2, 17, 4, dtype=torch.float64).unbind(0)
    want = plain_attention(queries, keys).mean(dim=1).mean(dim=1)
    torch.testing.assert_close(received_attention(queries, keys, chunk), want)
    torch.testing.assert_close(
        received_attention(queries, keys, chunk).sum(dim=1), torch.ones(3, dtype=torch.float64)
    )


class Peak(TorchDispatchMode):
    """Elements of the largest tensor that an operation made, and the most that were alive at once."""

    def __init__(self):
        super().__init__()
        self.largest = self.alive = 0
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)):
            self.largest = max(self.largest, tensor.numel())
            storage = tensor.untyped_storage()
            if storage._cdata not in self.storages:
                self.storages[storage._cdata] = storage.nbytes() // tensor.element_size()
                weakref.finalize(storage, self.storages.pop, storage._cdata, None)
            self.alive = max(self.alive, sum(self.storages.values()))
        return made


@pytest.mark.parametrize("max_scores", [1, 7199, 7200, 50_000, 100_000, 500_000, 2**25])
@torch.no_grad()
def test_received_attention_holds_no_more_scores_than_it_may(max_scores):
    """Of 6 tiles of 300 tokens and 4 heads: 2,160,000 scores in all, 7,200 of one query. `pytest -s` shows the figures."""
    shape = (6, 4, 300, 4)
    queries, keys = torch.randn(shape), torch.randn(shape)
    with Peak() as plain:
        want = plain_attention(queries, keys).mean(dim=1).mean(dim=1)
    with Peak() as peak:
        got = received_attention(queries, keys, max_scores)
    print(
        f"max_scores={max_scores}: largest {peak.largest} (plain {plain.largest}), alive {peak.alive} (plain {plain.alive})"
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)
    allowed = min(max(max_scores, 6 * 4 * 300), 6 * 4 * 300 * 300)
    assert peak.largest <= max(allowed, keys.numel())
    # Scores and their softmax, its mean over heads, and what matmul copies of the inputs, which count too.
    assert peak.alive <= 2.25 * allowed + 4 * keys.numel()
    assert plain.largest == 6 * 4 * 300 * 300


@pytest.mark.parametrize("feature_layer", [-1, -2, -4, 1, 3, 4])
@pytest.mark.parametrize("attention", [True, False])
@torch.no_grad()
def test_features_are_the_towers_hidden_states_bit_for_bit(tower, pixels, feature_layer, attention):
    want = tower(pixels, output_hidden_states=True).hidden_states[feature_layer]
    assert torch.equal(tap(tower, pixels, feature_layer, attention=attention).features, want)


def eager_attention(tower, pixels, layer):
    """(saliency, keys) of the layer that `hidden_states[layer]` comes from, of all layers' full attention maps."""
    eager = copy.deepcopy(tower)
    eager.set_attn_implementation("eager")
    index = layer_index(layer, tiny.LAYERS)
    raw = []
    projection = layers_of(eager)[index].get_submodule(tower_layout(tower.config).keys)
    projection.register_forward_hook(lambda module, args, output: raw.append(output))
    weights = eager(pixels, output_attentions=True).attentions[index]  # float[B, H, N, N]
    keys = torch.stack(raw[0].chunk(tower.config.num_attention_heads, dim=-1)).mean(dim=0)
    saliency = weights[:, :, 0, 1:] if tower_layout(tower.config).has_cls else weights.mean(dim=2)
    return saliency.mean(dim=1), keys


@pytest.mark.parametrize("feature_layer", [-2, 1])
@torch.no_grad()
def test_saliency_and_keys_are_an_eager_towers(tower, pixels, feature_layer):
    saliency, keys = eager_attention(tower, pixels, feature_layer)
    tokens = tap(tower, pixels, feature_layer)
    torch.testing.assert_close(tokens.saliency, saliency)
    torch.testing.assert_close(tokens.keys, keys)
    assert tokens.saliency.shape[1] == tiny.GRID**2
    # Guards against a tower so flat that any row would pass.
    assert tokens.saliency.std() > 0.05 * tokens.saliency.mean()
    assert tower.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("feature_layer", "attention_layer"),
    [
        (-2, 1),
        (3, -3),
        (-2, 4),
        (1, -1),
        (2, 3),
        (-2, -2),
        (-2, 3),
    ],  # earlier, later, and the same by two names
)
@torch.no_grad()
def test_attention_of_another_layer_goes_with_the_features_of_their_own(
    tower, pixels, feature_layer, attention_layer
):
    features = tower(pixels, output_hidden_states=True).hidden_states[feature_layer]
    saliency, keys = eager_attention(tower, pixels, attention_layer)
    tokens = tap(tower, pixels, feature_layer, attention_layer=attention_layer)
    assert torch.equal(tokens.features, features)
    torch.testing.assert_close(tokens.saliency, saliency)
    torch.testing.assert_close(tokens.keys, keys)
    if layer_index(attention_layer, tiny.LAYERS) != layer_index(feature_layer, tiny.LAYERS):
        own = tap(tower, pixels, feature_layer)  # guards against layers so alike that either would pass
        assert (tokens.saliency - own.saliency).abs().mean() > 0.05 * own.saliency.mean()
        assert not torch.allclose(tokens.keys, own.keys, rtol=0.1)


@torch.no_grad()
def test_attention_is_computed_only_when_asked(tower, pixels):
    tokens = tap(tower, pixels, attention=False)
    assert tokens.saliency is None and tokens.keys is None
    assert tokens.has_cls == (tower.config.model_type != "siglip_vision_model")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_towers_have_float32_saliency(tower, pixels, dtype):
    tokens = tap(tower.to(dtype), pixels.to(dtype))
    assert tokens.features.dtype == dtype
    assert tokens.saliency.dtype == tokens.keys.dtype == torch.float32


def count_layers(tower):
    """A list that counts, from now on, how often each layer runs."""
    calls = [0] * tiny.LAYERS
    for index, layer in enumerate(layers_of(tower)):

        def count(module, args, output, index=index):
            calls[index] += 1

        layer.mlp.register_forward_hook(count)
    return calls


@pytest.mark.parametrize(
    ("feature_layer", "runs"), [(-2, [1, 1, 1, 0]), (-1, [1, 1, 1, 1]), (1, [1, 0, 0, 0])]
)
@torch.no_grad()
def test_layers_after_the_tapped_one_do_not_run(tower, pixels, feature_layer, runs):
    calls = count_layers(tower)
    tap(tower, pixels, feature_layer)
    assert calls == runs


@pytest.mark.parametrize(
    ("feature_layer", "attention_layer", "runs"),
    [
        (-2, 1, [1, 1, 1, 0]),
        (2, 1, [1, 1, 0, 0]),
        (1, 2, [1, 1, 0, 0]),
        (1, -2, [1, 1, 1, 0]),
        (-2, -1, [1, 1, 1, 1]),
    ],
)
@torch.no_grad()
def test_layers_after_the_later_of_both_do_not_run(tower, pixels, feature_layer, attention_layer, runs):
    calls = count_layers(tower)
    tap(tower, pixels, feature_layer, attention_layer=attention_layer)
    assert calls == runs
    calls[:] = [0] * tiny.LAYERS
    tap(tower, pixels, feature_layer, attention=False)
    assert (
        sum(calls) == layer_index(feature_layer, tiny.LAYERS) + 1
    )  # where no attention is wanted, the features' alone


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
    wanted = tap(tower, pixels, attention=reducer.uses_attention, attention_layer=reducer.layer)
    calls = count_layers(tower)
    torch.manual_seed(5)
    with vzip.attach(model, reducer=reducer) as handle:
        got = handle.reduce(pixels, num_dropped=0)
        assert calls == runs and sum(runs) == handle.family.num_layers_run(reducer)  # what the plan counts
    torch.manual_seed(5)
    want = reducer(wanted)
    assert torch.equal(got.features, want.features) and torch.equal(got.slots, want.slots)


@torch.no_grad()
def test_the_tower_is_left_as_it_was(tower, pixels):
    before = tower(pixels, output_hidden_states=True)  # transformers puts its own hooks in once, here
    marked, keys = marks(tower), list(tower.state_dict())
    tap(tower, pixels)
    after = tower(pixels, output_hidden_states=True)
    assert torch.equal(before.last_hidden_state, after.last_hidden_state)
    assert all(torch.equal(a, b) for a, b in zip(before.hidden_states, after.hidden_states, strict=True))
    assert marks(tower) == marked
    assert list(tower.state_dict()) == keys


@pytest.mark.parametrize("failing", [0, -2])  # before the tapped layer, and in it
@torch.no_grad()
def test_a_tower_that_raises_is_left_as_it_was(tower, pixels, failing):
    before = tower(pixels).last_hidden_state

    def fail(module, args):
        raise RuntimeError("out of memory")

    hook = layers_of(tower)[failing].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        tap(tower, pixels)
    hook.remove()
    assert marks(tower) == []
    assert torch.equal(tower(pixels).last_hidden_state, before)


@torch.no_grad()
def test_a_layers_own_forward_comes_back(tower, pixels):
    last = layers_of(tower)[-1]
    original = last.forward

    def wrapped(*args, **kwargs):
        return original(*args, **kwargs) + 1

    last.forward = wrapped
    before = tower(pixels).last_hidden_state
    tap(tower, pixels)
    assert vars(last)["forward"] is wrapped
    assert torch.equal(tower(pixels).last_hidden_state, before)


def test_an_unknown_tower_is_refused():
    text = tiny.llava().model.language_model
    with pytest.raises(UserError, match="'llama' is not supported") as error:
        run_tower(text, torch.zeros(1, 3, 8, 8), feature_layer=-2, num_dropped=0, attention_layer=-2)
    assert "clip_vision_model" in str(error.value)


@pytest.mark.parametrize(("feature_layer", "index"), [(-1, 23), (-2, 22), (-24, 0), (1, 0), (24, 23)])
def test_layer_index_counts_as_hidden_states_does(feature_layer, index):
    assert layer_index(feature_layer, 24) == index


@pytest.mark.parametrize(
    ("feature_layer", "words"),
    [
        (0, ["vision_feature_layer=0", "which has 4"]),  # the embeddings, which no layer made
        (5, ["vision_feature_layer=5", "which has 4"]),
        (-5, ["vision_feature_layer=-5", "which has 4"]),
        (-6, ["vision_feature_layer=-6", "which has 4"]),
        ([-2, -1], ["vision_feature_layer=[-2, -1]", "not one layer"]),
    ],
)
def test_a_layer_that_is_not_there_is_refused(tower, pixels, feature_layer, words):
    with pytest.raises(UserError) as error:
        tap(tower, pixels, feature_layer)
    assert all(word in str(error.value) for word in words), error.value
    assert marks(tower) == []


@pytest.mark.parametrize("layer", [0, 5, -5, "late", 1.5])
def test_an_attention_layer_that_is_not_there_is_refused_as_the_reducers(tower, pixels, layer):
    calls = count_layers(tower)
    with pytest.raises(UserError, match=r"^reducer\.layer=") as error:
        run_tower(tower, pixels, feature_layer=-2, num_dropped=0, attention_layer=layer)
    assert repr(layer) in str(error.value) and "vision_feature_layer" not in str(error.value)
    assert calls == [0] * tiny.LAYERS


@pytest.mark.parametrize("layer", [0, 5, -5, "late"])
def test_an_attention_layer_that_is_not_there_is_refused_at_attach(layer):
    model = tiny.llava()
    with pytest.raises(UserError, match=r"^reducer\.layer="):
        vzip.attach(model, reducer=VisionZip(dominant=4, contextual=2, layer=layer))
    vzip.attach(model, budget=6)  # nothing was left behind


@pytest.mark.parametrize("shape", [[2, 4, 56, 56], [3, 56, 56], [0, 3, 56, 56]])
def test_what_is_no_picture_is_refused(tower, shape):
    with pytest.raises(UserError, match="are no pictures"):
        tap(tower, torch.zeros(shape))
    assert marks(tower) == []


@torch.no_grad()
@pytest.mark.integration
def test_the_memory_is_bounded_at_siglips_shape_too():
    """SigLIP-so400m (16 heads of 72, 729 tokens) on 10 tiles, in float32. `pytest -s` shows the figures."""
    queries, keys = torch.randn(2, 10, 16, 729, 72).unbind(0)
    with Peak() as plain:
        want = plain_attention(queries, keys).mean(dim=1).mean(dim=1)
    with Peak() as peak:
        got = received_attention(queries, keys)
    print(
        f"alive at once: {peak.alive * 4 / 2**20:,.0f} MiB, all attention maps {plain.alive * 4 / 2**20:,.0f} MiB"
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-8)
    assert peak.alive <= 2.25 * MAX_SCORES + 4 * keys.numel() < plain.alive
