"""Run a vision tower up to one layer, and read that layer's attention while it stays on SDPA or FlashAttention.

The released code asks all layers for full attention maps to use one row of one layer. Here forward hooks on the tapped
layer's `q_proj` and `k_proj` give the queries and keys, from which only what is needed is computed; the layers after it
are passed through. The tower is touched during the call alone.

Legend of shapes: B images, N vision tokens, P patches, H heads, d width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from packaging import version
from torch import Tensor, nn

from vzip.errors import UserError
from vzip.patch import replaced_forwards
from vzip.reducers.base import VisionTokens

MAX_SCORES = 2**25
"""Attention scores held at once where there is no CLS: 128 MiB of float32, and as much for their softmax."""


@dataclass(frozen=True)
class TowerLayout:
    """Where a vision tower of `transformers` keeps its layers, and whether it has a CLS token."""

    layers: str
    queries: str
    keys: str
    has_cls: bool


def _layouts() -> dict[str, TowerLayout]:
    q, k = "self_attn.q_proj", "self_attn.k_proj"
    old = version.parse(transformers.__version__) < version.parse("5.18")
    dinov2 = (
        ("attention.attention.query", "attention.attention.key")
        if old
        else ("attention.q_proj", "attention.k_proj")
    )
    return {
        "clip_vision_model": TowerLayout(layers="encoder.layers", queries=q, keys=k, has_cls=True),
        "dinov2": TowerLayout(layers="encoder.layer", queries=dinov2[0], keys=dinov2[1], has_cls=True),
        "siglip_vision_model": TowerLayout(layers="encoder.layers", queries=q, keys=k, has_cls=False),
    }


TOWER_LAYOUTS = _layouts()


def tower_layout(config: Any) -> TowerLayout:
    """The layout of the vision tower with this config. Raises UserError for a kind that is not in `TOWER_LAYOUTS`."""
    kind = config.model_type
    if kind not in TOWER_LAYOUTS:
        raise UserError(
            f"vision tower of type {kind!r} is not supported; supported are: {', '.join(sorted(TOWER_LAYOUTS))}"
        )
    return TOWER_LAYOUTS[kind]


def layer_index(layer: int, num_layers: int, *, setting: str = "vision_feature_layer") -> int:
    """Index of the layer whose output is `hidden_states[layer]`: of 24 layers, -2 is layer 22.

    `hidden_states` starts with the embeddings, so it has num_layers + 1 entries. Raises UserError, naming the setting, for
    anything but one of the layers.
    """
    if not isinstance(layer, int):
        raise UserError(f"{setting}={layer!r} is not one layer; a reducer needs one, e.g. -2")
    index = (layer if layer >= 0 else layer + num_layers + 1) - 1
    if not 0 <= index < num_layers:
        raise UserError(
            f"{setting}={layer} names no layer of the vision tower, which has {num_layers}; "
            f"choose 1 to {num_layers}, or {-num_layers} to -1"
        )
    return index


def split_heads(states: Tensor, num_heads: int) -> Tensor:
    """float32[B, H, N, head_dim] (float64 stays) of float[B, N, H * head_dim]."""
    heads = states.view(*states.shape[:2], num_heads, -1).transpose(1, 2)
    return heads.to(torch.promote_types(heads.dtype, torch.float32))


def cls_attention(queries: Tensor, keys: Tensor) -> Tensor:
    """float[B, P]: softmax attention of CLS (token 0) to each patch, averaged over heads, of float[B, H, N, head_dim]."""
    scores = (queries[:, :, :1] @ keys.transpose(2, 3)).mul(queries.shape[-1] ** -0.5)
    return scores.softmax(dim=-1)[:, :, 0, 1:].mean(dim=1)


def received_attention(queries: Tensor, keys: Tensor, max_scores: int = MAX_SCORES) -> Tensor:
    """float[B, N]: attention each token receives, averaged over heads and queries, of float[B, H, N, head_dim].

    Source: the paper's appendix A.2, for encoders without CLS. At most `max_scores` scores are held at once, though never
    fewer than those of one query.
    """
    num_images, num_heads, num_tokens, _ = keys.shape
    total = queries.new_zeros(num_images, num_tokens)
    for rows in torch.split(queries, max(1, max_scores // (num_images * num_heads * num_tokens)), dim=2):
        scores = (rows @ keys.transpose(2, 3)).mul_(
            queries.shape[-1] ** -0.5
        )  # in place: a third copy would stand beside
        total += scores.softmax(dim=-1).mean(dim=1).sum(dim=1)
    return total / queries.shape[2]


def _pass_through(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


@contextmanager
def captured(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of `modules`, by name, while the block runs."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            outputs[name] = output

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def check_pixel_values(pixel_values: Tensor) -> None:
    """Raises UserError unless there is at least one picture, float[B, 3, height, width]."""
    if pixel_values.dim() != 4 or pixel_values.shape[1] != 3 or not pixel_values.shape[0]:
        shape = list(pixel_values.shape)
        raise UserError(
            f"pixel_values of shape {shape} are no pictures: the vision tower takes float[B, 3, height, width] with "
            f"B >= 1; use what the model's processor returns"
        )


def run_tower(
    tower: nn.Module,
    pixel_values: Tensor,
    *,
    feature_layer: int,
    num_dropped: int,
    attention_layer: int | None,
    **kwargs: Any,
) -> VisionTokens:
    """The tokens that `hidden_states[feature_layer]` of the tower holds, with the attention of one of its layers.

    Args:
        tower: a vision model of a kind in `TOWER_LAYOUTS`.
        pixel_values: float[B, 3, height, width].
        feature_layer: index into the tower's hidden states, as `vision_feature_layer` of LLaVA's config.
        num_dropped: see `VisionTokens`.
        attention_layer: the hidden state whose layer's saliency and keys are wanted; None: neither.
        kwargs: for the tower, e.g. `interpolate_pos_encoding`.

    Raises:
        UserError: an unknown kind of tower, a layer that it does not have, or pixel values that are no pictures.
    """
    check_pixel_values(pixel_values)
    layout = tower_layout(tower.config)
    layers = list(tower.get_submodule(layout.layers).children())
    index = last = layer_index(feature_layer, len(layers))
    tapped = {"features": layers[index]}
    if attention_layer is not None:
        tap = layer_index(attention_layer, len(layers), setting="reducer.layer")
        last = max(index, tap)
        tapped |= {name: layers[tap].get_submodule(getattr(layout, name)) for name in ("queries", "keys")}
    with replaced_forwards(dict.fromkeys(layers[last + 1 :], _pass_through)), captured(tapped) as outputs:
        tower(pixel_values, **kwargs)
    if attention_layer is None:
        return VisionTokens(features=outputs["features"], has_cls=layout.has_cls, num_dropped=num_dropped)
    with torch.no_grad():
        num_heads: int = tower.config.num_attention_heads  # type: ignore[union-attr, assignment]
        queries, keys = (split_heads(outputs[name], num_heads) for name in ("queries", "keys"))
        saliency = cls_attention(queries, keys) if layout.has_cls else received_attention(queries, keys)
        return VisionTokens(
            features=outputs["features"],
            has_cls=layout.has_cls,
            num_dropped=num_dropped,
            saliency=saliency,
            keys=keys.mean(dim=1),
        )
