"""MMTok, vision coverage: select patches that cover all patches best, without attention.

A patch spreads a share of 1 over all candidates, by a softmax of their cosines. A selection covers
a patch with the largest share that one of its members has. Each step selects the patch that adds
most. The published method adds the text of the question, which this project does not look at.

Source: arXiv 2508.18264, and the authors' released code (repository Ironieser/MMTok,
`mmtok/core/semantic_selector.py`) called without text, whose selections this module reproduces.
There, padding of a picture is no candidate; here it is one.
"""

from typing import Any, ClassVar

from torch import Tensor

from vzip.errors import check_number
from vzip.reducers.base import VisionTokens
from vzip.reducers.selection import Selector, cosines, cover


class MMTok(Selector):
    """Keep the patches that stand for all others.

    Args:
        temperature: of the softmax; the lower, the fewer patches a patch is covered by.
        budget: like the others, see `Selector`.
    """

    name: ClassVar[str] = "mmtok"

    def __init__(
        self,
        *,
        budget: int | None = None,
        tiles: int = 1,
        keep: float | None = None,
        temperature: float = 0.2,
        merge: str | None = None,
        layer: int | None = None,
    ) -> None:
        super().__init__(budget=budget, tiles=tiles, keep=keep, merge=merge, layer=layer)
        check_number("reducer.temperature", temperature, least=0.001)
        self.temperature = temperature

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "temperature": self.temperature}

    def select(self, tokens: VisionTokens, num_selected: int) -> Tensor:
        # Each row of the softmax is a patch, and each column a candidate.
        shares = (cosines(tokens.features.float()) / self.temperature).softmax(dim=2)
        coverage = shares.transpose(1, 2)
        weights = coverage.new_ones(coverage.shape[:2])
        return cover(coverage, weights, num_selected)
