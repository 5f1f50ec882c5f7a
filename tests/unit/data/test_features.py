"""A feature cache: made once, also in several attempts, read by example, and refused if it belongs to
another run.
"""

import json
import pickle
from functools import cache
from threading import Thread

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.batches.collate import Collator
from data.batches.dataset import loader
from data.batches.media import ProcessedMedia
from data.cache import make_features
from data.cache.features import CachedMedia, CacheLayout, cache_settings, folder_of, open_cache, shard_path
from data.cache.make_features import FeatureMaker, examples_per_shard, make_cache, write_features
from tests.helpers import tiny
from tests.helpers.examples import (
    IMAGE_TEXTS,
    NUM_FRAMES,
    VIDEO_TEXTS,
    are_equal,
    examples_of,
    padded_batches,
    texts_of,
)
from vzip import UserError
from vzip.families import family_of
from vzip.families.features import VisualFeatures
from vzip.reducers.random import Random
from vzip.reducers.visionzip import VisionZip
from vzip.runs.projector import fingerprint

TEXTS = [*IMAGE_TEXTS, "five <image>", "no more", "seven <image>", "<image>eight"]
REDUCER = VisionZip(dominant=4, contextual=2)
SHARD = 3
"""Examples of a shard. The last shard of the 8 examples in `TEXTS` has 2."""


@cache
def family(kind="clip"):
    return family_of(tiny.llava(kind).requires_grad_(False))


def settings_of(family, reducer=REDUCER, *, processor=None, name="these", num_frames=NUM_FRAMES, kind="clip"):
    return cache_settings(
        family,
        reducer,
        processor or tiny.processor(kind),
        base_fingerprint=fingerprint(family),
        examples_name=name,
        num_frames=num_frames,
    )


def usual_settings(kind="clip", reducer=REDUCER, **changes):
    return settings_of(family(kind), reducer, kind=kind, **changes)


class WatchedMedia(ProcessedMedia):
    """Notes the examples that it loads. The user interrupts the command at example `last`."""

    def __init__(self, kind, reducer, *, last=None):
        weightless = family(kind).without_weights()
        super().__init__(tiny.processor(kind), weightless, reducer, num_frames=NUM_FRAMES)
        self.last = last
        self.loaded = []

    def load(self, kind, examples):
        self.loaded += [example.index for example in examples if kind in example.media]
        if self.last in self.loaded:
            raise KeyboardInterrupt
        return super().load(kind, examples)


def write(folder, examples, kind="clip", reducer=REDUCER, *, last=None, shard=SHARD, batch=2):
    """Make a cache, and return the examples whose media were loaded."""
    media = WatchedMedia(kind, reducer, last=last)
    layout = CacheLayout(usual_settings(kind, reducer), len(examples), shard)
    write_features(folder, layout, examples, FeatureMaker(family(kind), reducer, media), batch=batch)
    return media.loaded


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_features(one, other):
    for name in ("features", "order", "counts"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


# Made in several attempts


def test_an_interrupted_command_resumes_at_its_shard_and_makes_the_same(tmp_path):
    """Also the random draws are the same, whatever else draws in between."""
    examples = examples_of(TEXTS, tmp_path)
    reducer = Random(budget=5)
    write(tmp_path / "whole", examples, reducer=reducer)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "ended", examples, reducer=reducer, last=4)  # in the second shard
    with pytest.raises(UserError, match=r"ended holds 3 of 8 examples; run `make cache` again"):
        CachedMedia(tmp_path / "ended", usual_settings(reducer=reducer))

    # A picture that is gone is named, and the shards before it stay.
    torch.rand(7)
    (gone,) = examples[6].media["image"]
    gone.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=gone.name):
        write(tmp_path / "ended", examples, reducer=reducer)
    (tmp_path / "elsewhere").rename(gone)

    assert write(tmp_path / "ended", examples, reducer=reducer) == [6, 7]
    assert contents(tmp_path / "ended") == contents(tmp_path / "whole")
    assert write(tmp_path / "ended", examples, reducer=reducer) == []


def shard_of_other_settings(folder, examples):
    write(folder.parent / "other", examples, reducer=VisionZip(dominant=5, contextual=1))
    return (folder.parent / "other" / shard_path(folder, 1).name).read_bytes()


def zeros_behind_header(folder, examples):
    content = shard_path(folder, 1).read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    return content[:begin] + bytes(len(content) - begin)


DAMAGES = {
    "gone": lambda folder, examples: None,
    "empty": lambda folder, examples: b"",
    "cut off": lambda folder, examples: shard_path(folder, 1).read_bytes()[:-1],
    "cut off in its header": lambda folder, examples: shard_path(folder, 1).read_bytes()[:100],
    "zeros behind the header": zeros_behind_header,
    "no shard": lambda folder, examples: b"no shard" * 100,
    "of other settings": shard_of_other_settings,
    "of other examples": lambda folder, examples: shard_path(folder, 0).read_bytes(),
}


def test_a_damaged_shard_or_one_of_another_cache_is_refused_and_made_anew(tmp_path):
    examples = examples_of(TEXTS, tmp_path)
    folder = tmp_path / "cache"
    write(folder, examples)
    whole = contents(folder)
    times = [path.stat().st_mtime_ns for path in sorted(folder.iterdir())]

    for damage, content_of in DAMAGES.items():
        content = content_of(folder, examples)
        shard_path(folder, 1).unlink()
        if content is not None:
            shard_path(folder, 1).write_bytes(content)

        with pytest.raises(UserError, match=r"5 of 8 examples"):
            CachedMedia(folder, usual_settings())
        assert write(folder, examples) == [3, 4], damage
        assert contents(folder) == whole, damage
        CachedMedia(folder, usual_settings())

    # The other shards were never touched.
    untouched = [shard_path(folder, 0), shard_path(folder, 2)]
    assert {path.stat().st_mtime_ns for path in untouched} < set(times)


def test_two_that_make_one_cache_compute_each_shard_once(tmp_path):
    examples = examples_of(TEXTS, tmp_path)
    folder = tmp_path / "cache"
    loaded = []
    threads = [Thread(target=lambda: loaded.extend(write(folder, examples))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(loaded) == sorted(write(tmp_path / "other", examples))
    assert contents(folder) == contents(tmp_path / "other")


@pytest.mark.parametrize("kind", ["clip", "next", "onevision"])
def test_shards_are_cut_by_size(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(make_features, "SHARD_BYTES", 20_000)
    texts = ["<image>one"] * 30 + ["<video>two"] * (4 if kind in tiny.VIDEO else 0)
    examples = examples_of(texts, tmp_path)
    maker = FeatureMaker(family(kind), REDUCER, WatchedMedia(kind, REDUCER))
    folder = make_cache(tmp_path, examples, maker, usual_settings(kind), batch=8, num_workers=0)

    cached = open_cache(tmp_path, usual_settings(kind))
    assert cached.folder == folder
    assert cached.layout.examples_per_shard == examples_per_shard(family(kind), REDUCER, usual_settings(kind))
    sizes = []
    for shard in range(cached.layout.num_shards):
        in_shard = [examples[number] for number in cached.layout.examples_in(shard)]
        kinds = {medium for example in in_shard for medium in example.media}
        sizes.append(sum(cached.load(medium, in_shard).features.nbytes for medium in kinds))
    assert len(sizes) > 1
    assert 20_000 / 8 < max(sizes) <= 20_000


# Read


@pytest.fixture(scope="module")
def cache_by_example(tmp_path_factory):
    """Make (examples, their cache, source of their pixels) of a kind, with each example reduced by itself."""

    @cache
    def make(kind, shard):
        folder = tmp_path_factory.mktemp(kind)
        examples = examples_of(texts_of(kind), folder)
        write(folder / "cache", examples, kind, shard=shard, batch=1)
        return examples, CachedMedia(folder / "cache", usual_settings(kind)), WatchedMedia(kind, REDUCER)

    return make


@given(
    numbers=st.lists(st.integers(0, len(IMAGE_TEXTS + VIDEO_TEXTS) - 1), min_size=1, max_size=5),
    shard=st.integers(1, 8),
)
@pytest.mark.parametrize("kind", tiny.VIDEO)
def test_any_examples_are_read_as_they_were_made(cache_by_example, kind, numbers, shard):
    examples, cached, media = cache_by_example(kind, shard)
    chosen = [examples[number] for number in numbers]
    for medium in family(kind).kinds:
        parts = []
        counts = []
        for example in chosen:
            if medium in example.media:
                inputs = media.load(medium, [example])
                counts += media.counts(medium, inputs)
                parts.append(family(kind).visual_features(medium, inputs.normalized(torch.float32), REDUCER))
        if parts:
            features = cached.load(medium, chosen)
            assert_same_features(features, VisualFeatures.join(parts))
            assert cached.counts(medium, features) == counts


def test_workers_read_it_too(tmp_path):
    """A worker is forked from a process that has read from it, or gets a copy."""
    examples = examples_of(TEXTS, tmp_path)
    write(tmp_path / "cache", examples)
    cached = CachedMedia(tmp_path / "cache", usual_settings())
    collator = Collator(tiny.processor(), family(), REDUCER, media=cached)
    batches = padded_batches(examples, collator, micro=4, num_steps=4)
    here = list(loader(batches, first=0, num_workers=0))
    in_workers = list(loader(batches, first=0, num_workers=2))
    assert len(here) == len(in_workers) == 4
    assert all(map(are_equal, here, in_workers))

    copied = pickle.loads(pickle.dumps(cached))
    assert_same_features(copied.load("image", examples), cached.load("image", examples))


# Refused


def other_layer():
    changed = family_of(tiny.llava())
    changed.model.config.vision_feature_layer = -3
    return settings_of(changed)


def other_pictures():
    changed = tiny.processor()
    changed.image_processor.image_mean = [0.5, 0.5, 0.5]
    return usual_settings(processor=changed)


CHANGES = {
    "weights": (lambda: settings_of(family_of(tiny.llava(seed=1))), "model.fingerprint"),
    "layer": (other_layer, "config.vision_feature_layer: -2 in the cache, -3 wanted"),
    "precision": (
        lambda: settings_of(family_of(tiny.llava(dtype=torch.bfloat16))),
        "dtype: 'float32' in the cache, 'bfloat16' wanted",
    ),
    "pictures": (other_pictures, "processors.image.image_mean"),
    "budget": (
        lambda: usual_settings(reducer=VisionZip(dominant=8, contextual=2)),
        "reducer.dominant: 4 in the cache, 8 wanted",
    ),
    "order": (
        lambda: settings_of(family_of(tiny.llava(), anyres="spatial")),
        "reducer.anyres: 'released' in the cache, 'spatial' wanted",
    ),
    "reducer": (
        lambda: usual_settings(reducer=Random(budget=6)),
        "reducer.name: 'visionzip' in the cache, 'random' wanted",
    ),
    "examples": (lambda: usual_settings(name="those"), "rows: 'these' in the cache, 'those' wanted"),
    "versions": (lambda: usual_settings() | {"transformers": "4.0"}, "'4.0' wanted"),
}


def test_a_cache_of_other_settings_is_refused_with_what_differs(tmp_path):
    examples = examples_of(TEXTS[:2], tmp_path)
    write(tmp_path / "cache-0", examples)
    assert json.loads((tmp_path / "cache-0" / "cache.json").read_text()) == {
        "settings": usual_settings(),
        "num_rows": len(examples),
        "rows_a_shard": SHARD,
    }
    for change, (make_settings, words) in CHANGES.items():
        settings = make_settings()
        with pytest.raises(UserError) as error:
            open_cache(tmp_path, settings)
        message = str(error.value)
        assert all(word in message for word in [words, "data.cache=", "make cache"]), message
        assert folder_of(tmp_path, settings) != folder_of(tmp_path, usual_settings())

        # Settings that are the same are not named.
        if change not in ("reducer", "weights", "precision"):
            assert message.count("in the cache") == 1, message


def test_frames_matter_only_to_models_that_take_videos():
    assert usual_settings("clip", num_frames=3) == usual_settings("clip", num_frames=4)
    assert usual_settings("video", num_frames=3) != usual_settings("video", num_frames=4)


@pytest.mark.parametrize(
    "content", [None, "", "[]", "{}", json.dumps({"settings": {}, "num_rows": 3, "rows_a_shard": 0})]
)
def test_a_folder_that_is_no_cache_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "cache.json").write_text(content)
    with pytest.raises(UserError, match=r"cache\.json is damaged.*data.cache=true needs .*make cache"):
        CachedMedia(tmp_path, usual_settings())
