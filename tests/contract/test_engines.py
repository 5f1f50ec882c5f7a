"""Both paths give the trainable parameters the same gradient, in every family, for any mixture of examples.

The models are in float64, where next to nothing is rounded: the gradients must agree to 1e-10.
"""

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
from tests.helpers.examples import IMAGE_ID, VIDEO_ID, micro_batches_of
from train.losses import FastLoss, ReferenceLoss
from vzip.families import families, family_of
from vzip.reducers.identity import Identity
from vzip.reducers.visionzip import VisionZip
from vzip.templates.encode import IGNORED

pytestmark = pytest.mark.slow

PLACEHOLDERS = {"image": IMAGE_ID, "video": VIDEO_ID}
SIZES = [(tiny.SIDE, tiny.SIDE), (40, 90), (150, 60)]
PREFIX = [1, 40, 41, 42, 43]
REDUCERS = [VisionZip(dominant=5, contextual=2), VisionZip(dominant=3, contextual=1)]


def float64_family(kind):
    family = family_of(tiny.exact(tiny.llava(kind, dtype=torch.float64)))
    family.model.requires_grad_(False)
    family.projector.requires_grad_(True)
    return family


cached_family = cache(float64_family)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Files by kind."""
    folder = tmp_path_factory.mktemp("media")
    paths = {"image": [], "video": [folder / "clip"]}
    for number, size in enumerate(SIZES):
        paths["image"].append(folder / f"{number}.png")
        tiny.picture(7, *size).save(paths["image"][-1])
    paths["video"][0].mkdir()
    for number, frame in enumerate(tiny.video(3, 2)):
        frame.save(paths["video"][0] / f"{number}.png")
    return paths


@st.composite
def shapes(draw, kinds):
    """An example as numbers: (text before the media, media, turns, text behind, number of its first file).

    A turn is (question tokens, answer tokens).
    """
    media = draw(st.lists(st.sampled_from(kinds), max_size=2))
    turns = draw(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 9)), min_size=1, max_size=3))
    return draw(st.integers(0, 3)), sorted(media), turns, draw(st.integers(0, 3)), draw(st.integers(0, 2))


def example_of(shape, media, index):
    """The ids and labels of an example, its images and videos behind the shared prefix and some text."""
    before, kinds, turns, behind, first = shape
    ids = [*PREFIX, *range(50, 50 + before), *(PLACEHOLDERS[kind] for kind in kinds)]
    labels = [IGNORED] * len(ids)
    for turn, (question, answer) in enumerate(turns):
        text = [60 + (index + turn + position) % 150 for position in range(question + answer)]
        ids += text
        labels += [IGNORED] * question + text[question:]

    paths = {}
    for kind in dict.fromkeys(kinds):
        files = media[kind]
        paths[kind] = tuple(files[(first + number) % len(files)] for number in range(kinds.count(kind)))
    return Example(ids + [2] * behind, labels + [IGNORED] * behind, paths)


def step_gradient(loss, batcher, plan, step=0):
    """(gradient of the projector, reported loss) of a step: summed over the micro batches of all ranks."""
    projector = loss.family.projector
    projector.zero_grad()
    mean = 0.0
    for rank in range(plan.world_size):
        batches = MicroBatches(batcher, plan, rank=rank, has_gradient=has_media(batcher.examples))
        for micro_batch in micro_batches_of(batches, step):
            loss_sum, reported = loss(micro_batch)
            (loss_sum / batches.num_labels(step)).backward()
            mean += float(reported) / max(batches.num_grad_labels(step), 1)
    return torch.cat([parameter.grad.flatten() for parameter in projector.parameters()]), mean


def reference_path(family, collator, examples, plan, *, micro):
    """(loss, batcher)"""
    loss = ReferenceLoss(family, collator.reducer, text_has_gradient=False)
    return loss, PaddedBatcher(collator, examples, plan, micro=micro)


def fast_path(family, collator, examples, plan, *, tokens, recompute=False):
    """(loss, batcher)"""
    prefix = shared_prefix(examples, [family.placeholder_id(kind) for kind in collator.kinds])
    packer = Packer(collator, num_prefix=len(prefix))
    batcher = PackedBatcher(
        [packer],
        examples,
        plan,
        tokens=tokens,
        num_run=packer.lengths(examples)[None],
        has_gradient=has_media(examples),
    )
    loss = FastLoss(family, [collator.reducer], prefix=prefix, recompute=recompute)
    loss.run_prefix(torch.device("cpu"))
    return loss, batcher


def make_collator(kind, family, examples, reducer):
    kinds = family.kinds if "video" in examples.kinds else ("image",)
    return Collator(tiny.processor(kind), family, reducer, kinds=kinds, num_frames=2)


def assert_equal_gradients(kind, examples, reducer, *, world_size, micro, tokens, recompute):
    """The fast path on some ranks gives the gradient and the loss of the reference path on one.
    Returns the gradient.
    """
    family = cached_family(kind)
    collator = make_collator(kind, family, examples, reducer)
    alone = BatchPlan(size=len(examples), world_size=1, num_steps=1, seed=0)
    plan = BatchPlan(size=len(examples), world_size=world_size, num_steps=1, seed=0)

    reference = reference_path(family, collator, examples, alone, micro=micro)
    expected, mean = step_gradient(*reference, alone)
    fast = fast_path(family, collator, examples, plan, tokens=tokens, recompute=recompute)
    gradient, fast_mean = step_gradient(*fast, plan)
    assert torch.linalg.vector_norm(gradient - expected) <= 1e-10 * torch.linalg.vector_norm(expected)
    assert fast_mean == pytest.approx(mean, rel=1e-12)
    return expected


@pytest.mark.parametrize("kind", tiny.KINDS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=6)
@given(data=st.data())
def test_any_mixture_of_examples_gives_the_same_gradient(kind, media, data):
    drawn = data.draw(st.lists(shapes(cached_family(kind).kinds), min_size=1, max_size=6))
    examples = Examples.of(example_of(shape, media, index) for index, shape in enumerate(drawn))
    gradient = assert_equal_gradients(
        kind,
        examples,
        data.draw(st.sampled_from(REDUCERS)),
        world_size=data.draw(st.sampled_from([1, 2])),
        micro=data.draw(st.sampled_from([1, 2, 6])),
        tokens=data.draw(st.sampled_from([1, 100, 10_000])),
        recompute=data.draw(st.booleans()),
    )
    assert bool(gradient.any()) == any(kinds for _, kinds, *_ in drawn)


def test_all_families_are_here():
    assert {model_type for model_type, *_ in tiny.KINDS.values()} == set(families())


@pytest.mark.parametrize("kind", ["clip", "next"])
def test_all_tokens_give_the_same_gradient(kind, media):
    examples = Examples.of(example_of((0, ["image"], [(3, 4)], 1, first), media, first) for first in range(3))
    assert_equal_gradients(kind, examples, Identity(), world_size=1, micro=2, tokens=10_000, recompute=False)


def test_fifty_steps_of_both_paths_have_the_same_losses(media):
    """Training multiplies rounding; in float64 there is next to none."""
    shapes_of_run = [
        (index % 3, ["image"] * (index % 4 > 0), [(3 + index, 4)], 1, index % 3) for index in range(8)
    ]
    examples = Examples.of(example_of(shape, media, index) for index, shape in enumerate(shapes_of_run))
    plan = BatchPlan(size=4, world_size=1, num_steps=50, seed=0)

    curves = []
    for path, settings_of_path in ((fast_path, {"tokens": 60}), (reference_path, {"micro": 2})):
        family = float64_family("clip")
        collator = make_collator("clip", family, examples, REDUCERS[0])
        loss, batcher = path(family, collator, examples, plan, **settings_of_path)
        optimizer = torch.optim.AdamW(family.projector.parameters(), lr=1e-2)
        curve = []
        for step in range(50):
            curve.append(step_gradient(loss, batcher, plan, step)[1])
            optimizer.step()
        curves.append(curve)

    assert curves[0] == pytest.approx(curves[1], rel=1e-9)
    assert curves[0][-1] < curves[0][1] - 0.1  # it learns
