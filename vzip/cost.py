"""What a tuning run costs: FLOPs and memory. Multiply-adds count as two FLOPs.

Source of the transformer formula: arXiv 2412.04467, section 4 (with a SwiGLU FFN's three matrices).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from vzip.families import Family
from vzip.fast.loss import MAX_LOGITS
from vzip.fast.segments import MAX_BLOCK
from vzip.reducers import Reducer

QUANTISED_BYTES = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
"""Bytes of a quantised weight. NF4 has a byte of scale for 64 weights and a float32 for 256 of these (arXiv 2305.14314)."""
SHORT_TEXT = 32
"""Text tokens of a short row, behind the prefix that rows share."""
SCORE_BYTES = 22
"""Of an attention score where rows are attended in blocks: it, its probability, and their gradients."""


def linear_flops(module: nn.Module) -> int:
    """FLOPs that the module's linear layers take for one token."""
    return sum(2 * m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))


def attention_flops(config: Any, num_tokens: int) -> int:
    """FLOPs of QK^T and of its product with V, in all layers, for `num_tokens` tokens that see each other."""
    return int(4 * config.num_hidden_layers * num_tokens**2 * config.hidden_size)


@dataclass(frozen=True)
class ExampleCost:
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


def example_cost(
    family: Family, reducer: Reducer, *, num_tiles: int, num_visual_tokens: int, num_text_tokens: int
) -> ExampleCost:
    """The cost of tuning on one row: `num_tiles` pictures (images, tiles or frames), what they are reduced to, and text."""
    vision: Any = family.tower.config
    text: Any = family.language_model.config
    tower = num_tiles * (
        family.num_patches * linear_flops(family.tower) + attention_flops(vision, family.num_patches)
    )
    tokens = num_visual_tokens + num_text_tokens
    language = tokens * (linear_flops(family.language_model) + linear_flops(family.lm_head))
    language += attention_flops(text, tokens) // 2  # causal: half of it
    return ExampleCost(
        tower=tower * family.num_layers_run(reducer) // vision.num_hidden_layers
        + num_tiles * family.other_flops,
        projector=2 * num_visual_tokens * linear_flops(family.projector),
        language=2 * language,
    )


def frozen_linears(family: Family) -> Iterator[tuple[str, nn.Linear]]:
    """(name, layer) of the language model's frozen linear layers, without the head: those that can be quantised."""
    for name, module in family.language_model.named_modules():
        if isinstance(module, nn.Linear) and "lora_" not in name:
            yield name, module


def weight_memory(family: Family, *, quantize: str | None = None) -> int:
    """Bytes of all weights, with the language model's frozen linear layers held in `quantize` ("nf4", "int8")."""
    held = {id(layer.weight): layer for _, layer in frozen_linears(family)} if quantize else {}
    others: int = sum(p.numel() * p.element_size() for p in family.model.parameters() if id(p) not in held)
    num_quantised = sum(layer.in_features * layer.out_features for layer in held.values())
    return others + (math.ceil(num_quantised * QUANTISED_BYTES[quantize]) if quantize else 0)


def head_width(config: Any) -> int:
    """Of a language model's attention."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def kept_memory(
    config: Any, *, itemsize: int, recompute: bool = False, quantize: str | None = None, lora: bool = False
) -> int:
    """Bytes that one layer of the language model keeps for the backward pass, for one token of the fast path.

    A frozen linear layer needs no input. What is kept: both norms' inputs; queries, keys and values, and what attention makes
    of them; gate and up, or, where they are made again (`recompute`), their input. In bf16, in Vicuna's shapes, these are
    22.75 d, or 14 d. On top, the int8 layers of bitsandbytes keep their inputs, and LoRA beside a linear layer keeps the
    layer's input in float32.
    """
    width, inner, head = config.hidden_size, config.intermediate_size, head_width(config)
    values = 2 * width + 2 * head * (config.num_attention_heads + config.num_key_value_heads)
    values += width if recompute else 2 * inner
    if quantize == "int8":
        values += width if recompute else 2 * width + inner
    inputs = (
        3 * width + head * config.num_attention_heads + (0 if recompute else 2 * width + inner) if lora else 0
    )
    return int(itemsize * values + 4 * inputs)


def _picture_memory(family: Family) -> int:
    """Bytes that a picture, or a tile, takes in the tower: about 16 numbers of its width a patch in the layer that runs, and
    the pixels, as bytes and as numbers.
    """
    itemsize, width = (
        next(family.language_model.parameters()).element_size(),
        family.model.config.vision_config.hidden_size,
    )
    return int(16 * itemsize * family.num_patches * width + 3 * (5 + itemsize) * family.tile_side**2)


def packed_memory(
    family: Family,
    reducer: Reducer,
    *,
    num_tokens: int,
    num_prefix: int,
    recompute: bool = False,
    quantize: str | None = None,
) -> int:
    """Bytes beside the weights that a micro batch of `num_tokens` packed tokens takes in the fast path, at the most.

    That is, as if all rows were short, and all tokens visual ones. FlashAttention has the keys and values of the shared prefix,
    `num_prefix` tokens, before each row; where there is none, `blocked_memory` comes on top.
    """
    config = family.model.config
    text, vision = config.text_config, config.vision_config
    itemsize = next(family.language_model.parameters()).element_size()
    lora = any("lora_" in name for name, _ in family.language_model.named_parameters())
    kept = partial(kept_memory, text, itemsize=itemsize, quantize=quantize, lora=lora)
    # The layer that runs has products and gradients of its own, about one and a half times what it keeps.
    language = text.num_hidden_layers * kept(recompute=recompute) + 3 * kept() // 2
    ends = (
        4 * (vision.hidden_size + 3 * text.hidden_size) + 3 * itemsize * text.hidden_size
    )  # projector and embeddings
    logits = 12 * min(num_tokens * text.vocab_size, MAX_LOGITS)

    num_examples = math.ceil(
        num_tokens / (family.budget_tiles * family.num_tile_tokens(reducer) + SHORT_TEXT)
    )
    prefix = num_prefix * 2 * itemsize * head_width(text) * text.num_key_value_heads * text.num_hidden_layers
    pictures = family.budget_tiles * _picture_memory(family)
    return int(num_tokens * (language + ends) + logits + num_examples * (prefix + pictures))


def blocked_memory(config: Any, *, longest: int, num_prefix: int) -> int:
    """Bytes that attention takes where it runs in blocks of rows, of up to `longest` tokens behind the prefix."""
    return int(SCORE_BYTES * config.num_attention_heads * max(longest, MAX_BLOCK) * (longest + num_prefix))


def generation_memory(family: Family, *, num_tokens: int) -> int:
    """Bytes beside the weights that answering a question of `num_tokens` tokens takes, padding and the answer counted: keys and
    values of all layers, what the layer that runs makes, and a picture.
    """
    text = family.model.config.text_config
    itemsize = next(family.language_model.parameters()).element_size()
    cached = 2 * itemsize * head_width(text) * text.num_key_value_heads * text.num_hidden_layers
    running = 3 * kept_memory(text, itemsize=itemsize) // 2
    return int(num_tokens * (cached + running) + family.budget_tiles * _picture_memory(family))


def padded_memory(family: Family, *, num_tokens: int) -> int:
    """Bytes beside the weights that a padded micro batch takes in the reference engine.

    A layer keeps its input alone (checkpointing), the one that runs about 46 d in bf16; logits are whole, in float32, beside
    their logarithms and gradients.
    """
    text = family.model.config.text_config
    itemsize = next(family.language_model.parameters()).element_size()
    layers = itemsize * text.hidden_size * (text.num_hidden_layers + 23)
    return int(num_tokens * (layers + 14 * text.vocab_size))
