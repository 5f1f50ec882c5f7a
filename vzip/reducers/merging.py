"""Merging: what becomes of the patches that a reducer does not select.

VisionZip's way: every k-th of the remaining patches is a merge target, and every other one is
merged into the target with the most similar key. Reducers share it, so that each selection can be
combined with it.

Source: arXiv 2412.04467, section 3, and the authors' released code (repository
dvlab-research/VisionZip, `visionzip/clip_encoder.py`), whose results this module reproduces.

Legend of shapes: see `vzip/reducers/base.py`; R remaining patches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vzip.errors import UserError
from vzip.reducers.base import ReducerOutput, VisionTokens

MERGES = ("sum", "average")


def split_budget(budget: int) -> tuple[int, int]:
    """Split a budget into (D, C) at the paper's ratio of 5.4 : 1."""
    # 64 = 54 + 10, 128 = 108 + 20, 192 = 162 + 30.
    contextual = round(budget / 6.4)
    return budget - contextual, contextual


def remaining_tokens(dominant: Tensor, num_tokens: int, *, has_cls: bool) -> Tensor:
    """List the patches that are not dominant, in raster order. CLS is never among them.

    Args:
        dominant: int64[B, D].
        num_tokens: N.
        has_cls: whether token 0 is CLS.

    Returns:
        int64[B, R]: indices into the N vision tokens.
    """
    # Mark all tokens, and unmark the dominant ones and CLS.
    is_left = torch.ones(dominant.shape[0], num_tokens, dtype=torch.bool, device=dominant.device)
    is_left.scatter_(1, dominant, False)
    is_left[:, : int(has_cls)] = False

    # The same number remains of each picture, so the list of all indices can be cut into rows.
    return is_left.nonzero()[:, 1].view(dominant.shape[0], -1)


def assign_to_targets(keys: Tensor, num_contextual: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the merge targets, and a target for every other token.

    Targets stand at 0, step, 2 step, ... of the remaining patches. Every other token goes to the
    target with the most similar key (cosine).

    Args:
        keys: float[B, R, head_dim].
        num_contextual: C.

    Returns:
        Indices of the targets int64[C] and of the others int64[R - C] among the remaining patches,
        and the number of the target that each other token is assigned to, int64[B, R - C].
    """
    # Spread the targets evenly over the picture. The step is rounded down, so its multiples may go
    # on after C targets; patches there are ordinary ones, as in the released code.
    num_remaining = keys.shape[1]
    step = max(1, num_remaining // num_contextual)
    index = torch.arange(num_remaining, device=keys.device)
    is_target = (index % step == 0) & (index < step * num_contextual)

    # Similar patches have similar keys. The argmax decides, so it is computed in float32 at least.
    directions = F.normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=-1)
    similarity = directions[:, ~is_target] @ directions[:, is_target].transpose(1, 2)
    return index[is_target], index[~is_target], similarity.argmax(dim=2)


def merge(targets: Tensor, others: Tensor, assigned: Tensor, how: str) -> Tensor:
    """Merge every other token into the target that it is assigned to.

    A target to which nothing is assigned is unchanged, in both ways of merging.

    Args:
        targets: float[B, C, d].
        others: float[B, R - C, d].
        assigned: int64[B, R - C], the target of each other token.
        how: "sum", as in the released code: the target plus the mean of its cluster. "average", as
            in the paper's text: the mean of target and cluster.

    Returns:
        float[B, C, d], in the precision of `targets`.
    """
    # Sums over clusters are matrix products with a 0/1 matrix, in float32 at least.
    accurate = torch.promote_types(targets.dtype, torch.float32)
    members = F.one_hot(assigned, targets.shape[1]).transpose(1, 2).to(accurate)
    sizes = members.sum(dim=2, keepdim=True)
    total = members @ others.to(accurate)

    # An empty cluster has the sum 0, so its target is unchanged.
    if how == "sum":
        merged = targets + total / sizes.clamp(min=1)
    else:
        merged = (targets + total) / (1 + sizes)
    return merged.to(targets.dtype)


def take(values: Tensor, indices: Tensor) -> Tensor:
    """Take the rows int64[B, T] of float[B, N, d]: float[B, T, d]."""
    return values.gather(1, indices.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def keep_and_merge(
    tokens: VisionTokens, dominant: Tensor, num_contextual: int, *, how: str | None
) -> ReducerOutput:
    """Keep the selected tokens unchanged, and merge the other patches into C targets.

    Args:
        tokens: all tokens, with keys if there is something to merge.
        dominant: int64[B, D]: the selected ones, in raster order.
        num_contextual: C. With 0, the other patches are dropped.
        how: "sum" or "average", see `merge`. None if nothing is merged.
    """
    num_images, num_tokens, _ = tokens.features.shape
    num_dominant = dominant.shape[1]

    # Selected tokens take the first D slots of the output.
    kept = take(tokens.features, dominant)
    slot = torch.arange(num_dominant + num_contextual, device=kept.device).expand(num_images, -1)
    slots = torch.full((num_images, num_tokens), -1, device=kept.device)
    slots.scatter_(1, dominant, slot[:, :num_dominant])
    if num_contextual == 0:
        nothing = dominant[:, :0]
        return ReducerOutput(features=kept, dominant=dominant, contextual=nothing, slots=slots)

    if tokens.keys is None or how is None:
        raise UserError(
            "merging reads the keys of the vision tower's attention, and there are none here; "
            "give VisionTokens with keys"
        )

    # Keys choose the target, features are merged.
    remaining = remaining_tokens(dominant, num_tokens, has_cls=tokens.has_cls)
    target_index, other_index, assigned = assign_to_targets(take(tokens.keys, remaining), num_contextual)
    targets = remaining[:, target_index]
    others = remaining[:, other_index]
    merged = merge(take(tokens.features, targets), take(tokens.features, others), assigned, how)

    # Each target takes one of the last C slots, together with the tokens assigned to it.
    slots.scatter_(1, targets, slot[:, num_dominant:])
    slots.scatter_(1, others, num_dominant + assigned)
    return ReducerOutput(
        features=torch.cat([kept, merged], dim=1),
        dominant=dominant,
        contextual=targets,
        slots=slots,
    )
