"""A vision tower run the way the released VisionZip code does it: the baseline of ours, for towers with a CLS.

Source: repository dvlab-research/VisionZip, `visionzip/clip_encoder.py`: the tower returns all hidden states and the whole
attention maps of all layers, for which its attention has to be the eager one; one row of the maps of the layer before the last
is used, with that layer's keys, which are caught as they are made.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vzip.reducers.base import VisionTokens
from vzip.tap import tower_layout

LAYER = -2
"""The hidden state that is taken, as LLaVA's `vision_feature_layer` has it."""


def eager_copy(tower: nn.Module) -> nn.Module:
    """The tower with eager attention; the weights are the same tensors."""
    eager: Any = copy.deepcopy(tower, {id(parameter): parameter for parameter in tower.parameters()})
    eager.set_attn_implementation("eager")
    return eager


@torch.no_grad()
def released_tokens(tower: Any, pixel_values: Tensor) -> VisionTokens:
    """What a reducer gets of float[B, 3, height, width], as `vzip.tap.run_tower` has it; `tower` is an `eager_copy`."""
    layout = tower_layout(tower.config)
    assert layout.has_cls and tower.config._attn_implementation == "eager"
    tapped = list(tower.get_submodule(layout.layers).children())[LAYER]
    caught: list[Tensor] = []
    handle = tapped.get_submodule(layout.keys).register_forward_hook(
        lambda module, args, output: caught.append(output)
    )
    try:
        outputs = tower(pixel_values, output_hidden_states=True, output_attentions=True)
    finally:
        handle.remove()
    maps = outputs.attentions[LAYER]  # [B, heads, N, N]
    return VisionTokens(
        features=outputs.hidden_states[LAYER],
        has_cls=True,
        num_dropped=1,
        saliency=maps[:, :, 0, 1:].float().mean(dim=1),
        keys=caught[0].unflatten(-1, (maps.shape[1], -1)).float().mean(dim=2),
    )
