"""Compute a feature cache: the reducer's output of every example, once.

`features.py` describes the files and reads them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.batches.dataset import explain_workers
from data.batches.media import Media
from data.batches.workers import usable_workers
from data.cache.features import META, CacheLayout, folder_of, shard_path
from data.examples.tokens import Example
from data.locks import locked
from data.progress import progress
from vzip.families import Family
from vzip.families.features import VisualFeatures
from vzip.files import atomic_write, write_json
from vzip.media import MediaInputs
from vzip.reducers import Reducer

SHARD_BYTES = 2**28
"""Most bytes of features in a shard, if each example has one image or video.

Writing a shard takes three times as much memory.
"""


@dataclass(frozen=True)
class LoadedBatch:
    """The images and videos of some examples, by kind."""

    num_media: dict[str, list[int]]
    """Number of images, or videos, of each example."""
    inputs: dict[str, MediaInputs]
    """All of them, ready for the vision tower. A kind without any has no entry."""


class _MediaBatches(Dataset[LoadedBatch]):
    """Loads the media of batch after batch, in data workers."""

    def __init__(
        self,
        examples: Sequence[Example],
        media: Media,
        kinds: Sequence[str],
        batches: Sequence[Sequence[int]],
    ) -> None:
        self.examples = examples
        self.media = media
        self.kinds = kinds
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> LoadedBatch:
        examples = [self.examples[number] for number in self.batches[index]]

        num_media = {}
        inputs: dict[str, Any] = {}
        for kind in self.kinds:
            num_media[kind] = [len(example.media.get(kind, ())) for example in examples]
            if any(num_media[kind]):
                inputs[kind] = self.media.load(kind, examples)
        return LoadedBatch(num_media, inputs)


class FeatureMaker:
    """Computes a reducer's output for images and videos.

    Args:
        family: the model's family, with the model on its device. No reducer needs to be attached.
        reducer: the reducer. If it draws tokens at random, the cache keeps that one draw.
        media: opens and processes images and videos, in data workers.
    """

    def __init__(self, family: Family, reducer: Reducer, media: Media) -> None:
        self.family = family
        self.reducer = reducer
        self.media = media

        # The type of the tower, not of the projector, which may be tuned in float32.
        parameter = next(family.tower.parameters())
        self.dtype = parameter.dtype
        self.device = parameter.device

    @torch.no_grad()
    def compute(self, kind: str, inputs: MediaInputs) -> VisualFeatures:
        """Run tower and reducer on the model's device, and return the features on the CPU."""
        # The pixels travel as uint8, a quarter of float32, and are normalized on the device.
        on_device = inputs.map(lambda values: values.to(self.device))
        features = self.family.visual_features(kind, on_device.normalized(self.dtype), self.reducer)
        return features.map(Tensor.cpu)

    def no_features(self) -> VisualFeatures:
        """Return features of no image. They give a shard without images its dtype and width."""
        none = torch.empty(0, dtype=torch.int64)
        features = torch.empty(0, self.family.feature_width, dtype=self.dtype)
        if not self.family.has_grids:
            return VisualFeatures(features, none, none)
        return VisualFeatures(features, none, none, kept=none, grids=torch.empty(0, 4, dtype=torch.float64))


def examples_per_shard(family: Family, reducer: Reducer, settings: Mapping[str, Any]) -> int:
    """Choose how many examples fit into `SHARD_BYTES`."""
    # Each example is counted with one image or video of the largest kind.
    num_tokens = max(family.num_image_tokens(reducer, size) for size in family.image_sizes)
    if "video" in family.kinds:
        num_tokens = max(num_tokens, family.num_video_tokens(reducer, settings["num_frames"]))

    # At least one, however large a single example is.
    itemsize: int = getattr(torch, settings["dtype"]).itemsize
    return max(1, SHARD_BYTES // (num_tokens * settings["width"] * itemsize))


def make_cache(
    parent: Path,
    examples: Sequence[Example],
    maker: FeatureMaker,
    settings: Mapping[str, Any],
    *,
    batch: int,
    num_workers: int,
) -> Path:
    """Compute the missing shards of the cache of these settings, and return its folder.

    Args:
        parent: the subset's folder.
        examples: the subset's examples.
        maker: computes the features.
        settings: what `cache_settings` returned.
        batch: examples that are computed at once.
        num_workers: processes that open and process images (0: this one).

    Raises:
        UserError: an image or video can't be read, or the system has ended a worker.
        OSError: the disk is full.
    """
    # Each combination of settings has a folder of its own, so caches do not overwrite each other.
    folder = folder_of(parent, settings)
    shard_size = examples_per_shard(maker.family, maker.reducer, settings)
    layout = CacheLayout(dict(settings), len(examples), shard_size)
    write_features(folder, layout, examples, maker, batch=batch, num_workers=num_workers)
    return folder


def write_features(
    folder: Path,
    layout: CacheLayout,
    examples: Sequence[Example],
    maker: FeatureMaker,
    *,
    batch: int = 16,
    num_workers: int = 0,
) -> None:
    """Write `cache.json` and the shards that are missing.

    An interrupted command resumes at the shard it was writing.

    Args:
        folder: the cache's folder.
        layout: its settings and the size of its shards.
        examples: `layout.num_examples` of them.
        maker: computes the features.
        batch: examples that are computed at once.
        num_workers: processes that open and process images (0: this one).

    Raises:
        UserError: an image or video can't be read, or the system has ended a worker.
        OSError: the disk is full.
    """
    assert len(examples) == layout.num_examples

    # Two processes would compute the same shards. The second one waits, and finds them all.
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock"), wait=True):
        # cache.json comes first, so that a run can already tell how many shards are missing.
        write_json(folder / META, layout.to_json())
        _write_missing_shards(folder, layout, examples, maker, batch=batch, num_workers=num_workers)


def _write_missing_shards(
    folder: Path,
    layout: CacheLayout,
    examples: Sequence[Example],
    maker: FeatureMaker,
    *,
    batch: int,
    num_workers: int,
) -> None:
    """Compute and write the shards that are missing or damaged, see `write_features`."""
    # One loader for all shards, so that workers read ahead while a shard is written.
    batches_by_shard = _missing_batches(folder, layout, batch)
    batches = list(chain.from_iterable(batches_by_shard.values()))
    dataset = _MediaBatches(examples, maker.media, maker.family.kinds, batches)
    loaded = iter(DataLoader(dataset, batch_size=None, num_workers=usable_workers(num_workers)))

    # The bar starts behind the examples of shards that exist.
    num_missing = sum(map(len, batches))
    bar = progress(
        None,
        total=layout.num_examples,
        title="cache features",
        unit="example",
        start=layout.num_examples - num_missing,
    )
    with explain_workers(), bar:
        for shard, shard_batches in batches_by_shard.items():
            # A shard is written whole or not at all, so the next command need not look inside.
            tensors = _compute_shard(shard_batches, loaded, maker, bar)
            content = save(tensors, metadata=layout.metadata(shard))
            with atomic_write(shard_path(folder, shard)) as scratch:
                scratch.write_bytes(content)


def _missing_batches(folder: Path, layout: CacheLayout, batch: int) -> dict[int, list[range]]:
    """Cut the shards that are missing into batches of example numbers, by shard."""
    batches: dict[int, list[range]] = {}
    for shard in range(layout.num_shards):
        # An earlier command has written this shard.
        if layout.open_shard(folder, shard) is not None:
            continue

        numbers = layout.examples_in(shard)
        starts = range(0, len(numbers), batch)
        batches[shard] = [numbers[start : start + batch] for start in starts]
    return batches


def _compute_shard(
    batches: Sequence[range], loaded: Iterator[LoadedBatch], maker: FeatureMaker, bar: "tqdm[Any]"
) -> dict[str, Tensor]:
    """Take a shard's batches from the loader, and compute its tensors."""
    # Start with no features, so that a kind without any media can be joined too.
    num_media: dict[str, list[int]] = {}
    features: dict[str, list[VisualFeatures]] = {}
    for kind in maker.family.kinds:
        num_media[kind] = []
        features[kind] = [maker.no_features()]

    for numbers in batches:
        loaded_batch = next(loaded)

        # Seed each batch by its examples: after an interruption a random reducer draws the same.
        torch.manual_seed(numbers.start)
        for kind, inputs in loaded_batch.inputs.items():
            features[kind].append(maker.compute(kind, inputs))
        for kind, counts in loaded_batch.num_media.items():
            num_media[kind] += counts
        bar.update(len(numbers))

    return _shard_tensors(num_media, features)


def _shard_tensors(
    num_media: Mapping[str, Sequence[int]], features: Mapping[str, Sequence[VisualFeatures]]
) -> dict[str, Tensor]:
    """Join the features of a shard's examples into the tensors of its file."""
    tensors = {}
    for kind, parts in features.items():
        joined = VisualFeatures.join(parts)
        tensors[f"{kind}.features"] = joined.features
        tensors[f"{kind}.order"] = joined.order
        tensors[f"{kind}.counts"] = joined.counts
        if joined.kept is not None and joined.grids is not None:
            tensors[f"{kind}.kept"] = joined.kept
            tensors[f"{kind}.grids"] = joined.grids
        tensors[f"{kind}.starts"] = _starts(num_media[kind], joined)
    return tensors


def _starts(num_media: Sequence[int], features: VisualFeatures) -> Tensor:
    """int64[examples + 1, 3]: where each example's images (or videos), positions and tokens begin.

    The last row holds the ends of the last example.
    """
    # Each count leads to the next: media of an example, positions of its media, tokens among them.
    first_medium = _cumulative(torch.tensor(num_media))
    first_position = _cumulative(features.counts)[first_medium]

    # `image_newline` (-1) takes a position, but is no token of the features.
    is_token = (features.order >= 0).long()
    first_token = _cumulative(is_token)[first_position]

    return torch.stack([first_medium, first_position, first_token], dim=1)


def _cumulative(counts: Tensor) -> Tensor:
    """int64[n + 1]: 0, then the sum of the first 1, 2, ... counts."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
