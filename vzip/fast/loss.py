"""Cross entropy of a frozen head, over the label tokens alone and a few of them at a time.

Legend of shapes: n label tokens, d width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vzip.patch import replaced_forwards

MAX_LOGITS = 2**25
"""Logits held at once: 128 MiB of float32, and twice as much beside them."""


class _CrossEntropy(torch.autograd.Function):
    """The gradient is made with the loss, chunk by chunk: no logits wait for the backward pass, and none are made twice."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Any, targets: Tensor, num_examples: int) -> Tensor:
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        gradients: list[Tensor] = []
        for part, wanted in zip(
            torch.split(hidden, num_examples), torch.split(targets, num_examples), strict=True
        ):
            # In place: on a CPU, making large tensors costs more than filling them.
            high = F.linear(part, head.weight, head.bias).to(total.dtype)
            highest = high.amax(dim=1, keepdim=True)
            of_wanted = high.gather(1, wanted[:, None]) - highest
            mass = high.sub_(highest).exp_().sum(dim=1, keepdim=True)
            total += (mass.log() - of_wanted).sum()
            high.div_(mass).scatter_add_(1, wanted[:, None], torch.full_like(mass, -1.0))
            gradients.append(high.to(hidden.dtype) @ head.weight)
        ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (of_hidden,) = ctx.saved_tensors
        return of_hidden * gradients[0], None, None, None


def cross_entropy(head: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross entropy of the frozen head's logits, in float32 (float64 stays): a scalar.

    Args:
        head: a linear layer, from float[n, d] to logits float[n, V].
        hidden: float[n, d].
        targets: int64[n].
    """
    num_examples = max(1, MAX_LOGITS // head.out_features)

    def chunked(hidden: Tensor) -> Tensor:
        total: Tensor = _CrossEntropy.apply(hidden, head, targets, num_examples)  # type: ignore[no-untyped-call]
        return total

    # Called as a module, and once: sharded weights are gathered for it, by all ranks, however many labels each of them has.
    with replaced_forwards({head: chunked}):
        found: Tensor = head(hidden)
    return found
