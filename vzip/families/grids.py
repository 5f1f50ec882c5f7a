"""Pictures of any size: a grid of patches, of which each square group becomes one visual token.

The processor resizes a picture so that its sides are multiples of a group's, and its area lies
between two limits. So the number of tokens follows from the picture's size.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Self

import torch
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from vzip.errors import UserError
from vzip.families.features import VisualFeatures
from vzip.reducers.base import Reducer, VisionTokens
from vzip.reducers.identity import Identity
from vzip.tap import received_attention

MAX_RATIO = 200
"""The processors refuse pictures that are longer than this many times their width."""


@dataclass(frozen=True)
class PixelLimits:
    """Fewest and most pixels of a picture after the processor has resized it."""

    least: int
    most: int

    @classmethod
    def of(cls, processor: Any) -> Self:
        """Read the limits of an image processor, or of a video processor."""
        size = processor.size
        return cls(int(size["shortest_edge"]), int(size["longest_edge"]))

    def grid(self, image_size: tuple[int, int], *, side: int) -> tuple[int, int]:
        """Count rows and columns of groups of `side` pixels, for a picture of (height, width).

        Raises:
            UserError: a picture that the processor refuses.
        """
        height, width = image_size
        if max(height, width) > MAX_RATIO * min(height, width):
            raise UserError(
                f"a picture of {height} x {width} pixels is too long for this model: one side may be "
                f"at most {MAX_RATIO} times the other; cut it, or take the example out"
            )
        resized = smart_resize(height, width, side, min_pixels=self.least, max_pixels=self.most)
        return resized[0] // side, resized[1] // side


def check_grids(grids: Tensor, num_patches: int, *, merge: int, kind: str) -> None:
    """Check the grids int64[media, 3] of patches: steps in time, rows and columns.

    Raises:
        UserError: a video without frames, a picture smaller than a group of merge x merge patches
            or with sides that are no multiples of it, or another number of patches.
    """
    name = f"{kind}_grid_thw"
    advice = "use what the model's processor returns"
    if grids.dim() != 2 or grids.shape[1] != 3 or len(grids) == 0:
        raise UserError(f"{name} of shape {list(grids.shape)} holds no {kind}s as [{kind}s, 3]; {advice}")

    for steps, rows, columns in grids.tolist():
        if steps < 1:
            raise UserError(f"{name} has a {kind} without frames; give one of at least 1 frame")
        if min(rows, columns) < merge or rows % merge or columns % merge:
            raise UserError(
                f"{name} has a picture of {rows} x {columns} patches, but a visual token is made of "
                f"{merge} x {merge}; give a larger picture, or {advice}"
            )

    expected = int(grids.prod(dim=1).sum())
    if expected != num_patches:
        raise UserError(f"{name} counts {expected} patches, but there are {num_patches}; {advice}")


def fitting(reducer: Reducer, num_tokens: int) -> Reducer:
    """Return the reducer, or the identity for a picture that has fewer tokens than its budget."""
    # Pictures have any size here, so a small one keeps all of its tokens.
    try:
        reducer.num_tokens(num_tokens, has_cls=False, num_dropped=0)
    except UserError:
        return Identity()
    return reducer


def num_reduced(reducer: Reducer, num_tokens: int) -> int:
    """Count the tokens that remain of a picture with `num_tokens`."""
    return fitting(reducer, num_tokens).num_tokens(num_tokens, has_cls=False, num_dropped=0)


def window_order(grids: Tensor, *, merge: int, window: int) -> Tensor:
    """Return int64[G]: the groups of all pictures, window by window.

    Args:
        grids: int64[media, 3], steps in time, rows and columns of patches.
        merge: patches a side of a group.
        window: groups a side of a window. Those at the right and the lower border may be smaller.
    """
    orders = []
    first = 0
    for steps, rows, columns in (grids // torch.tensor([1, merge, merge]).to(grids)).tolist():
        step = torch.arange(steps).view(-1, 1, 1)
        row = torch.arange(rows).view(-1, 1)
        column = torch.arange(columns)

        # Sort by step, row and column of the window; a stable sort keeps the raster inside it.
        windows_a_row = -(-columns // window)
        windows_a_step = -(-rows // window) * windows_a_row
        number = step * windows_a_step + row // window * windows_a_row + column // window
        orders.append(number.flatten().argsort(stable=True) + first)
        first += number.numel()
    return torch.cat(orders)


def pictures_of(grids: Tensor) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yield neighbouring pictures of equal size together: their number, and (rows, columns) of patches."""
    sizes: list[tuple[int, int]] = []
    for steps, rows, columns in grids.tolist():
        sizes += [(rows, columns)] * steps
    for size, same in groupby(sizes):
        yield len(list(same)), size


def attention_in_pictures(queries: Tensor, keys: Tensor, grids: Tensor) -> Tensor:
    """Compute the attention that each patch receives from its picture: float[patches].

    Args:
        queries: float[patches, H, head_dim], picture by picture.
        keys: float[patches, H, head_dim].
        grids: int64[media, 3].
    """
    received = []
    first = 0
    for num_pictures, (rows, columns) in pictures_of(grids):
        num_patches = rows * columns
        block = slice(first, first + num_pictures * num_patches)
        first = block.stop
        shape = (num_pictures, num_patches, *queries.shape[1:])
        block_queries = queries[block].view(shape).transpose(1, 2)
        block_keys = keys[block].view(shape).transpose(1, 2)
        received.append(received_attention(block_queries, block_keys).flatten())
    return torch.cat(received)


class ReducedGrids:
    """The tokens that remain of pictures of different sizes, in the raster of their pictures.

    Args:
        tokens: those of all pictures, float[1, G, d].
        reducer: reduces each picture by itself.
    """

    def __init__(self, tokens: VisionTokens, reducer: Reducer) -> None:
        self.tokens = tokens
        self.reducer = reducer
        self._first_group = 0
        self._num_tokens = 0
        self._features: list[Tensor] = []
        self._order: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._num_groups: list[int] = []

    def add(self, num_pictures: int, grid: tuple[int, int]) -> None:
        """Reduce the next pictures, each of rows x columns groups."""
        num_groups = grid[0] * grid[1]
        tokens = self._take(num_pictures, grid)
        output = fitting(self.reducer, num_groups)(tokens)
        self._features.append(output.features.flatten(0, 1))

        # A contextual token stands where its merge target was.
        source = torch.cat([output.dominant, output.contextual], dim=1)
        in_raster = source.argsort(dim=1)
        picture = torch.arange(num_pictures, device=source.device)[:, None]
        order = in_raster + picture * source.shape[1] + self._num_tokens
        self._num_tokens += source.numel()
        self._order.append(order.flatten())
        self._kept += source.gather(1, in_raster).unbind()
        self._num_groups += [num_groups] * num_pictures

    def _take(self, num_pictures: int, grid: tuple[int, int]) -> VisionTokens:
        """Take the next groups of all pictures, as tokens float[num_pictures, num_groups, d]."""
        num_groups = grid[0] * grid[1]
        block = slice(self._first_group, self._first_group + num_pictures * num_groups)
        self._first_group = block.stop

        def apart(values: Tensor) -> Tensor:
            return values[0, block].view(num_pictures, num_groups, -1).squeeze(-1)

        saliency, keys = self.tokens.saliency, self.tokens.keys
        return replace(
            self.tokens,
            features=apart(self.tokens.features),
            saliency=None if saliency is None else apart(saliency),
            keys=None if keys is None else apart(keys),
            received=tuple(apart(layer) for layer in self.tokens.received),
            grid=grid,
        )

    def features(self, steps: Tensor, grids: Tensor) -> VisualFeatures:
        """Put all pictures together.

        Args:
            steps: int64[media], pictures of each image (1), or steps of each video.
            grids: see `VisualFeatures.grids`.
        """
        kept = []
        counts = []
        picture = 0
        for num_steps in steps.tolist():
            pictures = range(picture, picture + num_steps)
            picture = pictures.stop
            # The groups of a later step are counted behind those of the steps before.
            for step, number in enumerate(pictures):
                kept.append(self._kept[number] + step * self._num_groups[number])
            counts.append(sum(len(self._kept[number]) for number in pictures))
        return VisualFeatures(
            torch.cat(self._features),
            torch.cat(self._order),
            torch.tensor(counts),
            kept=torch.cat(kept),
            grids=grids,
        )
