"""Measure the attention of a vision tower: per patch, per layer, and the gradient of the softmax.

The tower stays on SDPA. Forward hooks give the queries and keys of all layers (`vzip.tap`), and
only what is needed is computed from them, in chunks. Shapes: B pictures, N vision tokens, P
patches, L layers, H heads.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vzip.families import Family
from vzip.reducers.visionzip import VisionZip
from vzip.tap import MAX_SCORES, captured, cls_attention, received_attention, split_heads, tower_layout

SMALLEST = 1e-8
"""Attention weights below this count as this."""
NUM_BINS = 32
"""Bins of attention weights from `SMALLEST` to 1, equally wide in the logarithm."""
ALL_LAYERS = VisionZip(dominant=1, contextual=0, layer=-1)
"""A reducer that makes a tower run to its last layer."""


@dataclass(frozen=True)
class LayerAttention:
    """The attention of one layer.

    It goes from CLS to the patches, or, in a tower without CLS, from all tokens to each other.
    """

    queries: Tensor
    """float32[B, H, N, head_dim]."""
    keys: Tensor
    """float32[B, H, N, head_dim]."""
    has_cls: bool

    def shares(self) -> Tensor:
        """Return each patch's share of the attention on all patches: float32[B, P].

        This is the saliency of `vzip.reducers.base.VisionTokens`, scaled to a sum of 1.
        """
        # Scaling removes the attention of CLS to itself, which is not on any patch.
        attention = cls_attention if self.has_cls else received_attention
        saliency = attention(self.queries, self.keys)
        return saliency / saliency.sum(dim=1, keepdim=True)

    def rows(self, max_scores: int = MAX_SCORES) -> Iterator[Tensor]:
        """Yield the softmax rows that the shares average: float32[rows, N].

        At most `max_scores` numbers are in memory at once, or those of one query.
        """
        queries = self.queries[:, :, :1] if self.has_cls else self.queries

        # A query has one score for each image, head and key.
        scores_per_query = self.keys[:, :, :, 0].numel()
        step = max(1, max_scores // scores_per_query)
        for chunk in torch.split(queries, step, dim=2):
            scores = (chunk @ self.keys.transpose(2, 3)).mul_(chunk.shape[-1] ** -0.5)
            yield scores.softmax(dim=-1).flatten(0, 2)


@torch.no_grad()
def attention_of_layers(family: Family, pixel_values: Tensor) -> list[LayerAttention]:
    """Run the tower once on float[B, 3, height, width], and return the attention of each layer."""
    tower: Any = family.tower
    layout = tower_layout(tower.config)
    layers = list(tower.get_submodule(layout.layers).children())
    modules = {}
    for index, layer in enumerate(layers):
        modules[f"queries {index}"] = layer.get_submodule(layout.queries)
        modules[f"keys {index}"] = layer.get_submodule(layout.keys)

    # Hooks store what the projections return. The tower's own output is not needed.
    with captured(modules) as outputs:
        family.vision_tokens(ALL_LAYERS, pixel_values)

    attention = []
    for index in range(len(layers)):
        queries = split_heads(outputs[f"queries {index}"], tower.config.num_attention_heads)
        keys = split_heads(outputs[f"keys {index}"], tower.config.num_attention_heads)
        attention.append(LayerAttention(queries=queries, keys=keys, has_cls=layout.has_cls))
    return attention


def _cumulated(shares: Tensor) -> Tensor:
    """Sum the attention on the 1, 2, ... most attended patches: float[B, P]."""
    return shares.sort(dim=1, descending=True).values.cumsum(dim=1)


def top_shares(shares: Tensor, counts: Sequence[int]) -> list[float]:
    """Return the mean attention on the k most attended patches, for each k in `counts`.

    `shares`: float[B, P].
    """
    attention = _cumulated(shares).mean(dim=0)
    return [float(attention[count - 1]) for count in counts]


def num_holding(shares: Tensor, share: float) -> list[int]:
    """Return the smallest number of patches with this share of the attention, for each picture.

    `shares`: float[B, P].
    """
    num_below = (_cumulated(shares) < share).sum(dim=1)
    return [int(count) + 1 for count in num_below]


def softmax_gradient(layers: Iterable[LayerAttention]) -> dict[str, Any]:
    """Measure the gradient of the softmax, p_i (1 - p_i), against the attention weight p_i.

    Source: the appendix of arXiv 2412.04467. Its formula dp_i/dz_i = p_i (1 - p_i) explains why
    attention gathers in few tokens.

    Returns:
        "bins": the number of weights, their mean weight and their mean gradient, for each size of
            weight that occurs.
        "top_tenth": the share of the attention and of the gradient that the most attended tenth of
            the tokens gets.
        "num_rows" and "num_tokens": how many softmax rows there were, and how long they are.
    """
    # Weights spread over many powers of ten, so the bins are equally wide in the logarithm.
    edges = torch.logspace(torch.tensor(SMALLEST).log10().item(), 0, NUM_BINS + 1)

    # Sums are in float64: there are millions of weights, most of them tiny.
    num_weights, sum_of_weights, sum_of_gradients = torch.zeros(3, NUM_BINS, dtype=torch.float64)
    top = torch.zeros(2, dtype=torch.float64)  # weight, gradient
    num_rows = 0
    num_tokens = 0
    for layer in layers:
        for rows in layer.rows():
            gradient = rows * (1 - rows)

            # Without the outermost edges, the first and the last bin take what lies beyond them.
            bins = torch.bucketize(rows, edges[1:-1].to(rows)).flatten()
            num_weights += _sum_by_bin(bins, torch.ones_like(rows))
            sum_of_weights += _sum_by_bin(bins, rows)
            sum_of_gradients += _sum_by_bin(bins, gradient)

            # The paper's claim: few tokens get most of the gradient. Sum the top tenth of each row.
            most = rows.topk(max(1, rows.shape[1] // 10), dim=1).indices
            sums = [values.gather(1, most).double().sum() for values in (rows, gradient)]
            top += torch.stack(sums).cpu()
            num_rows += len(rows)
            num_tokens = rows.shape[1]

    return {
        "num_rows": num_rows,
        "num_tokens": num_tokens,
        "top_tenth": {
            "tokens": max(1, num_tokens // 10),
            "attention": float(top[0] / sum_of_weights.sum()),
            "gradient": float(top[1] / sum_of_gradients.sum()),
        },
        "bins": _filled_bins(edges, num_weights, sum_of_weights, sum_of_gradients),
    }


def _filled_bins(
    edges: Tensor, num_weights: Tensor, sum_of_weights: Tensor, sum_of_gradients: Tensor
) -> list[dict[str, float]]:
    """List the bins that hold weights, with the means of each. An empty bin has no mean."""
    filled = []
    for index, count in enumerate(num_weights.tolist()):
        if count:
            filled.append(
                {
                    "from": float(edges[index]),
                    "to": float(edges[index + 1]),
                    "weights": int(count),
                    "mean_weight": float(sum_of_weights[index]) / count,
                    "mean_gradient": float(sum_of_gradients[index]) / count,
                }
            )
    return filled


def _sum_by_bin(bins: Tensor, values: Tensor) -> Tensor:
    """Sum the values in each bin: float64[bins], on the CPU."""
    return torch.bincount(bins, values.flatten().double(), minlength=NUM_BINS).cpu()
