"""RMSNorm and SwiGLU of frozen layers, which keep for the backward pass what they can't do without, and no more.

A norm keeps its input, a SwiGLU its gate and its other half; transformers' own keep float32 copies and products beside them. On
a GPU liger-kernel does both, where it is installed.

Legend of shapes: d width, f width of the MLP.
"""

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vzip.errors import UserError


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
    return given.addcmul_(high, shared, value=-1).mul_(scale).to(hidden.dtype)


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """float[..., f] of gate and up, float[..., f]."""
    return F.silu(gate) * up


def swiglu_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, float[..., f]."""
    return torch.ops.aten.silu_backward(gradient * up, gate), gradient * F.silu(gate)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def check_compiles(device: torch.device, dtype: torch.dtype) -> None:
    """Raises UserError where torch.compile can make no kernel."""
    gate, up = torch.ones(2, 8, 8, device=device, dtype=dtype).unbind()
    try:
        _compiled(swiglu_forward)(gate, up)
    except Exception as error:  # of many kinds: no compiler, no Triton, a GPU that is too old for it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"torch.compile can make no kernels here ({reason}); set compile=false, or install a C++ compiler (and for a GPU "
            f"Triton)"
        ) from error


def _kernel(function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    return _compiled(function) if compiled else function


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float, compiled: bool) -> Any:
        ctx.save_for_backward(hidden, weight)
        ctx.eps, ctx.compiled = eps, compiled
        return _kernel(rms_forward, compiled)(hidden, weight, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        return _kernel(rms_backward, ctx.compiled)(gradients[0], hidden, weight, ctx.eps), None, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, compiled: bool) -> Any:
        ctx.save_for_backward(gate, up)
        ctx.compiled = compiled
        return _kernel(swiglu_forward, compiled)(gate, up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return *_kernel(swiglu_backward, ctx.compiled)(gradients[0], *ctx.saved_tensors), None


@cache
def _has_liger_package() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def _has_liger(device: torch.device) -> bool:
    return device.type == "cuda" and _has_liger_package()


def rms_norm(norm: Any, hidden: Tensor, *, compiled: bool = False) -> Tensor:
    """float[..., d]: the norm of float[..., d] by the frozen weight of `norm`, one of transformers' Llama's.

    With `compiled` its elementwise operations are one kernel, which takes seconds to make and is kept on disk.
    """
    normed: Tensor
    if _has_liger(hidden.device):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        normed = LigerRMSNormFunction.apply(hidden, norm.weight, norm.variance_epsilon, 0.0, "llama", False)
        return normed
    normed = _RMSNorm.apply(hidden, norm.weight, norm.variance_epsilon, compiled)  # type: ignore[no-untyped-call]
    return normed


def _swiglu(gate: Tensor, up: Tensor, compiled: bool) -> Tensor:
    product: Tensor
    if _has_liger(gate.device):
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        product = LigerSiLUMulFunction.apply(gate, up)
        return product
    product = _SwiGLU.apply(gate, up, compiled)  # type: ignore[no-untyped-call]
    return product


def _mlp(mlp: Any, hidden: Tensor, compiled: bool) -> Tensor:
    found: Tensor = mlp.down_proj(_swiglu(mlp.gate_proj(hidden), mlp.up_proj(hidden), compiled))
    return found


def swiglu_mlp(mlp: nn.Module, hidden: Tensor, *, recompute: bool = False, compiled: bool = False) -> Tensor:
    """float[..., d]: the MLP of float[..., d]; with `recompute` only its input is kept, and gate and up are made again."""
    if recompute and torch.is_grad_enabled():
        found: Tensor = checkpoint(_mlp, mlp, hidden, compiled, use_reentrant=False)
        return found
    return _mlp(mlp, hidden, compiled)
