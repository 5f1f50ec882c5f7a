"""LLaVA-NeXT (LLaVA-1.6): an image becomes up to five tiles, each reduced to the same budget.

`vzip.families.anyres` says in which order the tokens of the tiles then stand.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import LlavaNextForConditionalGeneration
from transformers.image_processing_utils import select_best_resolution

from vzip.errors import UserError
from vzip.families.anyres import Grid, released_order, spatial_order
from vzip.families.base import Family, num_dropped_tokens
from vzip.families.features import UnpackedFeatures, VisualFeatures
from vzip.media import MediaInputs
from vzip.reducers.base import Reducer, VisionTokens
from vzip.reducers.identity import Identity


def tiles_of(grids: Sequence[Grid | None]) -> list[int]:
    """Count the tiles of each image, the base tile included; None is an image of a single tile."""
    return [1 if grid is None else grid.num_tiles for grid in grids]


def stack_tiles(pixel_values: Tensor, counts: Sequence[int]) -> Tensor:
    """Stack float[images, most tiles, 3, side, side] to float[all tiles, 3, side, side].

    Pixels that are stacked already are returned unchanged.

    Raises:
        UserError: the number of images or tiles is not that of `counts`.
    """
    if pixel_values.dim() == 5:
        shape = list(pixel_values.shape)
        if len(pixel_values) != len(counts) or pixel_values.shape[1] < max(counts, default=1):
            raise UserError(
                f"pixel_values of shape {shape} do not hold {list(counts)} tiles of {len(counts)} images, "
                f"as image_sizes has it; use what the model's processor returns"
            )
        # Images of fewer tiles are padded with empty ones.
        return torch.cat([image[:count] for image, count in zip(pixel_values, counts, strict=True)])

    if pixel_values.dim() == 4 and len(pixel_values) != sum(counts):
        raise UserError(
            f"pixel_values hold {len(pixel_values)} tiles, image_sizes asks for {list(counts)}; "
            f"use what the processor returns"
        )
    return pixel_values


def _reduce_visible(
    tokens: VisionTokens, reducer: Reducer, tiles: Tensor, patches: Tensor, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Reduce tiles that show the same patches of the picture, without their padding.

    A tile that shows no more patches than the budget keeps them all.

    Args:
        tokens: patches of all tiles, without CLS.
        reducer: reduces each tile by itself.
        tiles: int64[tiles]: the tiles to reduce.
        patches: int64[P]: the patches that they show.
        grid: rows and columns of these patches.

    Returns:
        The tokens float[tiles, n, d], and the patch of each token, int64[tiles, n].
    """
    # Index [tiles, 1] and [P] give the visible patches of each tile.
    rows = tiles.unsqueeze(1)
    visible = VisionTokens(
        features=tokens.features[rows, patches],
        has_cls=False,
        saliency=None if tokens.saliency is None else tokens.saliency[rows, patches],
        keys=None if tokens.keys is None else tokens.keys[rows, patches],
        received=tuple(layer[rows, patches] for layer in tokens.received),
        grid=grid,
    )
    budget = reducer.num_tokens(tokens.features.shape[1], has_cls=False, num_dropped=0)
    if len(patches) <= budget:
        return visible.features, patches.expand(len(tiles), -1)

    # The reducer numbers the visible patches; `patches` gives their numbers in the tile.
    output = reducer(visible)
    return output.features, patches[torch.cat([output.dominant, output.contextual], dim=1)]


class LlavaNext(Family):
    """Adapter of `LlavaNextForConditionalGeneration`."""

    model_type: ClassVar[str] = "llava_next"
    model_class: ClassVar[type] = LlavaNextForConditionalGeneration
    budget_tiles: ClassVar[int] = 5
    """The paper's budgets 160, 320 and 640 count the tokens of 5 tiles."""
    config_of_features: ClassVar[tuple[str, ...]] = (*Family.config_of_features, "image_grid_pinpoints")

    # ---- Tiles ----

    def tile_order(self, reducer: Reducer) -> str:
        """Return the order of tokens: "model" without a reduction, else the family's own."""
        return "model" if isinstance(reducer, Identity) else self.anyres

    def grid_of(self, image_size: tuple[int, int]) -> Grid:
        """Return the grid into which the processor cuts an image of (height, width) pixels."""
        self.check_image_size(image_size)
        config = self.model.config
        height, width = select_best_resolution(image_size, config.image_grid_pinpoints)
        return Grid.of(
            image_size,
            (height // self.tile_side, width // self.tile_side),
            side=self.tile_side // config.vision_config.patch_size,
        )

    def grids(self, inputs: MediaInputs) -> list[Grid | None]:
        """Return the grid of each image; None is a single tile. Raises UserError without sizes."""
        if "image_sizes" not in inputs.extra:
            raise UserError(
                f"a {self.model_type!r} model needs image_sizes beside pixel_values; "
                f"use what its processor returns"
            )
        return [self.grid_of((int(height), int(width))) for height, width in inputs.extra["image_sizes"]]

    # ---- Sizes and counts ----

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        return [(height, width) for height, width in self.model.config.image_grid_pinpoints]

    def num_tiles(self, image_size: tuple[int, int]) -> int:
        return self.grid_of(image_size).num_tiles

    def num_tile_tokens(self, reducer: Reducer) -> int:
        # The order "spatial" has no position for CLS.
        has_cls = self.has_cls and self.tile_order(reducer) != "spatial"
        dropped = num_dropped_tokens(self.model.config) if has_cls else 0
        return reducer.num_tokens(self.num_patches, has_cls=has_cls, num_dropped=dropped)

    def num_image_tokens(self, reducer: Reducer, image_size: tuple[int, int] | None = None) -> int:
        """Count the placeholders of an image; by default of a square one."""
        # 2 x 2 tiles and the base tile: the paper's budgets count 5 tiles for an image.
        size = image_size or (2 * self.tile_side, 2 * self.tile_side)
        return self.num_grid_tokens(reducer, self.grid_of(size))

    def num_grid_tokens(self, reducer: Reducer, grid: Grid | None) -> int:
        """Count the placeholders of an image with this grid; None is an image of a single tile."""
        tile_tokens = self.num_tile_tokens(reducer)
        if grid is None:
            return tile_tokens + 1  # image_newline

        # All tiles, padding included.
        order = self.tile_order(reducer)
        if order == "released":
            return tile_tokens * grid.num_tiles

        # The visible patches only, and a newline after each row.
        num_rows, num_columns = grid.pooled
        if order == "model":
            return tile_tokens + num_rows * (num_columns + 1)

        # A tile that shows fewer patches than the budget keeps them all.
        num_tokens = tile_tokens
        for rows, columns in grid.visible:
            num_tokens += min(tile_tokens, len(rows) * len(columns))
        return num_tokens + num_rows

    def num_processed_tokens(self, reducer: Reducer, kind: str, inputs: MediaInputs, index: int) -> int:
        if kind == "video":
            return super().num_processed_tokens(reducer, kind, inputs, index)
        return self.num_grid_tokens(reducer, self.grids(inputs)[index])

    def check_cacheable(self, reducer: Reducer) -> None:
        if self.tile_order(reducer) == "model":
            raise UserError(
                f"reducer={reducer.name}: a {self.model_type!r} model packs all tokens of its tiles "
                f"behind the projector, so nothing can be cached before it; train without the cache, "
                f"or choose another reducer"
            )

    # ---- The two computations ----

    def vision_tokens(self, reducer: Reducer, pixel_values: Tensor, **options: Any) -> VisionTokens:
        tokens = super().vision_tokens(reducer, pixel_values, **options)
        return tokens.without_cls() if self.tile_order(reducer) == "spatial" else tokens

    def visual_features(
        self, kind: str, inputs: MediaInputs, reducer: Reducer, **options: Any
    ) -> VisualFeatures:
        grids = self.grids(inputs)
        tiles = stack_tiles(inputs.pixels, tiles_of(grids))
        tokens = self.vision_tokens(reducer, tiles, **options)

        order = self.tile_order(reducer)
        if order == "released":
            return self._released_features(tokens, reducer, grids)
        if order == "spatial":
            return self._spatial_features(tokens, reducer, grids)
        return UnpackedFeatures(
            features=reducer(tokens).features,
            order=torch.empty(0, dtype=torch.int64),
            counts=torch.tensor([self.num_grid_tokens(reducer, grid) for grid in grids]),
            kind=kind,
            num_tiles=tuple(tiles_of(grids)),
            image_sizes=inputs.extra["image_sizes"],
        )

    def _released_features(
        self, tokens: VisionTokens, reducer: Reducer, grids: Sequence[Grid | None]
    ) -> VisualFeatures:
        """Reduce all tiles, and put their tokens in the order "released"."""
        output = reducer(tokens)
        num_tokens = output.features.shape[1]

        # CLS is token 0 and leads the dominant tokens, in all tiles or in none.
        num_cls = 0
        if tokens.has_cls and output.dominant.shape[1] > 0:
            num_cls = int(not output.dominant[:, 0].any().item())

        # Tiles of all images stand one after the other.
        images = []
        first_tile = 0
        for grid, count in zip(grids, tiles_of(grids), strict=True):
            of_image = slice(first_tile, first_tile + count)
            order = released_order(
                output.dominant[of_image],
                grid,
                num_tokens=num_tokens,
                num_cls=num_cls,
                has_cls=tokens.has_cls,
            )
            images.append(VisualFeatures.of_image(output.features[of_image].flatten(0, 1), order))
            first_tile += count
        return VisualFeatures.join(images)

    def _spatial_features(
        self, tokens: VisionTokens, reducer: Reducer, grids: Sequence[Grid | None]
    ) -> VisualFeatures:
        """Reduce the visible patches of all tiles, and put their tokens in the order "spatial"."""
        device = tokens.features.device
        side = self.tile_side // self.model.config.vision_config.patch_size
        all_patches = (range(side), range(side))

        # Rows and columns of the patches that each tile shows; base tiles have no padding.
        visible: list[tuple[range, range]] = []
        for grid in grids:
            visible.append(all_patches)
            if grid is not None:
                visible += grid.visible

        # Tiles that show the same patches are reduced together. The order of these groups is fixed:
        # a reducer may draw at random.
        groups: dict[tuple[range, range], list[int]] = {}
        for tile, rows_and_columns in enumerate(visible):
            groups.setdefault(rows_and_columns, []).append(tile)

        reduced: dict[int, tuple[Tensor, Tensor]] = {}
        for (rows, columns), tiles in groups.items():
            # Numbers of the visible patches within a tile.
            raster = [row * side + column for row in rows for column in columns]
            patches = torch.tensor(raster, dtype=torch.int64, device=device)
            features, positions = _reduce_visible(
                tokens, reducer, torch.tensor(tiles, device=device), patches, (len(rows), len(columns))
            )
            for index, tile in enumerate(tiles):
                reduced[tile] = (features[index], positions[index])

        # Each image is the tokens of its tiles, in the raster of the picture.
        images = []
        first_tile = 0
        for grid, count in zip(grids, tiles_of(grids), strict=True):
            of_image = [reduced[tile] for tile in range(first_tile, first_tile + count)]
            features = torch.cat([tile_features for tile_features, _ in of_image])
            order = spatial_order([positions for _, positions in of_image], grid)
            images.append(VisualFeatures.of_image(features, order))
            first_tile += count
        return VisualFeatures.join(images)

    def project(self, features: VisualFeatures) -> Tensor:
        # Without a reduction, the model's own code packs the projected tokens.
        if isinstance(features, UnpackedFeatures):
            return torch.cat(self.pack(self.run_projector(features.features), features))

        tokens = super().project(features)
        newline = self.model.model.image_newline.to(tokens)[None]
        # -1 in `order` takes the last one, the newline.
        return torch.cat([tokens, newline])[features.order]

    def pack(self, tokens: Tensor, features: UnpackedFeatures) -> list[Tensor]:
        """Pack projected tokens float[all tiles, P, d_llm] with the model's own code.

        Returns:
            float[n, d_llm] of each image.
        """
        inner = self.model.model
        images: list[Tensor] = inner.pack_image_features(
            torch.split(tokens, list(features.num_tiles)),
            features.image_sizes,
            self.model.config.vision_feature_select_strategy,
            inner.image_newline,
        )[0]
        return images
