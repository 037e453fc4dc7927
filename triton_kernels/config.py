"""Sizes of tiles, by rule. Pure functions of a problem and a GPU; nothing is tried out here (tune.py does)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """What a plan needs to know of a GPU."""

    name: str
    backend: str  # of Triton: cuda, hip, or interpreter
    capability: int  # e.g. 80; 0 where it is not NVIDIA's
    multiprocessors: int


@dataclass(frozen=True)
class Shape:
    """What of a problem decides on the compiled kernel."""

    itemsize: int
    proj_dim: int
    head_dim: int
    value_dim: int
    per_head_proj: bool = False
    shared_kv: bool = False


@dataclass(frozen=True)
class Forward:
    block_k: int  # a projection tile: rows of K' and V', columns, rows of the sequence at a time
    block_c: int
    block_n: int
    project_stages: int
    block_q: int  # an attention tile: rows of query, rows of K' and V' at a time
    block_s: int
    attend_stages: int
    num_warps: int


@dataclass(frozen=True)
class Backward:
    fused: bool  # a program has all rows of K', and there are no row tiles
    block_rows: int  # a row tile: rows of query, rows of K' and V' at a time
    block_s: int
    row_stages: int
    block_k: int  # a column tile: rows of K' and V', rows of query at a time
    block_q: int
    column_stages: int
    num_warps: int


@dataclass(frozen=True)
class ProjectBackward:
    block_r: int  # a matrix tile: rows and columns of E, columns of a head at a time
    block_n: int  # also the sequence's rows of an input tile
    block_w: int
    block_c: int  # an input tile: columns, rows of K' and V' at a time
    block_k: int
    stages: int
    num_warps: int


@dataclass(frozen=True)
class Config:
    forward: Forward
    backward: Backward
    project_backward: ProjectBackward


@dataclass(frozen=True)
class Unit:
    """How heads share tiles of E and F: see common.columns_of."""

    piece: int
    parts: int
    heads: int
    tiles: int
    columns: int


def power_of_2(n: int, least: int = 16) -> int:
    return max(least, 1 << (n - 1).bit_length())


def unit_for(shape: Shape, most_columns: int = 128) -> Unit:
    """Tiles have a power of 2 of columns, for the compiler; heads of 96, say, are three pieces of 32 each."""
    width = max(shape.head_dim, shape.value_dim)
    padded = power_of_2(width)
    piece, parts = min(padded, most_columns), max(1, padded // most_columns)
    if padded >= 64 and 4 * width <= 3 * padded:
        piece, parts = padded // 4, 3
    pieces = parts * (2 if shape.shared_kv else 1)
    columns = most_columns if not shape.per_head_proj else min(most_columns, power_of_2(pieces * piece))
    slots = columns // piece
    heads = 1 if shape.per_head_proj else slots // math.gcd(slots, pieces)
    tiles = -(-heads * pieces // slots) * (1 if shape.shared_kv else 2)
    return Unit(piece, parts, heads, tiles, columns)


def config_for(shape: Shape, device: Device) -> Config:
    """The tiles for a problem on a device."""
    wide = shape.itemsize == 4
    k = power_of_2(shape.proj_dim)
    width = power_of_2(max(shape.head_dim, shape.value_dim))
    unit = unit_for(shape)
    # Rows of query and of K', by the width of heads. Eight warps stand one above the other on the rows of a tile of
    # scores, 16 rows each: with fewer than 128 rows several of them compute the same.
    # float32 takes three products of TF32, whose operands are split in registers: smaller tiles, or they spill.
    width = max(width, 32)
    if wide:
        attend = {32: (32, 64), 64: (32, 64), 128: (32, 32), 256: (16, 16)}[width]
        rows = {32: (16, 16), 64: (16, 32), 128: (16, 32), 256: (16, 16)}[width]
        columns = {32: 32, 64: 32, 128: 16, 256: 16}[width]
    else:
        attend = {32: (128, 64), 64: (128, 64), 128: (128, 64), 256: (64, 32)}[width]
        rows = {32: (128, 64), 64: (128, 64), 128: (64, 32), 256: (32, 32)}[width]
        columns = {32: 128, 64: 128, 128: 64, 256: 32}[width]
    fused = k <= columns and not wide and width <= 64
    # Products on 9.0 and 10.0 are so fast that bytes from L2 limit them at large K: taller tiles read key, K' and V'
    # less often (python -m bench.counts --gpu H100). Below they would not help.
    tall = 90 <= device.capability < 120 and not wide and width <= 64 and k > 128
    if tall and device.capability < 100:
        attend = (256, 64)
    forward = Forward(
        block_k=256 if tall else min(k, 64 if wide else 128),
        block_c=unit.columns,
        block_n=32 if wide or tall else 64,
        project_stages=3,
        block_q=attend[0],
        block_s=min(k, attend[1]),
        attend_stages=2,
        num_warps=8,
    )
    # wgmma takes 64 rows of dK' and dV' at a time, and with 32 query rows a step ptxas lets each product wait for the
    # one before it (C7515, which tests/test_triton.py looks for).
    fused_wide = fused and 90 <= device.capability < 120 and k >= 64
    backward = Backward(
        fused=fused,
        block_rows=rows[0],
        block_s=min(k, rows[1]),
        row_stages=1 if wide or width > 128 else 2,
        block_k=min(k, columns),
        block_q=16 if wide else 64 if fused_wide else 32,
        column_stages=1 if wide or width > 128 else 2,
        num_warps=8 if width > 128 or not (wide or fused or width == 128) or (fused_wide and k > 64) else 4,
    )
    project_backward = ProjectBackward(
        block_r=min(k, 64 if wide else 128),
        block_n=64 if wide else 128,
        block_w=min(unit.piece, 32 if wide else 64),
        block_c=unit.columns,
        block_k=min(k, 32 if wide else 64),
        stages=2,
        num_warps=4 if wide and 90 <= device.capability < 120 else 8,
    )
    return Config(forward, backward, project_backward)
