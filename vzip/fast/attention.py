"""Causal attention within each example of a packed sequence, behind the prefix that all share.

On a GPU in half precision FlashAttention computes it: flash-attn's if that is installed, otherwise
torch's. Elsewhere examples of similar length are attended together by matrix products. In bf16 on a
CPU these are several times faster than the backward pass of torch's own
`scaled_dot_product_attention`. Only queries, keys and values are saved for the backward pass.

Legend of shapes: T tokens, R examples, P prefix tokens, H heads, K key heads, c width of a head; G
examples of a block, L tokens of its longest example; groups, the H / K heads that share a key head.
"""

import importlib.util
from functools import cache
from typing import Any

import torch
from packaging import version
from torch import Tensor

from vzip.fast.segments import Block, Prefix, Segments

PACKED_ATTENTION = "vzip_packed"
"""The name of `packed_attention` in transformers' registry of attentions."""


# Attention by matrix products, one block of examples at a time


def _grouped(padded: Tensor, block: Block, num_groups: int) -> Tensor:
    """Make one matrix for each key head and example: float[K, G, groups * L, c].

    Args:
        padded: float[K * groups, G * L, c].
        block: the block of examples.
        num_groups: heads that share a key head.
    """
    shape = (-1, num_groups, block.num_examples, block.length, padded.shape[-1])
    return padded.view(shape).transpose(1, 2).flatten(2, 3)


def _pad(values: Tensor, block: Block, num_groups: int) -> Tensor:
    """Cut a block out of float[K * groups, T, c], and pad it to float[K, G, groups * L, c]."""
    padded = values[:, block.start : block.stop].index_select(1, block.to_padded)
    return _grouped(padded, block, num_groups)


def _unpad(grouped: Tensor, block: Block, num_groups: int) -> Tensor:
    """Undo `_pad`: float[K * groups, tokens of the block, c]."""
    width = grouped.shape[-1]
    padded = grouped.view(-1, block.num_examples, num_groups, block.length, width).transpose(1, 2)
    padded = padded.reshape(-1, block.num_examples * block.length, width)
    return padded.index_select(1, block.from_padded)


def _with_prefix(prefix: Tensor, examples: Tensor) -> Tensor:
    """Put float[K, P, c] before each example of float[K, G, L, c]: float[K, G, P + L, c]."""
    copies = prefix[:, None].expand(-1, examples.shape[1], -1, -1)
    return torch.cat([copies, examples], dim=2)


def _block_inputs(
    queries: Tensor, keys: Tensor, values: Tensor, prefix: Prefix, block: Block
) -> tuple[Tensor, Tensor, Tensor]:
    """Cut out a block: float[K, G, groups * L, c] of queries, float[K, G, P + L, c] of the rest."""
    # Heads that share a key head become rows of one matrix, so that no key has to be copied.
    num_groups = queries.shape[0] // keys.shape[0]
    prefix_keys, prefix_values = prefix
    query = _pad(queries, block, num_groups)
    key = _with_prefix(prefix_keys, _pad(keys, block, 1))
    value = _with_prefix(prefix_values, _pad(values, block, 1))
    return query, key, value


def _probabilities(query: Tensor, key: Tensor, block: Block, scaling: float) -> Tensor:
    """float[K, G, groups * L, P + L] in float32 or better: the causal softmax of a block."""
    num_keys = key.shape[2]
    num_groups = query.shape[2] // block.length

    # -inf where a query must not look: at the tokens after its own. All of them see the prefix.
    shape = (block.length, num_keys)
    mask = torch.full(shape, float("-inf"), dtype=key.dtype, device=key.device)
    mask = mask.triu(num_keys - block.length + 1)

    # One call multiplies, scales and adds the mask, without copies of the scores in between.
    scores = torch.baddbmm(
        mask.repeat(num_groups, 1),
        query.flatten(0, 1),
        key.flatten(0, 1).transpose(1, 2),
        alpha=scaling,
    )
    # Half precision would round the sum of many small exponentials.
    dtype = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(dim=-1, dtype=dtype).view(*query.shape[:3], num_keys)


class _BlockAttention(torch.autograd.Function):
    """Attention by blocks: float[H, T, c].

    Queries are float[H, T, c], keys and values float[K, T, c]; `settings` are the number of the
    layer and the factor of the scores. The probabilities are not saved. The backward pass computes
    them again, one block at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        segments: Segments,
        settings: tuple[int, float],
    ) -> Tensor:
        ctx.save_for_backward(queries, keys, values)
        ctx.segments = segments
        ctx.settings = settings

        layer, scaling = settings
        prefix = segments.prefixes[layer]
        num_groups = queries.shape[0] // keys.shape[0]
        output = torch.empty_like(queries)
        for block in segments.blocks:
            query, key, value = _block_inputs(queries, keys, values, prefix, block)
            probabilities = _probabilities(query, key, block, scaling)

            # The product runs in the model's precision, which is faster than float32.
            mixed = probabilities.to(value.dtype) @ value
            output[:, block.start : block.stop] = _unpad(mixed, block, num_groups)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = gradients
        queries, keys, values = ctx.saved_tensors
        segments: Segments = ctx.segments
        layer, scaling = ctx.settings
        prefix = segments.prefixes[layer]

        num_groups = queries.shape[0] // keys.shape[0]
        grad_queries = torch.empty_like(queries)
        grad_keys = torch.empty_like(keys)
        grad_values = torch.empty_like(values)

        for block in segments.blocks:
            query, key, value = _block_inputs(queries, keys, values, prefix, block)
            probabilities = _probabilities(query, key, block, scaling)

            # A padded query repeats its example's last one. Its gradient has to be zero, or that
            # query would count twice.
            num_heads, _, width = queries.shape
            padded = grad_output.new_zeros(num_heads, len(block.to_padded), width)
            padded[:, block.from_padded] = grad_output[:, block.start : block.stop]
            grad_mixed = _grouped(padded, block, num_groups)

            # Back through the product with the values, then through the softmax.
            grad_probabilities = (grad_mixed @ value.transpose(2, 3)).to(probabilities.dtype)
            grad_value = probabilities.to(value.dtype).transpose(2, 3) @ grad_mixed
            grad_scores = torch._softmax_backward_data(
                grad_probabilities, probabilities, -1, probabilities.dtype
            ).to(query.dtype)

            # Back through the product of queries and keys.
            grad_query = (grad_scores @ key).mul_(scaling)
            grad_key = (grad_scores.transpose(2, 3) @ query).mul_(scaling)

            # The prefix is frozen: its keys and values need no gradient.
            own = slice(segments.num_prefix, None)
            tokens = slice(block.start, block.stop)
            grad_queries[:, tokens] = _unpad(grad_query, block, num_groups)
            grad_keys[:, tokens] = _unpad(grad_key[:, :, own], block, 1)
            grad_values[:, tokens] = _unpad(grad_value[:, :, own], block, 1)

        return grad_queries, grad_keys, grad_values, None, None


# FlashAttention


@cache
def _has_flash_package() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _torch_release() -> tuple[int, ...]:
    # NVIDIA's builds have versions such as 2.11.0a0, which would compare as older than 2.11.
    return version.parse(torch.__version__).release


def has_flash(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether FlashAttention takes heads of this width on this device.

    It needs half precision, a width of up to 256, a GPU from Ampere on, and either flash-attn or
    torch from 2.11 on.
    """
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or width > 256:
        return False

    is_installed = _has_flash_package() or _torch_release() >= (2, 11)
    return is_installed and torch.cuda.get_device_capability(device) >= (8, 0)


def _flash(queries: Tensor, keys: Tensor, values: Tensor, segments: Segments, scaling: float) -> Tensor:
    """Run FlashAttention, causal from the end of each example.

    Args:
        queries: float[T, H, c].
        keys: float[T + R * P, K, c], the prefix before each example.
        values: float[T + R * P, K, c].
        segments: where the examples are.
        scaling: factor of the scores.

    Returns:
        float[T, H, c].
    """
    # Where queries and keys of each example begin, and the lengths of the longest example.
    longest = max(segments.lengths)
    bounds = (
        segments.query_bounds,
        segments.key_bounds,
        longest,
        longest + segments.num_prefix,
    )

    mixed: Any
    if _has_flash_package():
        from flash_attn import flash_attn_varlen_func

        mixed = flash_attn_varlen_func(
            queries,
            keys,
            values,
            *bounds,
            softmax_scale=scaling,
            causal=True,
            deterministic=True,
        )
    else:
        from torch.nn.attention.varlen import varlen_attn

        options: dict[str, Any] = {}
        num_groups = queries.shape[1] // keys.shape[1]
        if num_groups > 1 and _torch_release() >= (2, 12):
            options["enable_gqa"] = True
        elif num_groups > 1:
            # Before 2.12 torch takes as many key heads as heads.
            keys = keys.repeat_interleave(num_groups, 1)
            values = values.repeat_interleave(num_groups, 1)

        # Causal: a query sees everything to its left (-1), and nothing to its right (0).
        mixed = varlen_attn(
            queries,
            keys,
            values,
            *bounds,
            scale=scaling,
            window_size=(-1, 0),
            **options,
        )

    assert isinstance(mixed, Tensor)
    return mixed


# What transformers calls


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of one layer; transformers calls it.

    Args:
        module: the layer's attention, whose `layer_idx` is read.
        query: float[1, H, T, c].
        key: float[1, K, T, c].
        value: float[1, K, T, c].
        attention_mask: None.
        settings: `scaling` of the scores and `segments`, where the examples are. Settings of other
            attentions are ignored.

    Returns:
        float[1, T, H, c], and None for the attention maps.
    """
    assert attention_mask is None and not (module.training and module.attention_dropout)
    segments: Segments = settings["segments"]
    scaling: float = settings["scaling"]
    layer: int = module.layer_idx

    if not has_flash(query.device, query.dtype, query.shape[-1]):
        mixed = _BlockAttention.apply(  # type: ignore[no-untyped-call]
            query[0],
            key[0],
            value[0],
            segments,
            (layer, scaling),
        )
        return mixed.transpose(0, 1)[None], None

    # FlashAttention takes matrices of tokens, in which each example has its own copy of the prefix.
    prefix_keys, prefix_values = segments.prefixes[layer]
    keys = torch.cat([prefix_keys, key[0]], dim=1).transpose(0, 1)
    values = torch.cat([prefix_values, value[0]], dim=1).transpose(0, 1)
    keys = keys.index_select(0, segments.key_order)
    values = values.index_select(0, segments.key_order)
    mixed = _flash(query[0].transpose(0, 1), keys, values, segments, scaling)
    return mixed[None], None
