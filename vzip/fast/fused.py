"""RMSNorm and SwiGLU of frozen layers, which save as little as possible for the backward pass.

A norm saves its input, and a SwiGLU its gate and its other half. transformers' own modules save
float32 copies and products beside them. On a GPU liger-kernel computes both, if it is installed.

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

# The formulas


def _to_float32(tensor: Tensor) -> Tensor:
    """Cast to float32; float64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def rms_forward(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute transformers' RMSNorm of float[..., d], equal to the bit."""
    high = _to_float32(hidden)
    scale = torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (high * scale).to(hidden.dtype)


def rms_backward(gradient: Tensor, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute the gradient float[..., d] of an RMSNorm's input; its weight is frozen."""
    high = _to_float32(hidden)
    grad_normed = _to_float32(gradient * weight)
    scale = torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + eps)

    # With x the input, s the scale and g the gradient of x * s:
    # dx = s * (g - x * mean(g * x) * s^2).
    shared = (grad_normed * high).mean(-1, keepdim=True) * scale.square()
    return grad_normed.addcmul_(high, shared, value=-1).mul_(scale).to(hidden.dtype)


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """Compute silu(gate) * up, float[..., f]."""
    return F.silu(gate) * up


def swiglu_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of gate and up, each float[..., f]."""
    grad_gate = torch.ops.aten.silu_backward(gradient * up, gate)
    grad_up = gradient * F.silu(gate)
    return grad_gate, grad_up


# One kernel for each formula


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Packed sequences differ in length; without `dynamic` each length would be compiled anew.
    return torch.compile(function, dynamic=True)


def _kernel(function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    return _compiled(function) if compiled else function


def check_compiles(device: torch.device, dtype: torch.dtype) -> None:
    """Raise UserError if torch.compile can't make kernels on this machine."""
    # Only compiling a small kernel tells whether the compiler works.
    gate, up = torch.ones(2, 8, 8, device=device, dtype=dtype).unbind()
    try:
        _compiled(swiglu_forward)(gate, up)
    except Exception as error:
        # Errors of many kinds end here: no compiler, no Triton, a GPU that is too old for it.
        reason = str(error).strip() or type(error).__name__
        first_line = reason.splitlines()[0]
        raise UserError(
            f"torch.compile can't make kernels here ({first_line}); "
            "set compile=false, or install a C++ compiler (and Triton for a GPU)"
        ) from error


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float, compiled: bool) -> Any:
        ctx.save_for_backward(hidden, weight)
        ctx.eps = eps
        ctx.compiled = compiled
        return _kernel(rms_forward, compiled)(hidden, weight, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        grad_hidden = _kernel(rms_backward, ctx.compiled)(gradients[0], hidden, weight, ctx.eps)
        return grad_hidden, None, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, compiled: bool) -> Any:
        ctx.save_for_backward(gate, up)
        ctx.compiled = compiled
        return _kernel(swiglu_forward, compiled)(gate, up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = _kernel(swiglu_backward, ctx.compiled)(gradients[0], gate, up)
        return grad_gate, grad_up, None


# What replaces the forwards of a model's modules


# Looking for a package reads the disk, and a norm runs many times a second.
@cache
def _has_liger_package() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def _has_liger(device: torch.device) -> bool:
    return device.type == "cuda" and _has_liger_package()


def rms_norm(norm: Any, hidden: Tensor, *, compiled: bool = False) -> Tensor:
    """Normalise float[..., d] as `norm` does, a frozen RMSNorm of transformers' Llama.

    With `compiled` its elementwise operations are one kernel. Making it takes seconds; it is cached
    on disk.
    """
    eps = norm.variance_epsilon
    normed: Tensor
    if _has_liger(hidden.device):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        # No offset of the weight, casts as in Llama, and the gradient not in place of its input.
        normed = LigerRMSNormFunction.apply(hidden, norm.weight, eps, 0.0, "llama", False)
    else:
        normed = _RMSNorm.apply(hidden, norm.weight, eps, compiled)  # type: ignore[no-untyped-call]
    return normed


def _swiglu(gate: Tensor, up: Tensor, compiled: bool) -> Tensor:
    product: Tensor
    if _has_liger(gate.device):
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        product = LigerSiLUMulFunction.apply(gate, up)
    else:
        product = _SwiGLU.apply(gate, up, compiled)  # type: ignore[no-untyped-call]
    return product


def _mlp(mlp: Any, hidden: Tensor, compiled: bool) -> Tensor:
    gate = mlp.gate_proj(hidden)
    up = mlp.up_proj(hidden)
    output: Tensor = mlp.down_proj(_swiglu(gate, up, compiled))
    return output


def swiglu_mlp(mlp: nn.Module, hidden: Tensor, *, recompute: bool = False, compiled: bool = False) -> Tensor:
    """Run a frozen SwiGLU MLP on float[..., d].

    With `recompute` only its input is saved, and the backward pass computes gate and up again.
    """
    # Without gradients nothing is saved anyway.
    if recompute and torch.is_grad_enabled():
        output: Tensor = checkpoint(_mlp, mlp, hidden, compiled, use_reentrant=False)
        return output
    return _mlp(mlp, hidden, compiled)
