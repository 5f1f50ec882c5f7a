"""Images and videos between the reducer and the projector: what the projector gets, and where its output then stands."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class VisualFeatures:
    """m tokens of images, or of videos, one after the other, for n places in the language model.

    Its fields are also what a model takes in place of pictures: see `Family.media_features`.
    """

    features: Tensor
    """float[..., d]: m tokens, in the shape in which the projector gets them."""
    order: Tensor
    """int64[n]: the token at each place; -1 is `image_newline`. Each token has one place, among those of its own image."""
    counts: Tensor
    """int64[images], on the CPU: places of each image, or video."""

    @classmethod
    def as_it_is(cls, features: Tensor, *, num_media: int) -> Self:
        """Tokens float[..., d] that stand as they are, the same number of each image or video."""
        num_tokens = features.shape[:-1].numel()
        order = torch.arange(num_tokens, device=features.device)
        return cls(features, order, torch.full((num_media,), num_tokens // num_media))

    @classmethod
    def of_image(cls, features: Tensor, order: Tensor) -> Self:
        """The tokens float[m, d] of one image in the order int64[n]."""
        return cls(features, order, torch.tensor([len(order)]))

    @classmethod
    def join(cls, parts: Sequence["VisualFeatures"]) -> Self:
        """All the parts' images, or videos, one after the other; features are float[m, d]."""
        features = [part.features.flatten(0, -2) for part in parts]
        starts = accumulate(map(len, features), initial=0)
        orders = [
            torch.where(part.order < 0, part.order, part.order + start)
            for part, start in zip(parts, starts, strict=False)
        ]
        return cls(torch.cat(features), torch.cat(orders), torch.cat([part.counts for part in parts]))
