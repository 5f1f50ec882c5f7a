"""What a forward and a tuning run cost: parameters, FLOPs, memory. Multiply-adds count as two FLOPs.

Source of the transformer formula: arXiv 2412.04467, section 4 (with a SwiGLU FFN's three matrices).
"""

from dataclasses import dataclass
from typing import Any

from torch import nn


def num_parameters(module: nn.Module, *, trainable: bool = False) -> int:
    """Parameters of a module, tied ones once; the trainable ones alone if asked."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


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
    """Vision tower up to the tapped layer, forward."""
    projector: int
    """Forward and full backward (inputs are frozen: weight gradients alone)."""
    language: int
    """Language model and head: forward, and backward to the activations (frozen weights need no gradient)."""

    @property
    def total(self) -> int:
        return self.tower + self.projector + self.language


def row_cost(
    *, tower: nn.Module, projector: nn.Module, language_model: nn.Module, lm_head: nn.Module, num_patches: int,
    num_layers_run: int, num_image_tokens: int, num_text_tokens: int,
) -> RowCost:
    """The cost of tuning on one row of `num_image_tokens` + `num_text_tokens` tokens."""
    vision: Any = tower.config
    share = num_layers_run / vision.num_hidden_layers
    tokens = num_image_tokens + num_text_tokens
    language = tokens * (linear_flops(language_model) + linear_flops(lm_head))
    language += attention_flops(language_model.config, tokens) // 2  # causal: half of it
    return RowCost(
        tower=int(share * (num_patches * linear_flops(tower) + attention_flops(vision, num_patches))),
        projector=2 * num_image_tokens * linear_flops(projector),
        language=2 * language,
    )


def tuning_memory(*, frozen_bytes: int, num_trainable: int, num_tokens: int, hidden_size: int, num_layers: int) -> int:
    """Bytes of one rank: frozen weights, float32 weights + gradient + two AdamW moments, activations.

    A frozen linear layer saves no input, so a layer keeps about 32 d bytes a token in bf16.
    """
    return frozen_bytes + 16 * num_trainable + 32 * hidden_size * num_layers * num_tokens
