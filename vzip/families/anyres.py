"""The order of the tokens of an image that was cut into tiles (LLaVA's "anyres").

Such an image is one *base* tile, the whole picture made small, and a grid of tiles of the picture
in full resolution. Padding fills the grid where the picture does not reach. There are three orders
of the tokens that a reducer leaves:

- "released", the order of VisionZip's released code (repository dvlab-research/VisionZip,
  `visionzip/llava_arch.py`): the base tile's tokens; the kept patches of all other tiles in the
  raster of the stitched grid; the CLS of each of these tiles; their contextual tokens, tile by
  tile. Padding may be kept, and row ends are not marked. (1 + tiles) * (D + C) tokens.
- "spatial", closer to what the model was trained on: no CLS; padding is never kept nor merged;
  every token at its position in the raster (a contextual token at its target's), and
  `image_newline` at the end of each row of patches.
- "model": all tokens, packed by the model's own code; the order of the identity reducer.

An image of a single tile has `image_newline` after its tokens, in every order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ANYRES = ("released", "spatial")
"""The orders that the setting `reducer.anyres` chooses from."""


@dataclass(frozen=True)
class Grid:
    """The tiles of one image except the base tile, and the part of them that is not padding."""

    rows: int
    """Rows of tiles."""
    columns: int
    """Columns of tiles."""
    side: int
    """Patches along one side of a tile."""
    top: int
    """Rows of patches that are padding above the picture. There are as many below."""
    left: int
    """Columns of patches that are padding to its left. There are as many to its right."""
    max_tiles: int | None = None
    """LLaVA-OneVision pools images larger than about this many tiles; None: it never pools."""

    @classmethod
    def of(
        cls, image_size: tuple[int, int], tiles: tuple[int, int], *, side: int, max_tiles: int | None = None
    ) -> "Grid":
        """Make the grid of an image of (height, width) pixels in (rows, columns) of tiles.

        Source of the rounding: `unpad_image` of transformers' `modeling_llava_next.py`.
        """
        height, width = image_size
        rows, columns = tiles
        num_rows = rows * side
        num_columns = columns * side

        # The picture fills the grid along one side; the rest of the other side is padding.
        top = left = 0
        if width / height > num_columns / num_rows:
            top = (num_rows - int(round(height * (num_columns / width), 7))) // 2
        else:
            left = (num_columns - int(round(width * (num_rows / height), 7))) // 2
        return cls(rows=rows, columns=columns, side=side, top=top, left=left, max_tiles=max_tiles)

    @property
    def num_tiles(self) -> int:
        """Tiles of the image, the base tile included."""
        return 1 + self.rows * self.columns

    @property
    def num_rows(self) -> int:
        """Rows of patches that show the picture."""
        return self.rows * self.side - 2 * self.top

    @property
    def num_columns(self) -> int:
        """Columns of patches that show the picture."""
        return self.columns * self.side - 2 * self.left

    @property
    def pooled(self) -> tuple[int, int]:
        """(rows, columns) of patches after the model's own pooling, for the order "model".

        Source: `pack_image_features` of transformers' `modeling_llava_onevision.py`.
        """
        if self.max_tiles is None:
            return self.num_rows, self.num_columns

        # Up to 10 % more along each side are not pooled.
        max_patches = self.max_tiles * self.side**2
        ratio = math.sqrt(self.num_rows * self.num_columns / max_patches)
        if ratio <= 1.1:
            return self.num_rows, self.num_columns
        return int(self.num_rows // ratio), int(self.num_columns // ratio)

    @property
    def visible(self) -> list[tuple[range, range]]:
        """For each tile but the base tile: rows and columns of patches that show the picture."""
        visible = []
        for row in range(self.rows):
            tile_rows = _overlap(self.top, self.num_rows, row * self.side, self.side)
            for column in range(self.columns):
                tile_columns = _overlap(self.left, self.num_columns, column * self.side, self.side)
                visible.append((tile_rows, tile_columns))
        return visible

    def raster(self, tile: Tensor, patches: Tensor) -> Tensor:
        """Return the positions of patches in the raster of the stitched grid.

        Args:
            tile: int64[...]: the tile of each patch; 1 is the first tile after the base tile.
            patches: int64[...]: the patch within the tile.
        """
        # Row and column of the patch in the stitched grid, in which tiles stand row by row.
        row = (tile - 1) // self.columns * self.side + patches // self.side
        column = (tile - 1) % self.columns * self.side + patches % self.side
        return row * (self.columns * self.side) + column


def _overlap(start: int, length: int, tile_start: int, side: int) -> range:
    """Return the part of the tile at `tile_start` that lies in the `length` patches at `start`."""
    first = start - tile_start
    stop = first + length
    return range(min(max(first, 0), side), min(max(stop, 0), side))


def released_order(
    dominant: Tensor, grid: Grid | None, *, num_tokens: int, num_cls: int, has_cls: bool
) -> Tensor:
    """Return the order "released" of one image.

    Args:
        dominant: int64[1 + tiles, D], as in `ReducerOutput`.
        grid: of the image; None for a single tile.
        num_tokens: T, tokens of a tile.
        num_cls: 1 if CLS leads the dominant tokens, else 0.
        has_cls: whether token 0 of the vision tower is CLS.

    Returns:
        int64[(1 + tiles) * T]: indices into the image's tokens, tile after tile. For a single tile,
        -1 (`image_newline`) follows its T tokens.
    """
    num_tiles, num_dominant = dominant.shape
    tokens = torch.arange(num_tiles * num_tokens, device=dominant.device).view(-1, num_tokens)
    if grid is None:
        return torch.cat([tokens[0], tokens.new_tensor([-1])])

    # Dominant patches of all tiles but the base tile, sorted by their position in the grid.
    tile = torch.arange(1, num_tiles, device=dominant.device).unsqueeze(1)
    patches = dominant[1:, num_cls:] - int(has_cls)
    by_raster = grid.raster(tile, patches).flatten().argsort()

    # In `tokens`, each row is a tile: CLS, dominant patches, contextual tokens.
    base = tokens[0]
    kept_patches = tokens[1:, num_cls:num_dominant].flatten()[by_raster]
    cls_tokens = tokens[1:, :num_cls].flatten()
    contextual = tokens[1:, num_dominant:].flatten()
    return torch.cat([base, kept_patches, cls_tokens, contextual])


def spatial_order(positions: Sequence[Tensor], grid: Grid | None) -> Tensor:
    """Return the order "spatial" of one image.

    There are as many newlines as in the model's own packing, even if that pools the patches.

    Args:
        positions: for each tile, base tile first, int64[n_i]: the patch of each of its tokens.
        grid: of the image; None for a single tile.

    Returns:
        int64[n + newlines]: indices into the image's tokens, tile after tile; -1 for
        `image_newline`.
    """
    # The base tile comes first, in its own raster.
    base = positions[0].argsort()
    if grid is None:
        return torch.cat([base, base.new_tensor([-1])])

    # Position of each token of the other tiles in the raster of the grid.
    rasters = []
    for tile, patches in enumerate(positions[1:], start=1):
        rasters.append(grid.raster(torch.full_like(patches, tile), patches))
    raster = torch.cat(rasters)

    # Each newline stands before the first patch of one row. These rows are spread evenly.
    num_newlines = grid.pooled[0]
    next_rows = [grid.top - (-(line + 1) * grid.num_rows // num_newlines) for line in range(num_newlines)]
    next_row = torch.tensor(next_rows, device=raster.device, dtype=raster.dtype)
    newline = next_row * (grid.columns * grid.side)

    # Sort tokens and newlines together. Tokens have even keys. A newline has the odd key between
    # the last patch of its row and the first one of the next.
    by_raster = torch.cat([2 * raster, 2 * newline - 1]).argsort()
    token_index = len(positions[0]) + torch.arange(len(raster), device=raster.device)
    indices = torch.cat([token_index, torch.full_like(newline, -1)])
    return torch.cat([base, indices[by_raster]])
