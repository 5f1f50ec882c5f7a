"""The control of a smaller picture: the average of the patches of each cell of a coarser grid."""

from typing import ClassVar

import torch
import torch.nn.functional as F

from vzip.reducers.base import Budgeted, ReducerOutput, VisionTokens
from vzip.reducers.cells import cells_of


class Pool(Budgeted):
    """Average the patches of each cell of a grid of `budget` cells, see `vzip.reducers.cells`."""

    name: ClassVar[str] = "pool"

    def __call__(self, tokens: VisionTokens) -> ReducerOutput:
        features = tokens.without_cls().features
        cell_of, middles = cells_of(self.num_kept(tokens), *tokens.rows_and_columns)
        cell_of = cell_of.to(features.device)
        middles = middles.to(features.device)

        # Means are matrix products, in float32 at least.
        accurate = torch.promote_types(features.dtype, torch.float32)
        members = F.one_hot(cell_of, len(middles)).to(accurate)
        weights = (members / members.sum(dim=0)).transpose(0, 1)
        averages = (weights @ features.to(accurate)).to(features.dtype)

        # All tokens are merged ones, whose targets are the middles of the cells. CLS is dropped.
        num_images = len(features)
        num_cls = int(tokens.has_cls)
        contextual = (middles + num_cls).expand(num_images, -1)
        return ReducerOutput(
            features=averages,
            dominant=contextual[:, :0],
            contextual=contextual,
            slots=F.pad(cell_of, (num_cls, 0), value=-1).expand(num_images, -1),
        )
