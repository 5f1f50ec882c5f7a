"""Run a vision tower up to one layer, and read that layer's attention, or that of several layers.

The authors' released code makes all layers return full attention maps, only to use one row of one
layer. Here the tower stays on SDPA or FlashAttention. Forward hooks on one layer's `q_proj` and
`k_proj` catch its queries and keys, and only the attention that a reducer reads is computed from
them. The layers after it are skipped. All of this is in place during the call alone.

Legend of shapes: B images, N vision tokens, P patches, H heads, d width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from packaging import version
from torch import Tensor, nn

from vzip.errors import UserError
from vzip.patch import replaced_forwards
from vzip.reducers.base import VisionTokens

MAX_SCORES = 2**25
"""Attention scores to hold at a time: 128 MiB of float32, and as much for their softmax."""


@dataclass(frozen=True)
class TowerLayout:
    """Where a vision tower of `transformers` keeps its layers, and whether it has a CLS token."""

    layers: str
    """Name of the list of layers in the tower."""
    queries: str
    """Name of what computes the queries in a layer: a projection, or the norm behind it."""
    keys: str
    """Name of what computes the keys in a layer."""
    has_cls: bool
    """Whether token 0 is CLS."""
    norm: str | None = None
    """Name of the norm behind the last layer, if the model takes its output for layer -1."""


# transformers 5.18 renamed the projections of DINOv2.
_OLD_DINOV2 = version.parse(transformers.__version__) < version.parse("5.18")

TOWER_LAYOUTS = {
    "clip_vision_model": TowerLayout(
        layers="encoder.layers",
        queries="self_attn.q_proj",
        keys="self_attn.k_proj",
        has_cls=True,
    ),
    "dinov2": TowerLayout(
        layers="encoder.layer",
        queries="attention.attention.query" if _OLD_DINOV2 else "attention.q_proj",
        keys="attention.attention.key" if _OLD_DINOV2 else "attention.k_proj",
        has_cls=True,
    ),
    "internvl_vision": TowerLayout(
        layers="encoder.layer",
        # Behind the projections. In towers without these norms they return what they get.
        queries="attention.q_norm",
        keys="attention.k_norm",
        has_cls=True,
        norm="layernorm",
    ),
    "siglip_vision_model": TowerLayout(
        layers="encoder.layers",
        queries="self_attn.q_proj",
        keys="self_attn.k_proj",
        has_cls=False,
    ),
    "vit": TowerLayout(
        layers="layers",
        queries="attention.q_proj",
        keys="attention.k_proj",
        has_cls=True,
    ),
}
"""The supported kinds of vision towers, by `vision_config.model_type`."""


def tower_layout(config: Any) -> TowerLayout:
    """Return the layout of a vision tower by its config. Raises UserError for an unknown kind."""
    kind = config.model_type
    if kind not in TOWER_LAYOUTS:
        raise UserError(
            f"vision tower of type {kind!r} is not supported; "
            f"supported are: {', '.join(sorted(TOWER_LAYOUTS))}"
        )
    return TOWER_LAYOUTS[kind]


def layer_index(layer: int, num_layers: int, *, setting: str = "vision_feature_layer") -> int:
    """Return the index of the layer that computes `hidden_states[layer]`.

    In a tower of 24 layers, -2 is layer 22. `hidden_states` starts with the embeddings, so it has
    num_layers + 1 entries.

    Args:
        layer: index into the hidden states.
        num_layers: layers of the tower.
        setting: the name that an error message uses.

    Raises:
        UserError: anything but one of the layers.
    """
    if not isinstance(layer, int):
        raise UserError(f"{setting}={layer!r} is not one layer; a reducer needs one, e.g. -2")

    # Negative numbers count from the end; hidden state 0 is the embeddings.
    hidden_state = layer if layer >= 0 else layer + num_layers + 1
    if not 1 <= hidden_state <= num_layers:
        raise UserError(
            f"{setting}={layer} names no layer of the vision tower, which has {num_layers}; "
            f"choose 1 to {num_layers}, or {-num_layers} to -1"
        )
    return hidden_state - 1


def split_heads(states: Tensor, num_heads: int) -> Tensor:
    """Split float[B, N, H * head_dim] into float32[B, H, N, head_dim]; float64 stays float64."""
    heads = states.view(*states.shape[:2], num_heads, -1).transpose(1, 2)
    return heads.to(torch.promote_types(heads.dtype, torch.float32))


def cls_attention(queries: Tensor, keys: Tensor) -> Tensor:
    """Compute the softmax attention that CLS (token 0) pays to each patch, averaged over heads.

    Args:
        queries: float[B, H, N, head_dim].
        keys: float[B, H, N, head_dim].

    Returns:
        float[B, P].
    """
    # Only the query of CLS is needed: one row of the N x N attention map, at 1 / N of its cost.
    scale = queries.shape[-1] ** -0.5
    scores = (queries[:, :, :1] @ keys.transpose(2, 3)).mul(scale)

    # The softmax covers all tokens. The attention of CLS to itself is left out only afterwards.
    return scores.softmax(dim=-1)[:, :, 0, 1:].mean(dim=1)


def received_attention(queries: Tensor, keys: Tensor, max_scores: int = MAX_SCORES) -> Tensor:
    """Compute the attention that each token receives, averaged over heads and queries.

    Source: the paper's appendix A.2, for encoders without CLS.

    Args:
        queries: float[B, H, N, head_dim].
        keys: float[B, H, N, head_dim].
        max_scores: attention scores to hold at a time, but never fewer than those of one query.

    Returns:
        float[B, N].
    """
    num_images, num_heads, num_tokens, head_dim = keys.shape
    scale = head_dim**-0.5

    # Every query counts here. The map of all of them would be large, so take some at a time.
    scores_per_query = num_images * num_heads * num_tokens
    num_queries = max(1, max_scores // scores_per_query)

    total = queries.new_zeros(num_images, num_tokens)
    for some_queries in torch.split(queries, num_queries, dim=2):
        # Scaled in place: a third copy would exceed the bound.
        scores = (some_queries @ keys.transpose(2, 3)).mul_(scale)
        total += scores.softmax(dim=-1).mean(dim=1).sum(dim=1)
    return total / queries.shape[2]


def _pass_through(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


@contextmanager
def captured(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of modules, by name, while the block runs."""
    outputs: dict[str, Tensor] = {}

    def store_as(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            outputs[name] = output

        return hook

    # A forward hook sees a module's output without a change to the module. The hooks are removed
    # even if the block raises.
    handles = [module.register_forward_hook(store_as(name)) for name, module in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def captured_keywords(modules: dict[str, nn.Module]) -> Iterator[dict[str, dict[str, Any]]]:
    """Collect the keyword arguments of modules, by name, while the block runs."""
    keywords: dict[str, dict[str, Any]] = {}

    def store_as(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, given: dict[str, Any]) -> None:
            keywords[name] = given

        return hook

    handles = [
        module.register_forward_pre_hook(store_as(name), with_kwargs=True) for name, module in modules.items()
    ]
    try:
        yield keywords
    finally:
        for handle in handles:
            handle.remove()


def check_pixel_values(pixel_values: Tensor) -> None:
    """Raise UserError unless there is at least one picture, float[B, 3, height, width]."""
    if pixel_values.dim() != 4 or pixel_values.shape[1] != 3 or len(pixel_values) == 0:
        shape = list(pixel_values.shape)
        raise UserError(
            f"pixel_values of shape {shape} are no pictures: the vision tower takes "
            f"float[B, 3, height, width] with B >= 1; use what the model's processor returns"
        )


def _features_module(tower: nn.Module, layout: TowerLayout, layer: int, module: nn.Module) -> nn.Module:
    """Return the module whose output the model takes for a layer: the layer's, or the norm behind it."""
    return tower.get_submodule(layout.norm) if layer == -1 and layout.norm is not None else module


def run_tower(
    tower: nn.Module,
    pixel_values: Tensor,
    *,
    feature_layer: int,
    num_dropped: int,
    attention_layer: int | None,
    received_layers: Sequence[int] = (),
    **kwargs: Any,
) -> VisionTokens:
    """Return the tokens of `hidden_states[feature_layer]`, with the attention of some layers.

    Args:
        tower: a vision model of a kind in `TOWER_LAYOUTS`.
        pixel_values: float[B, 3, height, width].
        feature_layer: index into the hidden states, as LLaVA's `vision_feature_layer`.
        num_dropped: see `VisionTokens`.
        attention_layer: the hidden state whose layer's saliency and keys are computed, if any.
        received_layers: hidden states whose layers' `VisionTokens.received` is computed.
        kwargs: arguments of the tower, e.g. `interpolate_pos_encoding`.

    Raises:
        UserError: an unknown kind of tower, a layer that it does not have, or no pictures.
    """
    check_pixel_values(pixel_values)
    layout = tower_layout(tower.config)
    layers = list(tower.get_submodule(layout.layers).children())

    # List the outputs to catch, and the last layer that one of them needs. The features are what
    # LLaVA passes to its projector.
    last_layer = layer_index(feature_layer, len(layers))
    hooked = {"features": _features_module(tower, layout, feature_layer, layers[last_layer])}

    # Hook the projections to queries and keys: attention kernels return no maps, but take these.
    received = [layer_index(layer, len(layers), setting="reducer.object_layer") for layer in received_layers]
    layer = None
    if attention_layer is not None:
        layer = layer_index(attention_layer, len(layers), setting="reducer.layer")
    for index in received if layer is None else [*received, layer]:
        last_layer = max(last_layer, index)
        hooked[f"queries {index}"] = layers[index].get_submodule(layout.queries)
        hooked[f"keys {index}"] = layers[index].get_submodule(layout.keys)

    # Nothing reads the layers after the last one, so they return their input.
    skipped = dict.fromkeys(layers[last_layer + 1 :], _pass_through)
    with replaced_forwards(skipped), captured(hooked) as outputs:
        tower(pixel_values, **kwargs)

    tokens = VisionTokens(outputs["features"], has_cls=layout.has_cls, num_dropped=num_dropped)
    config: Any = tower.config
    return _with_attention(tokens, outputs, layer, received, num_heads=config.num_attention_heads)


@torch.no_grad()
def _with_attention(
    tokens: VisionTokens,
    outputs: Mapping[str, Tensor],
    layer: int | None,
    received: Sequence[int],
    *,
    num_heads: int,
) -> VisionTokens:
    """Add what reducers read of some layers' attention.

    Args:
        tokens: the tokens.
        outputs: holds queries and keys float[B, N, d] of each layer.
        layer: whose saliency and keys are computed, if any.
        received: layers of which the attention that patches receive is computed.
        num_heads: H.
    """
    # They only choose tokens, so no gradient goes through them.
    queries = {}
    keys = {}
    for index in {*received} if layer is None else {*received, layer}:
        queries[index] = split_heads(outputs[f"queries {index}"], num_heads)
        keys[index] = split_heads(outputs[f"keys {index}"], num_heads)

    # Without CLS, the saliency is the same as what the patches receive.
    first_patch = int(tokens.has_cls)
    by_layer = {}
    for index in set(received):
        by_layer[index] = received_attention(queries[index], keys[index])[:, first_patch:]
    tokens = replace(tokens, received=tuple(by_layer[index] for index in received))
    if layer is None:
        return tokens

    # Saliency ranks the patches, and keys say which of them are alike.
    if tokens.has_cls:
        saliency = cls_attention(queries[layer], keys[layer])
    elif layer in by_layer:
        saliency = by_layer[layer]
    else:
        saliency = received_attention(queries[layer], keys[layer])
    return replace(tokens, saliency=saliency, keys=keys[layer].mean(dim=1))
