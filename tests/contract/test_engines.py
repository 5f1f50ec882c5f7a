"""The fast path gives the tuned weights the gradient of the reference path: every family on disk, any mixture of rows."""

from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.batches.collate import Collator, Packer
from data.batches.dataset import BatchPlan, MicroBatches, PackedBatcher, PaddedBatcher, has_media
from data.batches.packing import shared_prefix
from data.examples.tokens import Example, Examples
from tests.helpers import tiny
from train.losses import FastLoss, ReferenceLoss
from vzip.families import families, family_of
from vzip.reducers.identity import Identity
from vzip.reducers.visionzip import VisionZip
from vzip.templates.encode import IGNORED

IMAGE, VIDEO = (tiny.SPECIAL.index(token) for token in ("<image>", "<video>"))
SIZES = [(tiny.SIDE, tiny.SIDE), (40, 90), (150, 60)]
PREFIX = [1, 40, 41, 42, 43]
REDUCERS = [VisionZip(dominant=5, contextual=2), VisionZip(dominant=3, contextual=1)]


@cache
def float64_family(kind):
    family = family_of(tiny.exact(tiny.llava(kind, dtype=torch.float64)))
    family.model.requires_grad_(False)
    family.projector.requires_grad_(True)
    return family


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Files by kind."""
    folder = tmp_path_factory.mktemp("media")
    paths = {"image": [folder / f"{number}.png" for number in range(3)], "video": [folder / "clip"]}
    for path, size in zip(paths["image"], SIZES, strict=True):
        tiny.picture(7, *size).save(path)
    paths["video"][0].mkdir()
    for number, frame in enumerate(tiny.video(3, 2)):
        frame.save(paths["video"][0] / f"{number}.png")
    return paths


@st.composite
def rows(draw, kinds):
    """A row as numbers: (text before the media, media, turns of (question tokens, answer tokens), tokens behind)."""
    media = draw(st.lists(st.sampled_from(kinds), max_size=2))
    turns = draw(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 9)), min_size=1, max_size=3))
    return draw(st.integers(0, 3)), sorted(media), turns, draw(st.integers(0, 3)), draw(st.integers(0, 2))


def example_of(row, media, index):
    """The row's ids and labels, its images and videos behind the shared prefix and some text."""
    before, kinds, turns, behind, first = row
    ids = [*PREFIX, *range(50, 50 + before), *[{"image": IMAGE, "video": VIDEO}[kind] for kind in kinds]]
    labels = [IGNORED] * len(ids)
    for turn, (question, answer) in enumerate(turns):
        text = [60 + (index + turn + place) % 150 for place in range(question + answer)]
        ids, labels = ids + text, labels + [IGNORED] * question + text[question:]
    paths = {
        kind: tuple(media[kind][(first + n) % len(media[kind])] for n in range(kinds.count(kind)))
        for kind in dict.fromkeys(kinds)
    }
    return Example(ids + [2] * behind, labels + [IGNORED] * behind, paths)


def gradients(family, loss, batcher, plan, has_gradient, step=0):
    """Of the projector for a step, and the mean loss shown: summed over the micro batches of all ranks."""
    family.projector.zero_grad()
    shown = 0.0
    for rank in range(plan.world_size):
        batches = MicroBatches(batcher, plan, rank=rank, has_gradient=has_gradient)
        first = batches.first_index(step)
        for part in range(first, first + batches.num_micro_batches(step)):
            total, reported = loss(batches[part])
            (total / batches.num_labels(step)).backward()
            shown += float(reported) / max(batches.num_grad_labels(step), 1)
    return torch.cat([parameter.grad.flatten() for parameter in family.projector.parameters()]), shown


def both(family, examples, *, reducer, world_size, micro, tokens, recompute):
    """(gradient, loss) of the reference path on one rank, and of the fast path on some."""
    alone, plan = (
        BatchPlan(size=len(examples), world_size=ranks, num_steps=1, seed=0) for ranks in (1, world_size)
    )
    kind = next(kind for kind, (model_type, *_) in tiny.KINDS.items() if float64_family(kind) is family)
    kinds = family.kinds if "video" in examples.kinds else ("image",)
    collate = Collator(tiny.processor(kind), family, reducer, kinds=kinds, num_frames=2)
    prefix = shared_prefix(examples, [family.placeholder_id(kind) for kind in kinds])
    has_gradient, packer = has_media(examples), Packer(collate, num_prefix=len(prefix))
    padded = PaddedBatcher(collate, examples, alone, micro=micro)
    packed = PackedBatcher(
        [packer],
        examples,
        plan,
        tokens=tokens,
        num_run=packer.lengths(examples)[None],
        has_gradient=has_gradient,
    )
    return (
        gradients(
            family, ReferenceLoss(family, reducer, text_has_gradient=False), padded, alone, has_gradient
        ),
        gradients(
            family,
            FastLoss(family, [reducer], prefix=prefix, recompute=recompute),
            packed,
            plan,
            has_gradient,
        ),
    )


@pytest.mark.parametrize("kind", tiny.KINDS)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_mixture_of_rows_gives_the_same_gradient(kind, media, data):
    family = float64_family(kind)
    drawn = data.draw(st.lists(rows(family.kinds), min_size=1, max_size=6))
    examples = Examples.of(example_of(row, media, index) for index, row in enumerate(drawn))
    (expected, mean), (found, fast_mean) = both(
        family,
        examples,
        reducer=data.draw(st.sampled_from(REDUCERS)),
        world_size=data.draw(st.sampled_from([1, 2])),
        micro=data.draw(st.sampled_from([1, 2, 6])),
        tokens=data.draw(st.sampled_from([1, 100, 10_000])),
        recompute=data.draw(st.booleans()),
    )
    assert torch.linalg.vector_norm(found - expected) <= 1e-10 * torch.linalg.vector_norm(expected)
    assert fast_mean == pytest.approx(mean, rel=1e-12)
    assert bool(expected.any()) == any(kinds for _, kinds, *_ in drawn)


def test_all_families_are_here():
    assert {model_type for model_type, *_ in tiny.KINDS.values()} == set(families())


@pytest.mark.parametrize("kind", ["clip", "next"])
def test_all_tokens_give_the_same_gradient(kind, media):
    examples = Examples.of(example_of((0, ["image"], [(3, 4)], 1, first), media, first) for first in range(3))
    settings = {"reducer": Identity(), "world_size": 1, "micro": 2, "tokens": 10_000, "recompute": False}
    (expected, _), (found, _) = both(float64_family(kind), examples, **settings)
    assert torch.linalg.vector_norm(found - expected) <= 1e-10 * torch.linalg.vector_norm(expected)


def test_fifty_steps_of_both_have_the_same_losses(media):
    """Training multiplies rounding; in float64 there is next to none."""
    family = family_of(tiny.exact(tiny.llava(dtype=torch.float64)))
    family.model.requires_grad_(False)
    start, reducer = (
        {name: value.clone() for name, value in family.projector.state_dict().items()},
        REDUCERS[0],
    )
    given = [(index % 3, ["image"] * (index % 4 > 0), [(3 + index, 4)], 1, index % 3) for index in range(8)]
    examples = Examples.of(example_of(row, media, index) for index, row in enumerate(given))
    collate, plan, has_gradient = (
        Collator(tiny.processor(), family, reducer),
        BatchPlan(4, 1, 50, 0),
        has_media(examples),
    )
    packer = Packer(collate, num_prefix=len(PREFIX))
    packed = PackedBatcher(
        [packer], examples, plan, tokens=60, num_run=packer.lengths(examples)[None], has_gradient=has_gradient
    )
    ways = {
        FastLoss(family, [reducer], prefix=PREFIX): packed,
        ReferenceLoss(family, reducer, text_has_gradient=False): PaddedBatcher(
            collate, examples, plan, micro=2
        ),
    }
    curves = []
    for loss, batcher in ways.items():
        family.projector.load_state_dict(start)
        family.projector.requires_grad_(True)
        optimizer, curve = torch.optim.AdamW(family.projector.parameters(), lr=1e-2), []
        for step in range(50):
            curve.append(gradients(family, loss, batcher, plan, has_gradient, step)[1])
            optimizer.step()
        curves.append(curve)
    assert curves[0] == pytest.approx(curves[1], rel=1e-9)
    assert curves[0][-1] < curves[0][1] - 0.1  # it learns
