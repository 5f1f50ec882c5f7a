"""LLaVA-NeXT (LLaVA-1.6): an image becomes a base tile and up to four more, each behind the reducer with a budget of its own.

Where the tokens of the tiles then stand: `vzip.families.anyres`.
"""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import LlavaNextForConditionalGeneration
from transformers.image_processing_utils import select_best_resolution

from vzip.errors import UserError
from vzip.families.anyres import Grid, released_order, spatial_order
from vzip.families.base import Family, num_dropped, project
from vzip.families.features import VisualFeatures
from vzip.reducers.base import Reducer, VisionTokens


def stack_tiles(pixel_values: Tensor, counts: Sequence[int]) -> Tensor:
    """float[all tiles, 3, side, side] of float[images, most tiles, 3, side, side]; stacked ones stay as they are.

    Raises:
        UserError: fewer images or tiles than `counts` asks for.
    """
    if pixel_values.dim() == 5:
        shape = list(pixel_values.shape)
        if len(pixel_values) != len(counts) or pixel_values.shape[1] < max(counts, default=1):
            raise UserError(
                f"pixel_values of shape {shape} do not hold {list(counts)} tiles of {len(counts)} images, as image_sizes has "
                f"it; use what the model's processor returns"
            )
        return torch.cat([image[:count] for image, count in zip(pixel_values, counts, strict=True)])
    if pixel_values.dim() == 4 and len(pixel_values) != sum(counts):
        raise UserError(
            f"pixel_values hold {len(pixel_values)} tiles, image_sizes asks for {list(counts)}; use what the processor returns"
        )
    return pixel_values


def _reduce_visible(
    tokens: VisionTokens, reducer: Reducer, tiles: Tensor, patches: Tensor
) -> tuple[Tensor, Tensor]:
    """Tiles that show the same `patches`, reduced without their padding and CLS: float[tiles, n, d], patches int64[tiles, n].

    Where a tile shows no more patches than the budget has, it keeps them all.
    """
    first = int(tokens.has_cls)
    index = (patches + first).expand(len(tiles), -1)
    rows = tiles.unsqueeze(1)
    part = VisionTokens(
        features=tokens.features[rows, index],
        has_cls=False,
        saliency=None if tokens.saliency is None else tokens.saliency[rows, index - first],
        keys=None if tokens.keys is None else tokens.keys[rows, index],
    )
    if len(patches) <= reducer.num_tokens(tokens.features.shape[1] - first, has_cls=False, num_dropped=0):
        return part.features, patches.expand(len(tiles), -1)
    reduction = reducer(part)
    return reduction.features, patches[torch.cat([reduction.dominant, reduction.contextual], dim=1)]


def _tile_counts(grids: Sequence[Grid | None]) -> list[int]:
    return [1 if grid is None else grid.num_tiles for grid in grids]


def _released(
    inner: Any, reducer: Reducer, tokens: VisionTokens, grids: Sequence[Grid | None]
) -> VisualFeatures:
    """The images' tokens in the order "released"."""
    reduction, counts = reducer(tokens), _tile_counts(grids)
    num_tokens = reduction.features.shape[1]
    num_cls = int(
        tokens.has_cls and reduction.dominant.shape[1] > 0 and not reduction.dominant[:, 0].any().item()
    )
    orders = [
        released_order(dominant, grid, num_tokens=num_tokens, num_cls=num_cls, has_cls=tokens.has_cls)
        for dominant, grid in zip(torch.split(reduction.dominant, counts), grids, strict=True)
    ]
    images = zip(torch.split(reduction.features, counts), orders, strict=True)
    return VisualFeatures.join(
        [VisualFeatures.of_image(features.flatten(0, 1), order) for features, order in images]
    )


def _spatial(
    inner: Any, reducer: Reducer, tokens: VisionTokens, grids: Sequence[Grid | None]
) -> VisualFeatures:
    """The images' tokens in the order "spatial"."""
    side = inner.config.vision_config.image_size // inner.config.vision_config.patch_size
    device = tokens.features.device
    whole = (range(side), range(side))
    shown = [patches for grid in grids for patches in ([whole] if grid is None else [whole, *grid.visible])]
    reduced: dict[int, tuple[Tensor, Tensor]] = {}
    for rows, columns in dict.fromkeys(
        shown
    ):  # tiles that show the same patches together, in an order that random draws keep
        alike = [tile for tile, patches in enumerate(shown) if patches == (rows, columns)]
        patches = torch.tensor(
            [row * side + column for row in rows for column in columns], dtype=torch.int64, device=device
        )
        kept, places = _reduce_visible(tokens, reducer, torch.tensor(alike, device=device), patches)
        reduced |= dict(zip(alike, zip(kept, places, strict=True), strict=True))
    images, tiles = [], iter(range(len(shown)))
    for grid, count in zip(grids, _tile_counts(grids), strict=True):
        kept_of, places_of = zip(*(reduced[tile] for tile in islice(tiles, count)), strict=True)
        images.append(VisualFeatures.of_image(torch.cat(kept_of), spatial_order(places_of, grid)))
    return VisualFeatures.join(images)


class LlavaNext(Family):
    """Adapter of `LlavaNextForConditionalGeneration`."""

    model_type: ClassVar[str] = "llava_next"
    model_class: ClassVar[type] = LlavaNextForConditionalGeneration
    budget_tiles: ClassVar[int] = 5
    """The paper's budgets 160, 320 and 640 are totals over 5 tiles."""

    @classmethod
    def grid_of(cls, config: Any, image_size: tuple[int, int]) -> Grid:
        """The grid that the processor cuts an image of (height, width) pixels into."""
        cls.refuse_wrong_size(image_size)
        tile = config.vision_config.image_size
        height, width = select_best_resolution(image_size, config.image_grid_pinpoints)
        return Grid.of(
            image_size, (height // tile, width // tile), side=tile // config.vision_config.patch_size
        )

    @classmethod
    def grids_of(cls, config: Any, image_sizes: Any, **inputs: Any) -> list[Grid | None]:
        """The grid of each image; None for one that is a single tile. Raises UserError without sizes."""
        if image_sizes is None:
            raise UserError(
                f"a {cls.model_type!r} model needs image_sizes beside pixel_values; use what its processor returns"
            )
        return [cls.grid_of(config, (int(height), int(width))) for height, width in image_sizes]

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        return [(height, width) for height, width in self.model.config.image_grid_pinpoints]

    def num_tiles(self, image_size: tuple[int, int]) -> int:
        return self.grid_of(self.model.config, image_size).num_tiles

    def num_tile_tokens(self, reducer: Reducer) -> int:
        has_cls = self.has_cls and reducer.anyres != "spatial"
        dropped = num_dropped(self.model.config) if has_cls else 0
        return reducer.num_tokens(self.num_patches, has_cls=has_cls, num_dropped=dropped)

    def num_image_tokens(self, reducer: Reducer, image_size: tuple[int, int] | None = None) -> int:
        """Of an image of (height, width) pixels; without one, of a square of two tiles a side, which makes 5 tiles."""
        size = image_size or (2 * self.tile_side, 2 * self.tile_side)
        return self.num_grid_tokens(reducer, self.grid_of(self.model.config, size))

    def num_grid_tokens(self, reducer: Reducer, grid: Grid | None) -> int:
        """Placeholders of an image in these tiles, or of one that is a single tile."""
        budget = self.num_tile_tokens(reducer)
        if grid is None:
            return budget + 1
        if reducer.anyres == "released":
            return budget * grid.num_tiles
        rows, columns = grid.pooled
        if reducer.anyres == "model":
            return budget + rows * (columns + 1)
        return (
            budget
            + sum(min(budget, len(tile_rows) * len(tile_columns)) for tile_rows, tile_columns in grid.visible)
            + rows
        )

    def num_processed_tokens(self, reducer: Reducer, kind: str, inputs: Mapping[str, Any], index: int) -> int:
        if kind == "video":
            return super().num_processed_tokens(reducer, kind, inputs, index)
        return self.num_grid_tokens(reducer, self.grids_of(self.model.config, **inputs)[index])

    @classmethod
    def pack(cls, inner: Any, features: Sequence[Tensor], image_sizes: Any) -> list[Tensor]:
        """All tokens of the images, in the model's own order."""
        strategy = inner.config.vision_feature_select_strategy
        images: list[Tensor] = inner.pack_image_features(
            features, image_sizes, strategy, inner.image_newline
        )[0]
        return images

    @classmethod
    def tiles(
        cls, inner: Any, reducer: Reducer, pixels: Tensor, *, image_sizes: Any = None, **inputs: Any
    ) -> tuple[VisionTokens, list[Grid | None]]:
        """Vision tokens of all tiles, and the grid of each image."""
        grids = cls.grids_of(inner.config, image_sizes, batch_num_images=inputs.pop("batch_num_images", None))
        inputs.pop("vision_aspect_ratio", None)  # the config's
        return cls.vision_tokens(inner, reducer, stack_tiles(pixels, _tile_counts(grids)), **inputs), grids

    @classmethod
    def reduced(cls, kind: str, inner: Any, reducer: Reducer, pixels: Any, **inputs: Any) -> VisualFeatures:
        """As the other families', in the reducer's order of tiles, which is not the model's own."""
        assert reducer.anyres != "model", "the model's own packing works behind the projector"
        order = _spatial if reducer.anyres == "spatial" else _released
        return order(inner, reducer, *cls.tiles(inner, reducer, pixels, **inputs))

    @classmethod
    def placed(cls, inner: Any, reduced: VisualFeatures) -> Tensor:
        tokens = super().placed(inner, reduced)
        return torch.cat([tokens, inner.image_newline.to(tokens)[None]])[reduced.order]

    @classmethod
    def features(cls, kind: str, inner: Any, reducer: Reducer, pixels: Any, **inputs: Any) -> list[Tensor]:
        if reducer.anyres != "model":
            return super().features(kind, inner, reducer, pixels, **inputs)
        tokens, grids = cls.tiles(inner, reducer, pixels, **inputs)
        projected = torch.split(project(inner, reducer(tokens).features), _tile_counts(grids))
        return cls.pack(inner, projected, inputs["image_sizes"])

    def refuse_uncacheable(self, reducer: Reducer) -> None:
        if reducer.anyres == "model":
            raise UserError(
                f"reducer={reducer.name}: a {self.model_type!r} model packs all tokens of its tiles behind the projector, so "
                f"nothing can be cached before it; train without the cache, or choose another reducer"
            )
