"""The reducer's output for a whole subset, in files.

Training from these files opens no image and needs no vision tower.

A folder `cache-KEY/` holds `cache.json`, with everything that the features depend on, and shards of
a fixed number of examples. A shard is a safetensors file. For each kind of media it has the fields
of a `VisualFeatures` of all its examples, and `starts`, int64[examples + 1, 3]: where the images
(or videos), positions and tokens of each example begin in these fields. `make_features.py` writes
the files, this module reads them.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open

from data.examples.tokens import Example, Examples
from vzip import UserError
from vzip.families import Family
from vzip.families.features import VisualFeatures
from vzip.files import read_json_object
from vzip.reducers import Reducer

FORMAT = 1
"""Version of the files. Raise it when they change, so that older caches are refused."""
META = "cache.json"


def cache_settings(
    family: Family,
    reducer: Reducer,
    processor: Any,
    *,
    base_fingerprint: str,
    examples_name: str,
    num_frames: int,
) -> dict[str, Any]:
    """Collect everything that the features depend on.

    Args:
        family: the model's family.
        reducer: the reducer whose output is cached.
        processor: the model's processor, unreduced.
        base_fingerprint: `vzip.runs.projector.fingerprint` of the model as it was loaded.
        examples_name: `name_of_examples` of the examples.
        num_frames: frames taken of a video.

    Raises:
        UserError: this reducer's output can't be cached for this model.
    """
    family.check_cacheable(reducer)

    # Another processor may resize or crop differently, and so give other features.
    processors = {}
    for kind in family.kinds:
        processors[kind] = _processor_settings(getattr(processor, f"{kind}_processor"))

    settings = {
        "format": FORMAT,
        "model": {"type": family.model_type, "fingerprint": base_fingerprint},
        "config": family.feature_settings(),
        "reducer": family.describe_reduction(reducer),
        "processors": processors,
        # Type and width of the features: a blank image has to be made without reading any.
        "dtype": str(next(family.tower.parameters()).dtype).removeprefix("torch."),
        "width": family.feature_width,
        # Only the features of videos depend on the number of frames.
        "num_frames": num_frames if "video" in family.kinds else None,
        "rows": examples_name,
        # Another version may process or compute differently.
        "transformers": transformers.__version__,
    }

    # Through JSON and back, so that they can be compared with settings that were read from a file:
    # there, tuples are lists.
    as_read: dict[str, Any] = json.loads(json.dumps(settings))
    return as_read


def name_of_examples(examples: Examples) -> str:
    """Name the subset and the token file, which stand for the examples, their order and media."""
    assert examples.path is not None, "examples in memory have no name"
    return f"{examples.path.parent.name}/{examples.path.stem}"


def _processor_settings(processor: Any) -> dict[str, Any]:
    """Collect the class and the settings of a processor."""
    # `FrameProcessor` has no settings besides those of the image processor.
    settings = {}
    if hasattr(processor, "to_json_string"):
        settings = json.loads(processor.to_json_string())
    return {"class": type(processor).__name__, **settings}


def differences(cached: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Describe each setting that differs in one line, with both values."""
    in_cache = dict(_flatten(cached))
    in_run = dict(_flatten(wanted))

    # The run's settings come first, then those that only the cache has.
    lines = []
    for name in {**in_run, **in_cache}:
        if in_cache.get(name) != in_run.get(name):
            lines.append(f"{name}: {in_cache.get(name)!r} in the cache, {in_run.get(name)!r} wanted")
    return lines


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of each setting, also of those in groups."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


@dataclass(frozen=True)
class CacheLayout:
    """What `cache.json` says: the settings, and how the examples are cut into shards."""

    settings: dict[str, Any]
    num_examples: int
    examples_per_shard: int

    @classmethod
    def read(cls, folder: Path) -> "CacheLayout":
        """Read `cache.json`. Raises UserError if the folder is not a feature cache."""
        advice = "data.cache=true needs a feature cache: run `make cache` with the same settings"
        meta = read_json_object(folder / META, advice=advice)
        settings = meta.get("settings")
        num_examples = meta.get("num_rows")
        shard_size = meta.get("rows_a_shard")
        are_counts = type(num_examples) is int and type(shard_size) is int and shard_size > 0
        if not isinstance(settings, dict) or not are_counts:
            raise UserError(f"{folder / META} is damaged (a setting is missing); {advice}")
        return cls(settings, num_examples, shard_size)

    def to_json(self) -> dict[str, Any]:
        """Return the content of `cache.json`."""
        return {
            "settings": self.settings,
            "num_rows": self.num_examples,
            "rows_a_shard": self.examples_per_shard,
        }

    @cached_property
    def key(self) -> str:
        """A short hash of the settings."""
        return key_of(self.settings)

    @property
    def num_shards(self) -> int:
        return -(-self.num_examples // self.examples_per_shard)

    def examples_in(self, shard: int) -> range:
        """Return the numbers of the examples in a shard."""
        first = shard * self.examples_per_shard
        return range(first, min(first + self.examples_per_shard, self.num_examples))

    def metadata(self, shard: int) -> dict[str, str]:
        """Describe a shard, so that one of other settings or examples is not mistaken for it."""
        # A single entry: safetensors writes several in any order, but the files of equal shards
        # should be equal.
        examples = self.examples_in(shard)
        return {"of": f"{self.key}, rows {examples.start} to {examples.stop}"}

    def open_shard(self, folder: Path, shard: int) -> Any:
        """Open a shard. None if it is missing, damaged, or of other settings or examples."""
        # Opening reads only the header. It says how long the file must be.
        try:
            opened = safe_open(shard_path(folder, shard), framework="pt")
            is_of_cache = opened.metadata() == self.metadata(shard)
            num_examples = len(self.examples_in(shard))
            return opened if is_of_cache and _starts_fit(opened, num_examples) else None
        except (FileNotFoundError, SafetensorError):
            return None


def _starts_fit(shard: Any, num_examples: int) -> bool:
    """Tell whether the starts in a shard fit its other tensors.

    After a fault of the disk, a file may have its length and header, and zeros behind them.
    """
    names = shard.keys()
    for name in names:
        kind, _, field = name.partition(".")
        if field != "starts":
            continue

        # The last row says how many media, positions and tokens there are.
        starts = shard.get_tensor(name)
        ends = [shard.get_slice(f"{kind}.{part}").get_shape()[0] for part in ("counts", "order", "features")]
        if list(starts.shape) != [num_examples + 1, 3] or starts[-1].tolist() != ends:
            return False
        if bool((starts.diff(dim=0) < 0).any()):
            return False
    return True


def key_of(settings: Mapping[str, Any]) -> str:
    """Hash the settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def folder_of(parent: Path, settings: Mapping[str, Any]) -> Path:
    """Return the folder for features of these settings."""
    return parent / f"cache-{key_of(settings)}"


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05}.safetensors"


class CachedMedia:
    """Features from a cache. A collator gives them to the model instead of pixels.

    This is a `data.batches.media.Media`. Each process maps a shard when it first reads from it.

    Args:
        folder: the folder of the cache.
        settings: what `cache_settings` returns for this run.

    Raises:
        UserError: there is no cache, it has other settings, or shards are missing.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.layout = CacheLayout.read(folder)
        self._check_settings(settings)

        # Look for all shards now, so that a missing one is not found out in the middle of a run.
        numbers = range(self.layout.num_shards)
        shards = [self.layout.open_shard(folder, number) for number in numbers]
        self._check_complete(shards)

        # The starts are small and needed for every example, so read them now.
        self.starts = []
        for shard in shards:
            starts = {kind: shard.get_tensor(f"{kind}.starts") for kind in settings["processors"]}
            self.starts.append(starts)

        self._process = os.getpid()
        self._opened: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Open files can't be copied to a data worker. It maps them itself.
        return {**vars(self), "_opened": {}}

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        """Raise UserError, with all differences, unless the cache has these settings."""
        different = differences(self.layout.settings, settings)
        if different:
            listed = "\n".join(f"  {line}" for line in different)
            raise UserError(
                f"data.cache=true: {self.folder} does not fit this run; `make cache` with the same "
                f"settings makes one that does. These settings differ:\n{listed}"
            )

    def _check_complete(self, shards: Sequence[Any]) -> None:
        """Raise UserError if a shard is None."""
        num_cached = 0
        for number, shard in enumerate(shards):
            if shard is not None:
                num_cached += len(self.layout.examples_in(number))

        if None in shards:
            raise UserError(
                f"data.cache=true: {self.folder} holds {num_cached:,} of {self.layout.num_examples:,} "
                f"examples; run `make cache` again for the others"
            )

    def _shard(self, number: int) -> Any:
        """Map a shard, unless this process has done so already."""
        # A forked process must not use the files of its parent.
        if self._process != os.getpid():
            self._process = os.getpid()
            self._opened = {}

        if number not in self._opened:
            self._opened[number] = safe_open(shard_path(self.folder, number), framework="pt")
        return self._opened[number]

    def of_example(self, kind: str, index: int) -> VisualFeatures:
        """Read the features of the images, or videos, of example number `index` of the subset."""
        assert 0 <= index < self.layout.num_examples, "an example of another subset"

        # Where the example begins and ends among the shard's images, positions and tokens.
        number, position = divmod(index, self.layout.examples_per_shard)
        shard = self._shard(number)
        begin, end = self.starts[number][kind][position : position + 2].tolist()

        counts = shard.get_slice(f"{kind}.counts")[begin[0] : end[0]]
        order = shard.get_slice(f"{kind}.order")[begin[1] : end[1]]
        features = shard.get_slice(f"{kind}.features")[begin[2] : end[2]]

        # In the shard, `order` counts from its first token. -1 is `image_newline`, and stays.
        order = torch.where(order < 0, order, order - begin[2])

        # Only some models have places for their tokens.
        places = {}
        if f"{kind}.kept" in shard.keys():  # noqa: SIM118  a shard is no dict
            places["kept"] = shard.get_slice(f"{kind}.kept")[begin[1] : end[1]]
            places["grids"] = shard.get_slice(f"{kind}.grids")[begin[0] : end[0]]
        return VisualFeatures(features, order, counts, **places)

    def load(self, kind: str, examples: Sequence[Example]) -> VisualFeatures:
        """Read the features of all images, or videos, of the examples."""
        parts = []
        for example in examples:
            if kind in example.media:
                parts.append(self.of_example(kind, example.index))
        return VisualFeatures.join(parts)

    def blank(self, kind: str) -> VisualFeatures:
        """Make a single token of zeros."""
        # It must have the type of the other features, or the model would compute in another one.
        dtype = getattr(torch, self.layout.settings["dtype"])
        zeros = torch.zeros(1, self.layout.settings["width"], dtype=dtype)
        return VisualFeatures.in_order(zeros, num_media=1)

    def counts(self, kind: str, inputs: VisualFeatures) -> list[int]:
        """Count the placeholders of each image or video, which the features record."""
        counts: list[int] = inputs.counts.tolist()
        return counts


def open_cache(parent: Path, settings: Mapping[str, Any]) -> CachedMedia:
    """Open the cache of these settings in a subset's folder.

    Raises:
        UserError: it does not exist. The message lists how the newest cache differs.
    """
    folder = folder_of(parent, settings)

    # If it does not exist, try the newest cache: the error lists the settings that differ.
    if not folder.is_dir():
        caches = sorted(parent.glob("cache-*"), key=lambda other: other.stat().st_mtime)
        folder = caches[-1] if caches else folder
    return CachedMedia(folder, settings)
