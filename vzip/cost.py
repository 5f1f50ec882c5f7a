"""Estimate what a tuning run costs: FLOPs and memory. A multiply-add counts as two FLOPs.

Source of the transformer formula: arXiv 2412.04467, section 4, with the three matrices of a SwiGLU
MLP.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from vzip.families import Family
from vzip.fast.loss import MAX_LOGITS
from vzip.fast.segments import MAX_BLOCK
from vzip.reducers import Reducer

QUANTIZED_BYTES = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
"""Bytes of a quantized weight.

NF4 has one byte of scale for 64 weights, and a float32 for 256 of these (arXiv 2305.14314).
"""

SHORT_TEXT = 32
"""Text tokens of a short example, without the prefix that examples share."""

SCORE_BYTES = 22
"""Bytes of an attention score, its probability and their gradients, if attention runs in blocks."""


# FLOPs


def linear_flops(module: nn.Module) -> int:
    """FLOPs of the module's linear layers for one token."""
    flops = 0
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            flops += 2 * layer.in_features * layer.out_features
    return flops


def attention_flops(config: Any, num_tokens: int) -> int:
    """FLOPs of attention in all layers, for `num_tokens` tokens that all attend to each other.

    These are QK^T, and the product of its softmax with V.
    """
    # Each of the two products has num_tokens^2 * hidden_size multiply-adds.
    return int(4 * config.num_hidden_layers * num_tokens**2 * config.hidden_size)


@dataclass(frozen=True)
class ExampleCost:
    """FLOPs of one training example: an image and its text."""

    tower: int
    """Forward of the vision tower up to the hooked layer, and of other frozen parts."""
    projector: int
    """Forward and backward. The inputs are frozen, so only weights have gradients."""
    language: int
    """Forward and backward of the language model and its head. Only activations have gradients."""

    @property
    def total(self) -> int:
        """FLOPs of all parts."""
        return self.tower + self.projector + self.language


def example_cost(
    family: Family,
    reducer: Reducer,
    *,
    num_tiles: int,
    num_visual_tokens: int,
    num_text_tokens: int,
) -> ExampleCost:
    """FLOPs of tuning on one example.

    Args:
        family: the model.
        reducer: decides how many layers of the tower run.
        num_tiles: images, tiles or frames that the tower sees.
        num_visual_tokens: visual tokens that the language model gets.
        num_text_tokens: text tokens that it gets.
    """
    vision: Any = family.tower.config
    text: Any = family.language_model.config

    # Count the complete tower, and take the share of its layers that run: all layers cost the same.
    tile = family.num_patches * linear_flops(family.tower_layers)
    tile += 4 * family.num_patches * sum(family.patches_seen) * vision.hidden_size
    tower = num_tiles * tile * family.num_layers_run(reducer) // vision.num_hidden_layers

    # In causal attention a token sees only those before it, so half of the scores are computed.
    num_tokens = num_visual_tokens + num_text_tokens
    token = linear_flops(family.language_model) + linear_flops(family.lm_head)
    language = num_tokens * token + attention_flops(text, num_tokens) // 2

    # A backward pass to the weights alone, or to the inputs alone, costs as much as a forward pass.
    return ExampleCost(
        tower=tower + num_tiles * family.other_flops,
        projector=2 * num_visual_tokens * linear_flops(family.projector),
        language=2 * language,
    )


# Memory of the weights


def frozen_linears(family: Family) -> Iterator[tuple[str, nn.Linear]]:
    """Yield (name, layer) of the language model's frozen linear layers, which can be quantized.

    The head is not among them.
    """
    # peft puts LoRA's own layers, which are trained, beside the frozen ones.
    for name, module in family.language_model.named_modules():
        if isinstance(module, nn.Linear) and "lora_" not in name:
            yield name, module


def weight_memory(family: Family, *, quantize: str | None = None) -> int:
    """Bytes of all weights.

    Args:
        family: the model.
        quantize: "nf4" or "int8" if the language model's frozen linear layers are quantized.
    """
    # Quantized weights are counted first, so that the sum over all parameters can leave them out.
    quantized_ids = set()
    quantized_bytes = 0
    if quantize is not None:
        num_weights = 0
        for _, layer in frozen_linears(family):
            quantized_ids.add(id(layer.weight))
            num_weights += layer.in_features * layer.out_features
        quantized_bytes = math.ceil(num_weights * QUANTIZED_BYTES[quantize])

    other_bytes = 0
    for parameter in family.model.parameters():
        if id(parameter) not in quantized_ids:
            other_bytes += parameter.numel() * parameter.element_size()
    return other_bytes + quantized_bytes


# Memory of a step of the fast path


def _itemsize(family: Family) -> int:
    """Bytes of a number in the language model."""
    return next(family.language_model.parameters()).element_size()


def head_width(config: Any) -> int:
    """Width of a head of a language model's attention."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _cache_memory(config: Any, itemsize: int) -> int:
    """Bytes of the keys and values of one token, in all layers of a language model."""
    width = config.num_key_value_heads * head_width(config)
    return int(2 * itemsize * width * config.num_hidden_layers)


def kept_memory(
    config: Any,
    *,
    itemsize: int,
    recompute: bool = False,
    quantize: str | None = None,
    lora: bool = False,
) -> int:
    """Bytes that a layer of the language model saves for the backward pass, for one packed token.

    A frozen linear layer saves no input. What is saved: the inputs of both norms; queries, keys,
    values and the output of attention; and gate and up, or the MLP's input if they are computed
    again (`recompute`). In bf16, with Vicuna's shapes, this is 22.75 d, or 14 d. In addition, the
    int8 layers of bitsandbytes save their inputs, and LoRA beside a linear layer saves the layer's
    input in float32.

    Args:
        config: the language model's.
        itemsize: bytes of a number.
        recompute: whether the MLPs run again in the backward pass.
        quantize: how the linear layers are quantized.
        lora: whether the linear layers have LoRA beside them.
    """
    width = config.hidden_size
    inner = config.intermediate_size
    head = head_width(config)

    # The inputs of both norms; queries and the output of attention; keys and values.
    values = 2 * width + 2 * head * (config.num_attention_heads + config.num_key_value_heads)

    # The MLP's input, or gate and up.
    values += width if recompute else 2 * inner

    # The inputs of int8 layers: of the attention, and, if the MLP does not run again, of the MLP.
    if quantize == "int8":
        values += width if recompute else 2 * width + inner

    # LoRA is trained in float32, so each of its layers saves a float32 copy of its input.
    lora_inputs = 0
    if lora:
        lora_inputs = 3 * width + head * config.num_attention_heads
        lora_inputs += 0 if recompute else 2 * width + inner
    return int(itemsize * values + 4 * lora_inputs)


def _picture_memory(family: Family) -> int:
    """Bytes of a picture, or a tile, in the tower.

    The layer that runs has about 16 numbers of its width for each patch. The pixels are there as
    bytes, in float32 and in the model's precision.
    """
    itemsize = _itemsize(family)
    width = family.model.config.vision_config.hidden_size
    layer = 16 * itemsize * family.num_patches * width
    pixels = 3 * (5 + itemsize) * family.tile_side**2
    return int(layer + pixels)


def packed_memory(
    family: Family,
    reducer: Reducer,
    *,
    num_tokens: int,
    num_prefix: int,
    recompute: bool = False,
    quantize: str | None = None,
) -> int:
    """Most bytes that a packed micro batch takes in the fast path, besides the weights.

    This is the case in which all examples are short and all tokens are visual. FlashAttention has
    the keys and values of the shared prefix before each example. Without it, `blocked_memory` comes
    on top.

    Args:
        family: the model.
        reducer: decides how many visual tokens a picture has.
        num_tokens: tokens of the micro batch.
        num_prefix: tokens of the prefix.
        recompute: whether the MLPs run again in the backward pass.
        quantize: how the linear layers are quantized.
    """
    config = family.model.config
    text = config.text_config
    itemsize = _itemsize(family)
    lora = any("lora_" in name for name, _ in family.language_model.named_parameters())
    settings: dict[str, Any] = {"itemsize": itemsize, "quantize": quantize, "lora": lora}

    # All layers save something for the backward pass. The layer that runs also has products and
    # gradients of its own, about one and a half times what it saves.
    saved = text.num_hidden_layers * kept_memory(text, recompute=recompute, **settings)
    running = 3 * kept_memory(text, **settings) // 2

    # For each token, what the projector saves in float32, and the embeddings.
    inner = max(text.hidden_size, family.feature_width)
    ends = 4 * (family.feature_width + 3 * inner)
    ends += 3 * itemsize * text.hidden_size

    # Logits in float32, with twice as much beside them, but only one chunk at a time.
    logits = 12 * min(num_tokens * text.vocab_size, MAX_LOGITS)

    # The shorter the examples, the more pictures and copies of the prefix are in the batch.
    shortest = family.budget_tiles * family.num_tile_tokens(reducer) + SHORT_TEXT
    num_examples = math.ceil(num_tokens / shortest)
    prefix = num_prefix * _cache_memory(text, itemsize)
    pictures = family.budget_tiles * _picture_memory(family)

    return int(num_tokens * (saved + running + ends) + logits + num_examples * (prefix + pictures))


def blocked_memory(config: Any, *, longest: int, num_prefix: int) -> int:
    """Bytes of attention that runs in blocks of examples.

    Args:
        config: the language model's.
        longest: tokens of the longest example, without the prefix.
        num_prefix: tokens of the prefix.
    """
    # A block has several short examples, up to MAX_BLOCK tokens together, or a single longer one.
    num_scores = config.num_attention_heads * max(longest, MAX_BLOCK) * (longest + num_prefix)
    return int(SCORE_BYTES * num_scores)


# Memory of other passes


def generation_memory(family: Family, *, num_tokens: int) -> int:
    """Bytes of answering one question, besides the weights.

    These are the keys and values of all layers, what the layer that runs makes, and a picture.

    Args:
        family: the model.
        num_tokens: tokens of the question, its padding and the answer.
    """
    text = family.model.config.text_config
    itemsize = _itemsize(family)
    running = 3 * kept_memory(text, itemsize=itemsize) // 2
    token = _cache_memory(text, itemsize) + running
    return int(num_tokens * token + family.budget_tiles * _picture_memory(family))


def padded_memory(family: Family, *, num_tokens: int) -> int:
    """Bytes of a padded micro batch of `num_tokens` in the reference engine, besides the weights.

    With checkpointing a layer saves only its input; the layer that runs takes about 46 d in bf16.
    The logits are complete, in float32, beside their logarithms and gradients.
    """
    text = family.model.config.text_config
    layers = _itemsize(family) * text.hidden_size * (text.num_hidden_layers + 23)
    return int(num_tokens * (layers + 14 * text.vocab_size))
