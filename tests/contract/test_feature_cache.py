"""Tuning from a feature cache is tuning from pictures: the same features, loss and gradients for every
family and reducer.
"""

from functools import cache

import pytest
import torch

import vzip
from data.batches.collate import Collator, Packer
from data.batches.media import ProcessedMedia
from data.cache.features import CachedMedia, CacheLayout, cache_settings
from data.cache.make_features import FeatureMaker, write_features
from tests.helpers import tiny
from tests.helpers.examples import IMAGE_TEXTS, NUM_FRAMES, examples_of, texts_of
from train.losses import FastLoss, ReferenceLoss, visual_tokens
from vzip import UserError
from vzip.families import family_of
from vzip.reducers.hiprune import HiPrune
from vzip.reducers.identity import Identity
from vzip.reducers.pool import Pool
from vzip.reducers.random import Random
from vzip.reducers.scope import Scope
from vzip.reducers.visionzip import VisionZip
from vzip.runs.projector import fingerprint

pytestmark = pytest.mark.slow

ENGINES = ("reference", "fast")
RELEASED = VisionZip(dominant=4, contextual=2)
REDUCERS = {  # (reducer, order of tiles)
    "released": (RELEASED, "released"),
    "spatial": (RELEASED, "spatial"),
    "without CLS": (VisionZip(dominant=3, contextual=4, keep_cls=False), "released"),
    "random": (Random(budget=5), "released"),
    "random-spatial": (Random(budget=5), "spatial"),
    "pool": (Pool(budget=5), "released"),
    "hiprune-spatial": (HiPrune(budget=5), "spatial"),
    "scope-merging": (Scope(budget=6, merge="sum"), "released"),
}


def family_with(kind, dtype=torch.float32, anyres="released"):
    """A model the way it is tuned: frozen, with a float32 projector that learns."""
    family = family_of(tiny.llava(kind, dtype=dtype).requires_grad_(False), anyres=anyres)
    family.projector.float().requires_grad_(True)
    return family


with_towers = cache(family_with)


@cache
def without_towers(kind, dtype, anyres):
    family = family_with(kind, dtype, anyres)
    family.drop_towers()
    return family


class TwoRuns:
    """The same examples for a model that sees pictures, and for one that has a cache and no towers."""

    def __init__(self, folder, kind, reducer=RELEASED, *, anyres="released", texts=None, dtype=torch.float32):
        self.examples = examples_of(texts or texts_of(kind), folder)
        self.reducer = reducer
        self.with_towers = with_towers(kind, dtype, anyres)
        self.without_towers = without_towers(kind, dtype, anyres)
        processor = tiny.processor(kind)

        settings = cache_settings(
            self.with_towers,
            reducer,
            processor,
            base_fingerprint=fingerprint(self.with_towers),
            examples_name="these",
            num_frames=NUM_FRAMES,
        )
        layout = CacheLayout(settings, len(self.examples), examples_per_shard=100)
        media = ProcessedMedia(processor, self.with_towers.without_weights(), reducer, num_frames=NUM_FRAMES)
        maker = FeatureMaker(self.with_towers, reducer, media)
        write_features(folder / "cache", layout, self.examples, maker, batch=100)

        shared = {"kinds": self.examples.kinds, "num_frames": NUM_FRAMES}
        cached = CachedMedia(folder / "cache", settings)
        self.from_pictures = Collator(processor, self.with_towers, reducer, **shared)
        self.from_cache = Collator(processor, self.without_towers, reducer, **shared, media=cached)

    def chosen(self, numbers=None):
        return [self.examples[number] for number in numbers or range(len(self.examples))]

    def batches(self, numbers=None):
        """(from pictures, from the cache): the micro batch of these examples."""
        examples = self.chosen(numbers)
        return self.from_pictures(examples), self.from_cache(examples)

    def tokens(self):
        """Projected tokens by kind: (from pictures, by the model's own patched method; from the cache)."""
        from_pictures, from_cache = self.batches()
        model = self.with_towers.model
        expected = {}
        actual = {}
        with torch.no_grad(), vzip.attach(model, reducer=self.reducer, anyres=self.with_towers.anyres):
            torch.manual_seed(0)
            for kind, media in from_pictures.media.items():
                inputs = media.normalized(model.dtype)
                method = getattr(model.model, f"get_{kind}_features")
                tokens = method(**inputs.arguments).pooler_output
                expected[kind] = torch.cat(list(tokens))
        with torch.no_grad():
            for kind in from_cache.media:
                actual[kind] = visual_tokens(self.without_towers, self.reducer, from_cache, kind)
        return expected, actual

    def losses(self, engine, numbers=None):
        """(loss, gradients of the projector), from pictures and from the cache."""
        results = []
        for family, collator in (
            (self.with_towers, self.from_pictures),
            (self.without_towers, self.from_cache),
        ):
            torch.manual_seed(0)  # of random reducers
            if engine == "fast":
                loss_of = FastLoss(family, [self.reducer], prefix=[], recompute=False)
                loss_of.run_prefix(torch.device("cpu"))
                batch = Packer(collator, num_prefix=0)(self.chosen(numbers))
            else:
                loss_of = ReferenceLoss(family, self.reducer, text_has_gradient=False)
                batch = collator(self.chosen(numbers))
            loss, _ = loss_of(batch)
            results.append((loss.item(), torch.autograd.grad(loss, list(family.projector.parameters()))))
        return results


def assert_equal_gradients(actual, expected):
    for gradient, wanted in zip(actual, expected, strict=True):
        assert gradient.dtype == torch.float32
        assert wanted.norm() > 0
        assert (gradient - wanted).double().norm() < 1e-6 * wanted.double().norm()


@pytest.mark.parametrize("name", REDUCERS)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_model_without_towers_learns_the_same(tmp_path, kind, name):
    reducer, anyres = REDUCERS[name]
    runs = TwoRuns(tmp_path, kind, reducer, anyres=anyres)
    from_pictures, from_cache = runs.batches()
    assert list(from_cache.media) == list(from_pictures.media)
    assert from_cache.num_placeholders == from_pictures.num_placeholders
    for field in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(getattr(from_cache, field), getattr(from_pictures, field))

    # Computed in one batch, so they are the same bits.
    expected, actual = runs.tokens()
    for medium, tokens in expected.items():
        assert len(tokens) == from_pictures.num_placeholders[medium] > 0
        assert torch.equal(actual[medium], tokens)

    for engine in ENGINES:
        (loss, gradients), (cached_loss, cached_gradients) = runs.losses(engine)
        assert loss > 0
        assert cached_loss == pytest.approx(loss, rel=1e-6)
        assert_equal_gradients(cached_gradients, gradients)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_bfloat16_model_learns_the_same_and_nothing_of_text_alone(tmp_path, kind):
    runs = TwoRuns(tmp_path, kind, dtype=torch.bfloat16)
    _, from_cache = runs.batches()
    assert {media.features.dtype for media in from_cache.media.values()} == {torch.bfloat16}

    expected, actual = runs.tokens()
    assert all(torch.equal(actual[medium], tokens) for medium, tokens in expected.items())
    for engine in ENGINES:
        (_, gradients), (_, cached_gradients) = runs.losses(engine)
        assert_equal_gradients(cached_gradients, gradients)

    # Without a picture, the projector runs all the same.
    _, text_alone = runs.batches([1])
    assert text_alone.num_placeholders == dict.fromkeys(text_alone.media, 0)
    for engine in ENGINES:
        (loss, _), (cached_loss, gradients) = runs.losses(engine, [1])
        assert cached_loss == loss > 0
        assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_dropped_towers_leave_no_tensor(kind):
    family = family_with(kind)
    towers = tuple(f"{name}." for name in family.frozen_names.values())
    all_names = [name for name, _ in family.model.named_parameters()]
    others = [name for name in all_names if not name.startswith(towers)]
    assert len(others) < len(all_names)

    family.drop_towers()
    assert [name for name, _ in family.model.named_parameters()] == others
    assert not [name for name, _ in family.model.named_buffers() if name.startswith(towers)]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_all_tokens_are_cached_unless_the_model_packs_them_behind_the_projector(tmp_path, kind):
    if kind in tiny.TILED:
        with pytest.raises(UserError, match=r"reducer=identity.*packs.*another reducer"):
            TwoRuns(tmp_path, kind, Identity())
        assert not (tmp_path / "cache").exists()
    else:
        runs = TwoRuns(tmp_path, kind, Identity(), texts=IMAGE_TEXTS)
        expected, actual = runs.tokens()
        torch.testing.assert_close(actual["image"], expected["image"], rtol=1e-5, atol=1e-6)
