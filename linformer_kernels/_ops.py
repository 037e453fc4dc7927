"""The ops: fakes, and FLOP formulas for torch.utils.flop_counter, to the schemas in schemas.inc.

The native library defines the ops and implements them; where it did not load, they are defined here. `_autograd`
registers their derivatives. Arguments arrive validated and cast (`_validation`), so nothing here reports a user's
mistake.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _library
from .segments import choose_segments

# torch's counter imports Triton. Where that is broken the counter does not import, but this package does; where it is
# missing, torch logs so, and importing this package never prints.
_log = logging.getLogger("torch.utils.flop_counter")
_log.disabled = True
try:
    from torch.utils.flop_counter import register_flop_formula
except Exception:

    def register_flop_formula(targets: Any, get_raw: bool = False) -> Callable[[Any], Any]:  # type: ignore[misc]
        """Nothing to register with."""
        return lambda formula: formula

finally:
    _log.disabled = False

OPS, NAMESPACE = _library.ops(), _library.namespace()
LIBRARY = torch.library.Library(NAMESPACE, "DEF" if _library.load() else "FRAGMENT")

# The strides of results follow those of the arguments, so a compiler may not hand over other strides than it traced.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

if _library.load():
    for _name, _signature in _library.schemas().items():
        LIBRARY.define(_name + _signature, tags=_TAGS)

# Each op is defined twice, with the same arguments and results: by default it runs the kernels of the native library
# for its device, as overload "triton" those of triton_kernels.
OVERLOADS = ("default", "triton")


def _op(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define an op's overload "triton". The decorated function is the fake of both."""

    def define(fake: Callable[..., Any]) -> Callable[..., Any]:
        LIBRARY.define(f"{name}.triton{_library.schemas()[name]}", tags=_TAGS)
        for qualified in (name, f"{name}.triton"):
            torch.library.register_fake(f"{NAMESPACE}::{qualified}", _on_one_device(name, fake), lib=LIBRARY)
        return fake

    return define


def _on_one_device(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """One tensor on "meta" is enough for torch to call the fake, whose results nobody writes."""
    names = list(inspect.signature(fake).parameters)

    @functools.wraps(fake)
    def checked(*args: Any) -> Any:
        tensors = [(n, arg) for n, arg in zip(names, args, strict=True) if isinstance(arg, Tensor)]
        for other, tensor in tensors[1:]:
            if tensor.device != tensors[0][1].device:
                raise ValueError(
                    f"linformer_kernels::{name}: {other} is on {tensor.device} but {tensors[0][0]} is on "
                    f"{tensors[0][1].device}; wanted: all tensors on one device. To fix it: use "
                    f"{other}.to({tensors[0][0]}.device)."
                )
        return fake(*args)

    return checked


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor itself if its last stride is 1, as the ops require, else a contiguous copy."""
    if tensor.stride()[-1] == 1:
        return tensor
    # contiguous() would return a tensor whose last dimension has size 1 as it is, whatever the stride.
    return tensor.clone(memory_format=torch.contiguous_format)


def heads_inner(like: Tensor) -> bool:
    """Whether its storage order is (B, N, H, D)."""
    return like.dim() == 4 and like.size(1) > 1 and like.size(2) > 1 and like.stride(1) < like.stride(2)


def _like(like: Tensor, last: int) -> Tensor:
    """A result shaped like `like` with `last` columns, in its storage order: (B, N, H, D) or (B, H, N, D)."""
    shape = [*like.shape[:-1], last]
    if heads_inner(like):
        b, h, n, d = shape
        return like.new_empty((b, n, h, d)).transpose(1, 2)
    return like.new_empty(shape)


def _empty_grads(needs: int, *inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(_like(x, x.size(-1)) if needs >> i & 1 else x.new_empty(0) for i, x in enumerate(inputs))


def empty_bias_grad(wanted: int, query: Tensor, key_bias: Tensor | None) -> Tensor:
    """float32, contiguous."""
    shape = key_bias.shape if key_bias is not None and wanted & 1 else (0,)
    return query.new_empty(shape, dtype=torch.float32)


def _empty_projections(
    key: Tensor, value: Tensor, proj_key: Tensor, cu_seqlens_k: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch = key.size(0) if cu_seqlens_k is None else cu_seqlens_k.size(0) - 1
    shape = (batch, key.size(1), proj_key.size(-2))
    return key.new_empty((*shape, key.size(-1))), key.new_empty((*shape, value.size(-1)))


def empty_project_grads(
    needs: int, key: Tensor, value: Tensor, proj_key: Tensor, proj_value: Tensor | None
) -> tuple[Tensor, ...]:
    """Gradients of E and F are sums over sequences or heads: contiguous."""
    matrices = (proj_key if needs & 4 else None), (proj_value if needs & 8 else None)
    return *_empty_grads(needs, key, value), *(key.new_empty((0,) if m is None else m.shape) for m in matrices)


def empty_attention_grads(
    needs: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    proj_key: Tensor,
    proj_value: Tensor | None,
    key_bias: Tensor | None,
) -> tuple[Tensor, ...]:
    """The gradients of the whole operation, not yet computed."""
    others = empty_project_grads(needs >> 1, key, value, proj_key, proj_value)
    return *_empty_grads(needs, query), *others, empty_bias_grad(needs >> 5, query, key_bias)


def empty_attention(
    query: Tensor, key: Tensor, value: Tensor, proj_key: Tensor, cu_seqlens_k: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """out, K' and V', not yet computed."""
    return _like(query, value.size(-1)), *_empty_projections(key, value, proj_key, cu_seqlens_k)


@_op("attention")
def _(query, key, value, proj_key, proj_value, key_bias, mask, cu_seqlens_q, cu_seqlens_k, rng_state, dropout_p, scale, allow_tf32):  # type: ignore[no-untyped-def]  # fmt: skip # noqa: E501
    return empty_attention(query, key, value, proj_key, cu_seqlens_k)


@_op("attention_backward")
def _(grad_out, query, key, value, proj_key, proj_value, key_bias, mask, cu_seqlens_q, cu_seqlens_k, rng_state, key_proj, value_proj, dropout_p, scale, allow_tf32, needs):  # type: ignore[no-untyped-def]  # fmt: skip # noqa: E501
    return empty_attention_grads(needs, query, key, value, proj_key, proj_value, key_bias)


@_op("project")
def _(key, value, proj_key, proj_value, mask, cu_seqlens_k, allow_tf32):  # type: ignore[no-untyped-def]
    return _empty_projections(key, value, proj_key, cu_seqlens_k)


@_op("project_backward")
def _(grad_key_proj, grad_value_proj, key, value, proj_key, proj_value, mask, cu_seqlens_k, allow_tf32, needs):  # type: ignore[no-untyped-def]
    return empty_project_grads(needs, key, value, proj_key, proj_value)


@_op("projected_attention")
def _(query, key_proj, value_proj, key_bias, cu_seqlens_q, rng_state, dropout_p, scale, allow_tf32):  # type: ignore[no-untyped-def]
    return _like(query, value_proj.size(-1))


def empty_projected_grads(
    needs: int, query: Tensor, key_proj: Tensor, value_proj: Tensor, key_bias: Tensor | None
) -> tuple[Tensor, ...]:
    """Gradients of K' and V' are sums over query tiles: contiguous, as K' and V' themselves."""
    grads = _empty_grads(needs, query, key_proj.contiguous(), value_proj.contiguous())
    return *grads, empty_bias_grad(needs >> 3, query, key_bias)


@_op("projected_attention_backward")
def _(grad_out, query, key_proj, value_proj, key_bias, cu_seqlens_q, rng_state, dropout_p, scale, allow_tf32, needs):  # type: ignore[no-untyped-def]
    return empty_projected_grads(needs, query, key_proj, value_proj, key_bias)


def empty_pool(
    key: Tensor, value: Tensor, cu_seqlens_k: Tensor | None, num_segments: int
) -> tuple[Tensor, Tensor, Tensor]:
    """K', V' and the counts of their rows, not yet computed."""
    batch = key.size(0) if cu_seqlens_k is None else cu_seqlens_k.size(0) - 1
    shape = (batch, key.size(1), num_segments)
    count = key.new_empty(shape, dtype=torch.float32)
    return key.new_empty((*shape, key.size(-1))), key.new_empty((*shape, value.size(-1))), count


@_op("pool")
def _(key, value, segments, cu_seqlens_k, num_segments):  # type: ignore[no-untyped-def]
    return empty_pool(key, value, cu_seqlens_k, num_segments)


def empty_pool_grads(
    grad_key_proj: Tensor, grad_value_proj: Tensor, segments: Tensor, heads_inner: bool, needs: int
) -> tuple[Tensor, Tensor]:
    """Gradients of key and value, which are not kept: as long as `segments`, stored as (B, N, H, D) if heads_inner."""
    heads = grad_key_proj.size(1)

    def empty(grad: Tensor, wanted: int) -> Tensor:
        if not wanted:
            return grad.new_empty(0)
        if segments.dim() == 2:
            return grad.new_empty((segments.size(0), heads, grad.size(-1)))
        batch, length = segments.size(0), segments.size(2)
        if heads_inner:
            return grad.new_empty((batch, length, heads, grad.size(-1))).transpose(1, 2)
        return grad.new_empty((batch, heads, length, grad.size(-1)))

    return empty(grad_key_proj, needs & 1), empty(grad_value_proj, needs & 2)


@_op("pool_backward")
def _(grad_key_proj, grad_value_proj, count, segments, cu_seqlens_k, heads_inner, needs):  # type: ignore[no-untyped-def]
    return empty_pool_grads(grad_key_proj, grad_value_proj, segments, heads_inner, needs)


# No overload of Triton's: the native library has it for CPUs, and PyTorch's own operators make it for all else.
LIBRARY.impl("choose_segments", choose_segments, "CompositeExplicitAutograd")


def _empty_segments(query, key, key_padding_mask, cu_seqlens_q, cu_seqlens_k, num_segments, singles, first, last):  # type: ignore[no-untyped-def]  # fmt: skip
    return key.new_empty(key.shape[:-1], dtype=torch.int32)


torch.library.register_fake(
    f"{NAMESPACE}::choose_segments", _on_one_device("choose_segments", _empty_segments), lib=LIBRARY
)


def _rows(shape: Sequence[int]) -> int:
    """Rows over all heads and sequences, padded (B, H, N, D) or packed (total, H, D)."""
    return math.prod(shape[:-1])


def _project_flops(key: Sequence[int], value: Sequence[int], proj_len: int) -> int:
    return 2 * proj_len * _rows(key) * (key[-1] + value[-1])


def _project_backward_flops(key: Sequence[int], value: Sequence[int], proj_len: int, needs: int, shared: bool) -> int:
    """`needs` as in project_backward; `shared`: E serves as F, so its gradient takes two products."""
    want_key, want_value, want_e, want_f = (bool(needs >> i & 1) for i in range(4))
    width = key[-1] * (want_key + want_e) + value[-1] * (want_value + (want_e if shared else want_f))
    return 2 * proj_len * _rows(key) * width


def _attend_flops(query: Sequence[int], value_width: int, proj_len: int) -> int:
    return 2 * proj_len * _rows(query) * (query[-1] + value_width)


def _attend_backward_flops(
    query: Sequence[int], value_width: int, proj_len: int, want_query: bool, want_key_proj: bool, want_value_proj: bool
) -> int:
    """Scores recomputed, dP where dS is wanted, and one product for each gradient."""
    scores = want_query or want_key_proj
    width = query[-1] * (1 + want_query + want_key_proj) + value_width * (scores + want_value_proj)
    return 2 * proj_len * _rows(query) * width if scores or want_value_proj else 0


@register_flop_formula(OPS.attention)
def _attention_flop_formula(query, key, value, proj_key, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return _project_flops(key, value, proj_key[-2]) + _attend_flops(query, value[-1], proj_key[-2])


@register_flop_formula(OPS.attention_backward)
def _attention_backward_flop_formula(grad_out, query, key, value, proj_key, proj_value, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]  # fmt: skip # noqa: E501
    needs, shared = args[-1], proj_value is None
    want_query, want_key, want_value, want_e, want_f = (bool(needs >> i & 1) for i in range(5))
    want_key_proj, want_value_proj = want_key or want_e, want_value or (want_e if shared else want_f)
    return _attend_backward_flops(
        query, value[-1], proj_key[-2], want_query, want_key_proj, want_value_proj
    ) + _project_backward_flops(key, value, proj_key[-2], needs >> 1, shared)


@register_flop_formula(OPS.project)
def _project_flop_formula(key, value, proj_key, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return _project_flops(key, value, proj_key[-2])


@register_flop_formula(OPS.project_backward)
def _project_backward_flop_formula(grad_key_proj, grad_value_proj, key, value, proj_key, proj_value, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]  # fmt: skip # noqa: E501
    return _project_backward_flops(key, value, proj_key[-2], args[-1], proj_value is None)


@register_flop_formula(OPS.projected_attention)
def _projected_flop_formula(query, key_proj, value_proj, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return _attend_flops(query, value_proj[-1], key_proj[-2])


@register_flop_formula(OPS.pool)
def _pool_flop_formula(key, value, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return _rows(key) * (key[-1] + value[-1])


@register_flop_formula(OPS.projected_attention_backward)
def _projected_backward_flop_formula(grad_out, query, key_proj, value_proj, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]  # fmt: skip
    wants = (bool(args[-1] >> i & 1) for i in range(3))
    return _attend_backward_flops(query, value_proj[-1], key_proj[-2], *wants)
