"""Tuning from a feature cache is tuning from pictures: for every family and reducer, the same features, loss and gradients."""

from functools import cache

import pytest
import torch

import vzip
from data.batches.collate import Collator, Packer
from data.batches.media import Processed
from data.cache.features import Cached, CacheLayout, cache_settings
from data.cache.make_features import FeatureMaker, write_features
from data.examples.tokens import kinds_of
from tests.helpers import tiny
from tests.helpers.rows import IMAGE_ROWS, NUM_FRAMES, examples_of, rows_of
from train.losses import FastLoss, ReferenceLoss, visual_tokens
from vzip import UserError
from vzip.families import family_of
from vzip.reducers.identity import Identity
from vzip.reducers.random import Random
from vzip.reducers.visionzip import VisionZip
from vzip.runs.projector import fingerprint

ENGINES = ("reference", "fast")
REDUCERS = {  # (reducer, order of tiles)
    "released": (VisionZip(dominant=4, contextual=2), "released"),
    "spatial": (VisionZip(dominant=4, contextual=2), "spatial"),
    "without CLS": (VisionZip(dominant=3, contextual=4, keep_cls=False), "released"),
    "random": (Random(budget=5), "released"),
    "random-spatial": (Random(budget=5), "spatial"),
}


def family_with(kind, dtype=torch.float32, anyres="released"):
    """A model as it is tuned: frozen but for a float32 projector."""
    family = family_of(tiny.llava(kind, dtype=dtype).requires_grad_(False), anyres=anyres)
    family.projector.float().requires_grad_(True)
    return family


@cache
def seeing(kind, dtype, anyres):
    return family_with(kind, dtype, anyres)


@cache
def blind(kind, dtype, anyres):
    family = family_with(kind, dtype, anyres)
    family.drop_towers()
    return family


@cache
def processor(kind):
    return tiny.processor(kind)


def stock_features(model, kind, inputs):
    method = getattr(model.model, f"get_{kind}_features")
    return torch.cat(list(method(inputs.pixels, **inputs.extra).pooler_output))


class Runs:
    """The same rows for a model that sees pictures, and for one that has a cache and no towers."""

    def __init__(
        self,
        folder,
        kind,
        reducer,
        anyres="released",
        *,
        texts=None,
        batch=100,
        rows_a_shard=100,
        dtype=torch.float32,
    ):
        self.examples, self.reducer = examples_of(texts or rows_of(kind), folder), reducer
        self.seeing, self.blind = seeing(kind, dtype, anyres), blind(kind, dtype, anyres)
        settings = cache_settings(
            self.seeing,
            reducer,
            processor(kind),
            base_fingerprint=fingerprint(self.seeing),
            rows="these",
            num_frames=NUM_FRAMES,
        )
        media = Processed(processor(kind), self.seeing.without_weights(), reducer, num_frames=NUM_FRAMES)
        layout = CacheLayout(settings, len(self.examples), rows_a_shard)
        write_features(
            folder / "cache",
            layout,
            self.examples,
            FeatureMaker(self.seeing, reducer, media),
            batch=batch,
            num_workers=0,
        )
        self.cached = Cached(folder / "cache", settings)
        kinds = kinds_of(self.examples)
        self.from_pictures = Collator(
            processor(kind), self.seeing, reducer, kinds=kinds, num_frames=NUM_FRAMES
        )
        self.from_cache = Collator(
            processor(kind), self.blind, reducer, kinds=kinds, num_frames=NUM_FRAMES, media=self.cached
        )

    def chosen(self, rows=None):
        return self.examples if rows is None else [self.examples[row] for row in rows]

    def batches(self, rows=None):
        """(of pictures, of the cache): the micro batch of these rows."""
        return self.from_pictures(self.chosen(rows)), self.from_cache(self.chosen(rows))

    def features(self, rows=None):
        """By kind of media, projected: (of pictures, as the model itself makes them; of the cache)."""
        seen, cached = self.batches(rows)
        model = self.seeing.model
        want, got = {}, {}
        with torch.no_grad(), vzip.attach(model, reducer=self.reducer, anyres=self.seeing.anyres):
            torch.manual_seed(0)
            for kind, inputs in seen.media.items():
                want[kind] = stock_features(model, kind, inputs.normalized(model.dtype))
        with torch.no_grad():
            for kind in cached.media:
                got[kind] = visual_tokens(self.blind, self.reducer, cached, kind)
        return want, got

    def losses(self, engine, rows=None):
        """(loss, projector's gradients) of pictures and of the cache."""
        examples, found = self.chosen(rows), []
        for family, collate in ((self.seeing, self.from_pictures), (self.blind, self.from_cache)):
            torch.manual_seed(0)
            if engine == "fast":
                way = FastLoss(family, [self.reducer], prefix=[], recompute=False)
                way.run_prefix(torch.device("cpu"))
                lay_out = Packer(collate, num_prefix=0)
            else:
                way, lay_out = ReferenceLoss(family, self.reducer, text_has_gradient=False), collate
            loss, _ = way(lay_out(examples))
            found.append((loss.item(), torch.autograd.grad(loss, list(family.projector.parameters()))))
        return found


def relative(got, want):
    return ((got - want).double().norm() / want.double().norm()).item()


@pytest.mark.parametrize("name", REDUCERS)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_model_without_towers_learns_the_same(tmp_path, kind, name):
    runs = Runs(tmp_path, kind, *REDUCERS[name])
    seen, cached = runs.batches()
    assert list(cached.media) == list(seen.media) and cached.num_placeholders == seen.num_placeholders
    assert all(
        torch.equal(getattr(cached, part), getattr(seen, part))
        for part in ("input_ids", "attention_mask", "labels")
    )
    want, got = runs.features()
    for media, values in want.items():  # computed in the same batch: the same bits
        assert len(values) == seen.num_placeholders[media] > 0 and torch.equal(got[media], values)
    for engine in ENGINES:
        (loss, gradients), (cached_loss, cached_gradients) = runs.losses(engine)
        assert cached_loss == pytest.approx(loss, rel=1e-6) and loss > 0
        for gradient, wanted in zip(cached_gradients, gradients, strict=True):
            assert wanted.norm() > 0 and relative(gradient, wanted) < 1e-6


@pytest.mark.parametrize("name", ["released", "spatial"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_rows_of_several_shards_come_in_any_order(tmp_path, kind, name):
    """Made two by two, three a shard. LLaVA-OneVision cuts only an image that is alone in its row into tiles."""
    runs = Runs(tmp_path, kind, *REDUCERS[name], batch=2, rows_a_shard=3)
    last = len(runs.examples) - 1
    for rows in ([last, 0, 2], [3, 1], [2, last, 2]):
        _, cached = runs.batches(rows)
        want, got = runs.features(rows)
        for media in (media for media, count in cached.num_placeholders.items() if count):
            torch.testing.assert_close(got[media], want[media], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_bfloat16_model_is_cached_in_bfloat16(tmp_path, kind):
    runs = Runs(tmp_path, kind, *REDUCERS["released"], dtype=torch.bfloat16)
    _, cached = runs.batches()
    assert {inputs.features.dtype for inputs in cached.media.values()} == {torch.bfloat16}
    want, got = runs.features()
    assert all(torch.equal(got[media], values) for media, values in want.items())
    for engine in ENGINES:
        (_, gradients), (_, cached_gradients) = runs.losses(engine)
        for gradient, wanted in zip(cached_gradients, gradients, strict=True):
            assert gradient.dtype == torch.float32 and relative(gradient, wanted) < 1e-6


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_batch_of_text_alone_runs_the_projector_and_teaches_it_nothing(tmp_path, kind):
    runs = Runs(tmp_path, kind, *REDUCERS["released"])
    _, cached = runs.batches([1])
    assert cached.num_placeholders == dict.fromkeys(cached.media, 0)
    for engine in ENGINES:
        (loss, _), (cached_loss, gradients) = runs.losses(engine, [1])
        assert cached_loss == loss > 0
        assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_dropped_towers_leave_no_tensor(kind):
    family = family_with(kind)
    names = tuple(f"{name}." for name in family.frozen_names.values())
    others = [name for name, _ in family.model.named_parameters() if not name.startswith(names)]
    assert len(others) < len(list(family.model.parameters()))
    family.drop_towers()
    assert [name for name, _ in family.model.named_parameters()] == others
    assert not [name for name, _ in family.model.named_buffers() if name.startswith(names)]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_all_tokens_are_cached_unless_the_model_packs_them_behind_the_projector(tmp_path, kind):
    if kind in tiny.TILED:
        with pytest.raises(UserError, match=r"reducer=identity.*packs.*another reducer"):
            Runs(tmp_path, kind, Identity())
        assert not (tmp_path / "cache").exists()
    else:
        runs = Runs(tmp_path, kind, Identity(), texts=IMAGE_ROWS)
        want, got = runs.features()
        torch.testing.assert_close(got["image"], want["image"], rtol=1e-5, atol=1e-6)
