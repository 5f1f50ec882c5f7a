"""What a vision tower's attention looks like, in numbers: per patch, per layer, and what the softmax makes of its gradient.

The tower stays on SDPA: forward hooks give the queries and keys of all layers (`vzip.tap`), from which only what is needed is
computed, in chunks. Legend of shapes: B pictures, N vision tokens, P patches, H heads.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vzip.families import Family
from vzip.reducers.visionzip import VisionZip
from vzip.tap import MAX_SCORES, captured, cls_attention, received_attention, split_heads, tower_layout

SMALLEST, BINS = 1e-8, 32
"""Attention weights below the first count as it; bins of the weights up to 1, equally wide in their logarithm."""
ALL_LAYERS = VisionZip(dominant=1, contextual=0, layer=-1)
"""A reducer for which a tower runs to its last layer."""


@dataclass(frozen=True)
class LayerAttention:
    """The attention of one layer: that of CLS to the patches, or, in a tower without CLS, all tokens' to each other."""

    queries: Tensor
    """float32[B, H, N, head_dim]."""
    keys: Tensor
    """float32[B, H, N, head_dim]."""
    has_cls: bool

    def shares(self) -> Tensor:
        """float32[B, P]: each patch's share of the attention that all patches get, averaged over heads: the saliency of
        `vzip.reducers.base.VisionTokens`, summing to 1.
        """
        attention = cls_attention if self.has_cls else received_attention
        saliency = attention(self.queries, self.keys)
        return saliency / saliency.sum(dim=1, keepdim=True)

    def rows(self, max_scores: int = MAX_SCORES) -> Iterator[Tensor]:
        """float32[rows, N]: the softmax rows that the shares are averages of, at most about `max_scores` numbers at once."""
        queries = self.queries[:, :, :1] if self.has_cls else self.queries
        step = max(1, max_scores // self.keys[:, :, :, 0].numel())
        for part in torch.split(queries, step, dim=2):
            scores = (part @ self.keys.transpose(2, 3)).mul_(part.shape[-1] ** -0.5)
            yield scores.softmax(dim=-1).flatten(0, 2)


@torch.no_grad()
def attention_of_layers(family: Family, pixel_values: Tensor) -> list[LayerAttention]:
    """The attention of each layer of the tower, first to last, on float[B, 3, height, width]: one run of the tower."""
    tower: Any = family.tower
    layout = tower_layout(tower.config)
    layers = enumerate(tower.get_submodule(layout.layers).children())
    parts = {
        (index, part): layer.get_submodule(getattr(layout, part))
        for index, layer in layers
        for part in ("queries", "keys")
    }
    with captured({str(name): module for name, module in parts.items()}) as outputs:
        family.vision_tokens(ALL_LAYERS, pixel_values)
    heads = {name: split_heads(outputs[str(name)], tower.config.num_attention_heads) for name in parts}
    return [
        LayerAttention(queries=heads[index, "queries"], keys=heads[index, "keys"], has_cls=layout.has_cls)
        for index in range(len(heads) // 2)
    ]


def top_shares(shares: Tensor, counts: Sequence[int]) -> list[float]:
    """The share of the attention that the k most attended patches hold, for each k, averaged over pictures; of float[B, P]."""
    held = shares.sort(dim=1, descending=True).values.cumsum(dim=1).mean(dim=0)
    return [float(held[count - 1]) for count in counts]


def num_holding(shares: Tensor, share: float) -> list[int]:
    """Of each picture, the least number of patches that hold this share of the attention; of float[B, P]."""
    held = shares.sort(dim=1, descending=True).values.cumsum(dim=1)
    return [int(count) + 1 for count in (held < share).sum(dim=1)]


def softmax_gradient(layers: Iterable[LayerAttention]) -> dict[str, Any]:
    """The gradient of the softmax, dp_i/dz_i = p_i (1 - p_i), over the attention weight p_i: measured on whole rows.

    Source: the appendix of arXiv 2412.04467, which explains with it why attention gathers in few tokens.

    Returns:
        `bins`: of the weights, with the number of weights and their mean weight and gradient; empty ones are left out.
        `top_tenth`: what the tenth of each row's tokens with the most attention has of all attention and of all gradient.
    """
    edges = torch.logspace(torch.tensor(SMALLEST).log10().item(), 0, BINS + 1)
    sums = torch.zeros(3, BINS, dtype=torch.float64)  # number, weight, gradient
    top, num_examples, num_tokens = torch.zeros(2, dtype=torch.float64), 0, 0
    for layer in layers:
        for rows in layer.rows():
            gradient = rows * (1 - rows)
            places = torch.bucketize(rows, edges[1:-1].to(rows)).flatten()
            for total, values in zip(sums, (torch.ones_like(rows), rows, gradient), strict=True):
                total += torch.bincount(places, values.flatten().double(), minlength=BINS).cpu()
            most = rows.topk(max(1, rows.shape[1] // 10), dim=1).indices
            top += torch.stack([values.gather(1, most).double().sum() for values in (rows, gradient)]).cpu()
            num_examples, num_tokens = num_examples + len(rows), rows.shape[1]
    bins = [
        {
            "from": low,
            "to": high,
            "weights": int(count),
            "mean_weight": weight / count,
            "mean_gradient": gradient / count,
        }
        for low, high, (count, weight, gradient) in zip(
            edges[:-1].tolist(), edges[1:].tolist(), sums.T.tolist(), strict=True
        )
        if count
    ]
    weight, gradient = (top / sums[1:].sum(dim=1)).tolist()
    return {
        "num_rows": num_examples,
        "num_tokens": num_tokens,
        "top_tenth": {"tokens": max(1, num_tokens // 10), "attention": weight, "gradient": gradient},
        "bins": bins,
    }
