"""Where the tokens of an image that was cut into tiles stand in the language model (LLaVA's "anyres").

Such an image is one *base* tile, the whole picture made small, and a grid of tiles of the picture in full resolution, in
which padding fills what the picture leaves free. Three orders of the tokens that a reducer leaves:

- "released", as VisionZip's released code has it (repository dvlab-research/VisionZip, `visionzip/llava_arch.py`): the base
  tile's tokens; the patches kept of all other tiles in the raster of the stitched grid; the CLS of each of these tiles; their
  contextual tokens, tile by tile. Padding can be kept, and no row end is marked. (1 + tiles) * (D + C) tokens.
- "spatial", closer to what the model was trained on: no CLS; padding is never kept nor merged; every token at its place in
  the raster (a contextual one at its target's), and `image_newline` at the end of each row of patches.
- "model": all tokens, packed by the model's own code; the order of the identity reducer.

An image of one tile alone has `image_newline` after its tokens, in every order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """The tiles of one image but the base tile, and which of their patches show the picture and not padding."""

    rows: int
    """Of tiles."""
    columns: int
    """Of tiles."""
    side: int
    """Patches of a tile's side."""
    top: int
    """Rows of patches that are padding above the picture, and as many below."""
    left: int
    """Columns of padding to its left, and as many to its right."""
    max_tiles: int | None = None
    """A picture of more patches than about so many tiles have is pooled by the model (LLaVA-OneVision)."""

    @classmethod
    def of(
        cls, image_size: tuple[int, int], tiles: tuple[int, int], *, side: int, max_tiles: int | None = None
    ) -> "Grid":
        """The grid of an image of (height, width) pixels that was fitted into (rows, columns) of tiles.

        Source of the rounding: `unpad_image` of transformers' `modeling_llava_next.py`.
        """
        (height, width), (rows, columns) = image_size, tiles
        num_rows, num_columns = rows * side, columns * side
        top = left = 0
        if width / height > num_columns / num_rows:
            top = (num_rows - int(round(height * (num_columns / width), 7))) // 2
        else:
            left = (num_columns - int(round(width * (num_rows / height), 7))) // 2
        return cls(rows=rows, columns=columns, side=side, top=top, left=left, max_tiles=max_tiles)

    @property
    def num_tiles(self) -> int:
        """Tiles of the image, the base tile counted."""
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
        """(rows, columns) of patches after the model's own pooling, which only the order "model" applies.

        Source: `pack_image_features` of transformers' `modeling_llava_onevision.py`.
        """
        shown = self.num_rows * self.num_columns
        ratio = 1.0 if self.max_tiles is None else math.sqrt(shown / (self.max_tiles * self.side**2))
        if ratio <= 1.1:
            return self.num_rows, self.num_columns
        return int(self.num_rows // ratio), int(self.num_columns // ratio)

    @property
    def visible(self) -> list[tuple[range, range]]:
        """Of each tile but the base tile, rows and columns of its patches that show the picture."""
        rows = [_overlap(self.top, self.num_rows, index * self.side, self.side) for index in range(self.rows)]
        columns = [
            _overlap(self.left, self.num_columns, index * self.side, self.side)
            for index in range(self.columns)
        ]
        return [(tile_rows, tile_columns) for tile_rows in rows for tile_columns in columns]

    def raster(self, tile: Tensor, patches: Tensor) -> Tensor:
        """int64[...]: places in the raster of the stitched grid of patches int64[...] of tiles int64[...] (1 is the first)."""
        row = (tile - 1) // self.columns * self.side + patches // self.side
        column = (tile - 1) % self.columns * self.side + patches % self.side
        return row * (self.columns * self.side) + column


def _overlap(start: int, length: int, tile_start: int, side: int) -> range:
    """Where the patches start, ..., start + length - 1 lie in a tile that begins at `tile_start`."""
    return range(min(max(start - tile_start, 0), side), min(max(start + length - tile_start, 0), side))


def released_order(
    dominant: Tensor, grid: Grid | None, *, num_tokens: int, num_cls: int, has_cls: bool
) -> Tensor:
    """int64[(1 + tiles) * T]: which of the image's tokens, tile after tile, stand in the language model, in that order.

    Args:
        dominant: int64[1 + tiles, D], as in `ReducerOutput`.
        grid: of the image; None for a single tile, behind which -1, `image_newline`, stands.
        num_tokens: T, tokens of a tile.
        num_cls: 1 where CLS leads the dominant tokens, else 0.
        has_cls: whether token 0 of the encoder is CLS.
    """
    tokens = torch.arange(dominant.shape[0] * num_tokens, device=dominant.device).view(-1, num_tokens)
    if grid is None:
        return torch.cat([tokens[0], tokens.new_tensor([-1])])
    tile = torch.arange(1, dominant.shape[0], device=dominant.device).unsqueeze(1)
    order = grid.raster(tile, dominant[1:, num_cls:] - int(has_cls)).flatten().argsort()
    kept = tokens[1:, num_cls : dominant.shape[1]].flatten()[order]
    return torch.cat(
        [tokens[0], kept, tokens[1:, :num_cls].flatten(), tokens[1:, dominant.shape[1] :].flatten()]
    )


def spatial_order(places: Sequence[Tensor], grid: Grid | None) -> Tensor:
    """int64[n + newlines]: indices into the image's tokens, tile after tile, with -1 where `image_newline` stands.

    There are as many newlines as the model's own packing has, also where it pools the patches.

    Args:
        places: for each tile, base first, int64[n_i]: the patches of its tokens.
        grid: of the image; None for a single tile.
    """
    base = places[0].argsort()
    if grid is None:
        return torch.cat([base, base.new_tensor([-1])])
    num_newlines = grid.pooled[0]
    raster = torch.cat(
        [grid.raster(torch.full_like(patches, tile), patches) for tile, patches in enumerate(places)][1:]
    )
    ends = [grid.top - (-(line + 1) * grid.num_rows // num_newlines) for line in range(num_newlines)]
    newlines = torch.tensor(ends, device=raster.device, dtype=raster.dtype) * (grid.columns * grid.side)
    order = torch.cat(
        [2 * raster, 2 * newlines - 1]
    ).argsort()  # a newline between the last patch of a row and the next row
    tokens = torch.cat(
        [len(places[0]) + torch.arange(len(raster), device=raster.device), torch.full_like(newlines, -1)]
    )
    return torch.cat([base, tokens[order]])
