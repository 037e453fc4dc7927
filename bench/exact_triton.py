"""Exact attention in Triton, forward: the quadratic neighbour that `python -m bench.counts` sets beside our kernels.

As plain as FlashAttention-2 gets: a program has BLOCK_M rows of the query of one head, goes through all keys BLOCK_N at
a time, and keeps a running maximum and sum of each row.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from linformer_kernels.triton_kernels import ops
from torch import Tensor

BLOCK_M = 128
# By bytes of an element and columns of a head: the most that stays in registers.
BLOCK_N = {2: {16: 64, 32: 64, 64: 64, 128: 32}, 4: {16: 16, 32: 16, 64: 16}}


@triton.jit
def add_block(b_q, p_k, p_v, m_n, b_out, b_most, b_sum, exponent, PRECISION: tl.constexpr, MASKED: tl.constexpr):
    """The keys at p_k [BLOCK_N, D] and the values at p_v, of which those in m_n exist, join the softmax."""
    m_rows = m_n[:, None] if MASKED else None
    other = 0.0 if MASKED else None
    b_k = tl.load(p_k, mask=m_rows, other=other)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * exponent  # [BLOCK_M, BLOCK_N]
    if MASKED:
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
    b_new = tl.maximum(b_most, tl.max(b_s, 1))
    b_p = tl.exp2(b_s - b_new[:, None])
    b_change = tl.exp2(b_most - b_new)
    b_v = tl.load(p_v, mask=m_rows, other=other)
    b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_change[:, None], input_precision=PRECISION)
    return b_out, b_new, b_sum * b_change + tl.sum(b_p, 1)


@triton.jit(do_not_specialize=["length"])
def exact_forward(
    query, key, value, out, length, exponent,
    D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, D] of out = softmax(scale Q K^T) V, with exponent = scale log2 e and, for each block of keys,

    s = exponent Q K_j^T    m' = max(m, rowmax(s))    sum' = 2^(m - m') sum + rowsum(2^(s - m'))
    out' = 2^(m - m') out + 2^(s - m') V_j            at the end out / sum
    """
    tiles = tl.cdiv(length, BLOCK_M)
    head = (tl.program_id(0) // tiles).to(tl.int64) * length * D
    o_m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n, o_d = tl.arange(0, BLOCK_N), tl.arange(0, D)
    o_out = head + o_m.to(tl.int64)[:, None] * D + o_d[None, :]
    m_m = o_m[:, None] < length
    b_q = tl.load(query + o_out, mask=m_m, other=0.0)

    p_k = key + head + o_n[:, None] * D + o_d[None, :]
    p_v = value + head + o_n[:, None] * D + o_d[None, :]
    b_out = tl.zeros([BLOCK_M, D], tl.float32)
    b_most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    for _ in tl.range(0, length // BLOCK_N, num_stages=STAGES):
        b_out, b_most, b_sum = add_block(b_q, p_k, p_v, o_n, b_out, b_most, b_sum, exponent, PRECISION, False)
        p_k += BLOCK_N * D
        p_v += BLOCK_N * D
    if length % BLOCK_N:
        m_n = o_n < length % BLOCK_N
        b_out, b_most, b_sum = add_block(b_q, p_k, p_v, m_n, b_out, b_most, b_sum, exponent, PRECISION, True)
    tl.store(out + o_out, (b_out / b_sum[:, None]).to(out.dtype.element_ty), mask=m_m)


def exact_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T / sqrt(D)) value of contiguous (B, H, N, D) tensors alike; no gradients."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.shape != query.shape or tensor.dim() != 4 or not tensor.is_contiguous():
            raise ValueError(
                f"{name}: shape {tuple(tensor.shape)}; wanted: contiguous (B, H, N, D), three times the same"
            )
    batch, heads, length, width = query.shape
    if problem := why_not(width, query.element_size()):
        raise ValueError(problem)
    out = torch.empty_like(query)
    arguments = {
        "query": query, "key": key, "value": value, "out": out, "length": length,
        "exponent": width**-0.5 * math.log2(math.e), "D": width, "PRECISION": "tf32x3", "BLOCK_M": BLOCK_M,
        "BLOCK_N": BLOCK_N[query.element_size()][width], "STAGES": 2,
    }  # fmt: skip
    if out.numel():
        ops.launch(ops.Launch(exact_forward, batch * heads * -(-length // BLOCK_M), arguments, num_warps=8))
    return out


def why_not(width: int, itemsize: int) -> str | None:
    """Why heads of `width` columns are not taken."""
    widths = BLOCK_N.get(itemsize, {})
    if width in widths:
        return None
    return f"heads of {width} columns of {itemsize} bytes; wanted: {', '.join(map(str, widths)) or '2 or 4 bytes'}"
