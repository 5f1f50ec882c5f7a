"""VisionZip: keep the tokens that hold the attention, merge the rest by the similarity of their keys.

Source: arXiv 2412.04467, section 3, as the authors' released code computes it (repository dvlab-research/VisionZip,
`visionzip/clip_encoder.py`). Legend of shapes: see `vzip/reducers/base.py`; D dominant, C contextual, R = N - D remaining.
"""

from dataclasses import InitVar, dataclass, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vzip.errors import UserError, check_choice, check_count
from vzip.reducers.base import ANYRES, ReducerOutput, VisionTokens, budget_of_a_tile

MERGES = ("sum", "average")


def split_budget(budget: int) -> tuple[int, int]:
    """(D, C) of a budget at the paper's ratio of 5.4 : 1, e.g. 64 = 54 + 10, 128 = 108 + 20, 192 = 162 + 30."""
    contextual = round(budget / 6.4)
    return budget - contextual, contextual


def select_dominant(saliency: Tensor, num_dominant: int, *, has_cls: bool, keep_cls: bool) -> Tensor:
    """int64[B, D]: CLS, where there is one to keep, and the most salient patches of float[B, P], in raster order.

    D counts the kept CLS. Of equally salient patches the first in raster order wins, on every device.
    """
    with_cls = has_cls and keep_cls and num_dominant > 0
    order = saliency.argsort(dim=1, descending=True, stable=True)
    kept = order[:, : num_dominant - int(with_cls)].sort(dim=1).values + int(has_cls)
    return F.pad(kept, (1, 0), value=0) if with_cls else kept


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


@dataclass(kw_only=True)
class VisionZip:
    """D dominant tokens (CLS counted) and C contextual ones: D + C tokens an image, or a tile where there are several.

    Raises:
        UserError: counts that contradict each other, or a value that does not exist.
    """

    name: ClassVar[str] = "visionzip"
    uses_attention: ClassVar[bool] = True

    budget: InitVar[int | None] = None
    """D + C of `tiles` tiles, split at the paper's ratio; or give both of `dominant` and `contextual`."""
    tiles: InitVar[int] = 1
    """How many tiles the budget is the total of: the paper counts LLaVA-NeXT's over 5."""
    dominant: int = None  # type: ignore[assignment]  # of the budget, if not given
    """D of one tile. With 0 the CLS is dropped too."""
    contextual: int = None  # type: ignore[assignment]
    """C of one tile."""
    merge: str = "sum"
    """"sum" (the released code, and so the published numbers) or "average" (the paper's text)."""
    keep_cls: bool = True
    """Whether CLS is one of the dominant tokens."""
    layer: int | None = None
    """The hidden state whose layer's attention and keys are read; None: the one of the features, as the paper does."""
    anyres: str = "released"
    """Order of the tokens of several tiles, see `vzip.families.anyres`."""

    def __post_init__(self, budget: int | None, tiles: int) -> None:
        self._tiles = 1 if budget is None else tiles  # what an error speaks of
        check_choice("reducer.merge", self.merge, MERGES)
        check_choice("reducer.anyres", self.anyres, ANYRES)
        check_choice("reducer.keep_cls", self.keep_cls, (True, False))
        share = None if budget is None else budget_of_a_tile(budget, tiles)
        if self.dominant is None and self.contextual is None and share is not None:
            self.dominant, self.contextual = split_budget(share)
        if self.dominant is None or self.contextual is None:
            raise UserError(
                f"give reducer.budget, or both reducer.dominant and reducer.contextual "
                f"(got budget={budget}, dominant={self.dominant}, contextual={self.contextual})"
            )
        check_count("reducer.dominant", self.dominant, 0)
        check_count("reducer.contextual", self.contextual, 0)
        total = self.dominant + self.contextual
        if not total:
            raise UserError(
                "reducer.dominant=0 and reducer.contextual=0 keep nothing; one of them must be at least 1"
            )
        if share is not None and share != total:
            of_tiles = f" of each of {tiles} tiles" if tiles > 1 else ""
            raise UserError(
                f"reducer.budget={budget} is not dominant + contextual = {self.dominant} + {self.contextual} = "
                f"{total}{of_tiles}; set reducer.budget={total * tiles} (or null), or leave dominant and contextual out"
            )

    def __repr__(self) -> str:
        changed = [
            f"{f.name}={getattr(self, f.name)}"
            for f in fields(self)[2:]
            if getattr(self, f.name) != f.default
        ]
        return (
            f"VisionZip({', '.join([f'{self.dominant} dominant + {self.contextual} contextual', *changed])})"
        )

    def settings(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def num_tokens(self, num_patches: int, *, has_cls: bool, num_dropped: int) -> int:
        budget = self.dominant + self.contextual
        available = num_patches + (1 if has_cls and self.keep_cls and self.dominant else 0)
        if budget > available:
            cls = " and a CLS token" if available > num_patches else ""
            total = (
                f", a total of at most {available * self._tiles} for {self._tiles} tiles"
                if self._tiles > 1
                else ""
            )
            raise UserError(
                f"reducer.budget={budget * self._tiles} ({self.dominant} dominant + {self.contextual} contextual a picture) "
                f"is larger than the {available} tokens of a picture ({num_patches} patches{cls}); "
                f"choose at most {available}{total}"
            )
        return budget

    def __call__(self, tokens: VisionTokens) -> ReducerOutput:
        features, saliency, keys = tokens.features, tokens.saliency, tokens.keys
        assert saliency is not None and keys is not None, "VisionZip needs the tapped layer's attention"
        num_images, num_tokens, _ = features.shape
        self.num_tokens(saliency.shape[1], has_cls=tokens.has_cls, num_dropped=tokens.num_dropped)

        dominant = select_dominant(saliency, self.dominant, has_cls=tokens.has_cls, keep_cls=self.keep_cls)
        slots = torch.full((num_images, num_tokens), -1, device=features.device)
        slots.scatter_(
            1, dominant, torch.arange(self.dominant, device=features.device).expand(num_images, -1)
        )
        kept = take(features, dominant)
        if self.contextual == 0:
            return ReducerOutput(features=kept, dominant=dominant, contextual=dominant[:, :0], slots=slots)

        remaining = remaining_tokens(dominant, num_tokens, has_cls=tokens.has_cls)
        target_at, other_at, assigned = assign_to_targets(take(keys, remaining), self.contextual)
        targets, others = remaining[:, target_at], remaining[:, other_at]
        merged = merge(take(features, targets), take(features, others), assigned, self.merge)
        order = torch.arange(self.contextual, device=features.device).expand(num_images, -1)
        slots.scatter_(1, targets, self.dominant + order)
        slots.scatter_(1, others, self.dominant + assigned)
        return ReducerOutput(
            features=torch.cat([kept, merged], dim=1), dominant=dominant, contextual=targets, slots=slots
        )
