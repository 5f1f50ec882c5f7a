"""Reading one layer of a vision tower: the same numbers as an eager tower's, and a tower that is left as it was."""

import copy

import pytest
import torch

from tests import tiny
from vzip import UserError
from vzip.tap import cls_attention, layer_index, received_attention, run_tower, tower_layout

TOWERS = sorted(tiny.TOWERS)


@pytest.fixture(params=TOWERS)
def tower(request):
    return tiny.llava(request.param).model.vision_tower


@pytest.fixture
def pixels():
    return torch.randn(2, 3, tiny.SIDE, tiny.SIDE)


def tap(tower, pixels, feature_layer=-2, *, attention=True):
    return run_tower(
        tower, pixels, feature_layer=feature_layer, num_dropped=0, attention_layer=feature_layer if attention else None
    )


def layers_of(tower):
    return list(tower.get_submodule(tower_layout(tower).layers).children())


def marks(module):
    """Every hook and every instance-level `forward` in a module."""
    found = []
    for name, part in module.named_modules():
        found += [(name, key) for key in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks") for _ in vars(part)[key]]
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
    torch.testing.assert_close(received_attention(queries, keys, chunk).sum(dim=1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("feature_layer", [-1, -2, -4, 1, 3, 4])
@pytest.mark.parametrize("attention", [True, False])
@torch.no_grad()
def test_features_are_the_towers_hidden_states_bit_for_bit(tower, pixels, feature_layer, attention):
    want = tower(pixels, output_hidden_states=True).hidden_states[feature_layer]
    assert torch.equal(tap(tower, pixels, feature_layer, attention=attention).features, want)


@pytest.mark.parametrize("feature_layer", [-2, 1])
@torch.no_grad()
def test_saliency_and_keys_are_an_eager_towers(tower, pixels, feature_layer):
    eager = copy.deepcopy(tower)
    eager.set_attn_implementation("eager")
    index = layer_index(feature_layer, tiny.LAYERS)
    raw = []
    projection = layers_of(eager)[index].get_submodule(tower_layout(tower).keys)
    projection.register_forward_hook(lambda module, args, output: raw.append(output))
    weights = eager(pixels, output_attentions=True).attentions[index]  # float[B, H, N, N]
    keys = torch.stack(raw[0].chunk(tower.config.num_attention_heads, dim=-1)).mean(dim=0)

    tokens = tap(tower, pixels, feature_layer)
    want = weights[:, :, 0, 1:].mean(dim=1) if tokens.has_cls else weights.mean(dim=1).mean(dim=1)
    torch.testing.assert_close(tokens.saliency, want)
    torch.testing.assert_close(tokens.keys, keys)
    assert tokens.saliency.shape[1] == tiny.GRID**2
    # Guards against a tower so flat that any row would pass.
    assert tokens.saliency.std() > 0.05 * tokens.saliency.mean()
    assert tower.config._attn_implementation == "sdpa"


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


@pytest.mark.parametrize(("feature_layer", "runs"), [(-2, [1, 1, 1, 0]), (-1, [1, 1, 1, 1]), (1, [1, 0, 0, 0])])
@torch.no_grad()
def test_layers_after_the_tapped_one_do_not_run(tower, pixels, feature_layer, runs):
    calls = [0] * tiny.LAYERS
    for index, layer in enumerate(layers_of(tower)):

        def count(module, args, output, index=index):
            calls[index] += 1

        layer.mlp.register_forward_hook(count)
    tap(tower, pixels, feature_layer)
    assert calls == runs


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
        run_tower(text, torch.zeros(1), feature_layer=-2, num_dropped=0, attention_layer=-2)
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
        ([-2, -1], ["vision_feature_layer=[-2, -1]", "several layers"]),
    ],
)
def test_a_layer_that_is_not_there_is_refused(tower, pixels, feature_layer, words):
    with pytest.raises(UserError) as error:
        tap(tower, pixels, feature_layer)
    assert all(word in str(error.value) for word in words), error.value
    assert marks(tower) == []
