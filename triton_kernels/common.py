"""What the kernels share: where tensors lie, which sequence a tile belongs to, products, dropout, sums across programs.

Names: p_ pointers, o_ offsets, m_ masks, b_ blocks in registers. `unit` is the number of elements in which strides
count: a whole 16 bytes where every row starts at a multiple of 16 bytes (the compiler then knows it and loads them at
once), else 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the lowest finite number: scores of minus infinity differ from it


def opaque(number: int) -> int:
    """A number as it stands in a tuple of arguments. There Triton compiles a kernel anew for multiples of 16 and for 1,
    whatever do_not_specialize says; odd numbers above 1 are all the same to it."""
    return 2 * number + 3


@triton.jit
def number(opaque):
    return (opaque >> 1) - 1


class Strides(NamedTuple):
    """Of a (batch, head, row, column) tensor, in units; columns are adjacent. E and F: rows are the K, and what they
    do not differ by has 0. Opaque."""

    batch: int
    head: int
    row: int


class Sizes(NamedTuple):
    """Of a problem, but for K and the widths of heads, which are compiled in. Opaque until `sizes_of`."""

    batch: int
    heads: int
    heads_kv: int
    len_q: int  # rows of a padded query; of all sequences of a packed one
    len_k: int
    seq_len_max: int  # columns of E and F


class Mask(NamedTuple):
    """key_padding_mask and its strides in bytes, opaque."""

    data: Any
    batch: int
    row: int


class Bias(NamedTuple):
    """key_bias and its strides, opaque; without one all are None, so that they are no arguments of the kernel."""

    data: Any
    batch: int | None
    head: int | None


@triton.jit
def sizes_of(sizes):
    return Sizes(
        number(sizes.batch), number(sizes.heads), number(sizes.heads_kv), number(sizes.len_q), number(sizes.len_k),
        number(sizes.seq_len_max),
    )  # fmt: skip


@triton.jit
def start_of(data, strides, b, h, unit: tl.constexpr):
    """Pointer to the first row of head h of sequence b."""
    return data + (b.to(tl.int64) * number(strides.batch) + h.to(tl.int64) * number(strides.head)) * unit


@triton.jit
def row_of(strides, unit: tl.constexpr):
    """Elements from a row to the next."""
    return number(strides.row).to(tl.int64) * unit


@triton.jit
def offsets_2d(strides, o_row, o_column, unit: tl.constexpr):
    """[rows, columns] of a head."""
    return o_row.to(tl.int64)[:, None] * row_of(strides, unit) + o_column[None, :]


@triton.jit
def columns_exist(o_n, columns, unit: tl.constexpr):
    """o_n < columns, and up to the next multiple of `unit`, which a row of E has: in this form the compiler sees that
    `unit` neighbours have one answer, and loads them at once."""
    return o_n // unit * unit < columns


@triton.jit
def columns_of(
    unit_id, tile, heads_kv,
    D: tl.constexpr, D_V: tl.constexpr, PIECE: tl.constexpr, PARTS: tl.constexpr, UNIT_HEADS: tl.constexpr,
    SHARED_KV: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What the BLOCK_C columns of a tile of projections are: of value (else key), of which head, which column of it.

    A unit of UNIT_HEADS heads that share E and F has a list of pieces of PIECE columns, PARTS for each head; a tile has
    the next BLOCK_C // PIECE of them. Where E serves as F the pieces of value follow those of key, else they have tiles
    of their own, and whether a tile is of value is one answer for all its columns.
    """
    o_c = tl.arange(0, BLOCK_C)
    index = o_c // PIECE
    if SHARED_KV:
        index += tile * (BLOCK_C // PIECE)
        of_value = index >= UNIT_HEADS * PARTS
        index -= of_value.to(tl.int32) * (UNIT_HEADS * PARTS)
    else:
        KEY_TILES: tl.constexpr = (UNIT_HEADS * PARTS * PIECE + BLOCK_C - 1) // BLOCK_C
        of_value = tile >= KEY_TILES
        index += tile % KEY_TILES * (BLOCK_C // PIECE)
    head = unit_id * UNIT_HEADS + index // PARTS
    o_d = index % PARTS * PIECE + o_c % PIECE
    m_c = (index < UNIT_HEADS * PARTS) & (head < heads_kv) & (o_d < tl.where(of_value, D_V, D))
    return of_value, head, o_d, m_c


@triton.jit
def column_pointers(key, value, key_strides, value_strides, of_value, b, head, o_d, unit: tl.constexpr):
    """Pointers to row 0 of sequence b at the columns of `columns_of`, and the distance of a row to the next."""
    p_key = start_of(key, key_strides, b, head, unit) + o_d
    p_value = start_of(value, value_strides, b, head, unit) + o_d
    # The unit last: of a choice between two multiples of it the compiler does not see that it is one.
    row = tl.where(of_value, number(value_strides.row), number(key_strides.row)).to(tl.int64) * unit
    return tl.where(of_value, p_value, p_key), row


@triton.jit
def first_row(cu_seqlens, b, rows):
    """Of sequence b, or the end of the last; held inside the tensor."""
    return tl.minimum(tl.maximum(tl.load(cu_seqlens + b), 0), tl.zeros([], tl.int64) + rows)


@triton.jit
def sequence(cu_seqlens, b, rows, most):
    """First row and number of rows of sequence b. Offsets that run past their tensor are held inside it."""
    first = tl.zeros([], tl.int64)
    length = tl.minimum(rows, most)
    if cu_seqlens is not None:
        first = first_row(cu_seqlens, b, rows)
        end = tl.maximum(first_row(cu_seqlens, b + 1, rows), first)
        length = tl.minimum(end - first, most.to(tl.int64)).to(tl.int32)
    return first, length


@triton.jit
def find_tile(cu_seqlens, batch, rows, most, tile, BLOCK: tl.constexpr):
    """Sequence, and number in it, of a tile of BLOCK rows counted over all sequences; `batch` if there is none.

    A packed sequence b has the tiles from first_row // BLOCK + b up to those of the next one: as many as it needs, or
    one more, which is none. So where it begins depends on its own offset alone, and halving finds it.
    """
    b = 0
    if cu_seqlens is None:
        tiles = tl.cdiv(tl.minimum(rows, most), BLOCK)
        b = tile // tiles
        tile = tile % tiles
    else:
        end = batch
        while end - b > 1:
            middle = b + (end - b) // 2
            if first_row(cu_seqlens, middle, rows) // BLOCK + middle <= tile:
                b = middle
            else:
                end = middle
        tile -= (first_row(cu_seqlens, b, rows) // BLOCK).to(tl.int32) + b
        _, length = sequence(cu_seqlens, b, rows, most)
        if (tile < 0) | (tile >= tl.cdiv(length, BLOCK)):
            b = batch
    return b, tile


@triton.jit
def kept_rows(mask, b, o_n, m_n):
    """Which of the rows m_n of the sequence take part."""
    if mask.data is not None:
        p_mask = mask.data + b.to(tl.int64) * number(mask.batch) + o_n.to(tl.int64) * number(mask.row)
        m_n = m_n & (tl.load(p_mask, mask=m_n, other=0) != 0)
    return m_n


@triton.jit
def dot(b_a, b_b, b_acc, PRECISION: tl.constexpr):
    """b_acc + b_a b_b. PRECISION of float32: tf32x3 (true to float32), tf32, ieee; "interpreter", which takes 16-bit
    floats for integers, gets them widened."""
    if PRECISION == "interpreter":
        return tl.dot(b_a.to(tl.float32), b_b.to(tl.float32), b_acc, input_precision="ieee")
    else:
        return tl.dot(b_a, b_b, b_acc, input_precision=PRECISION)


@triton.jit
def powers(b_s, exponent, b_most):
    """2^(exponent s - most), rounded once: `most`, rounded too, is common to a row, so its error cancels."""
    return tl.exp2(tl.fma(b_s, exponent, -b_most))


@triton.jit
def bias_of(key_bias, b, head, o_k, K: tl.constexpr):
    """What is added to the scores of rows o_k of K'; minus infinity where there is no such row."""
    p_bias = key_bias.data + b.to(tl.int64) * number(key_bias.batch) + head.to(tl.int64) * number(key_bias.head) + o_k
    return tl.load(p_bias, mask=o_k < K, other=float("-inf"))


@triton.jit
def biased_powers(b_s, b_most, HEADROOM: tl.constexpr):
    """e^(s - most) / 2^HEADROOM. The difference comes first: a bias may be the lowest finite number."""
    return tl.exp2((b_s - b_most) * LOG2_E - HEADROOM)


@triton.jit
def add_scores(b_s, b_most, m_k, exponent, WHOLE: tl.constexpr, BIASED: tl.constexpr, HEADROOM: tl.constexpr):
    """A step of the softmax over blocks of rows of K': powers of the scores of one more block, the most of them so far,
    and by what to multiply what was summed before. WHOLE: no block reaches beyond K."""
    if BIASED:
        b_new = tl.maximum(b_most, tl.max(b_s, 1))
        b_p = biased_powers(b_s, b_new[:, None], HEADROOM)
        b_change = tl.exp2((b_most - b_new) * LOG2_E)
    elif WHOLE:
        b_new = tl.maximum(b_most, tl.max(b_s, 1) * exponent + HEADROOM)
        b_p = powers(b_s, exponent, b_new[:, None])
        b_change = tl.exp2(b_most - b_new)
    else:
        b_new = tl.maximum(b_most, tl.max(tl.where(m_k[None, :], b_s, float("-inf")), 1) * exponent + HEADROOM)
        b_p = tl.where(m_k[None, :], powers(b_s, exponent, b_new[:, None]), 0.0)
        b_change = tl.exp2(b_most - b_new)
    return b_p, b_new, b_change


@triton.jit
def inverse(b_sum, one, BIASED: tl.constexpr):
    """one / sum. Where a bias has taken all rows of K' out the sum is zero, and so is whatever this multiplies."""
    if BIASED:
        b_sum = tl.where(b_sum == 0, 1.0, b_sum)
    return one / b_sum


@triton.jit
def kept_scores(rng_state, head, o_q, k, threshold, BLOCK_K: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Which elements of the softmax dropout keeps: [q, k], or [k, q], with BLOCK_K columns from k, a multiple of 4.

    Philox4x32-10: counter (k // 4, q, head, offset), key seed, word k % 4; `head` counts over all sequences.
    """
    BLOCK_Q: tl.constexpr = o_q.shape[0]
    seed, offset = tl.load(rng_state), tl.load(rng_state + 1)
    o_draw = k // 4 + tl.arange(0, BLOCK_K // 4)
    c0 = tl.broadcast_to(o_draw[None, :], [BLOCK_Q, BLOCK_K // 4])
    c1 = tl.broadcast_to(o_q[:, None], [BLOCK_Q, BLOCK_K // 4])
    c2, c3 = tl.zeros_like(c0) + head, tl.zeros_like(c0) + offset.to(tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    b_word = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK_Q, BLOCK_K])
    if TRANSPOSED:
        b_word = tl.trans(b_word)
    return b_word.to(tl.uint32, bitcast=True) >= threshold.to(tl.uint32, bitcast=True)


@triton.jit
def add_splits(b_acc, partial, arrived, tile, split, splits, SHAPE: tl.constexpr):
    """The sum of the blocks of all splits of a tile, and whether this program has it: the one that arrives last.

    Always the same order, so always the same bits. All threads write, the barrier collects them, one thread arrives
    (release and acquire, of the whole GPU), and its answer reaches the others through another barrier.
    """
    o = tl.arange(0, SHAPE[0])[:, None] * SHAPE[1] + tl.arange(0, SHAPE[1])[None, :]
    p_tile = partial + (tile.to(tl.int64) * splits) * (SHAPE[0] * SHAPE[1]) + o
    tl.store(p_tile + split.to(tl.int64) * (SHAPE[0] * SHAPE[1]), b_acc)
    tl.debug_barrier()
    last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == splits - 1
    if last:
        b_acc = tl.zeros(SHAPE, tl.float32)
        for i in range(0, splits):
            b_acc += tl.load(p_tile)
            p_tile += SHAPE[0] * SHAPE[1]
    return b_acc, last


@triton.jit
def signal(counter):
    """Everything this program has written is ready, for whoever waits."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release")


@triton.jit
def wait_for(counter, count):
    """Wait until `count` programs have signalled. They took their tickets earlier and wait for nobody."""
    while tl.atomic_add(counter, 0, sem="acquire") < count:
        pass
