"""The control for VisionZip: the same number of patches, drawn at random, and nothing merged."""

from typing import ClassVar

import torch

from vzip.reducers.base import Budgeted, ReducerOutput, VisionTokens
from vzip.reducers.merging import keep_and_merge


class Random(Budgeted):
    """Keep `budget` patches of each image, in raster order.

    Every call draws anew, from torch's global generator. The settings are those of `Budgeted`.
    """

    name: ClassVar[str] = "random"

    def __call__(self, tokens: VisionTokens) -> ReducerOutput:
        num_images = len(tokens.features)
        num_kept = self.num_kept(tokens)

        # Drawn on the CPU, so that a seed gives the same patches on every device.
        shuffled = torch.rand(num_images, tokens.num_patches).argsort(dim=1)
        drawn = shuffled[:, :num_kept].sort(dim=1).values
        kept = drawn.to(tokens.features.device) + int(tokens.has_cls)

        # Nothing is merged: the other patches are dropped.
        return keep_and_merge(tokens, kept, 0, how=None)
