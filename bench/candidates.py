"""Who is measured: our backends and the PyTorch compositions, all called as (query, key, value, E, F or None)."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.options import Cell

NAMES = ("query", "key", "value", "proj_key", "proj_value")


@dataclass(frozen=True)
class Candidate:
    name: str
    call: Callable[..., Tensor]
    kind: str  # "ours"; "rival", which gives the same answer; "exact", which gives another
    capability: str = ""  # the build of the CPU kernels that it demands

    @property
    def exact(self) -> bool:
        return self.kind == "exact"


@dataclass(frozen=True)
class Inputs:
    tensors: tuple[Tensor | None, ...]
    grad_out: Tensor

    def leaves(self, exact: bool) -> list[Tensor]:
        """The tensors whose gradients a training step wants."""
        return [tensor for tensor in self.tensors[: 3 if exact else 5] if tensor is not None]


def eager(query: Tensor, key: Tensor, value: Tensor, proj_key: Tensor, proj_value: Tensor | None = None) -> Tensor:
    """The formula as written; in float64 it is also the reference that every candidate is checked against."""
    key_proj = proj_key @ key
    value_proj = (proj_key if proj_value is None else proj_value) @ value
    scores = query @ key_proj.transpose(-1, -2) * query.size(-1) ** -0.5
    return torch.softmax(scores, dim=-1) @ value_proj


def eager_exact(query: Tensor, key: Tensor, value: Tensor, *_: Tensor | None) -> Tensor:
    return torch.softmax(query @ key.transpose(-1, -2) * query.size(-1) ** -0.5, dim=-1) @ value


def sdpa_proj(query: Tensor, key: Tensor, value: Tensor, proj_key: Tensor, proj_value: Tensor | None) -> Tensor:
    value_proj = (proj_key if proj_value is None else proj_value) @ value
    return scaled_dot_product_attention(query, proj_key @ key, value_proj)


def pack(proj: Tensor, rows: Tensor) -> Tensor:
    """proj @ rows as one product for all heads: no copy where rows are stored (B, N, H, D)."""
    b, h, n, d = rows.shape
    return (proj @ rows.transpose(1, 2).reshape(b, n, h * d)).view(b, -1, h, d).transpose(1, 2)


def eager_packed(query: Tensor, key: Tensor, value: Tensor, proj_key: Tensor, proj_value: Tensor | None) -> Tensor:
    key_proj, value_proj = pack(proj_key, key), pack(proj_key if proj_value is None else proj_value, value)
    scores = query @ key_proj.transpose(-1, -2) * query.size(-1) ** -0.5
    return torch.softmax(scores, dim=-1) @ value_proj


def sdpa_packed(query: Tensor, key: Tensor, value: Tensor, proj_key: Tensor, proj_value: Tensor | None) -> Tensor:
    value_proj = pack(proj_key if proj_value is None else proj_value, value)
    return scaled_dot_product_attention(query, pack(proj_key, key), value_proj)


def expanded(proj: Tensor, rows: Tensor) -> Tensor:
    """proj @ rows as a batch of products with one matrix, of rows as they lie.

    torch.matmul copies them where the matrix needs gradients.
    """
    b, h, n, d = rows.shape
    if rows.stride(1) < rows.stride(2):  # stored (B, N, H, D)
        wide = rows.transpose(1, 2).reshape(b, n, h * d)
        return torch.bmm(proj.expand(b, -1, -1), wide).view(b, -1, h, d).transpose(1, 2)
    return torch.bmm(proj.expand(b * h, -1, -1), rows.reshape(b * h, n, d)).view(b, h, -1, d)


def bmm(query: Tensor, key: Tensor, value: Tensor, proj_key: Tensor, proj_value: Tensor | None) -> Tensor:
    value_proj = expanded(proj_key if proj_value is None else proj_value, value)
    return scaled_dot_product_attention(query, expanded(proj_key, key), value_proj)


def upcast(query: Tensor, *others: Tensor | None) -> Tensor:
    """What a user writes who has found 16-bit matrix products slow on a CPU without instructions for them."""
    wide: Any = [None if tensor is None else tensor.float() for tensor in (query, *others)]
    return sdpa_proj(*wide).to(query.dtype)


def exact(query: Tensor, key: Tensor, value: Tensor, *_: Tensor | None) -> Tensor:
    return scaled_dot_product_attention(query, key, value)


def flash(query: Tensor, key: Tensor, value: Tensor, *_: Tensor | None) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(*(tensor.transpose(1, 2) for tensor in (query, key, value))).transpose(1, 2)


def ours(backend: str | None, *tensors: Any) -> Tensor:
    # Imported here so that the rest of the benchmark, and its help, work where the package is not installed.
    import linformer_kernels

    return linformer_kernels.linformer_attention(*tensors, backend=backend)


def candidates(options: argparse.Namespace, cell: Cell) -> list[Candidate]:
    if options.capability:
        found = [Candidate(f"ours:{name}", partial(ours, "cpu"), "ours", name) for name in options.capability]
    else:
        found = [Candidate(f"ours:{b}", partial(ours, None if b == "auto" else b), "ours") for b in options.backend]
    calls: dict[str, Callable[..., Tensor]] = {"eager": eager, "sdpa_proj": sdpa_proj, "exact": exact}
    if cell.sharing != "none":
        calls |= {"eager_packed": eager_packed, "sdpa_packed": sdpa_packed, "bmm": bmm}
    if "compile" in options.rivals:  # else not touched: loading the compiler takes seconds
        torch._dynamo.reset()  # a ninth shape would be one too many for a function, which then runs uncompiled
        calls["compile"] = torch.compile(eager, dynamic=False)
    if cell.dtype != "float32":
        calls |= {"upcast": upcast, "flash": flash}
    rivals = [name for name in options.rivals if name in calls]
    return found + [Candidate(name, calls[name], "exact" if name in ("exact", "flash") else "rival") for name in rivals]


def make_inputs(cell: Cell, device: str) -> Inputs:
    """Unit normal tensors, and E, F ~ N(0, 1/N), so that K' and V' have the spread of key and value."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, std: float = 1.0, grad: bool = cell.op != "fwd") -> Tensor:
        tensor = torch.randn(shape, generator=generator, device=device).mul_(std).to(cell.torch_dtype)
        if cell.layout == "bnhd" and len(shape) == 4:
            tensor = tensor.transpose(1, 2).contiguous().transpose(1, 2)
        return tensor.requires_grad_(grad)

    rows = (cell.batch, cell.heads, cell.seq_len, cell.head_dim)
    columns = (cell.proj_dim, cell.seq_len)
    projection = (cell.heads, *columns) if cell.sharing == "none" else columns
    std = cell.seq_len**-0.5
    query, key, value, proj_key = normal(*rows), normal(*rows), normal(*rows), normal(*projection, std=std)
    proj_value = None if cell.sharing == "key_value" else normal(*projection, std=std)
    return Inputs((query, key, value, proj_key, proj_value), normal(*rows, grad=False))


def small_version(cell: Cell) -> Cell:
    """A cell of the same kind that is cheap enough to predict the cost of the whole one from."""
    return replace(cell, batch=1, heads=min(cell.heads, 2), seq_len=min(cell.seq_len, 512))
