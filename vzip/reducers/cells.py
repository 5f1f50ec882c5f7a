"""Cells: the parts of a picture that the reducers `pool` and `grid` keep one token of each.

The grid has as many cells as the budget, of about the same size. Rows and columns are chosen so
that cells are as square as possible: 64 tokens of 24 x 24 patches are 8 x 8 cells of 3 x 3 patches,
and 8 tokens of 8 x 8 patches are 2 rows of 4 cells. A budget that makes no such grid, such as 17,
has rows of different numbers of cells: 4, 4, 4 and 5.
"""

import math

import torch
from torch import Tensor

STRETCH = 1.5
"""How far the number of rows may be from the one that makes cells square, as a factor.

Within it, a number of rows is preferred that gives all rows the same number of cells.
"""


def rows_of_cells(num_cells: int, rows: int, columns: int) -> list[int]:
    """Count the cells in each row of cells, for a picture of rows x columns patches."""
    # A row of cells is at least one patch high, and a cell at least one patch wide.
    possible = range(math.ceil(num_cells / columns), min(rows, num_cells) + 1)
    square = math.sqrt(num_cells * rows / columns)
    alike = [count for count in possible if num_cells % count == 0]
    close = [count for count in alike if square / STRETCH <= count <= square * STRETCH]

    # Rounded, so that of two equally good numbers the smaller one is taken.
    num_rows = min(close or possible, key=lambda count: round(abs(math.log(count / square)), 6))

    # Later rows take what does not divide evenly.
    bounds = _bounds(num_cells, num_rows)
    return [stop - start for start, stop in bounds]


def _bounds(length: int, parts: int) -> list[tuple[int, int]]:
    """Cut a length into parts that differ by one at most: (start, stop) of each."""
    return [(part * length // parts, (part + 1) * length // parts) for part in range(parts)]


def cells_of(num_cells: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Divide rows x columns patches into cells.

    Returns:
        The cell of each patch, int64[P], and the patch in the middle of each cell, int64[cells].
    """
    cell_of = torch.empty(rows, columns, dtype=torch.int64)
    middles: list[int] = []
    cells_in_rows = rows_of_cells(num_cells, rows, columns)
    for (top, bottom), num_in_row in zip(_bounds(rows, len(cells_in_rows)), cells_in_rows, strict=True):
        for left, right in _bounds(columns, num_in_row):
            cell_of[top:bottom, left:right] = len(middles)
            middles.append((top + bottom - 1) // 2 * columns + (left + right - 1) // 2)
    return cell_of.flatten(), torch.tensor(middles)
