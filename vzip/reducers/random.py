"""The control: as many patches as the budget, drawn at random, nothing merged."""

from typing import Any, ClassVar

import torch

from vzip.errors import UserError, check_choice
from vzip.reducers.base import ANYRES, ReducerOutput, VisionTokens, budget_of_a_tile
from vzip.reducers.visionzip import take


class Random:
    """`budget` patches of each image, drawn anew on every call from torch's global generator, in raster order.

    Args:
        budget: patches kept of `tiles` tiles.
        tiles: how many tiles the budget is the total of.
        anyres: order of the tokens of several tiles, see `vzip.families.anyres`.

    Raises:
        UserError: a budget below 1 a tile, or one that the tiles can't share.
    """

    name: ClassVar[str] = "random"
    uses_attention: ClassVar[bool] = False
    layer: int | None = None
    anyres: str

    def __init__(self, *, budget: int, tiles: int = 1, anyres: str = "released") -> None:
        check_choice("reducer.anyres", anyres, ANYRES)
        self.budget, self.anyres = budget_of_a_tile(budget, tiles), anyres

    def __repr__(self) -> str:
        return f"Random({self.budget} patches)"

    def settings(self) -> dict[str, Any]:
        return {"budget": self.budget, "anyres": self.anyres}

    def num_tokens(self, num_patches: int, *, has_cls: bool, num_dropped: int) -> int:
        if self.budget > num_patches:
            raise UserError(
                f"reducer.budget={self.budget} is larger than the {num_patches} patches of an image; "
                f"choose a budget of at most {num_patches}"
            )
        return self.budget

    def __call__(self, tokens: VisionTokens) -> ReducerOutput:
        num_images, num_tokens, _ = tokens.features.shape
        num_patches = num_tokens - int(tokens.has_cls)
        self.num_tokens(num_patches, has_cls=tokens.has_cls, num_dropped=tokens.num_dropped)
        order = torch.rand(num_images, num_patches).argsort(dim=1)[:, : self.budget].sort(dim=1).values
        kept = order.to(tokens.features.device) + int(tokens.has_cls)
        slots = torch.full((num_images, num_tokens), -1, device=kept.device)
        slots.scatter_(1, kept, torch.arange(self.budget, device=kept.device).expand(num_images, -1))
        return ReducerOutput(
            features=take(tokens.features, kept), dominant=kept, contextual=kept[:, :0], slots=slots
        )
