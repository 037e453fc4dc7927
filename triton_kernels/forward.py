"""Forward, one launch: K' = E key, V' = F value, out = softmax(scale query K'^T + bias) V'.

Every program takes the next ticket. Projection tiles come first: BLOCK_K rows of K' or V' by BLOCK_C columns, pieces of
heads side by side, so that a tile of E is read once for several heads; a long sequence is split, and the program that
delivers last adds the parts in their order. Attention tiles follow: BLOCK_Q query rows of one head, with the scores of
BLOCK_S rows of K' at a time (all of them where they fit). An attention tile waits until the projections of its head
are complete. Their tickets were drawn earlier, by programs that run and never wait: the wait ends, however few programs
a GPU holds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    LOWEST,
    add_scores,
    add_splits,
    bias_of,
    column_pointers,
    columns_exist,
    columns_of,
    dot,
    find_tile,
    inverse,
    kept_rows,
    kept_scores,
    offsets_2d,
    row_of,
    sequence,
    signal,
    sizes_of,
    start_of,
    wait_for,
)


@triton.jit
def project_tile(
    ticket, key, value, proj_key, proj_value, key_proj, value_proj, mask, cu_seqlens_k, strides, sizes, ready, arrived,
    partial, splits, units,
    unit: tl.constexpr, unit_e: tl.constexpr, K: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, PIECE: tl.constexpr,
    PARTS: tl.constexpr, UNIT_HEADS: tl.constexpr, UNIT_TILES: tl.constexpr, SHARED_KV: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """[BLOCK_K, BLOCK_C] of K' = E key and V' = F value."""
    ROW_BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    split = ticket % splits
    tile_id = ticket // splits
    block = tile_id % ROW_BLOCKS
    tile = tile_id // ROW_BLOCKS % UNIT_TILES
    unit_id = tile_id // ROW_BLOCKS // UNIT_TILES % units
    b = tile_id // ROW_BLOCKS // UNIT_TILES // units

    of_value, head, o_d, m_c = columns_of(
        unit_id, tile, sizes.heads_kv, D, D_V, PIECE, PARTS, UNIT_HEADS, SHARED_KV, BLOCK_C
    )
    first, length = sequence(cu_seqlens_k, b, sizes.len_k, sizes.seq_len_max)
    o_n = tl.arange(0, BLOCK_N)
    p_x, x_row = column_pointers(key, value, strides.key, strides.value, of_value, b, head, o_d, unit)
    p_x = p_x[None, :] + (first + o_n)[:, None] * x_row
    o_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < K
    p_e = start_of(proj_key, strides.proj_key, b, unit_id, unit_e) + offsets_2d(strides.proj_key, o_k, o_n, unit_e)
    if not SHARED_KV:
        if of_value:
            p_e = start_of(proj_value, strides.proj_value, b, unit_id, unit_e) + offsets_2d(
                strides.proj_value, o_k, o_n, unit_e
            )

    steps = tl.cdiv(length, BLOCK_N)
    begin, end = steps * split // splits, steps * (split + 1) // splits
    p_e += begin * BLOCK_N
    p_x += begin.to(tl.int64) * BLOCK_N * x_row
    whole = tl.minimum(end, length // BLOCK_N)
    b_acc = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    for step in tl.range(begin, whole, num_stages=STAGES):
        m_n = kept_rows(mask, b, step * BLOCK_N + o_n, o_n >= 0)
        b_e = tl.load(p_e, mask=m_k[:, None], other=0.0)
        b_x = tl.load(p_x, mask=m_n[:, None] & m_c[None, :], other=0.0)
        b_acc = dot(b_e, b_x, b_acc, PRECISION)
        p_e += BLOCK_N
        p_x += BLOCK_N * x_row
    if whole < end:  # columns of E that are no part of the sequence may hold anything, NaN included
        m_n = whole * BLOCK_N + o_n < length
        m_e = columns_exist(o_n, length - whole * BLOCK_N, unit_e)
        b_e = tl.load(p_e, mask=m_k[:, None] & m_e[None, :], other=0.0)
        b_e = tl.where(m_n[None, :], b_e, 0.0)
        m_n = kept_rows(mask, b, whole * BLOCK_N + o_n, m_n)
        b_x = tl.load(p_x, mask=m_n[:, None] & m_c[None, :], other=0.0)
        b_acc = dot(b_e, b_x, b_acc, PRECISION)

    complete = True
    if SPLIT:
        b_acc, complete = add_splits(b_acc, partial, arrived, tile_id, split, splits, [BLOCK_K, BLOCK_C])
    if complete:
        p_out, out_row = column_pointers(
            key_proj, value_proj, strides.key_proj, strides.value_proj, of_value, b, head, o_d, unit
        )
        p_out = p_out[None, :] + o_k.to(tl.int64)[:, None] * out_row
        tl.store(p_out, b_acc.to(key_proj.dtype.element_ty), mask=m_k[:, None] & m_c[None, :])
        signal(ready + b * units + unit_id)


@triton.jit
def attend_tile(
    ticket, query, key_proj, value_proj, key_bias, out, cu_seqlens_q, rng_state, strides, sizes, exponent, threshold,
    keep, ready, units,
    unit: tl.constexpr, K: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, UNIT_HEADS: tl.constexpr,
    WANTED: tl.constexpr, NEGATIVE: tl.constexpr, HEADROOM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """[BLOCK_Q, D_V] of out = softmax(scale Q K'^T + bias) V', computed as 2^(c s - c max) with c = |scale| log2 e, or
    with a bias as 2^((scale s + bias - max) log2 e)."""
    BIASED: tl.constexpr = key_bias.data is not None
    head = ticket % sizes.heads
    b, tile = find_tile(cu_seqlens_q, sizes.batch, sizes.len_q, sizes.len_q, ticket // sizes.heads, BLOCK_Q)
    if b < sizes.batch:
        head_kv = head // (sizes.heads // sizes.heads_kv)
        first, length = sequence(cu_seqlens_q, b, sizes.len_q, sizes.len_q)
        o_q = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
        o_d, o_v, o_k = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_S)
        m_q, m_d, m_v = o_q < length, o_d < D, o_v < D_V
        p_q = start_of(query, strides.query, b, head, unit) + offsets_2d(strides.query, first + o_q, o_d, unit)
        b_q = tl.load(p_q, mask=m_q[:, None] & m_d[None, :], other=0.0)
        if WANTED:
            wait_for(ready + b * units + head_kv // UNIT_HEADS, WANTED)

        p_k = start_of(key_proj, strides.key_proj, b, head_kv, unit) + offsets_2d(strides.key_proj, o_k, o_d, unit)
        p_v = start_of(value_proj, strides.value_proj, b, head_kv, unit) + offsets_2d(
            strides.value_proj, o_k, o_v, unit
        )
        b_out = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
        b_most = tl.full([BLOCK_Q], LOWEST if BIASED else float("-inf"), tl.float32)
        b_sum = tl.zeros([BLOCK_Q], tl.float32)
        for k in tl.range(0, K, BLOCK_S, num_stages=STAGES):
            m_k = k + o_k < K
            b_k = tl.load(p_k, mask=m_k[:, None] & m_d[None, :], other=0.0)
            b_s = dot(b_q, tl.trans(b_k), None, PRECISION)
            if NEGATIVE:
                b_s = -b_s
            if BIASED:
                b_s = tl.fma(b_s, exponent, bias_of(key_bias, b, head_kv, k + o_k, K)[None, :])
            b_p, b_new, b_change = add_scores(b_s, b_most, m_k, exponent, K % BLOCK_S == 0, BIASED, HEADROOM)
            b_sum = b_sum * b_change + tl.sum(b_p, 1)
            if rng_state is not None:
                m_kept = kept_scores(rng_state, b * sizes.heads + head, o_q, k, threshold, BLOCK_S, False)
                b_p = tl.where(m_kept, b_p, 0.0)
            b_v = tl.load(p_v, mask=m_k[:, None] & m_v[None, :], other=0.0)
            b_out = dot(b_p.to(b_v.dtype), b_v, b_out * b_change[:, None], PRECISION)
            b_most = b_new
            p_k += row_of(strides.key_proj, unit) * BLOCK_S
            p_v += row_of(strides.value_proj, unit) * BLOCK_S
        b_out = b_out * inverse(b_sum, keep, BIASED)[:, None]
        p_out = start_of(out, strides.out, b, head, unit) + offsets_2d(strides.out, first + o_q, o_v, unit)
        tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_q[:, None] & m_v[None, :])


_NUMBERS = ["threshold", "project_tiles", "splits", "units"]


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_NUMBERS)
def forward(
    query, key, value, proj_key, proj_value, key_proj, value_proj, key_bias, out, mask, cu_seqlens_q, cu_seqlens_k,
    rng_state, strides, sizes, exponent, threshold, keep, counters, partial, project_tiles, splits, units,
    unit: tl.constexpr, unit_e: tl.constexpr, K: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, PIECE: tl.constexpr,
    PARTS: tl.constexpr, UNIT_HEADS: tl.constexpr, UNIT_TILES: tl.constexpr, SHARED_KV: tl.constexpr,
    SPLIT: tl.constexpr, NEGATIVE: tl.constexpr, HEADROOM: tl.constexpr, PROJECT: tl.constexpr, ATTEND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, PROJECT_STAGES: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ATTEND_STAGES: tl.constexpr,
):  # fmt: skip
    """Stages PROJECT and ATTEND of the formula above; with one of them, project_kv or projected_attention.

    counters: [0] the next ticket, then for each unit the tiles that are ready, then for each tile the splits that have
    arrived; zero when the launch starts.
    """
    sizes = sizes_of(sizes)
    ticket = tl.atomic_add(counters, 1, sem="relaxed")
    ready = counters + 1
    if ticket < project_tiles:
        if PROJECT:
            project_tile(
                ticket, key, value, proj_key, proj_value, key_proj, value_proj, mask, cu_seqlens_k, strides, sizes,
                ready, ready + sizes.batch * units, partial, splits, units, unit, unit_e, K, D, D_V, PIECE, PARTS,
                UNIT_HEADS, UNIT_TILES, SHARED_KV, SPLIT, PRECISION, BLOCK_K, BLOCK_C, BLOCK_N, PROJECT_STAGES,
            )  # fmt: skip
    else:
        if ATTEND:
            attend_tile(
                ticket - project_tiles, query, key_proj, value_proj, key_bias, out, cu_seqlens_q, rng_state, strides,
                sizes, exponent, threshold, keep, ready, units, unit, K, D, D_V, UNIT_HEADS,
                UNIT_TILES * ((K + BLOCK_K - 1) // BLOCK_K) if PROJECT else 0, NEGATIVE, HEADROOM, PRECISION, BLOCK_Q,
                BLOCK_S, BLOCK_D, BLOCK_DV, ATTEND_STAGES,
            )  # fmt: skip
