"""VisionZip: keep the tokens that hold the attention, merge the rest by the similarity of their keys.

Source: arXiv 2412.04467, section 3, as the authors' released code computes it (repository dvlab-research/VisionZip,
`visionzip/clip_encoder.py`). Legend of shapes: see `vzip/reducers/base.py`; D dominant, C contextual, R = N - D remaining.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vzip.errors import UserError
from vzip.reducers.base import Reduction, VisionTokens

MERGES = ("sum", "average")


def split_budget(budget: int) -> tuple[int, int]:
    """(D, C) of a budget at the paper's ratio of 5.4 : 1, e.g. 64 = 54 + 10, 128 = 108 + 20, 192 = 162 + 30."""
    contextual = round(budget / 6.4)
    return budget - contextual, contextual


def select_dominant(saliency: Tensor, num_dominant: int, *, has_cls: bool) -> Tensor:
    """int64[B, D]: CLS, where there is one, and the most salient patches of float[B, P], in raster order.

    D counts the CLS. Of equally salient patches the first in raster order wins, on every device.
    """
    num_patches = max(num_dominant - 1, 0) if has_cls else num_dominant
    order = saliency.argsort(dim=1, descending=True, stable=True)
    kept = order[:, :num_patches].sort(dim=1).values
    if has_cls and num_dominant:
        kept = F.pad(kept + 1, (1, 0), value=0)
    return kept


def remaining_tokens(dominant: Tensor, num_tokens: int, *, has_cls: bool) -> Tensor:
    """int64[B, R]: the patches of N tokens that `dominant` (int64[B, D]) leaves, in raster order; never CLS."""
    free = torch.ones(dominant.shape[0], num_tokens, dtype=torch.bool, device=dominant.device)
    free.scatter_(1, dominant, False)
    free[:, : int(has_cls)] = False
    return free.nonzero()[:, 1].view(dominant.shape[0], -1)


def assign_to_targets(keys: Tensor, num_contextual: int) -> tuple[Tensor, Tensor, Tensor]:
    """Merge targets among float[B, R, k] keys: targets int64[C], others int64[R - C], and their target int64[B, R - C].

    Targets stand at 0, step, 2 step, ...; every other token goes to the target of the most similar key (cosine).
    """
    num_remaining = keys.shape[1]
    step = max(1, num_remaining // num_contextual)
    index = torch.arange(num_remaining, device=keys.device)
    is_target = (index % step == 0) & (index < step * num_contextual)
    directions = F.normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=-1)
    similarity = directions[:, ~is_target] @ directions[:, is_target].transpose(1, 2)
    return index[is_target], index[~is_target], similarity.argmax(dim=2)


def merge(targets: Tensor, others: Tensor, assigned: Tensor, how: str) -> Tensor:
    """float[B, C, d]: targets float[B, C, d] with the others float[B, R - C, d] assigned to them (int64[B, R - C]) merged in.

    "sum" is the released code: target + mean of its cluster. "average" is the mean of the target and its cluster, as the
    paper's text has it. A target without a cluster stays as it is, either way.
    """
    accurate = torch.promote_types(targets.dtype, torch.float32)
    members = F.one_hot(assigned, targets.shape[1]).transpose(1, 2).to(accurate)
    sizes = members.sum(dim=2, keepdim=True)
    total = members @ others.to(accurate)
    merged = targets + total / sizes.clamp(min=1) if how == "sum" else (targets + total) / (1 + sizes)
    return merged.to(targets.dtype)


def take(values: Tensor, indices: Tensor) -> Tensor:
    """float[B, T, d]: the rows int64[B, T] of float[B, N, d]."""
    return values.gather(1, indices.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


class VisionZip:
    """D dominant tokens (CLS counted) and C contextual ones: D + C tokens an image.

    Args:
        budget: D + C, split at the paper's ratio; or give both of the next two.
        dominant: D. With 0 the CLS is dropped too.
        contextual: C.
        merge: "sum" (the released code, and so the published numbers) or "average" (the paper's text).

    Raises:
        UserError: counts that contradict each other, or a `merge` that does not exist.
    """

    name: ClassVar[str] = "visionzip"
    uses_attention: ClassVar[bool] = True

    def __init__(
        self, *, budget: int | None = None, dominant: int | None = None, contextual: int | None = None, merge: str = "sum"
    ) -> None:
        if merge not in MERGES:
            raise UserError(f"reducer.merge={merge!r} does not exist; choose one of: {', '.join(MERGES)}")
        if dominant is None and contextual is None and budget is not None:
            dominant, contextual = split_budget(budget)
        if dominant is None or contextual is None:
            raise UserError(
                f"give reducer.budget, or both reducer.dominant and reducer.contextual "
                f"(got budget={budget}, dominant={dominant}, contextual={contextual})"
            )
        if dominant < 0 or contextual < 0 or dominant + contextual < 1:
            raise UserError(f"reducer.dominant={dominant} and reducer.contextual={contextual} must be >= 0 and sum to >= 1")
        if budget is not None and budget != dominant + contextual:
            raise UserError(
                f"reducer.budget={budget} is not dominant + contextual = {dominant} + {contextual} = {dominant + contextual}; "
                f"set reducer.budget={dominant + contextual} (or null), or leave dominant and contextual out"
            )
        self.dominant, self.contextual, self.merge = dominant, contextual, merge

    def __repr__(self) -> str:
        return f"VisionZip({self.dominant} dominant + {self.contextual} contextual, merge={self.merge})"

    def settings(self) -> dict[str, Any]:
        return {"dominant": self.dominant, "contextual": self.contextual, "merge": self.merge}

    def num_tokens(self, num_patches: int, *, has_cls: bool, num_dropped: int) -> int:
        budget = self.dominant + self.contextual
        available = num_patches + (1 if has_cls and self.dominant else 0)
        if budget > available:
            cls = " and a CLS token" if available > num_patches else ""
            raise UserError(
                f"reducer.budget={budget} ({self.dominant} dominant + {self.contextual} contextual) is larger than the "
                f"{available} tokens of an image ({num_patches} patches{cls}); choose a budget of at most {available}"
            )
        return budget

    def __call__(self, tokens: VisionTokens) -> Reduction:
        features, saliency, keys = tokens.features, tokens.saliency, tokens.keys
        assert saliency is not None and keys is not None, "VisionZip needs the tapped layer's attention"
        num_images, num_tokens, _ = features.shape
        self.num_tokens(saliency.shape[1], has_cls=tokens.has_cls, num_dropped=tokens.num_dropped)

        dominant = select_dominant(saliency, self.dominant, has_cls=tokens.has_cls)
        slots = torch.full((num_images, num_tokens), -1, device=features.device)
        slots.scatter_(1, dominant, torch.arange(self.dominant, device=features.device).expand(num_images, -1))
        kept = take(features, dominant)
        if self.contextual == 0:
            return Reduction(features=kept, dominant=dominant, contextual=dominant[:, :0], slots=slots)

        remaining = remaining_tokens(dominant, num_tokens, has_cls=tokens.has_cls)
        target_at, other_at, assigned = assign_to_targets(take(keys, remaining), self.contextual)
        targets, others = remaining[:, target_at], remaining[:, other_at]
        merged = merge(take(features, targets), take(features, others), assigned, self.merge)
        order = torch.arange(self.contextual, device=features.device).expand(num_images, -1)
        slots.scatter_(1, targets, self.dominant + order)
        slots.scatter_(1, others, self.dominant + assigned)
        return Reduction(features=torch.cat([kept, merged], dim=1), dominant=dominant, contextual=targets, slots=slots)
