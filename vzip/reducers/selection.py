"""Selectors: reducers that keep the best patches of a picture, by a rule of their own.

A selector chooses patches in `select`. Everything else is shared: the budget, the raster order, and
what becomes of the other patches. They are dropped, or merged as VisionZip does.

Legend of shapes: see `vzip/reducers/base.py`; K patches to keep.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vzip.errors import UserError, check_choice
from vzip.reducers.base import Budgeted, ReducerOutput, VisionTokens
from vzip.reducers.merging import MERGES, keep_and_merge, split_budget


class Selector(Budgeted):
    """Keep `budget` tokens of each picture.

    Args:
        budget: tokens to keep of `tiles` tiles together.
        tiles: number of tiles that the budget counts together.
        keep: share of a picture's patches to keep, instead of a budget.
        merge: what becomes of the patches that are not selected. None: they are dropped. "sum" or
            "average": they are merged as VisionZip does, and the budget is split at its ratio into
            selected and merged tokens.
        layer: hidden state whose layer's attention is read; None: that of the features.

    Raises:
        UserError: what `Budgeted` refuses, or a way of merging that does not exist.
    """

    def __init__(
        self,
        *,
        budget: int | None = None,
        tiles: int = 1,
        keep: float | None = None,
        merge: str | None = None,
        layer: int | None = None,
    ) -> None:
        super().__init__(budget=budget, tiles=tiles, keep=keep)
        check_choice("reducer.merge", merge, (None, *MERGES))
        self.merge = merge
        self.layer = layer

        # Merging compares the layer's keys.
        if merge is not None:
            self.uses_attention = True

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "merge": self.merge, "layer": self.layer}

    def select(self, tokens: VisionTokens, num_selected: int) -> Tensor:
        """Choose patches.

        Args:
            tokens: the patches, without CLS.
            num_selected: how many of each picture.

        Returns:
            int64[B, num_selected]: patch numbers, in any order.
        """
        raise NotImplementedError

    def __call__(self, tokens: VisionTokens) -> ReducerOutput:
        num_kept = self.num_kept(tokens)
        num_selected, num_contextual = (num_kept, 0) if self.merge is None else split_budget(num_kept)

        # The selection has no gradient. Patch 0 is token 1 if CLS comes first.
        with torch.no_grad():
            selected = self.select(tokens.without_cls(), num_selected)
        in_raster_order = selected.sort(dim=1).values + int(tokens.has_cls)
        return keep_and_merge(tokens, in_raster_order, num_contextual, how=self.merge)


def required_saliency(tokens: VisionTokens, reducer: str) -> Tensor:
    """Return the saliency. Raises UserError if the tower's attention was not computed."""
    if tokens.saliency is None:
        raise UserError(
            f"reducer={reducer} reads the attention of the vision tower, and there is none here; "
            f"give VisionTokens with saliency"
        )
    return tokens.saliency


def most_salient(saliency: Tensor, num_selected: int) -> Tensor:
    """Return the patches with the highest saliency. Of equal ones the first in raster order wins."""
    return saliency.argsort(dim=1, descending=True, stable=True)[:, :num_selected]


STRIPES = 4
"""Stripes in which `cosines` computes one half of its matrix. The other half is the same."""


def cosines(features: Tensor) -> Tensor:
    """Compute the cosine of each patch with each other: float[B, P, P], in float32 at least."""
    # In half precision, too many patches would be equally similar.
    accurate = features.to(torch.promote_types(features.dtype, torch.float32))
    directions = F.normalize(accurate, dim=-1)

    # Each stripe holds the patches of some columns with themselves, and with those after them.
    num_images, num_patches, _ = features.shape
    similar = directions.new_empty(num_images, num_patches, num_patches)
    width = math.ceil(num_patches / STRIPES)
    for first in range(0, num_patches, width):
        stripe = slice(first, first + width)
        below = directions[:, first:] @ directions[:, stripe].transpose(1, 2)
        similar[:, first:, stripe] = below
        similar[:, stripe, first:] = below.transpose(1, 2)
    return similar


def cover(coverage: Tensor, weights: Tensor, num_selected: int) -> Tensor:
    """Select patches one by one, so that they cover all patches best: the greedy way.

    A selection covers a patch as well as its best member does, and at least with 0. The gain of a
    candidate is what it would add, over all patches. The candidate with the highest score, the
    product of gain and weight, is selected. Of equal ones the first in raster order wins.

    Args:
        coverage: float[B, P, P]: how well a candidate (first P) covers each patch (second P).
        weights: float[B, P] of the candidates, not negative.
        num_selected: K.

    Returns:
        int64[B, K], in the order of selection.
    """
    # All candidates of all pictures stand one behind the other.
    num_images, num_patches, _ = coverage.shape
    rows = coverage.reshape(-1, num_patches)
    weight = weights.flatten()
    first = torch.arange(num_images, device=rows.device) * num_patches
    covered = coverage.new_zeros(num_images, num_patches)

    # A gain never grows, so an old score is an upper bound. Few of them must be computed again. `table`
    # shows the same scores by picture.
    scores = coverage.clamp(min=0).sum(dim=2).flatten() * weight
    table = scores.view(num_images, num_patches)

    def scores_of(candidates: Tensor, pictures: Tensor) -> Tensor:
        """Compute the scores of candidates int64[n] of the pictures int64[n]."""
        added = rows.index_select(0, candidates) - covered.index_select(0, pictures)
        gains = added.clamp_(min=0).sum(dim=1)

        # Rounding must not raise a score, and a selected patch keeps its -1.
        return torch.minimum(gains * weight.index_select(0, candidates), scores.index_select(0, candidates))

    picture = torch.arange(num_images, device=rows.device)
    selected = []
    for _ in range(num_selected):
        # The candidate with the best old score shows what can be reached; those below it can't win.
        reached = scores_of(table.argmax(dim=1) + first, picture)
        candidates = (table >= reached.unsqueeze(1)).flatten().nonzero().squeeze(1)
        scores.index_copy_(0, candidates, scores_of(candidates, candidates // num_patches))

        # Selected patches have the score -1, below all others.
        best = table.argmax(dim=1)
        selected.append(best)
        covered = torch.maximum(covered, rows.index_select(0, best + first))
        scores.index_fill_(0, best + first, -1)
    return torch.stack(selected, dim=1)
