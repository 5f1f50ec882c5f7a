"""Cross entropy of a frozen head, over the label tokens alone and a few of them at a time.

Legend of shapes: n label tokens, d width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_LOGITS = 2**25
"""Logits held at once: 128 MiB of float32, and twice as much beside them."""


class _CrossEntropy(torch.autograd.Function):
    """The gradient is made with the loss, chunk by chunk: no logits wait for the backward pass, and none are made twice."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Any, targets: Tensor, num_rows: int) -> Tensor:
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        gradients: list[Tensor] = []
        for part, wanted in zip(torch.split(hidden, num_rows), torch.split(targets, num_rows), strict=True):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                loss = F.cross_entropy(head(part).to(total.dtype), wanted, reduction="sum")
            gradients += torch.autograd.grad(loss, part)
            total += loss.detach()
        ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (of_hidden,) = ctx.saved_tensors
        return of_hidden * gradients[0], None, None, None


def cross_entropy(head: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross entropy of the frozen head's logits, in float32 (float64 stays): a scalar.

    Args:
        head: from float[n, d] to logits float[n, V].
        hidden: float[n, d].
        targets: int64[n].
    """
    num_rows = max(1, MAX_LOGITS // head.weight.shape[0])
    total: Tensor = _CrossEntropy.apply(hidden, head, targets, num_rows)  # type: ignore[no-untyped-call]
    return total
