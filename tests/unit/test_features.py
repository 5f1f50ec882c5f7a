"""A feature cache: made once, also in several attempts, read row by row, and refused where it is not of this run."""

import json
import pickle
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batches.collate import Collator
from data.batches.dataset import loader
from data.batches.media import Processed
from data.cache import make_features
from data.cache.features import Cached, CacheLayout, cache_settings, folder_of, shard_path
from data.cache.make_features import FeatureMaker, examples_per_shard, write_features
from tests.helpers import tiny
from tests.helpers.rows import IMAGE_ROWS, NUM_FRAMES, VIDEO_ROWS, examples_of, padded, rows_of
from vzip import UserError
from vzip.families import family_of
from vzip.families.features import VisualFeatures
from vzip.media import normalised
from vzip.reducers.random import Random
from vzip.reducers.visionzip import VisionZip
from vzip.runs.projector import fingerprint

TEXTS = [*IMAGE_ROWS, "five <image>", "no more", "seven <image>", "<image>eight"]
REDUCER = VisionZip(dominant=4, contextual=2)
SHARD = 3
"""Rows of a shard: of the 8 rows in `TEXTS`, the last shard has 2."""


@cache
def family(kind="clip", **shape):
    return family_of(tiny.llava(kind, **shape).requires_grad_(False))


@cache
def processor(kind="clip"):
    return tiny.processor(kind)


class Watched(Processed):
    """Notes the rows that it loads; the user ends the run at row `last`."""

    def __init__(self, *args, last=None, **settings):
        super().__init__(*args, **settings)
        self.last, self.rows = last, []

    def load(self, kind, examples):
        self.rows += [example.index for example in examples if kind in example.media]
        if self.last in self.rows:
            raise KeyboardInterrupt
        return super().load(kind, examples)


def described(kind="clip", reducer=REDUCER, **changes):
    given_settings = {"rows": "these", "num_frames": NUM_FRAMES} | changes
    return cache_settings(
        family(kind), reducer, processor(kind), base_fingerprint=fingerprint(family(kind)), **given_settings
    )


def write(folder, examples, kind="clip", reducer=REDUCER, *, last=None, shard=SHARD, batch=2):
    """Make a cache: the rows whose media were loaded."""
    media = Watched(
        processor(kind), family(kind).without_weights(), reducer, num_frames=NUM_FRAMES, last=last
    )
    layout = CacheLayout(described(kind, reducer), len(examples), shard)
    write_features(folder, layout, examples, FeatureMaker(family(kind), reducer, media), batch=batch)
    return media.rows


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# Made in several attempts


def test_an_ended_run_goes_on_at_its_shard_and_makes_the_same(tmp_path):
    """Also what is drawn at random, and draws of the user's in between."""
    examples, reducer = examples_of(TEXTS, tmp_path), Random(budget=5)
    write(tmp_path / "whole", examples, reducer=reducer)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "ended", examples, reducer=reducer, last=4)  # in the second shard
    with pytest.raises(UserError, match=r"ended holds 3 of 8 rows; run `make cache` again"):
        Cached(tmp_path / "ended", described(reducer=reducer))

    torch.rand(7)
    assert write(tmp_path / "ended", examples, reducer=reducer) == [3, 4, 6, 7]
    assert contents(tmp_path / "ended") == contents(tmp_path / "whole")
    assert write(tmp_path / "ended", examples, reducer=reducer) == []


def test_a_picture_that_is_gone_is_named_and_what_was_made_stays(tmp_path):
    examples = examples_of(TEXTS, tmp_path)
    (gone,) = examples[6].media["image"]
    gone.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=gone.name):
        write(tmp_path / "cache", examples)
    (tmp_path / "elsewhere").rename(gone)
    assert write(tmp_path / "cache", examples) == [6, 7]


def of_other_settings(folder, examples):
    write(folder.parent / "other", examples, reducer=VisionZip(dominant=5, contextual=1))
    return (folder.parent / "other" / shard_path(folder, 1).name).read_bytes()


DAMAGES = {
    "gone": lambda folder, examples: None,
    "empty": lambda folder, examples: b"",
    "cut off": lambda folder, examples: shard_path(folder, 1).read_bytes()[:-1],
    "cut off in its head": lambda folder, examples: shard_path(folder, 1).read_bytes()[:100],
    "no shard": lambda folder, examples: b"no shard" * 100,
    "of other settings": of_other_settings,
    "of other rows": lambda folder, examples: shard_path(folder, 0).read_bytes(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_shard_that_is_not_whole_or_another_is_refused_and_made_anew(tmp_path, damage):
    examples, folder = examples_of(TEXTS, tmp_path), tmp_path / "cache"
    write(folder, examples)
    whole, shards = contents(folder), [shard_path(folder, number) for number in range(3)]
    times = [path.stat().st_mtime_ns for path in shards]
    content = DAMAGES[damage](folder, examples)
    shards[1].unlink()
    if content is not None:
        shards[1].write_bytes(content)

    with pytest.raises(UserError, match=r"5 of 8 rows"):
        Cached(folder, described())
    assert write(folder, examples) == [3, 4]
    assert contents(folder) == whole
    assert [path.stat().st_mtime_ns == time for path, time in zip(shards, times, strict=True)] == [
        True,
        False,
        True,
    ]
    Cached(folder, described())


@pytest.mark.parametrize("kind", ["clip", "next", "onevision"])
def test_shards_are_cut_by_size(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(make_features, "SHARD_BYTES", 20_000)
    texts = ["<image>one"] * 30 + ["<video>two"] * (4 if kind in tiny.VIDEO else 0)
    examples, folder = examples_of(texts, tmp_path), tmp_path / "cache"
    write(folder, examples, kind, shard=examples_per_shard(family(kind), REDUCER, described(kind)), batch=8)
    cached = Cached(folder, described(kind))
    sizes = []
    for number in range(cached.layout.num_shards):
        rows = [examples[row] for row in cached.layout.rows(number)]
        kinds = {media for row in rows for media in row.media}
        sizes.append(sum(cached.load(media, rows)["features"].nbytes for media in kinds))
    assert len(sizes) > 1 and 20_000 / 8 < max(sizes) <= 20_000


# Read


@pytest.fixture(scope="module")
def made_one_by_one(tmp_path_factory):
    """(examples, their cache, what loads them) of a kind: each row reduced by itself."""

    @cache
    def make(kind, shard):
        folder = tmp_path_factory.mktemp(kind)
        examples = examples_of(rows_of(kind), folder)
        write(folder / "cache", examples, kind, shard=shard, batch=1)
        media = Processed(processor(kind), family(kind).without_weights(), REDUCER, num_frames=NUM_FRAMES)
        return examples, Cached(folder / "cache", described(kind)), media

    return make


@settings(max_examples=20, deadline=None)
@given(
    rows=st.lists(st.integers(0, len(IMAGE_ROWS + VIDEO_ROWS) - 1), min_size=1, max_size=5),
    shard=st.integers(1, 8),
)
@pytest.mark.parametrize("kind", tiny.VIDEO)
def test_any_rows_are_read_as_they_were_made(made_one_by_one, kind, rows, shard):
    examples, cached, media = made_one_by_one(kind, shard)
    for name in family(kind).kinds:
        chosen = [examples[row] for row in rows if name in examples[row].media]
        if chosen:
            alone = [normalised(media.load(name, [example]), torch.float32) for example in chosen]
            want = VisualFeatures.join([family(kind).reduce_media(REDUCER, name, inputs) for inputs in alone])
            got = cached.load(name, [examples[row] for row in rows])
            assert same(got, vars(want))
            assert cached.counts(name, got) == [
                count for inputs in alone for count in media.counts(name, inputs)
            ]


def test_workers_read_it_too(tmp_path):
    """Forked from a process that reads it already, or sent a copy."""
    examples = examples_of(TEXTS, tmp_path)
    write(tmp_path / "cache", examples)
    cached = Cached(tmp_path / "cache", described())
    batches = padded(examples, Collator(processor(), family(), REDUCER, media=cached), micro=4, num_steps=4)
    here = [batch.media["image"] for batch in loader(batches, first=0, num_workers=0)]
    there = [batch.media["image"] for batch in loader(batches, first=0, num_workers=2)]

    assert len(here) == len(there) == 4 and all(map(same, here, there))
    copied = pickle.loads(pickle.dumps(cached))
    assert same(copied.load("image", examples), cached.load("image", examples))


# Refused


def settings_of(changed, preparing=None):
    given_settings = {"base_fingerprint": fingerprint(changed), "rows": "these", "num_frames": NUM_FRAMES}
    return cache_settings(changed, REDUCER, preparing or processor(), **given_settings)


def other_weights():
    changed = family_of(tiny.llava(seed=1))
    return cache_settings(
        changed,
        REDUCER,
        processor(),
        base_fingerprint=fingerprint(changed),
        rows="these",
        num_frames=NUM_FRAMES,
    )


def other_layer():
    changed = family_of(tiny.llava())
    changed.model.config.vision_feature_layer = -3
    return cache_settings(
        changed,
        REDUCER,
        processor(),
        base_fingerprint=fingerprint(changed),
        rows="these",
        num_frames=NUM_FRAMES,
    )


def other_precision():
    changed = family_of(tiny.llava(dtype=torch.bfloat16))
    return cache_settings(
        changed,
        REDUCER,
        processor(),
        base_fingerprint=fingerprint(changed),
        rows="these",
        num_frames=NUM_FRAMES,
    )


def other_pictures():
    changed = tiny.processor()
    changed.image_processor.image_mean = [0.5, 0.5, 0.5]
    return cache_settings(
        family(),
        REDUCER,
        changed,
        base_fingerprint=fingerprint(family()),
        rows="these",
        num_frames=NUM_FRAMES,
    )


CHANGES = {
    "weights": (other_weights, ["model.fingerprint"]),
    "layer": (other_layer, ["config.vision_feature_layer: -2 in the cache, -3 wanted"]),
    "precision": (other_precision, ["dtype: 'float32' in the cache, 'bfloat16' wanted"]),
    "pictures": (other_pictures, ["processors.image.image_mean", "[0.5, 0.5, 0.5] wanted"]),
    "budget": (
        lambda: described(reducer=VisionZip(dominant=8, contextual=2)),
        ["reducer.dominant: 4 in the cache, 8 wanted"],
    ),
    "order": (
        lambda: described(reducer=VisionZip(dominant=4, contextual=2, anyres="spatial")),
        ["reducer.anyres", "spatial"],
    ),
    "reducer": (
        lambda: described(reducer=Random(budget=6)),
        ["reducer.name: 'visionzip' in the cache, 'random' wanted"],
    ),
    "rows": (lambda: described(rows="those"), ["rows: 'these' in the cache, 'those' wanted"]),
    "versions": (lambda: described() | {"transformers": "4.0"}, ["transformers: ", "'4.0' wanted"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_of_other_settings_is_refused_and_says_which(tmp_path, change):
    write(tmp_path / "cache", examples_of(TEXTS[:2], tmp_path))
    make, words = CHANGES[change]
    with pytest.raises(UserError) as error:
        Cached(tmp_path / "cache", make())
    assert all(word in str(error.value) for word in [*words, "data.cache=", "cache", "make cache"]), (
        error.value
    )
    assert change == "reducer" or str(error.value).count("in the cache") == 1  # and nothing that is the same
    assert folder_of(tmp_path, make()) != folder_of(tmp_path, described())


def test_frames_matter_to_models_that_take_videos():
    assert described(num_frames=3) == described(num_frames=4)
    assert described("video", num_frames=3) != described("video", num_frames=4)


@pytest.mark.parametrize("content", [None, "", "[]", "{}", json.dumps({"settings": {}, "rows": 3})])
def test_a_folder_that_is_no_cache_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "cache.json").write_text(content)
    with pytest.raises(UserError, match=r"data.cache=true: .* is no feature cache .*make cache"):
        Cached(tmp_path, described())
