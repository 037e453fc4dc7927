"""The public functions: Linformer attention and its two halves, padded and packed.

One head of Wang et al., "Linformer: Self-Attention with Linear Complexity" (2020, arXiv 2006.04768), section 4, Eq. 7:

    out = softmax(scale * query @ (E @ key)^T) @ (F @ value)

and the same with segments in the place of E and F: row k of the compressed keys is the mean of those of segment k.

Each function validates, chooses a backend (see `use_backend`) and runs it. All of them share these properties:

* Tensors of one floating dtype on one device. Under torch.autocast they are cast to its dtype (float64 is left alone).
* Any strides. Tensors whose last stride is not 1 are copied, all others are read where they lie.
* Empty batches, sequences and queries give empty or zero results.
* Differentiable once with respect to every floating tensor; the "reference" backend any number of times.
* Results do not change from run to run on one device; where "composed" serves a GPU, as far as torch promises that.
* float32 is true to float32. On a GPU it is multiplied in TF32 where torch allows that when the forward runs, backward
  too: torch.backends.cuda.matmul.fp32_precision = "tf32", or one of the older ways to say so.
* Dropout draws one seed from torch's generator of the device, so torch.manual_seed and checkpointing govern it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ._backends import REFUSALS, choose, short_way
from ._validation import (
    Call,
    check_attention,
    check_pool,
    check_pooled_attention,
    check_project,
    check_projected_attention,
    is_autocast,
)


def linformer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    proj_key: Tensor,
    proj_value: Tensor | None = None,
    *,
    key_padding_mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    is_causal: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Linformer attention on padded tensors: softmax(scale * query @ K'^T) @ V', in O(N * K) time and memory.

    K' = E[:, :N] @ key and V' = F[:, :N] @ value are the keys and values compressed from N rows to K.

    Args:
        query: (B, H, N_q, D).
        key: (B, H_kv, N, D). H is a multiple of H_kv: query head h reads key head h // (H // H_kv).
        value: (B, H_kv, N, D_v).
        proj_key: E, (K, N_max) for all heads or (H_kv, K, N_max), or of each sequence, computed from its data,
            (B, 1, K, N_max) or (B, H_kv, K, N_max); N <= N_max, and the first N columns are used.
        proj_value: F, shaped as E. None: E serves for both, is read once and receives the sum of both gradients.
        key_padding_mask: (B, N) bool, True = the position takes part (the convention of
            torch.nn.functional.scaled_dot_product_attention, not of torch.nn.MultiheadAttention). A masked position
            adds nothing to K' and V', whatever it holds, NaN included. A sequence with no position left gives zeros
            and zero gradients.
        key_bias: floating, (B, H_kv, K) or what broadcasts to it: added to the scaled scores of the rows of K'. -inf
            takes a row out; a query all of whose rows are out gets zeros.
        dropout_p: probability in [0, 1) of dropping an element of the softmax. Applied whenever it is not 0: pass 0
            in evaluation.
        scale: factor of the scores; None: 1 / sqrt(D).
        is_causal: refused if true. Every row of K' mixes the whole sequence, so no mask on the scores hides the future.
        backend: "cuda", "triton", "cpu", "composed" or "reference"; None: the first that takes the call, see
            `use_backend`.

    Returns:
        (B, H, N_q, D_v), in the storage order of the query: (B, N_q, H, D_v) storage stays that, as a transposed view.

    Raises:
        TypeError: an argument is not a tensor or number, tensors are not of one floating dtype, the mask is not bool.
        ValueError: shapes or devices do not fit, dropout_p or scale is out of range, the backend is unknown.
        NotImplementedError: is_causal=True, or the backend that was asked for cannot serve this call.
        RuntimeError: the backend that was asked for is not available in this installation.
    """
    short = short_way(backend, query, key, value, proj_key, proj_value, key_padding_mask)
    if short is not None and is_causal is False and key_bias is None:
        try:
            factor = _plain_factor(query, dropout_p, scale)
            if factor is not None:
                tensors = query, key, value, proj_key, proj_value, None, key_padding_mask, None, None, None
                return short.attention(*tensors, 0.0, factor, _plain_tf32(query))[0]
        except REFUSALS:
            pass  # the long way has words for it, or copies
    return _attention(
        query,
        key,
        value,
        proj_key,
        proj_value,
        key_bias,
        key_padding_mask,
        None,
        None,
        dropout_p,
        scale,
        is_causal,
        False,
        backend,
    )


def linformer_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    proj_key: Tensor,
    proj_value: Tensor | None = None,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    key_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    is_causal: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Linformer attention on sequences of different lengths packed one after the other, without padding.

    Every sequence gives what it gives alone: its keys and values meet the first N_b columns of E and F.

    Args:
        query: (total_q, H, D).
        key: (total_k, H_kv, D).
        value: (total_k, H_kv, D_v).
        proj_key: as in `linformer_attention`; no sequence may have more than N_max keys.
        proj_value: as in `linformer_attention`.
        cu_seqlens_q: (B + 1,) int32 or int64, on the same device: rows cu_seqlens_q[b] to cu_seqlens_q[b + 1] are the
            queries of sequence b. Starts at 0, never decreases, ends with total_q. The values are checked on CPU
            tensors in eager mode; elsewhere reading them would break a compiled graph or stall the device.
        cu_seqlens_k: the same for keys and values. A sequence without keys gives zeros.
        key_bias: as in `linformer_attention`, for B sequences.
        dropout_p: as in `linformer_attention`.
        scale: as in `linformer_attention`.
        is_causal: refused if true, as in `linformer_attention`.
        backend: as in `linformer_attention`. "reference" loops over the sequences in Python.

    Returns:
        (total_q, H, D_v), contiguous.

    Raises:
        ValueError, TypeError: as `linformer_attention`; also if cu_seqlens_q or cu_seqlens_k does not describe the
            rows.
    """
    return _attention(
        query,
        key,
        value,
        proj_key,
        proj_value,
        key_bias,
        None,
        cu_seqlens_q,
        cu_seqlens_k,
        dropout_p,
        scale,
        is_causal,
        True,
        backend,
    )


def project_kv(
    key: Tensor,
    value: Tensor,
    proj_key: Tensor,
    proj_value: Tensor | None = None,
    *,
    key_padding_mask: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The first half of Linformer attention: K' = E[:, :N] @ key and V' = F[:, :N] @ value.

    For caching K' and V' (cross-attention), and for sequences whose parts are projected in different places and summed.

    Args:
        key: (B, H_kv, N, D), or packed (total_k, H_kv, D) with cu_seqlens_k.
        value: (B, H_kv, N, D_v), or packed (total_k, H_kv, D_v).
        proj_key: as in `linformer_attention`.
        proj_value: as in `linformer_attention`.
        key_padding_mask: as in `linformer_attention`; for padded tensors only.
        cu_seqlens_k: as in `linformer_attention_varlen`; makes key and value packed.
        backend: as in `linformer_attention`.

    Returns:
        K' (B, H_kv, K, D) and V' (B, H_kv, K, D_v), contiguous, for padded and packed tensors alike.

    Raises:
        ValueError, TypeError: as `linformer_attention_varlen`; also if key_padding_mask and cu_seqlens_k come together.
    """
    short = short_way(backend, key, value, proj_key, proj_value, key_padding_mask)
    if short is not None and cu_seqlens_k is None:
        try:
            return short.project(key, value, proj_key, proj_value, key_padding_mask, None, _plain_tf32(key))
        except REFUSALS:
            pass  # the long way has words for it, or copies
    key, value, proj_key, proj_value = autocast(key, value, proj_key, proj_value)
    call = check_project(key, value, proj_key, proj_value, key_padding_mask, cu_seqlens_k)
    return choose(call, backend).project(
        call.key,
        call.value,
        call.proj_key,
        call.proj_value,
        call.key_padding_mask,
        call.cu_seqlens_k,
        _allow_tf32(call),
    )


def projected_attention(
    query: Tensor,
    key_proj: Tensor,
    value_proj: Tensor,
    *,
    key_bias: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """The second half of Linformer attention: softmax(scale * query @ K'^T + key_bias) @ V' for given K' and V'.

    Args:
        query: (B, H, N_q, D), or packed (total_q, H, D) with cu_seqlens_q.
        key_proj: K', (B, H_kv, K, D), from `project_kv`, a pooling or a convolution.
        value_proj: V', (B, H_kv, K, D_v).
        key_bias: as in `linformer_attention`.
        cu_seqlens_q: as in `linformer_attention_varlen`; makes the query packed.
        dropout_p: as in `linformer_attention`.
        scale: as in `linformer_attention`.
        backend: as in `linformer_attention`.

    Returns:
        (B, H, N_q, D_v) in the storage order of the query, or (total_q, H, D_v).

    Raises:
        ValueError, TypeError: as `linformer_attention_varlen`.
    """
    short = short_way(backend, query, key_proj, value_proj)
    if short is not None and cu_seqlens_q is None and key_bias is None:
        try:
            factor = _plain_factor(query, dropout_p, scale)
            if factor is not None:
                numbers = 0.0, factor, _plain_tf32(query)
                return short.projected_attention(query, key_proj, value_proj, None, None, None, *numbers)
        except REFUSALS:
            pass  # the long way has words for it, or copies
    query, key_proj, value_proj = autocast(query, key_proj, value_proj)
    call = check_projected_attention(query, key_proj, value_proj, key_bias, cu_seqlens_q, dropout_p, scale)
    return choose(call, backend).projected_attention(
        call.query,
        call.key_proj,
        call.value_proj,
        call.key_bias,
        call.cu_seqlens_q,
        _draw_rng_state(call),
        call.dropout_p,
        call.scale,
        _allow_tf32(call),
    )


def pool_kv(
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    num_segments: int,
    *,
    key_padding_mask: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values compressed by means over segments: row k of K' is the mean of the keys whose segment is k.

    E with 1 / count in the columns of a segment, in O(N * D) instead of O(N * K * D). Sums have a fixed order, that of
    the positions, so that they are bitwise the same from run to run, and for a padded, a packed and a single sequence.

    Args:
        key: (B, H_kv, N, D), or packed (total_k, H_kv, D) with cu_seqlens_k.
        value: (B, H_kv, N, D_v), or packed (total_k, H_kv, D_v).
        segments: int32 or int64, (B, N) for all heads or (B, H_kv, N); packed (total_k,) or (total_k, H_kv). The
            number of each position's segment, in any order; -1: it takes part nowhere, whatever it holds. Other numbers
            are an error where values can be read without cost (CPU tensors in eager mode), and as -1 elsewhere.
        num_segments: K, at least 1.
        key_padding_mask: as in `linformer_attention`; for padded tensors only. A masked position is as one of -1.
        cu_seqlens_k: as in `linformer_attention_varlen`; makes key and value packed.
        backend: as in `linformer_attention`.

    Returns:
        K' (B, H_kv, K, D), V' (B, H_kv, K, D_v), zero in rows without a position, and count (B, H_kv, K) float32, how
        many positions each row stands for. All contiguous. Gradients go to key and value: that of a row, over its
        count, to each of its positions.

    Raises:
        ValueError, TypeError: as `project_kv`; also for segments of a wrong shape, type or number.
    """
    key, value = autocast(key, value)
    call, number = check_pool(key, value, segments, num_segments, key_padding_mask, cu_seqlens_k)
    key_proj, value_proj, count = choose(call, backend).pool(
        call.key, call.value, call.segments, call.cu_seqlens_k, number
    )
    return key_proj, value_proj, count


def pooled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    num_segments: int,
    *,
    key_padding_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention to means over segments: `pool_kv`, then `projected_attention` with key_bias = log(count).

    A mean that stands for `count` keys has the weight of as many; with a segment for each position it is exact
    attention. In O(N * K) time and memory, with half the multiply-adds of `linformer_attention`.

    Args:
        query: (B, H, N_q, D), or packed (total_q, H, D) with cu_seqlens_q.
        key, value, segments, num_segments, key_padding_mask, cu_seqlens_k: as in `pool_kv`.
        cu_seqlens_q: as in `linformer_attention_varlen`; comes with cu_seqlens_k.
        dropout_p, scale, backend: as in `linformer_attention`.

    Returns:
        (B, H, N_q, D_v) in the storage order of the query, or (total_q, H, D_v). Zeros for a sequence without a
        position that takes part.

    Raises:
        ValueError, TypeError: as `pool_kv` and `projected_attention`; also for one of cu_seqlens_q and cu_seqlens_k
            without the other.
    """
    query, key, value = autocast(query, key, value)
    check_pooled_attention(query, key, value, cu_seqlens_q, cu_seqlens_k)
    options: Any = {"key_padding_mask": key_padding_mask, "cu_seqlens_k": cu_seqlens_k, "backend": backend}
    key_proj, value_proj, count = pool_kv(key, value, segments, num_segments, **options)
    options = {"cu_seqlens_q": cu_seqlens_q, "dropout_p": dropout_p, "scale": scale, "backend": backend}
    weight = count.double() if key_proj.dtype == torch.float64 else count
    return projected_attention(query, key_proj, value_proj, key_bias=weight.log(), **options)


def _attention(
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
    backend: str | None,
) -> Tensor:
    query, key, value, proj_key, proj_value = autocast(query, key, value, proj_key, proj_value)
    tensors = query, key, value, proj_key, proj_value, key_bias, key_padding_mask, cu_seqlens_q, cu_seqlens_k
    call = check_attention(*tensors, dropout_p, scale, is_causal, packed)
    out, _, _ = choose(call, backend).attention(
        call.query,
        call.key,
        call.value,
        call.proj_key,
        call.proj_value,
        call.key_bias,
        call.key_padding_mask,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        _draw_rng_state(call),
        call.dropout_p,
        call.scale,
        _allow_tf32(call),
    )
    return out


def _plain_factor(query: Tensor, dropout_p: float, scale: float | None) -> float | None:
    """The scale of a softmax without dropout; None: these numbers are for the checks."""
    if type(dropout_p) is not float or dropout_p != 0.0:
        return None
    if scale is None:
        return 1.0 / math.sqrt(query.shape[-1])
    return scale if type(scale) is float and math.isfinite(scale) else None


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Cast as autocast casts for an op on its lower-precision list. What is no tensor is left to the checks."""
    if not isinstance(tensors[0], Tensor) or not is_autocast(tensors[0].device.type):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def _draw_rng_state(call: Call) -> Tensor | None:
    """(seed, offset) of the dropout numbers; None without dropout."""
    if call.dropout_p == 0.0:
        return None
    return pad(torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=call.device), (0, 1))


def _allow_tf32(call: Call) -> bool:
    return call.device_type == "cuda" and call.dtype == torch.float32 and _torch_allows_tf32()


def _plain_tf32(tensor: Tensor) -> bool:
    return tensor.is_cuda and tensor.dtype == torch.float32 and _torch_allows_tf32()


def _torch_allows_tf32() -> bool:
    # Follows allow_tf32 and set_float32_matmul_precision too, and unlike allow_tf32 does not raise where both ways mix.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# The compiler takes the answer for a constant: it guards on the setting itself. torch.compiler.assume_constant_result
# does no more than this, but loads the compiler, for seconds.
_torch_allows_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]
