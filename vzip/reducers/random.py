"""The control: as many patches as the budget, drawn at random, nothing merged."""

from typing import Any, ClassVar

import torch

from vzip.errors import UserError
from vzip.reducers.base import Reduction, VisionTokens
from vzip.reducers.visionzip import take


class Random:
    """`budget` patches of each image, drawn anew on every call from torch's global generator, in raster order.

    Args:
        budget: patches kept of an image.

    Raises:
        UserError: a budget below 1.
    """

    name: ClassVar[str] = "random"
    uses_attention: ClassVar[bool] = False

    def __init__(self, *, budget: int) -> None:
        if budget < 1:
            raise UserError(f"reducer.budget={budget} must be at least 1")
        self.budget = budget

    def __repr__(self) -> str:
        return f"Random({self.budget} patches)"

    def settings(self) -> dict[str, Any]:
        return {"budget": self.budget}

    def num_tokens(self, num_patches: int, *, has_cls: bool, num_dropped: int) -> int:
        if self.budget > num_patches:
            raise UserError(
                f"reducer.budget={self.budget} is larger than the {num_patches} patches of an image; "
                f"choose a budget of at most {num_patches}"
            )
        return self.budget

    def __call__(self, tokens: VisionTokens) -> Reduction:
        num_images, num_tokens, _ = tokens.features.shape
        num_patches = num_tokens - int(tokens.has_cls)
        self.num_tokens(num_patches, has_cls=tokens.has_cls, num_dropped=tokens.num_dropped)
        order = torch.rand(num_images, num_patches).argsort(dim=1)[:, : self.budget].sort(dim=1).values
        kept = order.to(tokens.features.device) + int(tokens.has_cls)
        slots = torch.full((num_images, num_tokens), -1, device=kept.device)
        slots.scatter_(1, kept, torch.arange(self.budget, device=kept.device).expand(num_images, -1))
        return Reduction(features=take(tokens.features, kept), dominant=kept, contextual=kept[:, :0], slots=slots)
