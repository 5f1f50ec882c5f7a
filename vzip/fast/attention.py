"""Causal attention within the rows of a packed sequence, each behind the prefix that all of them share.

On a GPU in half precision FlashAttention does it, of flash-attn where it is installed, else of torch. Elsewhere rows of like
length are attended together by matrix products, which in bf16 on a CPU are several times faster than torch's own
`scaled_dot_product_attention` backward, and nothing but queries, keys and values is kept for the backward pass.

Legend of shapes: T tokens, R rows, P prefix tokens, H heads, K key heads, c width of a head; G rows of a block, L tokens of its
longest.
"""

import importlib.util
from functools import cache
from typing import Any

import torch
import transformers
from packaging import version
from torch import Tensor

from vzip.fast.segments import Block, Segments

NAME = "vzip_packed"
"""Of the attention in transformers' registry."""


def _padded(values: Tensor, block: Block, num_groups: int) -> Tensor:
    """float[K, G, groups * L, c] of float[K * groups, T, c]: the rows of a block, heads of a group one behind the other."""
    rows = values[:, block.start : block.stop].index_select(1, block.padded)
    rows = rows.view(-1, num_groups, block.num_rows, block.length, values.shape[-1])
    return rows.transpose(1, 2).flatten(2, 3)


def _packed(padded: Tensor, block: Block, num_groups: int) -> Tensor:
    """float[K * groups, tokens of the block, c]: the way back."""
    rows = padded.view(-1, block.num_rows, num_groups, block.length, padded.shape[-1]).transpose(1, 2)
    return rows.reshape(-1, block.num_rows * block.length, padded.shape[-1]).index_select(1, block.kept)


def _behind(prefix: Tensor, rows: Tensor) -> Tensor:
    """float[K, G, P + L, c]: the prefix before each row."""
    return torch.cat([prefix[:, None].expand(-1, rows.shape[1], -1, -1), rows], dim=2)


def _probabilities(queries: Tensor, keys: Tensor, block: Block, scaling: float) -> Tensor:
    """float[K, G, groups * L, P + L], at least in float32: the causal softmax of a block."""
    length, num_keys = block.length, keys.shape[2]
    hidden = torch.full((length, num_keys), float("-inf"), dtype=keys.dtype, device=keys.device).triu(
        num_keys - length + 1
    )
    scores = torch.baddbmm(
        hidden.repeat(queries.shape[2] // length, 1),
        queries.flatten(0, 1),
        keys.flatten(0, 1).transpose(1, 2),
        alpha=scaling,
    )
    high = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(dim=-1, dtype=high).view(*queries.shape[:3], num_keys)


class _BlockAttention(torch.autograd.Function):
    """Queries float[H, T, c], keys and values float[K, T, c], those of the prefix float[K, P, c]: float[H, T, c]."""

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
        ctx.segments, ctx.settings = segments, settings
        layer, scaling = settings
        prefix = segments.prefixes[layer]
        num_groups = queries.shape[0] // keys.shape[0]
        found = torch.empty_like(queries)
        for block in segments.blocks:
            query, key, value = (
                _padded(queries, block, num_groups),
                _padded(keys, block, 1),
                _padded(values, block, 1),
            )
            probabilities = _probabilities(query, _behind(prefix[0], key), block, scaling)
            mixed = probabilities.to(value.dtype) @ _behind(prefix[1], value)
            found[:, block.start : block.stop] = _packed(mixed, block, num_groups)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values = ctx.saved_tensors
        segments: Segments = ctx.segments
        layer, scaling = ctx.settings
        prefix = segments.prefixes[layer]
        num_groups, num_prefix = queries.shape[0] // keys.shape[0], segments.num_prefix
        into = [torch.empty_like(tensor) for tensor in (queries, keys, values)]
        for block in segments.blocks:
            query, key, value = (
                _padded(queries, block, num_groups),
                _padded(keys, block, 1),
                _padded(values, block, 1),
            )
            key, value = _behind(prefix[0], key), _behind(prefix[1], value)
            # A padded query repeats a row's last one: its gradient has to be zero, or that row's would count twice.
            given = gradients[0].new_zeros(queries.shape[0], block.num_rows * block.length, queries.shape[-1])
            given[:, block.kept] = gradients[0][:, block.start : block.stop]
            given = (
                given.view(-1, num_groups, block.num_rows, block.length, queries.shape[-1])
                .transpose(1, 2)
                .flatten(2, 3)
            )

            probabilities = _probabilities(query, key, block, scaling)
            of_probabilities = (given @ value.transpose(2, 3)).to(probabilities.dtype)
            of_values = probabilities.to(value.dtype).transpose(2, 3) @ given
            of_scores = torch._softmax_backward_data(
                of_probabilities, probabilities, -1, probabilities.dtype
            ).to(query.dtype)
            of_queries, of_keys = (
                (of_scores @ key).mul_(scaling),
                (of_scores.transpose(2, 3) @ query).mul_(scaling),
            )
            found = (of_queries, of_keys[:, :, num_prefix:], of_values[:, :, num_prefix:])
            for target, padded, groups in zip(into, found, (num_groups, 1, 1), strict=True):
                target[:, block.start : block.stop] = _packed(padded, block, groups)
        return (*into, None, None)


@cache
def _has_flash_package() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _torch_release() -> tuple[int, ...]:
    return version.parse(torch.__version__).release  # of 2.11.0a0 too, as builds of NVIDIA's call themselves


def _flash(queries: Tensor, keys: Tensor, values: Tensor, segments: Segments, scaling: float) -> Tensor:
    """float[T, H, c] of queries float[T, H, c], keys and values float[T + R * P, K, c]; causal from the end of each row."""
    bounds = (segments.query_bounds, segments.key_bounds)
    longest = (max(segments.lengths), max(segments.lengths) + segments.num_prefix)
    if _has_flash_package():
        from flash_attn import flash_attn_varlen_func

        mixed: Tensor = flash_attn_varlen_func(
            queries, keys, values, *bounds, *longest, softmax_scale=scaling, causal=True, deterministic=True
        )
        return mixed
    from torch.nn.attention.varlen import varlen_attn

    num_groups = queries.shape[1] // keys.shape[1]
    grouped: dict[str, Any] = {"enable_gqa": True} if num_groups > 1 else {}
    if grouped and _torch_release() < (2, 12):  # it wants as many key heads as heads
        keys, values, grouped = (
            keys.repeat_interleave(num_groups, 1),
            values.repeat_interleave(num_groups, 1),
            {},
        )
    found = varlen_attn(
        queries, keys, values, *bounds, *longest, scale=scaling, window_size=(-1, 0), **grouped
    )
    assert isinstance(found, Tensor)
    return found


def has_flash(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether FlashAttention takes heads of a width: on a GPU from Ampere on, in half precision, up to a width of 256; by
    flash-attn, or by torch from 2.11 on.
    """
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or width > 256:
        return False
    there = _has_flash_package() or _torch_release() >= (2, 11)
    return there and torch.cuda.get_device_capability(device) >= (8, 0)


def packed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers calls it.

    Args:
        module: the layer's attention; its `layer_idx` is asked.
        query: float[1, H, T, c].
        key: float[1, K, T, c].
        value: float[1, K, T, c].
        attention_mask: None.
        settings: `scaling` of the scores, and `segments`, where the rows are; what other attentions take is ignored.

    Returns:
        float[1, T, H, c], and no attention maps.
    """
    assert attention_mask is None and not (module.training and module.attention_dropout)
    segments, scaling, layer = settings["segments"], settings["scaling"], module.layer_idx
    if not has_flash(query.device, query.dtype, query.shape[-1]):
        mixed = _BlockAttention.apply(query[0], key[0], value[0], segments, (layer, scaling))  # type: ignore[no-untyped-call]
        return mixed.transpose(0, 1)[None], None
    # Rows of keys with the prefix before each: as matrices of tokens, which FlashAttention takes.
    keys, values = (
        torch.cat([before, now[0]], dim=1).transpose(0, 1).index_select(0, segments.key_order)
        for before, now in zip(segments.prefixes[layer], (key, value), strict=True)
    )
    return _flash(query[0].transpose(0, 1), keys, values, segments, scaling)[None], None


transformers.AttentionInterface.register(NAME, packed_attention)
