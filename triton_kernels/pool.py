"""Means over segments: row k of K' and V' is the mean of the keys and values whose segment is k; and their backward.

Keys are sorted by segment first, stably, which torch does (`members`). A program then sums the members of one row, in
the order of the sequence, BLOCK_N at a time in float32: O(N D) altogether, and always the same bits, as nobody adds to
what another adds to. A sort is the price: without it a program would search the whole sequence for its members, or add
with atomics, in whatever order they come. Backward needs no order: each key has the gradient of its row, over the
number of its members.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import find_tile, offsets_2d, row_of, sequence, sizes_of, start_of


def members(segments: Tensor, cu_seqlens_k: Tensor | None, batch: int, num_segments: int) -> tuple[Tensor, Tensor]:
    """Keys sorted by sequence, head and segment, and where in that order each segment starts.

    `segments` is (B, 1 or H_kv, N), or (1, 1 or H_kv, total) with `cu_seqlens_k`. Each head of a sequence has one
    segment more, the last, for what takes part nowhere. Nothing is read on the host.
    """
    heads, length = segments.shape[1:]
    rows = num_segments + 1
    # Torch sorts byte by byte on a GPU, so narrow numbers are worth it.
    dtype = torch.int32 if (batch + 1) * heads * rows < 2**31 else torch.int64
    of = {"device": segments.device, "dtype": dtype}
    if cu_seqlens_k is None:
        sequences = torch.arange(batch, **of)[:, None, None]
    else:  # `batch`, behind all others, for what is part of no sequence
        at = torch.arange(length, device=segments.device)
        sequences = torch.searchsorted(cu_seqlens_k[1:], at, right=True).to(dtype)
    inside = (segments >= 0) & (segments < num_segments)
    row = torch.where(inside, segments, num_segments).to(dtype)
    row += (sequences * heads + torch.arange(heads, **of)[:, None]) * rows
    in_order, order = torch.sort(row.flatten(), stable=True)
    return order, torch.searchsorted(in_order, torch.arange(batch * heads * rows, **of))


@triton.jit
def mean(x, strides, order, begin, end, b, head, before, D: tl.constexpr, unit: tl.constexpr, BLOCK_N: tl.constexpr,
         BLOCK_D: tl.constexpr):  # fmt: skip
    """[BLOCK_D] of the rows order[begin:end] - before; zero without any."""
    o_n, o_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    p_x = start_of(x, strides, b, head, unit)
    b_sum = tl.zeros([BLOCK_D], tl.float32)
    for at in range(begin, end, BLOCK_N):
        m_n = at + o_n < end
        b_n = tl.load(order + at + o_n, mask=m_n, other=0) - before
        b_x = tl.load(p_x + offsets_2d(strides, b_n, o_d, unit), mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)
        b_sum += tl.sum(b_x.to(tl.float32), 0)
    return b_sum / tl.maximum(end - begin, 1).to(tl.float32)


@triton.jit
def pool(
    key, value, key_proj, value_proj, count, order, starts, strides, sizes,
    unit: tl.constexpr, K: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, PACKED: tl.constexpr,
    PER_HEAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """A row of K' and V' of one head, and how many keys it has."""
    sizes = sizes_of(sizes)
    program = tl.program_id(0)
    k = program % K
    head = program // K % sizes.heads_kv
    b = program // K // sizes.heads_kv
    # Which of the lists of segments: of a head of a sequence, or of a sequence. `before`: the keys of the lists before
    # this one in `segments`, where packed sequences share a list and their rows are counted through.
    group = b.to(tl.int64)
    before = group * 0
    if PER_HEAD:
        group = group * sizes.heads_kv + head
        before += head
    if not PACKED:
        before = group
    before *= sizes.len_k
    p_start = starts + group * (K + 1) + k
    begin, end = tl.load(p_start), tl.load(p_start + 1)
    b_k = mean(key, strides.key, order, begin, end, b, head, before, D, unit, BLOCK_N, BLOCK_D)
    b_v = mean(value, strides.value, order, begin, end, b, head, before, D_V, unit, BLOCK_N, BLOCK_DV)
    o_d, o_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    p_k = start_of(key_proj, strides.key_proj, b, head, unit) + k * row_of(strides.key_proj, unit) + o_d
    p_v = start_of(value_proj, strides.value_proj, b, head, unit) + k * row_of(strides.value_proj, unit) + o_v
    tl.store(p_k, b_k.to(key_proj.dtype.element_ty), mask=o_d < D)
    tl.store(p_v, b_v.to(value_proj.dtype.element_ty), mask=o_v < D_V)
    tl.store(count + program, (end - begin).to(tl.float32))


@triton.jit
def spread(grad_x, grad, x_strides, strides, b, head, b_row, b_count, m_in, o_n, m_n, D: tl.constexpr,
           unit: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Rows o_n of a gradient: those b_row of the gradient of the means, over the count of each."""
    o_d = tl.arange(0, BLOCK_D)
    p_g = start_of(grad, strides, b, head, unit) + offsets_2d(strides, b_row, o_d, unit)
    b_g = tl.load(p_g, mask=m_in[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32) / b_count[:, None]
    p_x = start_of(grad_x, x_strides, b, head, unit) + offsets_2d(x_strides, o_n, o_d, unit)
    tl.store(p_x, b_g.to(grad_x.dtype.element_ty), mask=m_n[:, None] & (o_d < D)[None, :])


@triton.jit
def pool_backward(
    grad_key_proj, grad_value_proj, grad_key, grad_value, count, segments, cu_seqlens_k, segment_strides, strides,
    sizes,
    unit: tl.constexpr, K: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """BLOCK_N keys of one head. A gradient that nobody wants is None."""
    sizes = sizes_of(sizes)
    tile = tl.program_id(0)
    head = tile % sizes.heads_kv
    b, tile = find_tile(cu_seqlens_k, sizes.batch, sizes.len_k, sizes.len_k, tile // sizes.heads_kv, BLOCK_N)
    if b < sizes.batch:
        first, length = sequence(cu_seqlens_k, b, sizes.len_k, sizes.len_k)
        o_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < length
        o_n = first + o_n
        p_segment = start_of(segments, segment_strides, b, head, 1) + o_n * row_of(segment_strides, 1)
        b_row = tl.load(p_segment, mask=m_n, other=-1)
        m_in = (b_row >= 0) & (b_row < K)
        p_count = count + (b.to(tl.int64) * sizes.heads_kv + head) * K + b_row
        b_count = tl.load(p_count, mask=m_in, other=1.0)
        if grad_key is not None:
            spread(
                grad_key, grad_key_proj, strides.grad_key, strides.grad_key_proj, b, head, b_row, b_count, m_in, o_n,
                m_n, D, unit, BLOCK_D,
            )  # fmt: skip
        if grad_value is not None:
            spread(
                grad_value, grad_value_proj, strides.grad_value, strides.grad_value_proj, b, head, b_row, b_count,
                m_in, o_n, m_n, D_V, unit, BLOCK_DV,
            )  # fmt: skip
