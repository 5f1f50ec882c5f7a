"""Positions of (time, row, column) in the language model, for visual tokens of which some are left out.

Models of the Qwen-VL type number tokens in three ways at a time. A token of text has the same
number in all three. A visual token has the step in time, the row and the column of its place in the
picture, counted from the picture's first number. Text behind a picture goes on at the larger number
of rows and columns of its grid.

A token that stays keeps its own position, and text goes on where it does with all tokens. A
contextual token has the position of its merge target.

Legend of shapes: T tokens of all sequences together, n visual tokens that stay.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from vzip.families.features import VisualFeatures


@dataclass(frozen=True)
class GridPlaces:
    """Where the visual tokens of some images, or videos, are in their pictures."""

    offsets: Tensor
    """int64[n, 3]: step in time, row and column, counted from the picture's first position."""
    advance: Tensor
    """int64[n]: how far the position moves on behind a token; 0 except behind a picture's last one."""
    reach: Tensor
    """int64[n]: one more than the largest offset of all tokens of the picture, kept or not."""


def grid_places(features: VisualFeatures) -> GridPlaces:
    """Find the places of visual tokens, which have `kept` and `grids`, in their grids."""
    kept, grids = features.kept, features.grids
    assert kept is not None and grids is not None

    # The grid of each token, and its row and column there.
    medium = torch.repeat_interleave(features.counts.to(kept.device), output_size=len(kept))
    steps, rows, columns, interval = grids[medium].unbind(dim=1)
    steps = steps.long()
    rows = rows.long()
    columns = columns.long()
    step = kept // (rows * columns)
    row = kept % (rows * columns) // columns
    column = kept % columns

    # The model multiplies in float32, and rounds down.
    time = (step.float() * interval.float()).long()
    last_time = ((steps - 1).float() * interval.float()).long()

    # A token is its picture's last one if the next token belongs to another picture.
    is_last = torch.ones_like(kept, dtype=torch.bool)
    is_last[:-1] = medium[1:] != medium[:-1]
    largest = torch.maximum(rows, columns)
    return GridPlaces(
        offsets=torch.stack([time, row, column], dim=1),
        advance=largest * is_last,
        reach=torch.maximum(largest, last_time + 1),
    )


def first_of_rows(input_ids: Tensor) -> Tensor:
    """Return int64[B, L]: for each token of padded sequences, the index of its sequence's first one."""
    num_rows, length = input_ids.shape
    first = torch.arange(num_rows, device=input_ids.device) * length
    return first[:, None].expand(num_rows, length)


def grid_positions(
    input_ids: Tensor,
    places: Iterable[tuple[int, GridPlaces]],
    *,
    counted: Tensor,
    first: Tensor,
) -> tuple[Tensor, Tensor]:
    """Number the tokens of some sequences.

    Args:
        input_ids: int64[T].
        places: pairs of a placeholder's id and the places of its visual tokens, which stand in the
            order of the placeholders.
        counted: bool[T], false for padding.
        first: int64[T], the index of the first token of each token's sequence.

    Returns:
        Positions int64[3, T], 0 for padding; and int64[T], one more than the largest position that
        the text and the complete pictures up to each token have taken.
    """
    advance = counted.long()
    offsets = advance.new_zeros(len(input_ids), 3)
    reach = advance.clone()
    for placeholder, media in places:
        is_visual = (input_ids == placeholder) & counted
        advance = advance.masked_scatter(is_visual, media.advance)
        reach = reach.masked_scatter(is_visual, media.reach)
        offsets = offsets.masked_scatter(is_visual[:, None], media.offsets)

    # All tokens of a picture start at the same number, because only its last one moves it on.
    before = advance.cumsum(dim=0) - advance
    before = (before - before[first]) * counted
    positions = (before[:, None] + offsets) * counted[:, None]
    return positions.T, (before + reach) * counted
