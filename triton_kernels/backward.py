"""Backward of attention, one launch: from Q, K', V' and dO to dQ, dK', dV', dbias. Nothing of size N K is kept.

    P = softmax(scale Q K'^T + bias)    dP = M (dO V'^T)    dS = P (dP - rowsum(P dP))    M: dropout, 0 or 1 / (1 - p)
    dQ = scale dS K'                    dK' = scale dS^T Q  dV' = (M P)^T dO              dbias = dS^T 1

Where BLOCK_K rows hold all of K' (FUSED), a program goes through the query rows of a head once and has everything: five
products. Else row tiles come first: BLOCK_ROWS query rows, for which they write dQ and three statistics, the largest
score, 1 / sum, rowsum(P dP). Column tiles follow: BLOCK_K rows of dK' and dV', summed over the query rows of all heads
that share them; they compute S and dP anew, and wait until the row tiles of their heads are complete. Query rows are
split to fill the GPU; the parts are added in their order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    LOWEST,
    add_scores,
    add_splits,
    bias_of,
    biased_powers,
    dot,
    find_tile,
    inverse,
    kept_scores,
    offsets_2d,
    powers,
    row_of,
    sequence,
    signal,
    sizes_of,
    start_of,
    wait_for,
)


@triton.jit
def statistics_of(statistics, sizes, cu_seqlens_q, b, head, row):
    """Pointers to the three statistics of query rows."""
    rows = tl.zeros([], tl.int64) + sizes.len_q
    if cu_seqlens_q is None:
        row += b.to(tl.int64) * rows
        rows = rows * sizes.batch
    p_most = statistics + head.to(tl.int64) * rows + row
    return p_most, p_most + rows * sizes.heads, p_most + 2 * rows * sizes.heads


@triton.jit
def row_tile(
    ticket, query, key_proj, value_proj, key_bias, grad_out, grad_query, cu_seqlens_q, rng_state, strides, sizes,
    exponent, scale, threshold, keep, statistics, ready,
    unit: tl.constexpr, K: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, NEGATIVE: tl.constexpr,
    HEADROOM: tl.constexpr, WANT_QUERY: tl.constexpr, WANT_DELTA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Statistics and dQ of BLOCK_ROWS query rows: the scores of BLOCK_S rows of K' at a time, twice."""
    BIASED: tl.constexpr = key_bias.data is not None
    head = ticket % sizes.heads
    b, tile = find_tile(cu_seqlens_q, sizes.batch, sizes.len_q, sizes.len_q, ticket // sizes.heads, BLOCK_ROWS)
    if b < sizes.batch:
        head_kv = head // (sizes.heads // sizes.heads_kv)
        first, length = sequence(cu_seqlens_q, b, sizes.len_q, sizes.len_q)
        o_q = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        o_d, o_v, o_k = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_S)
        m_q, m_d, m_v = o_q < length, o_d < D, o_v < D_V
        p_q = start_of(query, strides.query, b, head, unit) + offsets_2d(strides.query, first + o_q, o_d, unit)
        p_do = start_of(grad_out, strides.grad_out, b, head, unit) + offsets_2d(
            strides.grad_out, first + o_q, o_v, unit
        )
        p_k = start_of(key_proj, strides.key_proj, b, head_kv, unit) + offsets_2d(strides.key_proj, o_k, o_d, unit)
        p_v = start_of(value_proj, strides.value_proj, b, head_kv, unit) + offsets_2d(
            strides.value_proj, o_k, o_v, unit
        )
        k_step, v_step = row_of(strides.key_proj, unit) * BLOCK_S, row_of(strides.value_proj, unit) * BLOCK_S
        b_q = tl.load(p_q, mask=m_q[:, None] & m_d[None, :], other=0.0)
        b_do = tl.load(p_do, mask=m_q[:, None] & m_v[None, :], other=0.0)

        b_most = tl.full([BLOCK_ROWS], LOWEST if BIASED else float("-inf"), tl.float32)
        b_sum = tl.zeros([BLOCK_ROWS], tl.float32)
        b_delta = tl.zeros([BLOCK_ROWS], tl.float32)
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
            b_most = b_new
            if WANT_QUERY or WANT_DELTA:
                b_v = tl.load(p_v, mask=m_k[:, None] & m_v[None, :], other=0.0)
                b_dp = dot(b_do, tl.trans(b_v), None, PRECISION)
                if rng_state is not None:
                    m_kept = kept_scores(rng_state, b * sizes.heads + head, o_q, k, threshold, BLOCK_S, False)
                    b_dp = tl.where(m_kept, b_dp * keep, 0.0)
                b_delta = b_delta * b_change + tl.sum(b_p * b_dp, 1)
            p_k += k_step
            p_v += v_step
        b_one = inverse(b_sum, 1.0, BIASED)
        b_delta = b_delta * b_one
        p_most, p_one, p_delta = statistics_of(statistics, sizes, cu_seqlens_q, b, head, first + o_q)
        tl.store(p_most, b_most, mask=m_q)
        tl.store(p_one, b_one, mask=m_q)
        tl.store(p_delta, b_delta, mask=m_q)

        if WANT_QUERY:
            p_k -= (K + BLOCK_S - 1) // BLOCK_S * k_step
            p_v -= (K + BLOCK_S - 1) // BLOCK_S * v_step
            b_dq = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
            for k in tl.range(0, K, BLOCK_S, num_stages=STAGES):
                m_k = k + o_k < K
                b_k = tl.load(p_k, mask=m_k[:, None] & m_d[None, :], other=0.0)
                b_s = dot(b_q, tl.trans(b_k), None, PRECISION)
                if NEGATIVE:
                    b_s = -b_s
                if BIASED:
                    b_s = tl.fma(b_s, exponent, bias_of(key_bias, b, head_kv, k + o_k, K)[None, :])
                    b_p = biased_powers(b_s, b_most[:, None], HEADROOM) * b_one[:, None]
                else:
                    b_p = powers(b_s, exponent, b_most[:, None]) * b_one[:, None]
                    if K % BLOCK_S:
                        b_p = tl.where(m_k[None, :], b_p, 0.0)
                b_v = tl.load(p_v, mask=m_k[:, None] & m_v[None, :], other=0.0)
                b_dp = dot(b_do, tl.trans(b_v), None, PRECISION)
                if rng_state is not None:
                    m_kept = kept_scores(rng_state, b * sizes.heads + head, o_q, k, threshold, BLOCK_S, False)
                    b_dp = tl.where(m_kept, b_dp * keep, 0.0)
                b_ds = b_p * (b_dp - b_delta[:, None])
                b_dq = dot(b_ds.to(b_k.dtype), b_k, b_dq, PRECISION)
                p_k += k_step
                p_v += v_step
            p_dq = start_of(grad_query, strides.grad_query, b, head, unit) + offsets_2d(
                strides.grad_query, first + o_q, o_d, unit
            )
            tl.store(p_dq, (b_dq * scale).to(grad_query.dtype.element_ty), mask=m_q[:, None] & m_d[None, :])
        signal(ready + b * sizes.heads_kv + head_kv)


@triton.jit
def column_tile(
    ticket, query, key_proj, value_proj, key_bias, grad_out, grad_query, grad_key_proj, grad_value_proj, grad_key_bias,
    cu_seqlens_q, rng_state, strides, sizes, exponent, scale, threshold, keep, statistics, ready, arrived, partial,
    splits, tiles,
    unit: tl.constexpr, K: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, NEGATIVE: tl.constexpr,
    HEADROOM: tl.constexpr, FUSED: tl.constexpr, SPLIT: tl.constexpr, WANT_QUERY: tl.constexpr, WANT_KEY: tl.constexpr,
    WANT_VALUE: tl.constexpr, WANT_BIAS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_K rows of dK', dV', dbias, and dQ where FUSED. Scores stand with the rows of K' down, query rows across."""
    COLUMN_BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    BIASED: tl.constexpr = key_bias.data is not None
    split = ticket % splits
    tile_id = ticket // splits
    head_kv = tile_id // COLUMN_BLOCKS % sizes.heads_kv
    b = tile_id // COLUMN_BLOCKS // sizes.heads_kv
    group = sizes.heads // sizes.heads_kv
    first, length = sequence(cu_seqlens_q, b, sizes.len_q, sizes.len_q)
    if not FUSED:
        wait_for(ready + b * sizes.heads_kv + head_kv, tl.cdiv(length, BLOCK_ROWS) * group)
    o_k = tile_id % COLUMN_BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
    o_d, o_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    m_k, m_d, m_v = o_k < K, o_d < D, o_v < D_V
    p_k = start_of(key_proj, strides.key_proj, b, head_kv, unit) + offsets_2d(strides.key_proj, o_k, o_d, unit)
    p_v = start_of(value_proj, strides.value_proj, b, head_kv, unit) + offsets_2d(strides.value_proj, o_k, o_v, unit)
    b_k = tl.load(p_k, mask=m_k[:, None] & m_d[None, :], other=0.0)
    b_v = tl.load(p_v, mask=m_k[:, None] & m_v[None, :], other=0.0)
    if BIASED:
        b_bias = bias_of(key_bias, b, head_kv, o_k, K)

    steps = tl.cdiv(length, BLOCK_Q)
    begin = (steps.to(tl.int64) * group * split // splits).to(tl.int32)
    end = (steps.to(tl.int64) * group * (split + 1) // splits).to(tl.int32)
    b_dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_K, BLOCK_DV], tl.float32)
    b_db = tl.zeros([BLOCK_K, 1], tl.float32)
    for step in tl.range(begin, end, num_stages=STAGES):
        head = head_kv * group + step // steps
        o_q = step % steps * BLOCK_Q + tl.arange(0, BLOCK_Q)
        m_q = o_q < length
        p_q = start_of(query, strides.query, b, head, unit) + offsets_2d(strides.query, first + o_q, o_d, unit)
        p_do = start_of(grad_out, strides.grad_out, b, head, unit) + offsets_2d(
            strides.grad_out, first + o_q, o_v, unit
        )
        b_q = tl.load(p_q, mask=m_q[:, None] & m_d[None, :], other=0.0)
        b_do = tl.load(p_do, mask=m_q[:, None] & m_v[None, :], other=0.0)
        b_s = dot(b_k, tl.trans(b_q), None, PRECISION)
        if NEGATIVE:
            b_s = -b_s
        if BIASED:
            b_s = tl.fma(b_s, exponent, b_bias[:, None])
        if FUSED:
            if BIASED:
                b_most = tl.maximum(tl.max(b_s, 0), LOWEST)
                b_p = biased_powers(b_s, b_most[None, :], 0)
            elif BLOCK_K == K:
                b_most = tl.max(b_s, 0) * exponent
                b_p = powers(b_s, exponent, b_most[None, :])
            else:
                b_most = tl.max(tl.where(m_k[:, None], b_s, float("-inf")), 0) * exponent
                b_p = tl.where(m_k[:, None], powers(b_s, exponent, b_most[None, :]), 0.0)
            b_p = b_p * inverse(tl.sum(b_p, 0), 1.0, BIASED)[None, :]
        else:
            p_most, p_one, p_delta = statistics_of(statistics, sizes, cu_seqlens_q, b, head, first + o_q)
            # A query that is not there has the bias for scores, which may be of any size.
            b_most = tl.load(p_most, mask=m_q, other=float("inf") if BIASED else 0.0)
            b_one = tl.load(p_one, mask=m_q, other=0.0)
            if BIASED:
                b_p = biased_powers(b_s, b_most[None, :], HEADROOM) * b_one[None, :]
            else:
                b_p = powers(b_s, exponent, b_most[None, :]) * b_one[None, :]
        b_kept = b_p
        if rng_state is not None:
            m_kept = kept_scores(
                rng_state, b * sizes.heads + head, o_q, tile_id % COLUMN_BLOCKS * BLOCK_K, threshold, BLOCK_K, True
            )
            b_kept = tl.where(m_kept, b_p * keep, 0.0)
        if WANT_VALUE:
            b_dv = dot(b_kept.to(b_do.dtype), b_do, b_dv, PRECISION)
        if WANT_KEY or WANT_BIAS or (FUSED and WANT_QUERY):
            b_dp = dot(b_v, tl.trans(b_do), None, PRECISION)
            if rng_state is not None:
                b_dp = tl.where(m_kept, b_dp * keep, 0.0)
            if FUSED:
                b_delta = tl.sum(b_p * b_dp, 0)
            else:
                b_delta = tl.load(p_delta, mask=m_q, other=0.0)
            b_ds = b_p * (b_dp - b_delta[None, :])
            if WANT_BIAS:
                b_db += tl.sum(b_ds, 1, keep_dims=True)
            b_ds = b_ds.to(b_q.dtype)
            if WANT_KEY:
                b_dk = dot(b_ds, b_q, b_dk, PRECISION)
            if FUSED and WANT_QUERY:
                b_dq = dot(tl.trans(b_ds), b_k, None, PRECISION) * scale
                p_dq = start_of(grad_query, strides.grad_query, b, head, unit) + offsets_2d(
                    strides.grad_query, first + o_q, o_d, unit
                )
                tl.store(p_dq, b_dq.to(grad_query.dtype.element_ty), mask=m_q[:, None] & m_d[None, :])

    if WANT_KEY:
        complete = True
        if SPLIT:
            b_dk, complete = add_splits(b_dk, partial, arrived, tile_id, split, splits, [BLOCK_K, BLOCK_D])
            partial += tiles.to(tl.int64) * splits * (BLOCK_K * BLOCK_D)
        if complete:
            p_dk = start_of(grad_key_proj, strides.grad_key_proj, b, head_kv, unit) + offsets_2d(
                strides.grad_key_proj, o_k, o_d, unit
            )
            tl.store(p_dk, (b_dk * scale).to(grad_key_proj.dtype.element_ty), mask=m_k[:, None] & m_d[None, :])
    if WANT_VALUE:
        complete = True
        if SPLIT:
            b_dv, complete = add_splits(b_dv, partial, arrived + tiles, tile_id, split, splits, [BLOCK_K, BLOCK_DV])
            partial += tiles.to(tl.int64) * splits * (BLOCK_K * BLOCK_DV)
        if complete:
            p_dv = start_of(grad_value_proj, strides.grad_value_proj, b, head_kv, unit) + offsets_2d(
                strides.grad_value_proj, o_k, o_v, unit
            )
            tl.store(p_dv, b_dv.to(grad_value_proj.dtype.element_ty), mask=m_k[:, None] & m_v[None, :])
    if WANT_BIAS:
        complete = True
        if SPLIT:
            b_db, complete = add_splits(b_db, partial, arrived + 2 * tiles, tile_id, split, splits, [BLOCK_K, 1])
        if complete:
            p_db = grad_key_bias + (b.to(tl.int64) * sizes.heads_kv + head_kv) * K + o_k[:, None]
            tl.store(p_db, b_db, mask=m_k[:, None])


_NUMBERS = ["threshold", "row_tiles", "splits", "tiles"]


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_NUMBERS)
def backward(
    query, key_proj, value_proj, key_bias, grad_out, grad_query, grad_key_proj, grad_value_proj, grad_key_bias,
    cu_seqlens_q, rng_state, strides, sizes, exponent, scale, threshold, keep, statistics, counters, partial, row_tiles,
    splits, tiles,
    unit: tl.constexpr, K: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, NEGATIVE: tl.constexpr,
    HEADROOM: tl.constexpr, FUSED: tl.constexpr, SPLIT: tl.constexpr, WANT_QUERY: tl.constexpr, WANT_KEY: tl.constexpr,
    WANT_VALUE: tl.constexpr, WANT_BIAS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROW_STAGES: tl.constexpr, COLUMN_STAGES: tl.constexpr,
):  # fmt: skip
    """The formulas above. `tiles` column tiles of `splits` parts each.

    counters: [0] the next ticket, then for each (sequence, head of K') the row tiles that are ready, then for each
    column tile the splits that have arrived, for dK', dV' and dbias; zero when the launch starts.
    """
    sizes = sizes_of(sizes)
    ticket = tl.atomic_add(counters, 1, sem="relaxed")
    ready = counters + 1
    if ticket < row_tiles:
        if not FUSED:
            row_tile(
                ticket, query, key_proj, value_proj, key_bias, grad_out, grad_query, cu_seqlens_q, rng_state, strides,
                sizes, exponent, scale, threshold, keep, statistics, ready, unit, K, D, D_V, NEGATIVE, HEADROOM,
                WANT_QUERY, WANT_KEY or WANT_BIAS, PRECISION, BLOCK_ROWS, BLOCK_S, BLOCK_D, BLOCK_DV, ROW_STAGES,
            )  # fmt: skip
    else:
        if WANT_KEY or WANT_VALUE or WANT_BIAS or FUSED:
            column_tile(
                ticket - row_tiles, query, key_proj, value_proj, key_bias, grad_out, grad_query, grad_key_proj,
                grad_value_proj, grad_key_bias, cu_seqlens_q, rng_state, strides, sizes, exponent, scale, threshold,
                keep, statistics, ready, ready + sizes.batch * sizes.heads_kv, partial, splits, tiles, unit, K, D, D_V,
                NEGATIVE, HEADROOM, FUSED, SPLIT, WANT_QUERY, WANT_KEY, WANT_VALUE, WANT_BIAS, PRECISION, BLOCK_ROWS,
                BLOCK_K, BLOCK_Q, BLOCK_D, BLOCK_DV, COLUMN_STAGES,
            )  # fmt: skip
