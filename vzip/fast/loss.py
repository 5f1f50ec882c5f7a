"""Cross entropy of a frozen head, over the label tokens alone and a chunk of them at a time.

Legend of shapes: n label tokens, d width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vzip.patch import replaced_forwards

MAX_LOGITS = 2**25
"""Logits that exist at once: 128 MiB in float32, with twice as much beside them."""


class _CrossEntropy(torch.autograd.Function):
    """Computes the gradient together with the loss, chunk by chunk.

    No logits wait for the backward pass, and none are computed twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Any, targets: Tensor, chunk_size: int) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=hidden.device)

        gradients: list[Tensor] = []
        chunks = zip(torch.split(hidden, chunk_size), torch.split(targets, chunk_size), strict=True)
        for chunk, chunk_targets in chunks:
            # The logits are changed in place: on a CPU, allocating large tensors costs more than
            # filling them.
            logits = F.linear(chunk, head.weight, head.bias).to(dtype)

            # -log softmax at the target. Subtract the largest logit, so that exp can't overflow.
            highest = logits.amax(dim=1, keepdim=True)
            target_logits = logits.gather(1, chunk_targets[:, None]) - highest
            exponentials = logits.sub_(highest).exp_()
            mass = exponentials.sum(dim=1, keepdim=True)
            total += (mass.log() - target_logits).sum()

            # The gradient of the logits is softmax - 1 at the target, and softmax elsewhere.
            grad_logits = exponentials.div_(mass)
            grad_logits.scatter_add_(1, chunk_targets[:, None], torch.full_like(mass, -1.0))
            gradients.append(grad_logits.to(hidden.dtype) @ head.weight)

        # Save the gradient alone, which is as small as the hidden states.
        ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * gradients[0], None, None, None


def cross_entropy(head: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """Sum the cross entropy of the frozen head's logits: a scalar in float32 (float64 stays).

    Args:
        head: a linear layer, from float[n, d] to logits float[n, V].
        hidden: float[n, d].
        targets: int64[n].
    """
    chunk_size = max(1, MAX_LOGITS // head.out_features)

    def chunked(hidden: Tensor) -> Tensor:
        total: Tensor = _CrossEntropy.apply(hidden, head, targets, chunk_size)  # type: ignore[no-untyped-call]
        return total

    # Call the head as a module, and once. Its hooks gather sharded weights on all ranks, which wait
    # for each other, and ranks have different numbers of labels.
    with replaced_forwards({head: chunked}):
        total: Tensor = head(hidden)
    return total
