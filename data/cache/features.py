"""The reducer's output of a whole subset, kept in files: training from it opens no picture and needs no vision tower.

A folder `cache-KEY/` holds `cache.json`, which says all that the features depend on, and shards of a fixed number of rows. A
shard is a safetensors file; of each kind of media it has the fields of a `VisualFeatures` of all its rows, and `starts`,
int64[rows + 1, 3]: where in them the images (or videos), places and tokens of each row begin. Written by `make_features.py`.
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
from torch import Tensor

from data.examples.tokens import Example, Examples
from vzip import UserError
from vzip.families import Family
from vzip.families.features import VisualFeatures
from vzip.reducers import Reducer

FORMAT = 1
META = "cache.json"
CONFIG = (
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "image_grid_pinpoints",
    "vision_aspect_ratio",
)
"""What of a model's config, beside its weights, the reducer's output depends on."""


def cache_settings(
    family: Family, reducer: Reducer, processor: Any, *, base_fingerprint: str, rows: str, num_frames: int
) -> dict[str, Any]:
    """Everything that the features depend on.

    Args:
        family: around the model.
        reducer: of the features.
        processor: of the model, unreduced.
        base_fingerprint: `vzip.runs.projector.fingerprint` of the model as it was loaded.
        rows: what tells the rows, their order and their images and videos from others, see `media_of_examples`.
        num_frames: of a video.

    Raises:
        UserError: a reducer whose output can't be cached for this model.
    """
    family.refuse_uncacheable(reducer)
    config = family.model.config
    settings = {
        "format": FORMAT,
        "model": {"type": family.model_type, "fingerprint": base_fingerprint},
        "config": {name: getattr(config, name) for name in CONFIG if hasattr(config, name)},
        "reducer": {"name": reducer.name, **reducer.settings()},
        "processors": {kind: _settings_of(getattr(processor, f"{kind}_processor")) for kind in family.kinds},
        "dtype": str(next(family.tower.parameters()).dtype).removeprefix("torch."),
        "width": config.vision_config.hidden_size,
        "num_frames": num_frames if "video" in family.kinds else None,
        "rows": rows,
        "transformers": transformers.__version__,
    }
    as_read: dict[str, Any] = json.loads(json.dumps(settings))  # lists for tuples, so that it can be compared
    return as_read


def media_of_examples(examples: Examples) -> str:
    """What tells these rows from others: the folder of their subset, and the name of their tokens."""
    return f"{examples.path.parent.name}/{examples.path.stem}"


def _settings_of(processor: Any) -> dict[str, Any]:
    """Of a processor of transformers; that of frames without torchvision has none but the image processor's."""
    settings = json.loads(processor.to_json_string()) if hasattr(processor, "to_json_string") else {}
    return {"class": type(processor).__name__, **settings}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def differences(cached: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """One line for each setting that differs, with both values."""
    there, here = dict(_flat(cached)), dict(_flat(wanted))
    names = [name for name in {**here, **there} if there.get(name) != here.get(name)]
    return [f"{name}: {there.get(name)!r} in the cache, {here.get(name)!r} wanted" for name in names]


@dataclass(frozen=True)
class CacheLayout:
    """What `cache.json` says: the settings, and how the rows are cut into shards."""

    settings: dict[str, Any]
    num_rows: int
    rows_a_shard: int

    @classmethod
    def read(cls, folder: Path) -> "CacheLayout":
        """Of a cache's folder. Raises UserError for a folder that is none."""
        try:
            return cls(**json.loads((folder / META).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"data.cache=true: {folder} is no feature cache ({error}); run `make cache` with the same settings"
            ) from error

    @cached_property
    def key(self) -> str:
        return key_of(self.settings)

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.rows_a_shard)

    def rows(self, shard: int) -> range:
        """The rows of a shard."""
        return range(self.num_rows)[shard * self.rows_a_shard : (shard + 1) * self.rows_a_shard]

    def metadata(self, shard: int) -> dict[str, str]:
        """What a shard says of itself: one of other settings or other rows is not this one."""
        rows = self.rows(shard)
        return {
            "of": f"{self.key}, rows {rows.start} to {rows.stop}"
        }  # one entry: safetensors writes several in any order

    def find(self, folder: Path, shard: int) -> Any:
        """The shard, opened; None if it is not there, of other settings or rows, or cut off."""
        try:
            found = safe_open(shard_path(folder, shard), framework="pt")
        except (FileNotFoundError, SafetensorError):
            return None
        return found if found.metadata() == self.metadata(shard) else None


def key_of(settings: Mapping[str, Any]) -> str:
    """A short hash of the settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def folder_of(parent: Path, settings: Mapping[str, Any]) -> Path:
    """Where the features of these settings are kept."""
    return parent / f"cache-{key_of(settings)}"


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05}.safetensors"


class Cached:
    """Media of rows that were cached: what a collator brings to the model in place of pictures. A `data.batches.media.Media`.

    Files are mapped when they are first read, by each process for itself.

    Args:
        folder: of the cache.
        settings: what `cache_settings` says of this run.

    Raises:
        UserError: no cache, one of other settings, or one that is not whole.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.layout = folder, CacheLayout.read(folder)
        if different := differences(self.layout.settings, settings):
            listed = "\n".join(f"  {line}" for line in different)
            raise UserError(
                f"data.cache=true: {folder} does not fit this run; `make cache` with the same settings makes one that does. "
                f"Different are:\n{listed}"
            )
        shards = [self.layout.find(folder, shard) for shard in range(self.layout.num_shards)]
        if None in shards:
            num_there = sum(
                len(self.layout.rows(shard)) for shard, found in enumerate(shards) if found is not None
            )
            raise UserError(
                f"data.cache=true: {folder} holds {num_there:,} of {self.layout.num_rows:,} rows; run `make cache` again for "
                f"the others"
            )
        kinds = tuple(settings["processors"])
        self.starts = [{kind: shard.get_tensor(f"{kind}.starts") for kind in kinds} for shard in shards]
        self._process, self._opened = os.getpid(), dict[int, Any]()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": {}}

    def _shard(self, number: int) -> Any:
        if self._process != os.getpid():  # forked: an opened file is not shared
            self._process, self._opened = os.getpid(), {}
        if number not in self._opened:
            self._opened[number] = safe_open(shard_path(self.folder, number), framework="pt")
        return self._opened[number]

    def row(self, kind: str, index: int) -> VisualFeatures:
        """The images, or videos, of row `index` of the subset."""
        assert 0 <= index < self.layout.num_rows, "an example of another subset"
        number, place = divmod(index, self.layout.rows_a_shard)
        shard = self._shard(number)
        begin, end = self.starts[number][kind][place : place + 2].tolist()
        names = ("counts", "order", "features")
        counts, order, features = (
            shard.get_slice(f"{kind}.{name}")[first:last]
            for name, first, last in zip(names, begin, end, strict=True)
        )
        return VisualFeatures(features, torch.where(order < 0, order, order - begin[2]), counts)

    def load(self, kind: str, examples: Sequence[Example]) -> dict[str, Tensor]:
        """The fields of a `VisualFeatures` of all images, or videos, of the rows."""
        return dict(
            vars(
                VisualFeatures.join(
                    [self.row(kind, example.index) for example in examples if kind in example.media]
                )
            )
        )

    def blank(self, kind: str) -> dict[str, Tensor]:
        """One token of zeros."""
        dtype = getattr(torch, self.layout.settings["dtype"])
        return dict(
            vars(
                VisualFeatures.as_it_is(
                    torch.zeros(1, self.layout.settings["width"], dtype=dtype), num_media=1
                )
            )
        )

    def counts(self, kind: str, inputs: dict[str, Tensor]) -> list[int]:
        counts: list[int] = inputs["counts"].tolist()
        return counts


def open_cache(parent: Path, settings: Mapping[str, Any]) -> Cached:
    """The cache of these settings among those of a subset. Raises UserError, saying what the newest one has otherwise."""
    folder = folder_of(parent, settings)
    if not folder.is_dir():
        folder = max(parent.glob("cache-*"), key=lambda other: other.stat().st_mtime, default=folder)
    return Cached(folder, settings)
