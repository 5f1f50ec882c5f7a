"""Make a feature cache: the reducer's output of every row, computed once. `features.py` says how it is kept, and reads it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.batches.dataset import explain_workers
from data.batches.media import Media
from data.cache.features import META, CacheLayout, shard_path
from data.examples.tokens import Example
from data.paths import atomic_write, write_json
from data.progress import progress
from vzip.families import Family
from vzip.families.features import VisualFeatures
from vzip.media import normalised
from vzip.reducers import Reducer

SHARD_BYTES = 2**28
"""Of features in a shard, at most, where a row has one image or video; while it is written, thrice as much is in memory."""

Batch = tuple[dict[str, list[int]], dict[str, Any]]
"""Of some rows, by kind: how many images (or videos) each row has, and what was made of them all."""


class FeatureMaker:
    """From rows to what a reducer leaves of their images and videos.

    Args:
        family: around the model, on its device; no reducer needs to be attached.
        reducer: of the features. One that draws at random draws once, for good.
        media: opens and processes images and videos; used in data workers.
    """

    def __init__(self, family: Family, reducer: Reducer, media: Media) -> None:
        self.family, self.reducer, self.media = family, reducer, media
        parameter = next(family.tower.parameters())
        self.dtype, self.device = parameter.dtype, parameter.device
        none = torch.empty(0, dtype=torch.int64)
        self.nothing = VisualFeatures(
            torch.empty(0, family.model.config.vision_config.hidden_size, dtype=self.dtype), none, none
        )

    @torch.no_grad()
    def reduce(self, kind: str, inputs: Mapping[str, Tensor]) -> VisualFeatures:
        """What `media` loaded, reduced on the model's device; on the CPU."""
        there = {name: value.to(self.device) for name, value in inputs.items()}
        reduced = self.family.reduce_media(self.reducer, kind, normalised(there, self.dtype))
        return VisualFeatures(reduced.features.cpu(), reduced.order.cpu(), reduced.counts)


def examples_per_shard(family: Family, reducer: Reducer, settings: Mapping[str, Any]) -> int:
    """As many as have `SHARD_BYTES` if each has one image or video of the largest kind."""
    num_tokens = max(family.num_image_tokens(reducer, size) for size in family.image_sizes)
    if "video" in family.kinds:
        num_tokens = max(num_tokens, family.num_video_tokens(reducer, settings["num_frames"]))
    itemsize: int = getattr(torch, settings["dtype"]).itemsize
    return max(1, SHARD_BYTES // (num_tokens * settings["width"] * itemsize))


class _ExampleBatches(Dataset[Batch]):
    """Item i is what the rows of batch i hold: by kind, images (or videos) of each row, and all of them loaded."""

    def __init__(self, examples: Sequence[Example], maker: FeatureMaker, batches: Sequence[range]) -> None:
        self.examples, self.kinds, self.media, self.batches = (
            examples,
            maker.family.kinds,
            maker.media,
            batches,
        )

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        rows = [self.examples[row] for row in self.batches[index]]
        num_media = {kind: [len(row.media.get(kind, ())) for row in rows] for kind in self.kinds}
        return num_media, {
            kind: self.media.load(kind, rows) for kind, counts in num_media.items() if any(counts)
        }


def _starts(num_media: Sequence[int], reduced: VisualFeatures) -> Tensor:
    """int64[rows + 1, 3]: where the images (or videos), places and tokens of each row begin, and the last one's end."""

    def ends(counts: Tensor) -> Tensor:
        return torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    media = ends(torch.tensor(num_media))
    places = ends(reduced.counts)[media]
    return torch.stack([media, places, ends((reduced.order >= 0).long())[places]], dim=1)


def _tensors(parts: Sequence[Batch], nothing: VisualFeatures) -> dict[str, Tensor]:
    """A shard's tensors of what was made of its batches."""
    tensors = {}
    for kind in parts[0][0]:
        reduced = VisualFeatures.join([nothing, *(made[kind] for _, made in parts if kind in made)])
        tensors |= {f"{kind}.{name}": value for name, value in vars(reduced).items()}
        tensors[f"{kind}.starts"] = _starts(
            [count for num_media, _ in parts for count in num_media[kind]], reduced
        )
    return tensors


def write_features(
    folder: Path,
    layout: CacheLayout,
    examples: Sequence[Example],
    maker: FeatureMaker,
    *,
    batch: int = 16,
    num_workers: int = 0,
) -> None:
    """Make what is missing of a cache: a run that was ended goes on at the shard that it was making.

    Args:
        folder: of the cache, see `folder_of`.
        layout: of the cache.
        examples: `layout.num_rows` of them.
        maker: from rows to features.
        batch: rows reduced at once.
        num_workers: processes that open and process pictures (0: this one).

    Raises:
        UserError: a picture or video that can't be read, or a worker that the system has ended.
        OSError: a full disk.
    """
    assert len(examples) == layout.num_rows
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / META, asdict(layout))
    missing = [shard for shard in range(layout.num_shards) if layout.find(folder, shard) is None]
    cut = {shard: layout.rows(shard) for shard in missing}
    batches = [
        (shard, rows[start : start + batch])
        for shard, rows in cut.items()
        for start in range(0, len(rows), batch)
    ]
    num_done = layout.num_rows - sum(len(rows) for _, rows in batches)
    loaded = iter(
        DataLoader(
            _ExampleBatches(examples, maker, [rows for _, rows in batches]),
            batch_size=None,
            num_workers=num_workers,
        )
    )
    with (
        explain_workers(),
        progress(None, total=layout.num_rows, title="cache features", unit="row", start=num_done) as bar,
    ):
        for shard, its_batches in groupby(batches, key=lambda each: each[0]):
            parts = []
            for _, rows in its_batches:
                num_media, inputs = next(loaded)
                torch.manual_seed(rows.start)  # what is drawn at random is the same in a run that was resumed
                parts.append(
                    (num_media, {kind: maker.reduce(kind, values) for kind, values in inputs.items()})
                )
                bar.update(len(rows))
            with atomic_write(shard_path(folder, shard)) as scratch:
                scratch.write_bytes(save(_tensors(parts, maker.nothing), metadata=layout.metadata(shard)))
