"""SCOPE: select patches by saliency times coverage, one by one.

A patch covers another as well as they are alike (cosine). The gain of a patch is what it would add
to the coverage of all patches. Each step selects the patch with the highest gain x saliency^alpha.

Source: NeurIPS 2025, and the authors' released code (repository kinredon/SCOPE,
`scope/clip_encoder.py`), whose selections this module reproduces. It computes all gains anew in
each step, which `cover` does not.
"""

from typing import Any, ClassVar

from torch import Tensor

from vzip.errors import check_number
from vzip.reducers.base import VisionTokens
from vzip.reducers.selection import Selector, cosines, cover


class Scope(Selector):
    """Keep the patches that are salient, and unlike those that are kept already.

    Args:
        alpha: power of the saliency, not negative. With 0 all patches weigh the same.
        budget: like the others, see `Selector`.
    """

    name: ClassVar[str] = "scope"

    def __init__(
        self,
        *,
        budget: int | None = None,
        tiles: int = 1,
        keep: float | None = None,
        alpha: float = 1.0,
        merge: str | None = None,
        layer: int | None = None,
    ) -> None:
        super().__init__(budget=budget, tiles=tiles, keep=keep, merge=merge, layer=layer)
        check_number("reducer.alpha", alpha, least=0)
        self.alpha = alpha
        if alpha > 0:
            self.uses_attention = True

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "alpha": self.alpha}

    def select(self, tokens: VisionTokens, num_selected: int) -> Tensor:
        coverage = cosines(tokens.features)

        # Without attention all patches weigh the same, as in the released code.
        weights = coverage.new_ones(coverage.shape[:2])
        if tokens.saliency is not None:
            weights = tokens.saliency.to(coverage.dtype).pow(self.alpha)
        return cover(coverage, weights, num_selected)
