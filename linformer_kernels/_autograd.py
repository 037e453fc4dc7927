"""Derivatives of the ops, as torch.autograd.Functions registered at the ops' Autograd dispatch key.

Registered there, a raw op differentiates like the public function, and torch.compile and torch.export see one op
where they would otherwise trace a Function. Only the inputs, K' and V' are saved: nothing of size N x K.
The first argument of a Function is the op and, differentiable once more in name only, its backward op; the second is
what the op takes behind its first `inputs`, in one tuple, as each argument of a Function costs time.
Each Function takes `ctx` in forward: the setup_context form costs an inspect.signature a call, about 30 us. And each
is torch's single-level Function: what Function itself adds, transforms of torch.func, is refused here anyway, and its
search for tensors that have outlived such a transform costs a fifth of a call's overhead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import lshift
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction as Function

from ._ops import LIBRARY, OPS, OVERLOADS, heads_inner, unit_stride

Ops = tuple[Callable[..., Any], Callable[..., Any]]


def _below_autograd(op: Any, *args: Any) -> Any:
    # Below the tracking of views too: a result of other strides is a view of what the op made, and nobody else's.
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return op._op(*args)  # op(*args) without one call of Python's


def _wanted(ctx: Any) -> int:
    """The ops' `needs` mask."""
    return sum(map(lshift, ctx.needs_input_grad[2:], range(6)))


def _returned(ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The wanted gradients; None for the others, and for what is no tensor."""
    return None, None, *(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad[2:], strict=True))


class _Attention(Function):
    inputs = 6

    @staticmethod
    def forward(ctx: Any, ops: Ops, rest: tuple[Any, ...], *inputs: Tensor | None) -> Any:
        op, ctx.op_backward = ops
        out, key_proj, value_proj = _below_autograd(op, *inputs, *rest)
        ctx.numbers = rest[-3:]
        ctx.save_for_backward(*inputs, *rest[:-3], key_proj, value_proj)
        ctx.mark_non_differentiable(key_proj, value_proj)
        ctx.set_materialize_grads(False)
        return out, key_proj, value_proj

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: None) -> Any:
        if grad_out is None:
            return _returned(ctx, (None,) * 6)
        return _returned(ctx, ctx.op_backward(unit_stride(grad_out), *ctx.saved_tensors, *ctx.numbers, _wanted(ctx)))


class _Project(Function):
    inputs = 4

    @staticmethod
    def forward(ctx: Any, ops: Ops, rest: tuple[Any, ...], *inputs: Tensor | None) -> Any:
        op, ctx.op_backward = ops
        *others, ctx.allow_tf32 = rest
        ctx.save_for_backward(*inputs, *others)
        return _below_autograd(op, *inputs, *rest)

    @staticmethod
    def backward(ctx: Any, grad_key_proj: Tensor, grad_value_proj: Tensor) -> Any:
        grad_key_proj, grad_value_proj = unit_stride(grad_key_proj), unit_stride(grad_value_proj)
        return _returned(
            ctx, ctx.op_backward(grad_key_proj, grad_value_proj, *ctx.saved_tensors, ctx.allow_tf32, _wanted(ctx))
        )


class _ProjectedAttention(Function):
    inputs = 4

    @staticmethod
    def forward(ctx: Any, ops: Ops, rest: tuple[Any, ...], *inputs: Tensor | None) -> Any:
        op, ctx.op_backward = ops
        ctx.numbers = rest[-3:]
        ctx.save_for_backward(*inputs, *rest[:-3])
        return _below_autograd(op, *inputs, *rest)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        return _returned(ctx, ctx.op_backward(unit_stride(grad_out), *ctx.saved_tensors, *ctx.numbers, _wanted(ctx)))


class _Pool(Function):
    inputs = 2

    @staticmethod
    def forward(ctx: Any, ops: Ops, rest: tuple[Any, ...], key: Tensor, value: Tensor) -> Any:
        op, ctx.op_backward = ops
        segments, cu_seqlens_k, _ = rest
        key_proj, value_proj, count = _below_autograd(op, key, value, *rest)
        ctx.heads_inner = heads_inner(key)
        ctx.save_for_backward(count, segments, cu_seqlens_k)
        ctx.mark_non_differentiable(count)
        return key_proj, value_proj, count

    @staticmethod
    def backward(ctx: Any, grad_key_proj: Tensor, grad_value_proj: Tensor, _: None) -> Any:
        grads = unit_stride(grad_key_proj), unit_stride(grad_value_proj)
        return _returned(ctx, ctx.op_backward(*grads, *ctx.saved_tensors, ctx.heads_inner, _wanted(ctx)))


def _differentiably(function: Any, ops: Ops, *args: Any) -> Any:
    return function.apply(ops, args[function.inputs :], *args[: function.inputs])


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


def _register(
    op: torch._ops.OpOverload, differentiable: Callable[..., Any]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Make `differentiable` the op's Autograd kernel, and return the op as the backends call it, and as eager code may
    that knows of no compiler and no transform."""

    def kernel(*args: Any) -> Any:
        tracked = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
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
    return call, kernel


@dataclass(frozen=True)
class Operations:
    """The differentiable operations of one overload of the ops."""

    attention: Callable[..., Any]
    project: Callable[..., Any]
    projected_attention: Callable[..., Any]
    pool: Callable[..., Any]


def _operations(overload: str) -> tuple[Operations, Operations]:
    def make(name: str, function: type[Function]) -> tuple[Callable[..., Any], Callable[..., Any]]:
        op, op_backward = (getattr(getattr(OPS, n), overload) for n in (name, f"{name}_backward"))
        backward, _ = _register(op_backward, partial(_Gradient.apply, op_backward))  # type: ignore[attr-defined]
        return _register(op, partial(_differentiably, function, (op, backward)))

    functions = {
        "attention": _Attention,
        "project": _Project,
        "projected_attention": _ProjectedAttention,
        "pool": _Pool,
    }
    made = [make(name, function) for name, function in functions.items()]
    return Operations(*(call for call, _ in made)), Operations(*(kernel for _, kernel in made))


(NATIVE, EAGER_NATIVE), (TRITON, _) = (_operations(overload) for overload in OVERLOADS)
