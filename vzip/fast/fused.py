"""RMSNorm and SwiGLU of frozen layers, which keep for the backward pass what they can't do without, and no more.

A norm keeps its input, a SwiGLU its gate and its other half; transformers' own keep float32 copies and products beside them. On
a GPU liger-kernel does both, where it is installed.

Legend of shapes: d width, f width of the MLP.
"""

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def _high(tensor: Tensor) -> Tensor:
    """In float32; float64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def rms_forward(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """float[..., d]: what transformers' RMSNorm makes of float[..., d], to the bit."""
    high = _high(hidden)
    return weight * (high * torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + eps)).to(hidden.dtype)


def rms_backward(gradient: Tensor, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """float[..., d]: the gradient of the input; the weight is frozen."""
    high, given = _high(hidden), _high(gradient * weight)
    scale = torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + eps)
    shared = (given * high).mean(-1, keepdim=True) * scale.square()
    return ((given - high * shared) * scale).to(hidden.dtype)


def swiglu_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, float[..., f]."""
    return torch.ops.aten.silu_backward(gradient * up, gate), gradient * F.silu(gate)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.eps = eps
        return rms_forward(hidden, weight, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        return rms_backward(gradients[0], hidden, weight, ctx.eps), None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return swiglu_backward(gradients[0], *ctx.saved_tensors)


def _has_liger(device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None


def rms_norm(norm: Any, hidden: Tensor) -> Tensor:
    """float[..., d]: the norm of float[..., d] by the frozen weight of `norm`, one of transformers' Llama's."""
    normed: Tensor
    if _has_liger(hidden.device):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        normed = LigerRMSNormFunction.apply(hidden, norm.weight, norm.variance_epsilon, 0.0, "llama", False)
        return normed
    normed = _RMSNorm.apply(hidden, norm.weight, norm.variance_epsilon)  # type: ignore[no-untyped-call]
    return normed


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    product: Tensor
    if _has_liger(gate.device):
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        product = LigerSiLUMulFunction.apply(gate, up)
        return product
    product = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    return product


def _mlp(mlp: Any, hidden: Tensor) -> Tensor:
    found: Tensor = mlp.down_proj(_swiglu(mlp.gate_proj(hidden), mlp.up_proj(hidden)))
    return found


def swiglu_mlp(mlp: nn.Module, hidden: Tensor, *, recompute: bool) -> Tensor:
    """float[..., d]: the MLP of float[..., d]; with `recompute` only its input is kept, and gate and up are made again."""
    if recompute and torch.is_grad_enabled():
        found: Tensor = checkpoint(_mlp, mlp, hidden, use_reentrant=False)
        return found
    return _mlp(mlp, hidden)
