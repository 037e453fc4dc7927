"""Every mistake a user can make, reported with the argument's name, what came, what is wanted and what to do.

The result is a `Call`: arguments in the form that the ops expect, read by the backend choice and by the backends.
Checks are written so that torch.compile folds them into guards; only the values in cu_seqlens need data, so they are
checked in eager mode on a CPU tensor alone, and the CPU ops check them again where they index memory.

An attribute of a tensor is read once: `shape` costs half of what `size(i)` does, the name of a device more than both.
"""

from __future__ import annotations

import math
import operator
import sys
from dataclasses import dataclass
from typing import NoReturn, SupportsIndex

import torch
from torch import Tensor
from torch.nn import Parameter

from ._ops import unit_stride

FLOATING_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_PADDED = {"query": "(B, H, N_q, D)", "key": "(B, H_kv, N, D)", "value": "(B, H_kv, N, D_v)"}
_PACKED = {"query": "(total_q, H, D)", "key": "(total_k, H_kv, D)", "value": "(total_k, H_kv, D_v)"}
_PROJ = "(K, N_max), (H_kv, K, N_max) or (B, 1 or H_kv, K, N_max), with K of at least 1"


@dataclass(eq=False)  # frozen would be four times as slow to make
class Call:
    """One validated call, not to be changed. Tensors that the operation does not take are None."""

    dtype: torch.dtype
    device: torch.device
    device_type: str
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    proj_key: Tensor | None = None
    proj_value: Tensor | None = None
    key_proj: Tensor | None = None
    value_proj: Tensor | None = None
    key_bias: Tensor | None = None
    segments: Tensor | None = None
    key_padding_mask: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    dropout_p: float = 0.0
    scale: float = 1.0


def check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    proj_key: Tensor,
    proj_value: Tensor | None,
    key_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    dropout_p: float,
    scale: float | None,
    is_causal: bool,
    packed: bool,
) -> Call:
    """A linformer_attention call or, packed, a linformer_attention_varlen call."""
    refuse_causal(is_causal)
    _check_floating(query=query, key=key, value=value, proj_key=proj_key, proj_value=proj_value)
    other = "padded tensors go to linformer_attention" if packed else "packed ones go to linformer_attention_varlen"
    _check_rank("query", query, packed, other)
    shape = _check_key_value(key, value, packed, other)
    query_shape = _check_query(query, "key", shape)
    n_max = _check_projections(proj_key, proj_value, shape[1])
    if packed:
        cu_seqlens_q = _checked_cu_seqlens("cu_seqlens_q", cu_seqlens_q, "query", query, None)
        cu_seqlens_k = _checked_cu_seqlens("cu_seqlens_k", cu_seqlens_k, "key", key, n_max)
        batch, source = cu_seqlens_k.size(0) - 1, "cu_seqlens_k describes"
        _check_same_batch(cu_seqlens_q, cu_seqlens_k)
    else:
        if query_shape[0] != shape[0]:
            _fail_batch("query has batch size", query_shape[0], "key", shape[0])
        _check_length("key", shape[2], n_max)
        _check_mask(key_padding_mask, key)
        batch, source = shape[0], "key has"
    _check_batch_of_projection(proj_key, batch, source)
    return Call(
        *_kind(query),
        query=unit_stride(query),
        key=unit_stride(key),
        value=unit_stride(value),
        proj_key=unit_stride(proj_key),
        proj_value=None if proj_value is None else unit_stride(proj_value),
        key_bias=_checked_bias(key_bias, (batch, shape[1], proj_key.size(-2)), query),
        key_padding_mask=key_padding_mask,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        dropout_p=_checked_dropout(dropout_p),
        scale=_checked_scale(scale, query_shape[-1]),
    )


def check_project(
    key: Tensor,
    value: Tensor,
    proj_key: Tensor,
    proj_value: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Call:
    """A project_kv call, padded or, with cu_seqlens_k, packed."""
    _check_floating(key=key, value=value, proj_key=proj_key, proj_value=proj_value)
    packed = cu_seqlens_k is not None
    shape = _check_key_value(key, value, packed, "packed tensors come with cu_seqlens_k, padded ones without")
    n_max = _check_projections(proj_key, proj_value, shape[1])
    if cu_seqlens_k is None:
        _check_length("key", shape[2], n_max)
        _check_mask(key_padding_mask, key)
        _check_batch_of_projection(proj_key, shape[0], "key has")
    else:
        refuse_both(key_padding_mask)
        cu_seqlens_k = _checked_cu_seqlens("cu_seqlens_k", cu_seqlens_k, "key", key, n_max)
        _check_batch_of_projection(proj_key, cu_seqlens_k.size(0) - 1, "cu_seqlens_k describes")
    return Call(
        *_kind(key),
        key=unit_stride(key),
        value=unit_stride(value),
        proj_key=unit_stride(proj_key),
        proj_value=None if proj_value is None else unit_stride(proj_value),
        key_padding_mask=key_padding_mask,
        cu_seqlens_k=cu_seqlens_k,
    )


def check_pool(
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    num_segments: SupportsIndex,
    key_padding_mask: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> tuple[Call, int]:
    """A pool_kv call, padded or, with cu_seqlens_k, packed. The mask becomes part of `segments`."""
    _check_floating(key=key, value=value)
    packed = cu_seqlens_k is not None
    shape = _check_key_value(key, value, packed, "packed tensors come with cu_seqlens_k, padded ones without")
    number = integer("num_segments", num_segments, "an integer, the number K of segments")
    if not 1 <= number < 2**31:
        remedy = "pass the number K of segments, so that they are 0 to K - 1"
        _fail(f"num_segments is {number}", "at least 1, and less than 2^31", remedy)
    if cu_seqlens_k is None:
        _check_mask(key_padding_mask, key)
    else:
        refuse_both(key_padding_mask)
        cu_seqlens_k = _checked_cu_seqlens("cu_seqlens_k", cu_seqlens_k, "key", key, None)
    segments = _checked_segments(segments, number, key, shape, packed)
    if key_padding_mask is not None:
        segments = torch.where(key_padding_mask[:, None], segments, -1)
    call = Call(
        *_kind(key), key=unit_stride(key), value=unit_stride(value), segments=segments, cu_seqlens_k=cu_seqlens_k
    )
    return call, number


def check_adaptive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Call:
    """What chooses segments by a query."""
    check_pooled_attention(query, key, value, cu_seqlens_q, cu_seqlens_k)
    if cu_seqlens_k is not None:
        refuse_both(key_padding_mask)
        cu_seqlens_q = _checked_cu_seqlens("cu_seqlens_q", cu_seqlens_q, "query", query, None)
        cu_seqlens_k = _checked_cu_seqlens("cu_seqlens_k", cu_seqlens_k, "key", key, None)
    else:
        _check_mask(key_padding_mask, key)
    # Choices are made in float32.
    query, key = (x.detach().float() if x.dtype == torch.float64 else x.detach() for x in (query, key))
    return Call(
        *_kind(query),
        query=unit_stride(query),
        key=unit_stride(key),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )


def check_projected_attention(
    query: Tensor,
    key_proj: Tensor,
    value_proj: Tensor,
    key_bias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    dropout_p: float,
    scale: float | None,
) -> Call:
    """A projected_attention call, padded or, with cu_seqlens_q, packed."""
    _check_floating(query=query, key_proj=key_proj, value_proj=value_proj)
    packed = cu_seqlens_q is not None
    _check_rank("query", query, packed, "a packed query comes with cu_seqlens_q, a padded one without")
    shape, value_shape = key_proj.shape, value_proj.shape
    if len(shape) != 4 or 0 in shape[1:]:
        _fail(_shape("key_proj", key_proj), "(B, H_kv, K, D), none but B zero", "use K' as project_kv returns it")
    if len(value_shape) != 4 or value_shape[:-1] != shape[:-1] or value_shape[-1] == 0:
        _fail(
            f"{_shape('value_proj', value_proj)} but {_shape('key_proj', key_proj)}",
            "(B, H_kv, K, D_v), as key_proj but for the last dimension",
            "take both from one project_kv call",
        )
    query_shape = _check_query(query, "key_proj", shape)
    if packed:
        cu_seqlens_q = _checked_cu_seqlens("cu_seqlens_q", cu_seqlens_q, "query", query, None)
        source, batch = "cu_seqlens_q describes a batch of", cu_seqlens_q.size(0) - 1
    else:
        source, batch = "query has batch size", query_shape[0]
    if batch != shape[0]:
        _fail_batch(source, batch, "key_proj", shape[0])
    return Call(
        *_kind(query),
        query=unit_stride(query),
        key_proj=unit_stride(key_proj),
        value_proj=unit_stride(value_proj),
        key_bias=_checked_bias(key_bias, tuple(shape[:3]), query),
        cu_seqlens_q=cu_seqlens_q,
        dropout_p=_checked_dropout(dropout_p),
        scale=_checked_scale(scale, query_shape[-1]),
    )


def check_both_packed(cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> None:
    """That query and keys are packed, or neither is."""
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        came, lacks = ("cu_seqlens_k", "cu_seqlens_q") if cu_seqlens_q is None else ("cu_seqlens_q", "cu_seqlens_k")
        _fail(f"{came} came without {lacks}", "both or neither", "pack query, key and value alike")


def check_pooled_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> None:
    """That the query fits the keys; the halves check the rest, and of the keys the second knows K' alone."""
    check_both_packed(cu_seqlens_q, cu_seqlens_k)
    _check_floating(query=query, key=key, value=value)
    packed = cu_seqlens_k is not None
    remedy = "packed tensors come with cu_seqlens_q and cu_seqlens_k, padded ones without"
    _check_rank("query", query, packed, remedy)
    shape = _check_key_value(key, value, packed, remedy)
    query_shape = _check_query(query, "key", shape)
    if packed:
        _check_same_batch(
            _checked_cu_seqlens("cu_seqlens_q", cu_seqlens_q, "query", query, None),
            _checked_cu_seqlens("cu_seqlens_k", cu_seqlens_k, "key", key, None),
        )
    elif query_shape[0] != shape[0]:
        _fail_batch("query has batch size", query_shape[0], "key", shape[0])


def check_pooling(
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    n_max: int,
    weight: Tensor | None,
    head_dim: int | None,
    num_heads: int | None,
) -> None:
    """The arguments of a projection that is no matrix; `weight`: of a convolution, made for these sizes."""
    _check_floating(key=key, value=value)
    _check_key_value(key, value, False, "view the columns of each head as a dimension of its own")
    _check_length("key", key.size(2), n_max)
    _check_mask(key_padding_mask, key)
    if weight is None:
        return
    heads = "H_kv" if num_heads is None else num_heads
    for name, tensor in (("key", key), ("value", value)):
        if tensor.size(-1) != head_dim or num_heads not in (None, tensor.size(1)):
            wanted = f"(B, {heads}, N, {head_dim}), as the convolution was made for"
            _fail(_shape(name, tensor), wanted, "make the projection with the num_heads and head_dim of the keys")
    if not is_autocast(key.device.type):
        _check_floating(key=key, proj_key=weight)
    _check_device("proj_key", weight, "key", key)


def is_autocast(device_type: str) -> bool:
    """Whether autocast casts there. Devices without it, as "meta", are not to be asked."""
    return torch._C._is_any_autocast_enabled() and _has_autocast(device_type) and torch.is_autocast_enabled(device_type)


def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


# The compiler of torch 2.10 and 2.11 cannot trace what this calls, and may take the answer for a constant.
_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def integer(name: str, value: SupportsIndex, wanted: str = "an integer") -> int:
    """A size: Python's integers, numpy's, what torch.compile has for them."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]  # the compiler cannot trace what follows for a size that may change
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is {value!r}; wanted: {wanted}")
    return operator.index(value)


def refuse_causal(is_causal: bool) -> None:
    """Linformer attention cannot be causal: say why."""
    if is_causal:
        _fail(
            "is_causal=True came",
            "False: each row of K' = E @ key mixes all positions, so no mask on the (N_q, K) scores hides the future",
            "use exact attention (torch.nn.functional.scaled_dot_product_attention) for causal models",
            NotImplementedError,
        )


def _fail(got: str, wanted: str, remedy: str, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{got}; wanted: {wanted}. To fix it: {remedy}.")


def _fail_batch(source: str, batch: int, name: str, other: int) -> NoReturn:
    remedy = "expand the smaller one with .expand(B, -1, -1, -1)"
    _fail(f"{source} {batch} but {name} has batch size {other}", "the same number of sequences in both", remedy)


def _check_same_batch(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    if cu_seqlens_q.size(0) != cu_seqlens_k.size(0):
        _fail(
            f"cu_seqlens_q has {cu_seqlens_q.size(0)} entries but cu_seqlens_k has {cu_seqlens_k.size(0)}",
            "B + 1 entries in both",
            "give a sequence without queries or keys a length of 0 by repeating an entry",
        )


def _shape(name: str, tensor: Tensor) -> str:
    return f"{name} has shape {tuple(tensor.shape)}"


def check_tensor(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        _fail(f"{name} is a {type(tensor).__name__}", "a torch.Tensor", f"pass {name} as a tensor", TypeError)


def _check_dense(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_nested:
        remedy = "use .to_dense() or .to_padded_tensor(), or linformer_attention_varlen for ragged batches"
        _fail(f"{name} is a sparse or nested tensor", "a dense tensor", remedy, TypeError)


def _check_device(name: str, tensor: Tensor, first_name: str, first: Tensor) -> None:
    if tensor.device != first.device:
        got = f"{name} is on {tensor.device} but {first_name} is on {first.device}"
        _fail(got, "all tensors on one device", f"use {name}.to({first_name}.device)")


def _check_floating(**tensors: Tensor | None) -> None:
    """Dense tensors of one floating dtype on one device. proj_value alone may be None."""
    first_name, first = next(iter(tensors.items()))
    check_tensor(first_name, first)
    assert first is not None  # for mypy: it has been refused
    dtype, device = first.dtype, first.device
    for name, tensor in tensors.items():
        if tensor is None and name == "proj_value":
            continue
        if not isinstance(tensor, Tensor):
            check_tensor(name, tensor)
        assert tensor is not None  # for mypy: it has been refused
        own = tensor.dtype
        if own not in FLOATING_DTYPES:
            wanted = "float32, float16, bfloat16 or float64"
            _fail(f"{name} has dtype {own}", wanted, f"convert it, for example with {name}.float()", TypeError)
        _check_dense(name, tensor)
        if own != dtype:
            got = f"{name} has dtype {own} but {first_name} has {dtype}"
            remedy = f"use {name}.to({first_name}.dtype), or run under torch.autocast"
            _fail(got, "one dtype for all tensors", remedy, TypeError)
        if tensor is not first and tensor.device != device:
            _check_device(name, tensor, first_name, first)


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.device, str]:
    """What a `Call` starts with."""
    device = tensor.device
    return tensor.dtype, device, "cpu" if tensor.is_cpu else device.type


def _check_rank(name: str, tensor: Tensor, packed: bool, remedy: str) -> None:
    rank, shapes = (3, _PACKED) if packed else (4, _PADDED)
    if tensor.dim() != rank:
        _fail(_shape(name, tensor), f"{rank} dimensions, {shapes[name]}", remedy)


def _check_key_value(key: Tensor, value: Tensor, packed: bool, remedy: str) -> torch.Size:
    """Returns the shape of the key."""
    _check_rank("key", key, packed, remedy)
    _check_rank("value", value, packed, remedy)
    key_shape, value_shape = key.shape, value.shape
    if key_shape[:-1] != value_shape[:-1]:
        wanted = "the same shape but for the last dimension"
        _fail(f"{_shape('value', value)} but {_shape('key', key)}", wanted, "take both from the same rows and heads")
    for name, tensor, shape in (("key", key, key_shape), ("value", value, value_shape)):
        if shape[1] == 0 or shape[-1] == 0:
            _fail(_shape(name, tensor), "at least one head and one column", "check the order of the dimensions")
    return key_shape


def _check_query(query: Tensor, key_name: str, key_shape: torch.Size) -> torch.Size:
    """Returns its shape."""
    query_shape = query.shape
    if query_shape[-1] != key_shape[-1]:
        got = f"query has head width {query_shape[-1]} but {key_name} has {key_shape[-1]}"
        _fail(got, "the same head width D in both", "project query and key to one width (value may have another)")
    if query_shape[1] == 0 or query_shape[1] % key_shape[1] != 0:
        _fail(
            f"query has {query_shape[1]} heads but {key_name} has {key_shape[1]}",
            "a multiple of the key heads (grouped-query: query head h reads key head h // (H // H_kv))",
            "check that dimension 1 is the head dimension",
        )
    return query_shape


def _check_projections(proj_key: Tensor, proj_value: Tensor | None, heads: int) -> int:
    """Returns N_max."""
    shape = proj_key.shape
    if len(shape) not in (2, 3, 4) or shape[-2] == 0:
        _fail(_shape("proj_key", proj_key), _PROJ, "use one matrix for all heads or one for each key head")
    if len(shape) >= 3 and shape[-3] != heads and (len(shape) == 3 or shape[1] != 1):
        got = f"{_shape('proj_key', proj_key)} but key has {heads} heads"
        _fail(got, _PROJ, "give each key head its matrix, or one (K, N_max) matrix to all")
    if proj_value is not None and proj_value.shape != shape:
        got = f"{_shape('proj_value', proj_value)} but {_shape('proj_key', proj_key)}"
        _fail(got, "the same shape in both", "leave proj_value out to use proj_key for keys and values")
    return shape[-1]


def _check_batch_of_projection(proj_key: Tensor, batch: int, source: str) -> None:
    if proj_key.dim() == 4 and proj_key.shape[0] != batch:
        got = f"{_shape('proj_key', proj_key)} but {source} {batch} sequences"
        _fail(got, _PROJ, "give each sequence its matrix, or one to all as (K, N_max) or (H_kv, K, N_max)")


def refuse_both(key_padding_mask: Tensor | None) -> None:
    if key_padding_mask is not None:
        _fail("key_padding_mask came with cu_seqlens_k", "one of the two", "leave the masked rows out when packing")


def _checked_bias(key_bias: Tensor | None, shape: tuple[int, ...], query: Tensor) -> Tensor | None:
    """As (B, H_kv, K) in float32, with float64 tensors in float64."""
    if key_bias is None:
        return None
    check_tensor("key_bias", key_bias)
    _check_dense("key_bias", key_bias)
    if not key_bias.dtype.is_floating_point:
        wanted = "a floating dtype: a number to add to the scores, -inf for a row that takes no part"
        remedy = "turn a bool mask into numbers with torch.where(mask, 0.0, -torch.inf)"
        _fail(f"key_bias has dtype {key_bias.dtype}", wanted, remedy, TypeError)
    _check_device("key_bias", key_bias, "query", query)
    own = key_bias.shape
    fits = len(own) <= 3 and all(n in (1, m) for n, m in zip(reversed(own), reversed(shape), strict=False))
    if not fits:
        wanted = f"(B, H_kv, K) = {shape}, or what broadcasts to it"
        _fail(_shape("key_bias", key_bias), wanted, "give each row of K' a number, and not each pair of query and row")
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return unit_stride(key_bias.to(wide).expand(shape))


def _checked_segments(segments: Tensor, number: int, key: Tensor, shape: torch.Size, packed: bool) -> Tensor:
    """As int32, (B, 1 or H_kv, N) or (total, 1 or H_kv), with -1 for what is out of range."""
    check_tensor("segments", segments)
    _check_dense("segments", segments)
    if segments.dtype not in (torch.int32, torch.int64):
        remedy = "use segments.to(torch.int64)"
        _fail(f"segments has dtype {segments.dtype}", "int32 or int64", remedy, TypeError)
    _check_device("segments", segments, "key", key)
    wanted = (shape[0], shape[1]) if packed else (shape[0], shape[1], shape[2])
    one_for_all = (shape[0],) if packed else (shape[0], shape[2])
    # By rank: of tuples of two lengths a compiler would compare the sequence with the heads, and guard on that.
    if tuple(segments.shape) != (wanted if segments.dim() == len(wanted) else one_for_all):
        names = ("(total_k,)", "(total_k, H_kv)") if packed else ("(B, N)", "(B, H_kv, N)")
        _fail(
            _shape("segments", segments),
            f"{names[0]} = {one_for_all} or {names[1]} = {wanted}",
            "give each key the number of its segment, the same for all heads or one a head",
        )
    if is_known(segments) and segments.numel():
        low, high = (int(bound) for bound in torch.aminmax(segments))
        if low < -1 or high >= number:
            _fail(
                f"segments holds {low if low < -1 else high} but num_segments is {number}",
                "0 to num_segments - 1, or -1 for a key that takes part nowhere",
                "check how the segments were computed, or raise num_segments",
            )
    else:
        segments = torch.where((segments >= 0) & (segments < number), segments, -1)
    segments = segments.to(torch.int32)
    return segments if len(segments.shape) == len(wanted) else segments.unsqueeze(1)


def _check_length(name: str, length: int, n_max: int) -> None:
    if length > n_max:
        got = f"{name} has sequence length N = {length} but the projection is made for N_max = {n_max}"
        _fail(got, "N <= N_max, the columns of proj_key (K, N_max)", "make a longer projection, or cut the sequence")


def _check_mask(key_padding_mask: Tensor | None, key: Tensor) -> None:
    if key_padding_mask is None:
        return
    check_tensor("key_padding_mask", key_padding_mask)
    _check_dense("key_padding_mask", key_padding_mask)
    if key_padding_mask.dtype != torch.bool:
        wanted = "bool, where True means that the position takes part"
        remedy = "use key_padding_mask.bool(), inverted if 1 stood for padding"
        _fail(f"key_padding_mask has dtype {key_padding_mask.dtype}", wanted, remedy, TypeError)
    if key_padding_mask.shape != (key.size(0), key.size(2)):
        wanted = f"(B, N) = {(key.size(0), key.size(2))}"
        remedy = "give the padding of the keys, and no mask of (query, key) pairs: K' mixes all positions"
        if key_padding_mask.shape == (key.size(2), key.size(0)):
            remedy = "check which dimension is the batch: the mask's order, or batch_first of the module"
        elif key_padding_mask.dim() == 2:
            remedy = "give each row of key an entry"
        _fail(_shape("key_padding_mask", key_padding_mask), wanted, remedy)
    _check_device("key_padding_mask", key_padding_mask, "key", key)


def _checked_cu_seqlens(
    name: str, cu_seqlens: Tensor | None, rows_name: str, rows: Tensor, n_max: int | None
) -> Tensor:
    """As int64. n_max bounds the length of a sequence."""
    check_tensor(name, cu_seqlens)
    assert cu_seqlens is not None  # for mypy: it has been refused
    _check_dense(name, cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        _fail(f"{name} has dtype {cu_seqlens.dtype}", "int32 or int64", f"use {name}.to(torch.int64)", TypeError)
    if cu_seqlens.dim() != 1 or cu_seqlens.size(0) == 0:
        _fail(_shape(name, cu_seqlens), "(B + 1,)", "start with 0, then add each sequence's length to the last entry")
    _check_device(name, cu_seqlens, rows_name, rows)
    if is_known(cu_seqlens):
        _check_bounds(name, cu_seqlens.tolist(), rows_name, rows.size(0), n_max)
    return unit_stride(cu_seqlens.to(torch.int64))


def is_known(tensor: Tensor) -> bool:
    """Whether values may be read: that would break the graph of a compiler, has no meaning on a fake tensor or on a
    wrapper of functorch's (of functionalize, which has no values of its own), and would stall a GPU."""
    known = type(tensor) in (Tensor, Parameter) and tensor.device.type == "cpu"
    traced = torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor) or is_recording()
    return known and not traced


def is_recording() -> bool:
    """Within make_fx, whose tensors look like any other."""
    proxy = torch._C._TorchDispatchModeKey.PROXY
    before = torch._ops._get_dispatch_mode_pre_dispatch  # make_fx(..., pre_dispatch=True) has a stack of its own
    return torch._C._get_dispatch_mode(proxy) is not None or before(proxy) is not None


def _check_bounds(name: str, bounds: list[int], rows_name: str, total: int, n_max: int | None) -> None:
    if bounds[0] != 0:
        _fail(f"{name} starts with {bounds[0]}", "0 as the first entry", "prepend 0 to the cumulative lengths")
    for i in range(1, len(bounds)):
        length = bounds[i] - bounds[i - 1]
        if length < 0:
            got = f"{name} falls from {bounds[i - 1]} to {bounds[i]} at entry {i}"
            _fail(got, "entries that never decrease", "use the cumulative sum of the lengths")
        if n_max is not None and length > n_max:
            _check_length(f"sequence {i - 1} of {rows_name} (by {name})", length, n_max)
    if bounds[-1] != total:
        got = f"{name} ends with {bounds[-1]} but {rows_name} has {total} rows"
        _fail(got, "the number of rows as the last entry", "pack exactly the rows that the lengths describe")


def _checked_dropout(dropout_p: float) -> float:
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        _fail(f"dropout_p is a {type(dropout_p).__name__}", "a float in [0, 1)", "pass a Python number", TypeError)
    if not 0.0 <= dropout_p < 1.0:
        _fail(f"dropout_p is {dropout_p}", "a float in [0, 1)", "pass the probability of dropping an element")
    return dropout_p


def _checked_scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        remedy = "pass a Python number; a learned scale is multiplied into the query"
        _fail(f"scale is a {type(scale).__name__}", "a float, or None for 1 / sqrt(D)", remedy, TypeError)
    if not abs(scale) <= sys.float_info.max:
        _fail(f"scale is {scale}", "a finite float, or None for 1 / sqrt(D)", "check how the scale was computed")
    return scale
