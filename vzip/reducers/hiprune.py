"""HiPrune: select anchors of a middle layer with their neighbours, and fill up from a late layer.

*Anchors* receive most attention in the object layer, in the middle of the tower. They stay with the
patches beside, above and below them. *Registers* receive most attention in the late layer, that of
the features. They take the rest of the budget.

Source: arXiv 2508.00553, and the authors' released code (repository Danielement321/HiPrune,
`LLaVA/llava/model/llava_arch.py`), whose selections this module reproduces. As there, the patch
beside the last one of a row is the first one of the next row.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from vzip.errors import UserError, check_number
from vzip.reducers.base import VisionTokens
from vzip.reducers.selection import Selector, most_salient


class HiPrune(Selector):
    """Keep anchors, their neighbours and registers.

    Args:
        alpha: share of the budget that is meant for anchors. Each counts as five patches, with its four
            neighbours.
        object_layer: hidden state whose layer gives the anchors. None: three eighths of the tower's
            layers, which is 9 of 24, as in the paper.
        layer: hidden state whose layer gives the registers; None: that of the features.
        budget: like the others, see `Selector`.
    """

    name: ClassVar[str] = "hiprune"
    uses_attention = True

    def __init__(  # noqa: PLR0913  all of them are settings
        self,
        *,
        budget: int | None = None,
        tiles: int = 1,
        keep: float | None = None,
        alpha: float = 0.1,
        object_layer: int | None = None,
        merge: str | None = None,
        layer: int | None = None,
    ) -> None:
        super().__init__(budget=budget, tiles=tiles, keep=keep, merge=merge, layer=layer)
        check_number("reducer.alpha", alpha, least=0, most=1)
        self.alpha = alpha
        self.object_layer = object_layer

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "alpha": self.alpha, "object_layer": self.object_layer}

    def received_layers(self, layers: Sequence[int]) -> tuple[int | None, ...]:
        """Return the object layer and the late layer, see `vzip.reducers.base.received_layers`."""
        middle = layers[max(1, round(len(layers) * 3 / 8)) - 1]
        return (middle if self.object_layer is None else self.object_layer, self.layer)

    def select(self, tokens: VisionTokens, num_selected: int) -> Tensor:
        if len(tokens.received) != 2:
            raise UserError(
                f"reducer={self.name} reads the attention that patches receive in two layers of the "
                f"vision tower, and there are {len(tokens.received)} here; "
                f"give VisionTokens with received of two layers"
            )
        in_object_layer, in_late_layer = tokens.received
        num_patches = in_object_layer.shape[1]
        _, width = tokens.rows_and_columns

        # Anchors, and the patches around them. At the borders these go on in the next row.
        anchors = most_salient(in_object_layer, round(num_selected * self.alpha / 5))
        steps = torch.tensor([0, -1, 1, -width, width], device=anchors.device)
        around = (anchors.unsqueeze(2) + steps).clamp(0, num_patches - 1).flatten(1)
        is_near = torch.zeros_like(in_late_layer, dtype=torch.bool).scatter_(1, around, True)

        # They come first, then the registers.
        return most_salient(in_late_layer.masked_fill(is_near, torch.inf), num_selected)
