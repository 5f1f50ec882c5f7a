"""DivPrune: select the patches that are least alike, without attention.

The first patch is the one whose nearest neighbour is farthest away. Then each step selects the
patch that is farthest from all selected ones. The distance is 1 - cosine.

Source: arXiv 2503.02175, and what the authors' released code (repository vbdi/divprune) selects,
which this module reproduces with code of its own. Two things differ. The authors select behind the
projector, and we before it, where the projector still learns. And a selected patch can't be
selected again here, which happens there if patches are exact copies.
"""

from typing import ClassVar

import torch
from torch import Tensor

from vzip.reducers.base import VisionTokens
from vzip.reducers.selection import Selector, cosines


class DivPrune(Selector):
    """Keep the patches that are farthest from each other. The settings are those of `Selector`."""

    name: ClassVar[str] = "divprune"

    def select(self, tokens: VisionTokens, num_selected: int) -> Tensor:
        distances = 1 - cosines(tokens.features)
        image = torch.arange(len(distances), device=distances.device)

        # The two halves can differ by rounding. The smaller distance is taken, so that of two patches
        # that are each other's neighbours the first one wins.
        distances.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        to_neighbour = torch.minimum(distances.amin(dim=1), distances.amin(dim=2))
        latest = to_neighbour.argmax(dim=1)
        selected = [latest]

        # Distance of each patch to the nearest selected one; selected patches are out.
        nearest = torch.full_like(distances[:, 0], torch.inf)
        for _ in range(num_selected - 1):
            nearest = torch.minimum(nearest, distances[image, latest])
            nearest[image, latest] = -torch.inf
            latest = nearest.argmax(dim=1)
            selected.append(latest)
        return torch.stack(selected, dim=1)
