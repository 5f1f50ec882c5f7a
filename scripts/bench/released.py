"""Run a vision tower as the authors' VisionZip code does: the baseline for ours, for towers with a CLS token.

Source: repository dvlab-research/VisionZip, `visionzip/clip_encoder.py`. The tower returns the
hidden states and the whole attention maps of all layers, for which attention has to be the eager
one. One row of the maps of the last layer but one is used, with that layer's keys, which a hook
catches.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vzip.reducers.base import VisionTokens
from vzip.tap import tower_layout

# The hidden state that is used, as LLaVA's `vision_feature_layer` says.
LAYER = -2


def eager_copy(tower: nn.Module) -> nn.Module:
    """Return a copy of the tower with eager attention that shares the weights."""
    shared = {id(parameter): parameter for parameter in tower.parameters()}
    eager: Any = copy.deepcopy(tower, shared)
    eager.set_attn_implementation("eager")
    return eager


@torch.no_grad()
def released_tokens(tower: Any, pixel_values: Tensor) -> VisionTokens:
    """Compute what a reducer takes, as `vzip.tap.run_tower` does.

    Args:
        tower: an `eager_copy`.
        pixel_values: float[B, 3, height, width].
    """
    layout = tower_layout(tower.config)
    assert layout.has_cls and tower.config._attn_implementation == "eager"

    layers = list(tower.get_submodule(layout.layers).children())
    key_projection = layers[LAYER].get_submodule(layout.keys)
    keys: list[Tensor] = []
    handle = key_projection.register_forward_hook(lambda module, args, output: keys.append(output))
    try:
        outputs = tower(pixel_values, output_hidden_states=True, output_attentions=True)
    finally:
        handle.remove()

    maps = outputs.attentions[LAYER]  # [B, heads, N, N]
    num_heads = maps.shape[1]
    return VisionTokens(
        features=outputs.hidden_states[LAYER],
        has_cls=True,
        num_dropped=1,
        saliency=maps[:, :, 0, 1:].float().mean(dim=1),
        keys=keys[0].unflatten(-1, (num_heads, -1)).float().mean(dim=2),
    )
