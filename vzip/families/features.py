"""What stands between the reducer and the projector, and between that and the language model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class VisualFeatures:
    """Tokens of all images, or all videos, of a micro batch, one after the other.

    They depend on frozen weights alone, so they can be kept in a file. There are m tokens for n
    positions in the language model; `image_newline`, which marks row ends, is not among the tokens.
    """

    features: Tensor
    """float[..., d]: m tokens, in the shape that the projector takes."""
    order: Tensor
    """int64[n]: the token at each position; -1 is `image_newline`. Each token has one position,
    among those of its image."""
    counts: Tensor
    """int64[images]: positions of each image, or video."""
    kept: Tensor | None = field(default=None, kw_only=True)
    """int64[n]: which of all tokens of its image, or video, stands at each position. None for a
    model that numbers its visual tokens like text."""
    grids: Tensor | None = field(default=None, kw_only=True)
    """float64[images, 4]: steps in time, rows and columns of all tokens of each image, or video, and
    how far one step in time moves the position. None as above."""

    @classmethod
    def in_order(cls, features: Tensor, *, num_media: int) -> Self:
        """Keep the order of tokens float[..., d]. Every image, or video, has the same number."""
        # All media have the same size here, so they share the tokens equally.
        num_tokens = features.shape[:-1].numel()
        order = torch.arange(num_tokens, device=features.device)
        return cls(features, order, torch.full((num_media,), num_tokens // num_media))

    @classmethod
    def of_image(cls, features: Tensor, order: Tensor) -> Self:
        """Put the tokens float[m, d] of one image in the order int64[n]."""
        return cls(features, order, torch.tensor([len(order)]))

    @classmethod
    def join(cls, parts: Sequence["VisualFeatures"]) -> Self:
        """Put several parts one after the other. Their features become float[m, d]."""
        features, orders = [], []
        num_tokens = 0
        for part in parts:
            tokens = part.features.flatten(0, -2)
            features.append(tokens)
            # Indices count from the first token of all parts; -1 stays -1.
            orders.append(torch.where(part.order < 0, part.order, part.order + num_tokens))
            num_tokens += len(tokens)

        counts = torch.cat([part.counts for part in parts])
        return cls(
            torch.cat(features),
            torch.cat(orders),
            counts,
            kept=_joined([part.kept for part in parts]),
            grids=_joined([part.grids for part in parts]),
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Apply a function to each tensor, e.g. move it to a device."""
        return replace(
            self,
            features=change(self.features),
            order=change(self.order),
            counts=change(self.counts),
            kept=None if self.kept is None else change(self.kept),
            grids=None if self.grids is None else change(self.grids),
        )


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Join what all parts have; None if none of them has it."""
    present = [part for part in parts if part is not None]
    assert len(present) in (0, len(parts))
    return torch.cat(present) if present else None


@dataclass(frozen=True)
class UnpackedFeatures(VisualFeatures):
    """All tokens of tiles, or of frames, before the model's own code packs them.

    That code runs after the projector and may average projected tokens, so these features can't be
    kept in a file. `order` is empty; `counts` are those after packing.
    """

    kind: str
    """"image" or "video"."""
    num_tiles: tuple[int, ...]
    """Tiles of each image, or frames of each video."""
    image_sizes: Tensor | None
    """int64[images, 2]: (height, width) in pixels; None for videos."""


@dataclass(frozen=True)
class LanguageInputs:
    """What the language model gets of a micro batch. The shape [...] is that of its token ids."""

    embeddings: Tensor
    """float[..., d_llm]: of text and visual tokens."""
    positions: Tensor | None = None
    """int64[3, ...]: step in time, row and column of each token. None if tokens are only counted."""
    added: tuple[Tensor, ...] = ()
    """float[..., d_llm] each: what is added to the outputs of the first layers, one after another."""
