"""The reducers: VisionZip against a slow transcription of the method, and the two controls."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vzip import UserError
from vzip.reducers import VisionTokens, create, names
from vzip.reducers.identity import Identity
from vzip.reducers.random import Random
from vzip.reducers.visionzip import VisionZip, split_budget
from vzip.tap import cls_attention, received_attention


def layer(images, grid, *, has_cls, width=5, heads=2, head_dim=3, seed=0):
    """Features, queries and keys (per head) of one encoder layer, in float64: no near ties that rounding could turn."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = grid * grid + has_cls

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = (images, heads, num_tokens, head_dim)
    return draw(images, num_tokens, width), draw(*shape), draw(*shape)


def tokens_of(features, queries, keys, has_cls):
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
    """Score of every token, summed over heads: what CLS attends to, or what all tokens together attend to."""
    saliency = [0.0] * len(keys[0])
    for head in range(len(keys)):
        for query in queries[head][:1] if has_cls else queries[head]:
            row = attention_row(query, keys[head])
            saliency = [total + value for total, value in zip(saliency, row, strict=True)]
    return saliency


def mean_key(keys, token):
    return [sum(head[token][axis] for head in keys) / len(keys) for axis in range(len(keys[0][0]))]


def merged_feature(target, cluster, merge):
    """The target with the mean of its cluster added, or averaged with all of it."""
    if not cluster:
        return target
    totals = [sum(values) for values in zip(*cluster, strict=True)]
    if merge == "sum":
        return [own + total / len(cluster) for own, total in zip(target, totals, strict=True)]
    return [(own + total) / (1 + len(cluster)) for own, total in zip(target, totals, strict=True)]


def reference(features, queries, keys, *, has_cls, dominant, contextual, merge="sum", keep_cls=True):
    """One image, by the words of the method: lists of features [N][d], queries and keys [H][N][k]."""
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
    got = reducer(tokens_of(features, queries, keys, has_cls))
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
    has_cls, keep_cls = draw(st.booleans()), draw(st.booleans())
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


@settings(max_examples=30, deadline=None)
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
        (True, 1, 0),  # the CLS alone
        (True, 1, 3),  # the CLS and nothing but merged tokens
        (True, 0, 3),  # no CLS either
        (True, 2, 6),  # C > D
        (True, 6, 5),  # R = 11, C = 5: not divisible, tokens after the last target
        (True, 4, 8),  # R = 13, C = 8: step 1, the others all stand behind the targets
        (True, 9, 7),  # D + C = N - 1: every cluster has one token at most, and without CLS none
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
    """D + C = N: every cluster is empty."""
    check_against_reference(*layer(2, 4, has_cls=True), has_cls=True, dominant=10, contextual=7, merge=merge)


def test_without_cls_all_dominant_tokens_are_patches():
    tokens = tokens_of(*layer(3, 4, has_cls=True), True)
    kept, dropped = (VisionZip(dominant=5, contextual=3, keep_cls=keep)(tokens) for keep in (True, False))
    assert (kept.dominant[:, 0] == 0).all() and (dropped.dominant > 0).all()
    assert kept.features.shape == dropped.features.shape == (3, 8, 5)
    for image in range(3):  # the same order of salience, with one patch more
        assert set(kept.dominant[image, 1:].tolist()) < set(dropped.dominant[image].tolist())
    assert (dropped.slots[:, 0] == -1).all() and (dropped.slots[:, 1:] >= 0).all()  # CLS is lost, not merged


def test_without_a_cls_token_keep_cls_changes_nothing():
    tokens = tokens_of(*layer(3, 4, has_cls=False), False)
    one, other = (VisionZip(dominant=5, contextual=3, keep_cls=keep)(tokens) for keep in (True, False))
    assert torch.equal(one.features, other.features) and torch.equal(one.slots, other.slots)


def test_nothing_but_the_remaining_tokens_is_merged_or_lost():
    reduction = VisionZip(dominant=5, contextual=3)(tokens_of(*layer(2, 4, has_cls=True), True))
    assert (reduction.slots >= 0).all()
    assert (
        VisionZip(dominant=5, contextual=0)(tokens_of(*layer(1, 4, has_cls=True), True)).slots.lt(0).sum()
        == 12
    )


def test_sum_adds_the_mean_and_average_does_not():
    """Two identical clusters: "sum" doubles a target's norm, "average" keeps it."""
    features = torch.ones(1, 5, 3)
    tokens = VisionTokens(
        features=features, has_cls=True, saliency=torch.arange(4.0)[None], keys=torch.ones(1, 5, 2)
    )
    merged = {
        how: VisionZip(dominant=1, contextual=1, merge=how)(tokens).features[0, 1]
        for how in ("sum", "average")
    }
    assert merged["sum"].tolist() == [2, 2, 2]
    assert merged["average"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("budget", "split"),
    [
        (64, (54, 10)),
        (128, (108, 20)),
        (192, (162, 30)),
        (32, (27, 5)),
    ],  # 32, 64 and 128 are also LLaVA-NeXT's, per tile
)
def test_the_papers_splits(budget, split):
    assert split_budget(budget) == split
    reducer = VisionZip(budget=budget)
    assert (reducer.dominant, reducer.contextual) == split


@pytest.mark.parametrize(("budget", "split"), [(160, (27, 5)), (320, (54, 10)), (640, (108, 20))])
def test_the_papers_budgets_of_five_tiles(budget, split):
    shared = VisionZip(budget=budget, tiles=5)
    assert (shared.dominant, shared.contextual) == split
    assert shared == VisionZip(budget=budget // 5) == VisionZip(dominant=split[0], contextual=split[1])
    assert shared == VisionZip(budget=budget, tiles=5, dominant=split[0], contextual=split[1])
    assert (
        shared.num_tokens(576, has_cls=True, num_dropped=1)
        == Random(budget=budget, tiles=5).budget
        == budget // 5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("merge", ["sum", "average"])
def test_half_precision_keeps_its_dtype_and_the_choice(dtype, merge):
    features, queries, keys = layer(2, 4, has_cls=True, width=8)
    exact = tokens_of(features.to(dtype).double(), queries, keys, True)
    half = VisionTokens(
        features=features.to(dtype), has_cls=True, saliency=exact.saliency.float(), keys=exact.keys.float()
    )
    reducer = VisionZip(dominant=5, contextual=3, merge=merge)
    got, want = reducer(half), reducer(exact)
    assert got.features.dtype == dtype
    assert torch.equal(got.dominant, want.dominant) and torch.equal(got.contextual, want.contextual)
    assert torch.equal(
        got.features[:, :5], features.to(dtype).gather(1, got.dominant[..., None].expand(-1, -1, 8))
    )
    assert torch.equal(got.slots, want.slots)
    assert torch.equal(got.features, want.features.to(dtype))  # one rounding, at the very end


def test_half_precision_keys_run():
    features, queries, keys = layer(2, 4, has_cls=True)
    exact = tokens_of(features, queries, keys, True)
    half = VisionTokens(
        features=features.bfloat16(),
        has_cls=True,
        saliency=exact.saliency.bfloat16(),
        keys=exact.keys.bfloat16(),
    )
    got = VisionZip(dominant=5, contextual=3)(half).features
    assert got.dtype == torch.bfloat16 and got.isfinite().all()


@pytest.mark.parametrize("has_cls", [True, False])
def test_a_batch_is_its_images_one_by_one(has_cls):
    features, queries, keys = (states.float() for states in layer(3, 4, has_cls=has_cls))
    reducer = VisionZip(dominant=5, contextual=3)
    batch = reducer(tokens_of(features, queries, keys, has_cls))
    for image in range(3):
        one = slice(image, image + 1)
        single = reducer(tokens_of(features[one], queries[one], keys[one], has_cls))
        torch.testing.assert_close(batch.features[one], single.features)
        assert torch.equal(batch.dominant[one], single.dominant)
        assert torch.equal(batch.contextual[one], single.contextual)
        assert torch.equal(batch.slots[one], single.slots)


@pytest.mark.parametrize(
    ("saliency", "kept"),
    [
        ([1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [0, 1, 2]),
        ([0.0, 2.0, 1.0, 1.0, 1.0, 3.0], [1, 2, 5]),  # one place for three equals
    ],
)
def test_ties_go_to_raster_order(saliency, kept):
    # More patches than a sorting network's block, so that an unstable sort would show.
    salient = torch.tensor([saliency + [0.0] * 600])
    tokens = VisionTokens(
        features=torch.randn(1, 606, 4), has_cls=False, saliency=salient, keys=torch.randn(1, 606, 4)
    )
    assert VisionZip(dominant=3, contextual=0)(tokens).dominant[0].tolist() == kept
    flat = VisionTokens(
        features=torch.randn(1, 606, 4),
        has_cls=False,
        saliency=torch.zeros(1, 606),
        keys=torch.randn(1, 606, 4),
    )
    assert VisionZip(dominant=300, contextual=0)(flat).dominant[0].tolist() == list(range(300))


def test_gradients_reach_every_token_that_a_slot_holds():
    features, queries, keys = layer(1, 3, has_cls=True)
    features.requires_grad_()
    reduction = VisionZip(dominant=3, contextual=2)(tokens_of(features, queries, keys, True))
    reduction.features.sum().backward()
    assert (features.grad[0].abs().sum(dim=1) > 0).tolist() == (reduction.slots[0] >= 0).tolist()


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
        ({"budget": 8, "anyres": "model"}, ["reducer.anyres='model'", "released", "spatial"]),
        (
            {"budget": 8, "keep_cls": "no"},
            ["reducer.keep_cls='no'", "True", "False"],
        ),  # Hydra's `no` is a text
        ({"budget": 161, "tiles": 5}, ["reducer.budget=161", "5 tiles", "160 or 165"]),
        ({"budget": 3, "tiles": 5}, ["reducer.budget=3", "choose 5"]),
        (
            {"budget": 160, "tiles": 5, "dominant": 27, "contextual": 6},
            ["27 + 6 = 33", "5 tiles", "reducer.budget=165"],
        ),
    ],
)
def test_contradicting_settings_are_named(arguments, words):
    with pytest.raises(UserError) as error:
        VisionZip(**arguments)
    assert all(word in str(error.value) for word in words), error.value
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    ("dominant", "contextual", "has_cls", "available"),
    [(10, 7, False, 16), (10, 8, True, 17), (0, 17, True, 16), (17, 0, False, 16), (18, 0, True, 17)],
)
def test_a_budget_larger_than_the_image_is_refused(dominant, contextual, has_cls, available):
    reducer = VisionZip(dominant=dominant, contextual=contextual)
    words = [
        f"reducer.budget={dominant + contextual}",
        f"{dominant} dominant",
        f"{contextual} contextual",
        str(available),
    ]
    with pytest.raises(UserError) as asked:
        reducer.num_tokens(16, has_cls=has_cls, num_dropped=0)
    with pytest.raises(UserError) as called:
        reducer(tokens_of(*layer(1, 4, has_cls=has_cls), has_cls))
    for error in (asked, called):
        assert all(word in str(error.value) for word in words), error.value


def test_without_cls_the_budget_is_of_the_patches_alone():
    reducer = VisionZip(dominant=10, contextual=7, keep_cls=False)
    for call in (
        lambda: reducer.num_tokens(16, has_cls=True, num_dropped=1),
        lambda: reducer(tokens_of(*layer(1, 4, has_cls=True), True)),
    ):
        with pytest.raises(UserError, match=r"reducer\.budget=17 .*16 patches\).*at most 16$"):
            call()


@pytest.mark.parametrize("num_dropped", [0, 1])
def test_identity_is_a_view_of_what_the_model_keeps(num_dropped):
    features = torch.randn(2, 17, 4)
    reduction = Identity()(VisionTokens(features=features, has_cls=True, num_dropped=num_dropped))
    assert torch.equal(reduction.features, features[:, num_dropped:])
    assert reduction.features.untyped_storage().data_ptr() == features.untyped_storage().data_ptr()
    assert reduction.dominant.tolist() == [list(range(num_dropped, 17))] * 2
    assert reduction.contextual.shape == (2, 0)
    assert reduction.slots[0].tolist() == [-1] * num_dropped + list(range(17 - num_dropped))
    assert Identity().num_tokens(16, has_cls=True, num_dropped=num_dropped) == reduction.features.shape[1]


@pytest.mark.parametrize("has_cls", [True, False])
def test_random_keeps_distinct_patches_in_raster_order(has_cls):
    features = torch.randn(50, 16 + has_cls, 4)
    reduction = Random(budget=6)(VisionTokens(features=features, has_cls=has_cls))
    kept = reduction.dominant
    assert kept.shape == (50, 6) and reduction.contextual.shape == (50, 0)
    assert (kept.diff(dim=1) > 0).all()  # raster order, and so distinct
    assert set(kept.flatten().tolist()) == set(
        range(has_cls, 16 + has_cls)
    )  # every patch has its chance; never CLS
    assert torch.equal(reduction.features, features.gather(1, kept[..., None].expand(-1, -1, 4)))
    assert torch.equal(reduction.slots.gather(1, kept), torch.arange(6).expand(50, 6))
    assert (reduction.slots >= 0).sum() == 50 * 6


def test_random_follows_the_seed():
    tokens = VisionTokens(features=torch.randn(4, 17, 4), has_cls=True)

    def draw(seed):
        torch.manual_seed(seed)
        return [Random(budget=6)(tokens).dominant.tolist() for _ in range(2)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(1)[0] != draw(1)[1]  # anew on every call


@pytest.mark.parametrize(
    ("budget", "words"), [(0, ["reducer.budget=0", "at least 1"]), (17, ["reducer.budget=17", "16 patches"])]
)
def test_random_refuses_budgets_that_do_not_fit(budget, words):
    with pytest.raises(UserError) as error:
        Random(budget=budget)(VisionTokens(features=torch.randn(1, 17, 4), has_cls=True))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budget": 161, "tiles": 5}, ["reducer.budget=161", "5 tiles", "160 or 165"]),
        ({"budget": 4, "tiles": 5}, ["reducer.budget=4", "choose 5"]),
        ({"budget": 8, "anyres": "model"}, ["reducer.anyres='model'", "released", "spatial"]),
    ],
)
def test_random_refuses_settings_by_name(settings, words):
    with pytest.raises(UserError) as error:
        Random(**settings)
    assert all(word in str(error.value) for word in words), error.value


OPTIONS = {
    "dominant": 6,
    "contextual": 2,
    "merge": "average",
    "keep_cls": False,
    "layer": -3,
    "anyres": "spatial",
}


def test_settings_record_every_option():
    assert VisionZip(**OPTIONS).settings() == OPTIONS
    defaults = {"merge": "sum", "keep_cls": True, "layer": None, "anyres": "released"}
    assert VisionZip(budget=40, tiles=5).settings() == {"dominant": 7, "contextual": 1, **defaults}
    assert Random(budget=40, tiles=5, anyres="spatial").settings() == {"budget": 8, "anyres": "spatial"}


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
        ({"budget": 8, "anyres": "spatial"}, "VisionZip(7 dominant + 1 contextual, anyres=spatial)"),
    ],
)
def test_repr_shows_what_is_not_the_default(settings, text):
    assert repr(VisionZip(**settings)) == text


@pytest.mark.parametrize(
    "reducer",
    [
        *[
            VisionZip(**{"budget": 8, name: OPTIONS[name]})
            for name in ("merge", "keep_cls", "layer", "anyres")
        ],
        VisionZip(**OPTIONS),
        VisionZip(budget=160, tiles=5),
        Identity(),
        Random(budget=8),
        Random(budget=160, tiles=5, anyres="spatial"),
    ],
    ids=repr,
)
def test_settings_make_the_same_reducer_again(reducer):
    again = create(reducer.name, json.loads(json.dumps(reducer.settings())))
    assert type(again) is type(reducer)
    assert again.settings() == reducer.settings() and repr(again) == repr(reducer)
    assert (again.layer, again.anyres) == (reducer.layer, reducer.anyres)
    counts = [each.num_tokens(576, has_cls=True, num_dropped=1) for each in (again, reducer)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", names())
def test_a_setting_of_another_version_is_refused_by_name(name):
    settings = {"visionzip": {"dominant": 4, "contextual": 2}, "random": {"budget": 8}, "identity": {}}[name]
    with pytest.raises(UserError, match="temperature") as error:
        create(name, {**settings, "temperature": 0.5})
    assert name in str(error.value)


def test_an_unknown_reducer_is_refused_with_the_known_names():
    with pytest.raises(UserError) as error:
        create("visionzap", {})
    assert "'visionzap'" in str(error.value)
    assert all(name in str(error.value) for name in names())
