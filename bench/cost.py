"""What one call must cost: the operations and bytes that no implementation avoids. Stated here and nowhere else."""

from __future__ import annotations

from bench.options import Cell

FORMULAS = (
    "needed FLOP a row and head: fwd 8*K*D (K'=E k, V'=F v, q K'^T, P V': 2*K*D each); bwd 18*K*D (scores again, dP,\n"
    "dq, dK', dV', dk, dv, dE, dF); full 26*K*D; exact attention is counted by its own: fwd 4*N*D, bwd 10*N*D.\n"
    "floor bytes a row: fwd 4*D a head (q, k, v, out), bwd 7*D a head (q, k, v, dout, dq, dk, dv), and K for each\n"
    "distinct E and F (bwd: and for its gradient), times the element size; full = fwd + bwd. The floor is the longer\n"
    "of FLOP / peak and bytes / copy bandwidth. Extra memory is the peak during a call beyond inputs and outputs."
)
LINFORMER_FLOP = {"fwd": 8, "bwd": 18, "full": 26}
POOLED_FLOP = {"fwd": 4, "bwd": 10, "full": 14}  # means over segments: no products
EXACT_FLOP = {"fwd": 4, "bwd": 10, "full": 14}


def flop(cell: Cell, exact: bool = False) -> int:
    rows = cell.batch * cell.heads * cell.seq_len
    if exact:
        return EXACT_FLOP[cell.op] * cell.seq_len * cell.head_dim * rows
    factor = (POOLED_FLOP if cell.sharing == "pooled" else LINFORMER_FLOP)[cell.op]
    return factor * cell.proj_dim * cell.head_dim * rows


def weighted_bytes(cell: Cell, per_head: int, per_projection: int) -> int:
    matrices = {"headwise": 2, "key_value": 1, "none": 2 * cell.heads, "pooled": 0}[cell.sharing]
    per_row = per_head * cell.head_dim * cell.batch * cell.heads + per_projection * cell.proj_dim * matrices
    return per_row * cell.seq_len * cell.torch_dtype.itemsize


def floor_bytes(cell: Cell, exact: bool = False) -> int:
    per_head, per_projection = {"fwd": (4, 1), "bwd": (7, 2), "full": (11, 3)}[cell.op]
    return weighted_bytes(cell, per_head, 0 if exact else per_projection)


def tensor_bytes(cell: Cell) -> int:
    """Inputs, the upstream gradient, and the outputs."""
    return weighted_bytes(cell, *((5, 1) if cell.op == "fwd" else (8, 2)))
