"""Backward of the projection, one launch: dK = E^T dK', dV = F^T dV', dE = dK' K^T, dF = dV' V^T (E = F: one sum).

Matrix tiles: BLOCK_R rows by BLOCK_N columns of dE or dF; they sum over all sequences and heads that share the matrix
in registers, in a fixed order, and write each element once: no atomics, nothing to add up afterwards. Input tiles:
BLOCK_N rows of the sequence by BLOCK_C columns, pieces of heads side by side, so that a tile of E is read once for
several heads. No tile waits for another.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    column_pointers,
    columns_exist,
    columns_of,
    dot,
    find_tile,
    kept_rows,
    offsets_2d,
    row_of,
    sequence,
    sizes_of,
    start_of,
)


@triton.jit
def add_products(
    b_acc, grad, x, grad_strides, x_strides, mask, cu_seqlens_k, sizes, o_k, o_n, first_b, first_head,
    unit: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, PER_BATCH: tl.constexpr, PER_HEAD: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_W: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """b_acc + the products dX' X^T of all sequences and heads, unless each has its own E."""
    STEPS: tl.constexpr = (WIDTH + BLOCK_W - 1) // BLOCK_W
    batch, heads = sizes.batch, sizes.heads_kv
    if PER_BATCH:
        batch = 1
    if PER_HEAD:
        heads = 1
    m_k = o_k < K
    for i in tl.range(0, batch * heads * STEPS, num_stages=STAGES):
        o_w = i % STEPS * BLOCK_W + tl.arange(0, BLOCK_W)
        m_w = o_w < WIDTH
        head = first_head + i // STEPS % heads
        b = first_b + i // STEPS // heads
        first, length = sequence(cu_seqlens_k, b, sizes.len_k, sizes.seq_len_max)
        m_n = kept_rows(mask, b, o_n, o_n < length)
        p_g = start_of(grad, grad_strides, b, head, unit) + offsets_2d(grad_strides, o_k, o_w, unit)
        p_x = start_of(x, x_strides, b, head, unit) + offsets_2d(x_strides, first + o_n, o_w, unit)
        b_g = tl.load(p_g, mask=m_k[:, None] & m_w[None, :], other=0.0)
        b_x = tl.load(p_x, mask=m_n[:, None] & m_w[None, :], other=0.0)
        b_acc = dot(b_g, tl.trans(b_x), b_acc, PRECISION)
    return b_acc


@triton.jit
def matrix_tile(
    tile, key, value, grad_key_proj, grad_value_proj, grad_proj_key, grad_proj_value, mask, cu_seqlens_k, strides,
    sizes, unit: tl.constexpr, unit_e: tl.constexpr, K: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr,
    SHARED_KV: tl.constexpr, PER_BATCH: tl.constexpr, PER_HEAD: tl.constexpr, WANT_PROJ_KEY: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R, BLOCK_N] of dE or dF; matrices are counted E then F of those that are wanted, sequence by sequence and
    head by head where each has its own."""
    ROW_BLOCKS: tl.constexpr = (K + BLOCK_R - 1) // BLOCK_R
    column_blocks = tl.cdiv(sizes.seq_len_max, BLOCK_N)
    o_n = tile % column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tile // column_blocks % ROW_BLOCKS * BLOCK_R + tl.arange(0, BLOCK_R)
    matrix = tile // column_blocks // ROW_BLOCKS
    b, head = 0 * matrix, 0 * matrix
    if PER_HEAD:
        head = matrix % sizes.heads_kv
        matrix = matrix // sizes.heads_kv
    if PER_BATCH:
        b = matrix % sizes.batch
        matrix = matrix // sizes.batch
    of_key = (matrix == 0) & WANT_PROJ_KEY
    m_e = (o_k < K)[:, None] & columns_exist(o_n, sizes.seq_len_max, unit_e)[None, :]
    b_acc = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    if SHARED_KV or of_key:
        b_acc = add_products(
            b_acc, grad_key_proj, key, strides.grad_key_proj, strides.key, mask, cu_seqlens_k, sizes, o_k, o_n, b, head,
            unit, K, D, PER_BATCH, PER_HEAD, PRECISION, BLOCK_W, STAGES,
        )  # fmt: skip
    if SHARED_KV or (matrix > 0) | (not WANT_PROJ_KEY):
        b_acc = add_products(
            b_acc, grad_value_proj, value, strides.grad_value_proj, strides.value, mask, cu_seqlens_k, sizes, o_k, o_n,
            b, head, unit, K, D_V, PER_BATCH, PER_HEAD, PRECISION, BLOCK_W, STAGES,
        )  # fmt: skip
    b_e = b_acc.to(key.dtype.element_ty)
    if of_key:
        p_e = start_of(grad_proj_key, strides.grad_proj_key, b, head, unit_e)
        tl.store(p_e + offsets_2d(strides.grad_proj_key, o_k, o_n, unit_e), b_e, mask=m_e)
    else:
        p_e = start_of(grad_proj_value, strides.grad_proj_value, b, head, unit_e)
        tl.store(p_e + offsets_2d(strides.grad_proj_value, o_k, o_n, unit_e), b_e, mask=m_e)


@triton.jit
def input_tile(
    tile, proj_key, proj_value, grad_key_proj, grad_value_proj, grad_key, grad_value, mask, cu_seqlens_k, strides,
    sizes, units,
    unit: tl.constexpr, unit_e: tl.constexpr, K: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, PIECE: tl.constexpr,
    PARTS: tl.constexpr, UNIT_HEADS: tl.constexpr, UNIT_TILES: tl.constexpr, SHARED_KV: tl.constexpr,
    WANT_KEY: tl.constexpr, WANT_VALUE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_C] of dK and dV."""
    unit_id = tile // UNIT_TILES % units
    b, row = find_tile(cu_seqlens_k, sizes.batch, sizes.len_k, sizes.seq_len_max, tile // UNIT_TILES // units, BLOCK_N)
    of_value, head, o_d, m_c = columns_of(
        unit_id, tile % UNIT_TILES, sizes.heads_kv, D, D_V, PIECE, PARTS, UNIT_HEADS, SHARED_KV, BLOCK_C
    )
    m_c = m_c & tl.where(of_value, WANT_VALUE, WANT_KEY)
    wanted = b < sizes.batch
    if not SHARED_KV:
        wanted = wanted & tl.where(of_value, WANT_VALUE, WANT_KEY)
    if wanted:
        first, length = sequence(cu_seqlens_k, b, sizes.len_k, sizes.seq_len_max)
        o_n, o_k = row * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
        m_e = columns_exist(o_n, sizes.seq_len_max, unit_e)
        p_e = start_of(proj_key, strides.proj_key, b, unit_id, unit_e) + offsets_2d(strides.proj_key, o_k, o_n, unit_e)
        e_step = row_of(strides.proj_key, unit_e) * BLOCK_K
        if not SHARED_KV:
            if of_value:
                p_e = start_of(proj_value, strides.proj_value, b, unit_id, unit_e) + offsets_2d(
                    strides.proj_value, o_k, o_n, unit_e
                )
                e_step = row_of(strides.proj_value, unit_e) * BLOCK_K
        p_g, g_row = column_pointers(
            grad_key_proj, grad_value_proj, strides.grad_key_proj, strides.grad_value_proj, of_value, b, head, o_d, unit
        )
        p_g = p_g[None, :] + o_k.to(tl.int64)[:, None] * g_row
        b_acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            m_k = k + o_k < K
            b_e = tl.load(p_e, mask=m_k[:, None] & m_e[None, :], other=0.0)
            b_g = tl.load(p_g, mask=m_k[:, None] & m_c[None, :], other=0.0)
            b_acc = dot(tl.trans(b_e), b_g, b_acc, PRECISION)
            p_e += e_step
            p_g += BLOCK_K * g_row
        # Columns of E that are no part of the sequence may hold anything: theirs are rows that nobody writes.
        m_n = o_n < length
        b_acc = tl.where(kept_rows(mask, b, o_n, m_n)[:, None], b_acc, 0.0)
        p_x, x_row = column_pointers(
            grad_key, grad_value, strides.grad_key, strides.grad_value, of_value, b, head, o_d, unit
        )
        p_x = p_x[None, :] + (first + o_n)[:, None] * x_row
        tl.store(p_x, b_acc.to(grad_key.dtype.element_ty), mask=m_n[:, None] & m_c[None, :])


_NUMBERS = ["matrix_tiles", "units"]


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_NUMBERS)
def project_backward(
    key, value, proj_key, proj_value, grad_key_proj, grad_value_proj, grad_key, grad_value, grad_proj_key,
    grad_proj_value, mask, cu_seqlens_k, strides, sizes, matrix_tiles, units,
    unit: tl.constexpr, unit_e: tl.constexpr, K: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, PIECE: tl.constexpr,
    PARTS: tl.constexpr, UNIT_HEADS: tl.constexpr, UNIT_TILES: tl.constexpr, SHARED_KV: tl.constexpr,
    PER_BATCH: tl.constexpr, PER_HEAD: tl.constexpr, WANT_KEY: tl.constexpr, WANT_VALUE: tl.constexpr,
    WANT_PROJ_KEY: tl.constexpr, WANT_PROJ_VALUE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The formulas above. A gradient that nobody wants is another tensor of its kind, and never written."""
    sizes = sizes_of(sizes)
    tile = tl.program_id(0)
    if tile < matrix_tiles:
        if WANT_PROJ_KEY or WANT_PROJ_VALUE:
            matrix_tile(
                tile, key, value, grad_key_proj, grad_value_proj, grad_proj_key, grad_proj_value, mask, cu_seqlens_k,
                strides, sizes, unit, unit_e, K, D, D_V, SHARED_KV, PER_BATCH, PER_HEAD, WANT_PROJ_KEY, PRECISION,
                BLOCK_R, BLOCK_N, BLOCK_W, STAGES,
            )  # fmt: skip
    else:
        if WANT_KEY or WANT_VALUE:
            input_tile(
                tile - matrix_tiles, proj_key, proj_value, grad_key_proj, grad_value_proj, grad_key, grad_value, mask,
                cu_seqlens_k, strides, sizes, units, unit, unit_e, K, D, D_V, PIECE, PARTS, UNIT_HEADS, UNIT_TILES,
                SHARED_KV, WANT_KEY, WANT_VALUE, PRECISION, BLOCK_N, BLOCK_C, BLOCK_K, STAGES,
            )  # fmt: skip
