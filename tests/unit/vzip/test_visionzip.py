"""VisionZip agrees with a slow transcription of the method; the two other reducers do what they say."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vzip import UserError
from vzip.reducers import VisionTokens, create, names, with_budget
from vzip.reducers.identity import Identity
from vzip.reducers.random import Random
from vzip.reducers.visionzip import VisionZip, split_budget
from vzip.tap import cls_attention, received_attention


def layer(images, grid, *, has_cls, width=5, heads=2, head_dim=3, seed=0):
    """Draw features, queries and keys (per head) of one layer of a tower, in float64, so that rounding
    decides no tie.
    """
    generator = torch.Generator().manual_seed(seed)
    num_tokens = grid * grid + has_cls

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = (images, heads, num_tokens, head_dim)
    return draw(images, num_tokens, width), draw(*shape), draw(*shape)


def tokens_of(features, queries, keys, *, has_cls=True):
    saliency = cls_attention(queries, keys) if has_cls else received_attention(queries, keys)
    return VisionTokens(
        features=features, has_cls=has_cls, num_dropped=int(has_cls), saliency=saliency, keys=keys.mean(dim=1)
    )


def attention_row(query, keys):
    """softmax(q K^T / sqrt(d)) of one query, as a list."""
    scores = [sum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(len(query)) for key in keys]
    exponentials = [math.exp(score - max(scores)) for score in scores]
    return [value / sum(exponentials) for value in exponentials]


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def patch_saliency(queries, keys, has_cls):
    """Return the score of every token, summed over heads: the attention of CLS, or that of all tokens
    together.
    """
    saliency = [0.0] * len(keys[0])
    for head in range(len(keys)):
        for query in queries[head][:1] if has_cls else queries[head]:
            row = attention_row(query, keys[head])
            saliency = [total + value for total, value in zip(saliency, row, strict=True)]
    return saliency


def mean_key(keys, token):
    return [sum(head[token][axis] for head in keys) / len(keys) for axis in range(len(keys[0][0]))]


def merged_feature(target, cluster, merge):
    """Add the mean of the cluster to the target, or average the target with the cluster."""
    if not cluster:
        return target
    totals = [sum(values) for values in zip(*cluster, strict=True)]
    if merge == "sum":
        return [own + total / len(cluster) for own, total in zip(target, totals, strict=True)]
    return [(own + total) / (1 + len(cluster)) for own, total in zip(target, totals, strict=True)]


def reference(features, queries, keys, *, has_cls, dominant, contextual, merge="sum", keep_cls=True):
    """Reduce one image by the words of the method: lists of features [N][d], queries and keys
    [H][N][head_dim].
    """
    saliency = patch_saliency(queries, keys, has_cls)
    patches = range(int(has_cls), len(features))
    cls = [0] if has_cls and keep_cls and dominant else []
    kept = cls + sorted(sorted(patches, key=lambda token: -saliency[token])[: dominant - len(cls)])

    rest = [token for token in patches if token not in kept]
    targets = rest[:: max(1, len(rest) // contextual)][:contextual] if contextual else []
    slots = [-1] * len(features)
    for slot, token in enumerate(kept + targets):
        slots[token] = slot
    clusters = [[] for _ in targets]
    for token in rest:
        if targets and token not in targets:
            likeness = [cosine(mean_key(keys, token), mean_key(keys, target)) for target in targets]
            best = likeness.index(max(likeness))
            clusters[best].append(features[token])
            slots[token] = len(kept) + best

    out = [features[token] for token in kept]
    out += [
        merged_feature(features[target], cluster, merge)
        for target, cluster in zip(targets, clusters, strict=True)
    ]
    return out, kept, targets, slots


def check_against_reference(features, queries, keys, *, has_cls, **choices):
    reducer = VisionZip(**choices)
    got = reducer(tokens_of(features, queries, keys, has_cls=has_cls))
    for image in range(len(features)):
        out, kept, targets, slots = reference(
            features[image].tolist(),
            queries[image].tolist(),
            keys[image].tolist(),
            has_cls=has_cls,
            **choices,
        )
        assert got.dominant[image].tolist() == kept
        assert got.contextual[image].tolist() == targets
        assert got.slots[image].tolist() == slots
        torch.testing.assert_close(
            got.features[image], torch.tensor(out, dtype=torch.float64), rtol=1e-10, atol=1e-10
        )
    num_patches = features.shape[1] - has_cls
    assert got.features.shape[1] == reducer.num_tokens(num_patches, has_cls=has_cls, num_dropped=int(has_cls))


@st.composite
def problems(draw):
    has_cls = draw(st.booleans())
    keep_cls = draw(st.booleans())
    grid = draw(st.integers(1, 5))
    num_patches = grid * grid
    dominant = draw(st.integers(0, num_patches + (has_cls and keep_cls)))
    left = num_patches + (has_cls and keep_cls and dominant > 0) - dominant
    contextual = draw(st.integers(0 if dominant else 1, left))
    sizes = {
        "width": draw(st.integers(1, 6)),
        "heads": draw(st.integers(1, 3)),
        "head_dim": draw(st.integers(2, 4)),
    }
    states = layer(draw(st.integers(1, 3)), grid, has_cls=has_cls, seed=draw(st.integers(0, 999)), **sizes)
    return states, {"has_cls": has_cls, "keep_cls": keep_cls, "dominant": dominant, "contextual": contextual}


@given(problem=problems(), merge=st.sampled_from(["sum", "average"]))
def test_agrees_with_the_method(problem, merge):
    states, choices = problem
    check_against_reference(*states, **choices, merge=merge)


@pytest.mark.parametrize("keep_cls", [True, False])
@pytest.mark.parametrize("merge", ["sum", "average"])
@pytest.mark.parametrize(
    ("has_cls", "dominant", "contextual"),
    [
        (True, 5, 0),  # C = 0
        (True, 1, 0),  # CLS alone
        (True, 1, 3),  # CLS and merged tokens
        (True, 0, 3),  # merged tokens alone
        (True, 2, 6),  # C > D
        (True, 6, 5),  # R = 11, C = 5: not divisible, so tokens stand after the last target
        (True, 4, 8),  # R = 13, C = 8: step 1, so all others stand after the targets
        (True, 9, 7),  # D + C = N - 1: at most one token in a cluster
        (False, 0, 16),  # every token is a target
        (False, 16, 0),  # every token is kept
        (False, 3, 4),
        (False, 9, 5),
    ],
)
def test_corner_cases_agree_with_the_method(has_cls, dominant, contextual, merge, keep_cls):
    states = layer(2, 4, has_cls=has_cls, seed=7)
    counts = {"dominant": dominant, "contextual": contextual}
    check_against_reference(*states, has_cls=has_cls, merge=merge, keep_cls=keep_cls, **counts)


@pytest.mark.parametrize("merge", ["sum", "average"])
def test_all_tokens_agree_with_the_method(merge):
    """With D + C = N every cluster is empty."""
    check_against_reference(*layer(2, 4, has_cls=True), has_cls=True, dominant=10, contextual=7, merge=merge)


def test_without_cls_all_dominant_tokens_are_patches():
    tokens = tokens_of(*layer(3, 4, has_cls=True))
    kept = VisionZip(dominant=5, contextual=3)(tokens)
    dropped = VisionZip(dominant=5, contextual=3, keep_cls=False)(tokens)
    assert (kept.dominant[:, 0] == 0).all() and (dropped.dominant > 0).all()
    assert kept.features.shape == dropped.features.shape == (3, 8, 5)
    for image in range(3):
        # The same order of saliency, with one patch more.
        assert set(kept.dominant[image, 1:].tolist()) < set(dropped.dominant[image].tolist())
    # CLS is dropped, not merged; no other token is dropped.
    assert (dropped.slots[:, 0] == -1).all() and (dropped.slots[:, 1:] >= 0).all()
    assert (kept.slots >= 0).all()


def test_keep_cls_changes_nothing_if_there_is_no_cls():
    tokens = tokens_of(*layer(3, 4, has_cls=False), has_cls=False)
    one = VisionZip(dominant=5, contextual=3, keep_cls=True)(tokens)
    other = VisionZip(dominant=5, contextual=3, keep_cls=False)(tokens)
    assert torch.equal(one.features, other.features) and torch.equal(one.slots, other.slots)


def test_sum_adds_the_mean_of_the_cluster_and_average_does_not():
    """Target and cluster are identical: "sum" doubles the target, "average" keeps it."""
    tokens = VisionTokens(
        features=torch.ones(1, 5, 3), has_cls=True, saliency=torch.arange(4.0)[None], keys=torch.ones(1, 5, 2)
    )
    merged = {how: VisionZip(dominant=1, contextual=1, merge=how)(tokens) for how in ("sum", "average")}
    assert merged["sum"].features[0, 1].tolist() == [2, 2, 2]
    assert merged["average"].features[0, 1].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("budget", "split"), [(32, (27, 5)), (64, (54, 10)), (128, (108, 20)), (192, (162, 30))]
)
def test_budgets_are_split_as_in_the_paper(budget, split):
    assert split_budget(budget) == split
    reducer = VisionZip(budget=budget)
    assert (reducer.dominant, reducer.contextual) == split

    # LLaVA-NeXT's budgets count the tokens of 5 tiles.
    shared = VisionZip(budget=5 * budget, tiles=5)
    assert shared == reducer == VisionZip(dominant=split[0], contextual=split[1])
    assert shared == VisionZip(budget=5 * budget, tiles=5, dominant=split[0], contextual=split[1])
    assert shared.num_tokens(576, has_cls=True, num_dropped=1) == budget
    assert Random(budget=5 * budget, tiles=5).budget == budget


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("merge", ["sum", "average"])
def test_half_precision_features_are_rounded_once_at_the_end(dtype, merge):
    features, queries, keys = layer(2, 4, has_cls=True, width=8)
    exact = tokens_of(features.to(dtype).double(), queries, keys)
    half = VisionTokens(
        features=features.to(dtype), has_cls=True, saliency=exact.saliency.float(), keys=exact.keys.float()
    )
    reducer = VisionZip(dominant=5, contextual=3, merge=merge)
    got = reducer(half)
    want = reducer(exact)
    assert torch.equal(got.dominant, want.dominant) and torch.equal(got.contextual, want.contextual)
    assert torch.equal(got.slots, want.slots)
    assert got.features.dtype == dtype and torch.equal(got.features, want.features.to(dtype))

    # Saliency and keys may be of half precision too.
    rough = VisionTokens(
        features=half.features,
        has_cls=True,
        saliency=exact.saliency.to(dtype),
        keys=exact.keys.to(dtype),
    )
    assert reducer(rough).features.dtype == dtype and reducer(rough).features.isfinite().all()


@pytest.mark.parametrize("has_cls", [True, False])
def test_a_batch_is_its_images_one_by_one(has_cls):
    features, queries, keys = (states.float() for states in layer(3, 4, has_cls=has_cls))
    reducer = VisionZip(dominant=5, contextual=3)
    batch = reducer(tokens_of(features, queries, keys, has_cls=has_cls))
    for image in range(3):
        one = slice(image, image + 1)
        single = reducer(tokens_of(features[one], queries[one], keys[one], has_cls=has_cls))
        torch.testing.assert_close(batch.features[one], single.features)
        assert torch.equal(batch.dominant[one], single.dominant)
        assert torch.equal(batch.contextual[one], single.contextual)
        assert torch.equal(batch.slots[one], single.slots)


@pytest.mark.parametrize(
    ("saliency", "num_dominant", "kept"),
    [
        ([1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 3, [0, 1, 2]),
        ([0.0, 2.0, 1.0, 1.0, 1.0, 3.0], 3, [1, 2, 5]),  # one place for three equal patches
        ([0.0] * 6, 300, list(range(300))),
    ],
)
def test_ties_go_to_the_first_in_raster_order(saliency, num_dominant, kept):
    # More patches than the block of a sorting network, so that an unstable sort would show.
    tokens = VisionTokens(
        features=torch.randn(1, 606, 4),
        has_cls=False,
        saliency=torch.tensor([saliency + [0.0] * 600]),
        keys=torch.randn(1, 606, 4),
    )
    assert VisionZip(dominant=num_dominant, contextual=0)(tokens).dominant[0].tolist() == kept


def test_gradients_reach_every_token_that_a_slot_holds():
    features, queries, keys = layer(1, 3, has_cls=True)
    features.requires_grad_()
    output = VisionZip(dominant=3, contextual=2)(tokens_of(features, queries, keys))
    output.features.sum().backward()
    assert (features.grad[0].abs().sum(dim=1) > 0).tolist() == (output.slots[0] >= 0).tolist()


# ---- Mistakes ----


def assert_refused(call, words):
    with pytest.raises(UserError) as error:
        call()
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, ["reducer.budget", "budget=None"]),
        ({"dominant": 5}, ["reducer.contextual", "contextual=None"]),
        ({"budget": 8, "contextual": 3}, ["reducer.dominant", "dominant=None"]),
        ({"budget": 0}, ["reducer.budget=0 must be a whole number"]),
        ({"budget": "8"}, ["reducer.budget=8 must be a whole number"]),
        ({"dominant": 0, "contextual": 0}, ["reducer.dominant=0", "reducer.contextual=0"]),
        ({"dominant": 4.5, "contextual": 1}, ["reducer.dominant=4.5"]),
        ({"dominant": -1, "contextual": 3}, ["reducer.dominant=-1"]),
        ({"dominant": 3, "contextual": -1}, ["reducer.contextual=-1"]),
        ({"dominant": 5, "contextual": 3, "budget": 9}, ["reducer.budget=9", "5 + 3", "8"]),
        ({"budget": 8, "merge": "mean"}, ["reducer.merge='mean'", "sum", "average"]),
        (
            {"budget": 8, "keep_cls": "no"},
            ["reducer.keep_cls='no'", "True", "False"],
        ),  # Hydra reads `no` as text
        ({"budget": 161, "tiles": 5}, ["reducer.budget=161", "5 tiles", "160 or 165"]),
        ({"budget": 3, "tiles": 5}, ["reducer.budget=3", "choose 5"]),
        (
            {"budget": 160, "tiles": 5, "dominant": 27, "contextual": 6},
            ["27 + 6 = 33", "5 tiles", "reducer.budget=165"],
        ),
    ],
)
def test_contradicting_settings_are_named(arguments, words):
    assert_refused(lambda: VisionZip(**arguments), words)


@pytest.mark.parametrize(
    ("settings", "has_cls", "words"),
    [
        (
            {"dominant": 10, "contextual": 7},
            False,
            ["budget=17", "10 dominant", "7 contextual", "at most 16"],
        ),
        ({"dominant": 10, "contextual": 8}, True, ["budget=18", "8 contextual", "at most 17", "CLS token"]),
        ({"dominant": 0, "contextual": 17}, True, ["budget=17", "16 patches)", "at most 16"]),
        ({"dominant": 17, "contextual": 0}, False, ["budget=17", "17 dominant", "at most 16"]),
        ({"dominant": 18, "contextual": 0}, True, ["budget=18", "at most 17"]),
        (
            {"dominant": 10, "contextual": 7, "keep_cls": False},
            True,
            ["budget=17", "16 patches)", "at most 16"],
        ),
        ({"budget": 90, "tiles": 5}, True, ["budget=90", "at most 17", "a total of at most 85 for 5 tiles"]),
    ],
)
def test_a_budget_larger_than_the_picture_is_refused(settings, has_cls, words):
    reducer = VisionZip(**settings)
    assert_refused(lambda: reducer.num_tokens(16, has_cls=has_cls, num_dropped=0), words)
    assert_refused(lambda: reducer(tokens_of(*layer(1, 4, has_cls=has_cls), has_cls=has_cls)), words)


# ---- The other reducers ----


@pytest.mark.parametrize("num_dropped", [0, 1])
def test_identity_is_a_view_of_what_the_model_keeps(num_dropped):
    features = torch.randn(2, 17, 4)
    output = Identity()(VisionTokens(features=features, has_cls=True, num_dropped=num_dropped))
    assert torch.equal(output.features, features[:, num_dropped:])
    assert output.features.untyped_storage().data_ptr() == features.untyped_storage().data_ptr()
    assert output.dominant.tolist() == [list(range(num_dropped, 17))] * 2
    assert output.contextual.shape == (2, 0)
    assert output.slots[0].tolist() == [-1] * num_dropped + list(range(17 - num_dropped))
    assert Identity().num_tokens(16, has_cls=True, num_dropped=num_dropped) == output.features.shape[1]


@pytest.mark.parametrize("has_cls", [True, False])
def test_random_keeps_distinct_patches_in_raster_order(has_cls):
    features = torch.randn(50, 16 + has_cls, 4)
    output = Random(budget=6)(VisionTokens(features=features, has_cls=has_cls))
    kept = output.dominant
    assert kept.shape == (50, 6) and output.contextual.shape == (50, 0)
    assert (kept.diff(dim=1) > 0).all()
    # Every patch has its chance, CLS never.
    assert set(kept.flatten().tolist()) == set(range(has_cls, 16 + has_cls))
    assert torch.equal(output.features, features.gather(1, kept[..., None].expand(-1, -1, 4)))
    assert torch.equal(output.slots.gather(1, kept), torch.arange(6).expand(50, 6))
    assert (output.slots >= 0).sum() == 50 * 6


def test_random_follows_the_seed_and_draws_anew_on_every_call():
    tokens = VisionTokens(features=torch.randn(4, 17, 4), has_cls=True)

    def draw(seed):
        torch.manual_seed(seed)
        return [Random(budget=6)(tokens).dominant.tolist() for _ in range(2)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(1)[0] != draw(1)[1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budget": 0}, ["reducer.budget=0", "at least 1"]),
        ({"budget": 17}, ["reducer.budget=17", "16 patches"]),
        ({"budget": 161, "tiles": 5}, ["reducer.budget=161", "5 tiles", "160 or 165"]),
        ({"budget": 4, "tiles": 5}, ["reducer.budget=4", "choose 5"]),
    ],
)
def test_random_refuses_budgets_that_do_not_fit(settings, words):
    tokens = VisionTokens(features=torch.randn(1, 17, 4), has_cls=True)
    assert_refused(lambda: Random(**settings)(tokens), words)


# ---- Settings, as checkpoints record them ----

OPTIONS = {"dominant": 6, "contextual": 2, "merge": "average", "keep_cls": False, "layer": -3}


def test_settings_record_every_option():
    assert VisionZip(**OPTIONS).settings() == OPTIONS
    defaults = {"merge": "sum", "keep_cls": True, "layer": None}
    assert VisionZip(budget=40, tiles=5).settings() == {"dominant": 7, "contextual": 1, **defaults}
    assert Random(budget=40, tiles=5).settings() == {"budget": 8}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"budget": 64}, "VisionZip(54 dominant + 10 contextual)"),
        ({"budget": 160, "tiles": 5}, "VisionZip(27 dominant + 5 contextual)"),
        ({"budget": 8, "merge": "sum", "layer": None}, "VisionZip(7 dominant + 1 contextual)"),
        ({"budget": 8, "merge": "average"}, "VisionZip(7 dominant + 1 contextual, merge=average)"),
        (
            {"budget": 8, "keep_cls": False, "layer": 4},
            "VisionZip(7 dominant + 1 contextual, keep_cls=False, layer=4)",
        ),
    ],
)
def test_repr_shows_what_is_not_the_default(settings, text):
    assert repr(VisionZip(**settings)) == text


@pytest.mark.parametrize(
    "reducer",
    [
        VisionZip(**OPTIONS),
        VisionZip(budget=8, layer=-3),
        VisionZip(budget=160, tiles=5),
        Identity(),
        Random(budget=160, tiles=5),
    ],
    ids=repr,
)
def test_settings_make_the_same_reducer_again(reducer):
    again = create(reducer.name, json.loads(json.dumps(reducer.settings())))
    assert type(again) is type(reducer)
    assert again.settings() == reducer.settings() and repr(again) == repr(reducer)
    assert again.layer == reducer.layer
    counts = [each.num_tokens(576, has_cls=True, num_dropped=1) for each in (again, reducer)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", names())
def test_an_unknown_setting_is_refused_by_name(name):
    settings = {} if name == "identity" else {"budget": 8}
    assert_refused(lambda: create(name, {**settings, "warmth": 0.5}), ["warmth", name])


def test_an_unknown_reducer_is_refused_with_the_known_names():
    assert_refused(lambda: create("visionzap", {}), ["'visionzap'", *names()])


def test_with_budget_keeps_the_other_settings():
    reducer = with_budget(VisionZip(**OPTIONS), 40, tiles=5)
    assert reducer.settings() == OPTIONS | {"dominant": 7, "contextual": 1}
    assert with_budget(Random(budget=3), 10, tiles=5).budget == 2
    assert_refused(lambda: with_budget(Identity(), 8, tiles=1), ["identity", "budget"])
