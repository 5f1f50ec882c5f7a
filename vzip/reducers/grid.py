"""The control of even spacing: the patch in the middle of each cell of a coarser grid."""

from typing import ClassVar

from vzip.reducers.base import Budgeted, ReducerOutput, VisionTokens
from vzip.reducers.cells import cells_of
from vzip.reducers.merging import keep_and_merge


class EvenGrid(Budgeted):
    """Keep the middle patch of each cell of a grid of `budget` cells, see `vzip.reducers.cells`."""

    name: ClassVar[str] = "grid"

    def __call__(self, tokens: VisionTokens) -> ReducerOutput:
        _, middles = cells_of(self.num_kept(tokens), *tokens.rows_and_columns)
        kept = middles.to(tokens.features.device) + int(tokens.has_cls)
        return keep_and_merge(tokens, kept.expand(len(tokens.features), -1), 0, how=None)
