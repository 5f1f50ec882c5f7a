"""What a tuning run costs: FLOPs and memory. Multiply-adds count as two FLOPs.

Source of the transformer formula: arXiv 2412.04467, section 4 (with a SwiGLU FFN's three matrices).
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from vzip.families import Family
from vzip.reducers import Reducer


def linear_flops(module: nn.Module) -> int:
    """FLOPs that the module's linear layers take for one token."""
    return sum(2 * m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def attention_flops(config: Any, num_tokens: int) -> int:
    """FLOPs of QK^T and of its product with V, in all layers, for `num_tokens` tokens that see each other."""
    return int(4 * config.num_hidden_layers * num_tokens**2 * config.hidden_size)


@dataclass(frozen=True)
class RowCost:
    """FLOPs of one training row: an image and its text."""

    tower: int
    """Vision tower up to the tapped layer, and other frozen parts before the language model, forward."""
    projector: int
    """Forward and full backward (inputs are frozen: weight gradients alone)."""
    language: int
    """Language model and head: forward, and backward to the activations (frozen weights need no gradient)."""

    @property
    def total(self) -> int:
        return self.tower + self.projector + self.language


def row_cost(family: Family, reducer: Reducer, *, num_tiles: int, num_visual_tokens: int, num_text_tokens: int) -> RowCost:
    """The cost of tuning on one row: `num_tiles` pictures (images, tiles or frames), what they are reduced to, and text."""
    vision: Any = family.tower.config
    text: Any = family.language_model.config
    tower = num_tiles * (family.num_patches * linear_flops(family.tower) + attention_flops(vision, family.num_patches))
    tokens = num_visual_tokens + num_text_tokens
    language = tokens * (linear_flops(family.language_model) + linear_flops(family.lm_head))
    language += attention_flops(text, tokens) // 2  # causal: half of it
    return RowCost(
        tower=tower * family.num_layers_run(reducer) // vision.num_hidden_layers + num_tiles * family.other_flops,
        projector=2 * num_visual_tokens * linear_flops(family.projector),
        language=2 * language,
    )


def tuning_memory(family: Family, *, num_trainable: int, num_tokens: int) -> int:
    """Bytes that one rank needs for micro batches of `num_tokens` tokens.

    Frozen weights; float32 weights, gradients and two AdamW moments of what is tuned; activations: a frozen linear layer
    saves no input, so a layer of the language model keeps about 32 d bytes a token in bf16.
    """
    text: Any = family.language_model.config
    weights: int = sum(p.numel() * p.element_size() for p in family.model.parameters())
    activations: int = 32 * text.hidden_size * text.num_hidden_layers * num_tokens
    return weights + 16 * num_trainable + activations
