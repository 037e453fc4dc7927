"""Derivatives of the ops, as torch.autograd.Functions registered at the ops' Autograd dispatch key.

Registered there, a raw op differentiates like the public function, and torch.compile and torch.export see one op
where they would otherwise trace a Function. Only the inputs, K' and V' are saved: nothing of size N x K.
The first two arguments of a Function are the op and, differentiable once more in name only, its backward op.
Each Function takes `ctx` in forward: the setup_context form costs an inspect.signature a call, about 30 us.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from ._ops import LIBRARY, OVERLOADS, unit_stride

_ops = torch.ops.linformer_kernels


def _below_autograd(op: Callable[..., Any], *args: Any) -> Any:
    # Below the tracking of views too: a result of other strides is a view of what the op made, and nobody else's.
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return op(*args)


def _wanted(ctx: Any, count: int) -> int:
    """The ops' `needs` mask for their first `count` inputs, which follow the two of the Function itself."""
    return sum(1 << i for i in range(count) if ctx.needs_input_grad[2 + i])


def _returned(ctx: Any, grads: tuple[Tensor, ...] = ()) -> tuple[Tensor | None, ...]:
    """The wanted gradients, and None for every other input."""
    needed = ctx.needs_input_grad[2:]
    return None, None, *(grads[i] if i < len(grads) and needed[i] else None for i in range(len(needed)))


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, op: Callable[..., Any], backward: Callable[..., Any], *args: Any) -> Any:
        out, key_proj, value_proj = _below_autograd(op, *args)
        tensors, ctx.scalars = args[:-3], args[-3:]
        ctx.op_backward = backward
        ctx.save_for_backward(*tensors, key_proj, value_proj)
        ctx.mark_non_differentiable(key_proj, value_proj)
        ctx.set_materialize_grads(False)
        return out, key_proj, value_proj

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: None) -> Any:
        if grad_out is None:
            return _returned(ctx)
        grads = ctx.op_backward(unit_stride(grad_out), *ctx.saved_tensors, *ctx.scalars, _wanted(ctx, 5))
        return _returned(ctx, grads)


class _Project(Function):
    @staticmethod
    def forward(ctx: Any, op: Callable[..., Any], backward: Callable[..., Any], *args: Any) -> Any:
        *tensors, ctx.allow_tf32 = args
        ctx.op_backward = backward
        ctx.save_for_backward(*tensors)
        return _below_autograd(op, *args)

    @staticmethod
    def backward(ctx: Any, grad_key_proj: Tensor, grad_value_proj: Tensor) -> Any:
        grad_key_proj, grad_value_proj = unit_stride(grad_key_proj), unit_stride(grad_value_proj)
        grads = ctx.op_backward(grad_key_proj, grad_value_proj, *ctx.saved_tensors, ctx.allow_tf32, _wanted(ctx, 4))
        return _returned(ctx, grads)


class _ProjectedAttention(Function):
    @staticmethod
    def forward(ctx: Any, op: Callable[..., Any], backward: Callable[..., Any], *args: Any) -> Any:
        tensors, ctx.scalars = args[:-3], args[-3:]
        ctx.op_backward = backward
        ctx.save_for_backward(*tensors)
        return _below_autograd(op, *args)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        grads = ctx.op_backward(unit_stride(grad_out), *ctx.saved_tensors, *ctx.scalars, _wanted(ctx, 3))
        return _returned(ctx, grads)


_REMEDY = (
    'call the forward with backend="reference" (or within use_backend("reference")), which is plain PyTorch and '
    "differentiable in every way, any number of times"
)


class _Gradient(Function):
    """A backward op run with create_graph=True: right values, and a clear error if they are differentiated."""

    @staticmethod
    def forward(ctx: Any, op: Callable[..., Any], *args: Any) -> Any:
        return _below_autograd(op, *args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(f"the fused backends are differentiable once; for higher derivatives {_REMEDY}")


def _register(op: torch._ops.OpOverload, differentiable: Callable[..., Any]) -> Callable[..., Any]:
    """Make `differentiable` the op's Autograd kernel, and return the op as the backends call it."""

    def kernel(*args: Any) -> Any:
        tracked = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        # Tangents do not set requires_grad: passing them on to the op would drop them silently.
        if forward_ad._current_level >= 0 or (tracked and torch._C._are_functorch_transforms_active()):
            raise NotImplementedError(
                f"the fused backends have no forward-mode derivatives and none for torch.func transforms; {_REMEDY}"
            )
        return differentiable(*args) if tracked else _below_autograd(op, *args)

    def call(*args: Any) -> Any:
        # Compilers and torch.jit.trace want the op, and so does vmap, under which no tensor says that it requires
        # gradients. Eager code skips the dispatcher's detour to the kernel, a third of a call's overhead.
        whole = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing()
        return op(*args) if whole else kernel(*args)

    LIBRARY.impl(op, kernel, "Autograd")
    return call


@dataclass(frozen=True)
class Operations:
    """The three differentiable operations of one overload of the ops."""

    attention: Callable[..., Any]
    project: Callable[..., Any]
    projected_attention: Callable[..., Any]


def _operations(overload: str) -> Operations:
    def make(name: str, function: type[Function]) -> Callable[..., Any]:
        op, op_backward = (getattr(getattr(_ops, n), overload) for n in (name, f"{name}_backward"))
        return _register(op, partial(function.apply, op, _register(op_backward, partial(_Gradient.apply, op_backward))))

    return Operations(
        make("attention", _Attention), make("project", _Project), make("projected_attention", _ProjectedAttention)
    )


NATIVE, TRITON = (_operations(overload) for overload in OVERLOADS)
