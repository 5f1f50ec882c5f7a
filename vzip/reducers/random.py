"""The control for VisionZip: the same number of patches, drawn at random, and nothing merged."""

from typing import Any, ClassVar

import torch

from vzip.errors import UserError
from vzip.reducers.base import ReducerOutput, VisionTokens, budget_of_a_tile, check_keep, share_of
from vzip.reducers.visionzip import take


class Random:
    """Keep `budget` patches of each image, in raster order.

    Every call draws anew, from torch's global generator.

    Args:
        budget: patches to keep of `tiles` tiles together.
        tiles: number of tiles that the budget counts together.
        keep: share of a picture's patches to keep, instead of a budget.

    Raises:
        UserError: a budget below 1 per tile, or one that does not divide among the tiles; or a share
            outside of (0, 1].
    """

    name: ClassVar[str] = "random"
    uses_attention: ClassVar[bool] = False
    layer: int | None = None

    def __init__(self, *, budget: int | None = None, tiles: int = 1, keep: float | None = None) -> None:
        check_keep(keep, budget=budget)
        if keep is None and budget is None:
            raise UserError("give reducer.budget, or reducer.keep as a share of a picture's patches")
        self.keep = keep
        self.budget = 0 if budget is None else budget_of_a_tile(budget, tiles)

    def __repr__(self) -> str:
        return (
            f"Random({self.budget} patches)" if self.keep is None else f"Random({self.keep} of the patches)"
        )

    def settings(self) -> dict[str, Any]:
        return {"budget": self.budget} if self.keep is None else {"keep": self.keep}

    def num_tokens(self, num_patches: int, *, has_cls: bool, num_dropped: int) -> int:
        if self.keep is not None:
            return share_of(self.keep, num_patches)
        if self.budget > num_patches:
            raise UserError(
                f"reducer.budget={self.budget} is larger than the {num_patches} patches "
                f"of an image; choose a budget of at most {num_patches}"
            )
        return self.budget

    def __call__(self, tokens: VisionTokens) -> ReducerOutput:
        num_images, num_tokens, _ = tokens.features.shape
        first_patch = int(tokens.has_cls)
        num_patches = num_tokens - first_patch

        # Refuse a picture with fewer patches than the budget.
        budget = self.num_tokens(num_patches, has_cls=tokens.has_cls, num_dropped=tokens.num_dropped)

        # Drawn on the CPU, so that a seed gives the same patches on every device.
        shuffled = torch.rand(num_images, num_patches).argsort(dim=1)
        drawn = shuffled[:, :budget].sort(dim=1).values
        kept = drawn.to(tokens.features.device) + first_patch

        # Nothing is merged, so a patch that was not drawn is in no slot (-1).
        slot = torch.arange(budget, device=kept.device).expand(num_images, -1)
        slots = torch.full((num_images, num_tokens), -1, device=kept.device)
        slots.scatter_(1, kept, slot)
        return ReducerOutput(
            features=take(tokens.features, kept),
            dominant=kept,
            contextual=kept[:, :0],
            slots=slots,
        )
