"""Run a vision tower with a CLS token in the same steps as the authors' VisionZip code.

This is the baseline for our tower. Source: repository dvlab-research/VisionZip,
`visionzip/clip_encoder.py`. The tower returns the hidden states and the whole attention maps of all
layers, which only eager attention computes. The code uses one row of the maps of the last layer but
one. A hook keeps that layer's keys.
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
    """Copy the tower with eager attention. Both share the weights."""
    # A deep copy takes objects of this dictionary instead of copying them.
    shared = {id(parameter): parameter for parameter in tower.parameters()}
    eager: Any = copy.deepcopy(tower, shared)
    eager.set_attn_implementation("eager")
    return eager


@torch.no_grad()
def released_tokens(tower: Any, pixel_values: Tensor) -> VisionTokens:
    """Compute the input of a reducer. `vzip.tap.run_tower` does the same.

    Args:
        tower: an `eager_copy`.
        pixel_values: float[B, 3, height, width].
    """
    layout = tower_layout(tower.config)
    assert layout.has_cls and tower.config._attn_implementation == "eager"

    # The keys are not among the tower's outputs, so a hook on their projection keeps them.
    layers = list(tower.get_submodule(layout.layers).children())
    key_projection = layers[LAYER].get_submodule(layout.keys)
    keys: list[Tensor] = []
    handle = key_projection.register_forward_hook(lambda module, args, output: keys.append(output))
    try:
        outputs = tower(pixel_values, output_hidden_states=True, output_attentions=True)
    finally:
        handle.remove()

    # Saliency is the attention from CLS (token 0) to the patches, averaged over the heads.
    maps = outputs.attentions[LAYER]  # [B, heads, N, N]
    num_heads = maps.shape[1]
    return VisionTokens(
        features=outputs.hidden_states[LAYER],
        has_cls=True,
        num_dropped=1,
        saliency=maps[:, :, 0, 1:].float().mean(dim=1),
        keys=keys[0].unflatten(-1, (num_heads, -1)).float().mean(dim=2),
    )
