"""Is the answer right? Every candidate against float64, on the very inputs that are timed.

The rule, that of the tests: the error is at most twice that of the plain PyTorch formula in the same type, plus one
rounding of the result and four of float32; in two norms, largest, which finds one wrong element, and root mean square,
which finds an error that is small and everywhere. Where checking all heads and rows would cost too much, the upstream
gradient is zero outside some heads and rows: those are compared, and gradients elsewhere, which must be zero, add to
the error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench import machine
from bench.candidates import NAMES, Candidate, Inputs, eager, eager_exact
from bench.options import Cell

SAMPLE_ROWS = 256


@dataclass(frozen=True)
class Verdict:
    tensor: str
    norm: str
    error: float
    plain_error: float
    limit: float

    @property
    def right(self) -> bool:
        return self.error <= self.limit  # False for NaN

    def __str__(self) -> str:
        name = "out" if self.tensor == "out" else f"grad of {self.tensor}"
        relation = "within" if self.right else "OVER"
        return f"{name}: {self.norm} error {self.error:.2e} {relation} {self.limit:.2e} (plain {self.plain_error:.2e})"


class Checker:
    """Expected answers of one cell, for the Linformer formula or the exact one."""

    def __init__(self, cell: Cell, inputs: Inputs, exact: bool) -> None:
        self.cell, self.inputs, self.exact, self.train = cell, inputs, exact, cell.op != "fwd"
        device = inputs.grad_out.device
        rows, heads = self.affordable()
        self.scope = f"{heads} of {cell.batch * cell.heads} heads, {rows} of {cell.seq_len} rows"
        self.rows = spread(rows, cell.seq_len).to(device)
        self.heads = spread(heads, cell.batch * cell.heads).to(device)
        # With one E a head: which matrices the chosen heads use, and where among those each head finds its own.
        self.matrices, self.matrix_of_head = torch.unique(self.heads % cell.heads, return_inverse=True)
        mask = torch.zeros(inputs.grad_out.shape[:3], dtype=torch.bool, device=device)
        mask.flatten(0, 1)[self.heads[:, None], self.rows] = True
        self.grad_out = inputs.grad_out * mask[..., None]
        self.expected = self.plain(torch.float64)
        plain = self.plain(cell.torch_dtype)
        self.plain_errors = {name: norms(plain[name] - want) for name, want in self.expected.items()}

    def affordable(self) -> tuple[int, int]:
        """How many rows and heads to check: all, or so many that the check takes a few seconds."""
        cell, device = self.cell, self.inputs.grad_out.device.type
        # A CPU without 16-bit arithmetic runs the plain formula at about 2 GFLOP/s (measured, AVX2).
        budget = 6e9 if cell.torch_dtype.itemsize == 2 and device == "cpu" else 4e10
        unit = (cell.seq_len if self.exact else cell.proj_dim) * cell.head_dim
        per_head = 0 if self.exact else (12 if self.train else 4) * unit * cell.seq_len
        per_row = (14 if self.train else 4) * unit
        rows, heads = cell.seq_len, cell.batch * cell.heads
        if heads * (per_head + rows * per_row) > budget:
            rows = min(rows, SAMPLE_ROWS)
            heads = max(1, min(heads, int(budget // (per_head + rows * per_row))))
        return rows, heads

    def chosen(self, tensor: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tensor as (heads, ., .) and the heads of it that take part, None for a matrix that all share."""
        if tensor.dim() == 4:
            return tensor.flatten(0, 1), self.heads
        return tensor, self.matrices if tensor.dim() == 3 else None

    def plain(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The plain PyTorch formula in `dtype` on the chosen heads and rows."""
        leaves: dict[str, Tensor] = {}
        for name, tensor in zip(NAMES, self.inputs.tensors, strict=True):
            if tensor is not None and not (self.exact and name.startswith("proj")):
                flat, index = self.chosen(tensor.detach())
                leaves[name] = (flat if index is None else flat[index]).to(dtype, copy=True).requires_grad_(self.train)
        query, key, value, *projections = leaves.values()
        if self.cell.sharing == "none":
            projections = [matrix[self.matrix_of_head] for matrix in projections]
        formula = eager_exact if self.exact else eager
        with torch.set_grad_enabled(self.train):
            out = formula(query[:, self.rows], key, value, *projections)
        if not self.train:
            return {"out": out}
        grad_out = self.grad_out.flatten(0, 1)[self.heads[:, None], self.rows].to(dtype)
        gradients = torch.autograd.grad(out, list(leaves.values()), grad_out)
        return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}

    def __call__(self, candidate: Candidate) -> list[Verdict]:
        machine.use_capability(candidate.capability)
        with torch.set_grad_enabled(self.train):
            out = candidate.call(*self.inputs.tensors)
        flat = out.detach().flatten(0, 1)
        errors = {"out": norms(flat[self.heads[:, None], self.rows] - self.expected["out"])}
        if not flat.isfinite().all():
            errors["out"] = dict.fromkeys(errors["out"], float("nan"))
        if self.train:
            gradients = torch.autograd.grad(out, self.inputs.leaves(self.exact), self.grad_out)
            for name, gradient in zip(list(self.expected)[1:], gradients, strict=True):
                flat, index = self.chosen(gradient)
                errors[name] = norms((flat if index is None else flat[index]) - self.expected[name])
                if index is not None and len(index) < len(flat):
                    outside = torch.ones(len(flat), dtype=torch.bool, device=flat.device).index_fill_(0, index, False)
                    stray = norms(flat[outside])
                    errors[name] = {norm: error + stray[norm] for norm, error in errors[name].items()}
        return [self.verdict(name, norm, error) for name in errors for norm, error in errors[name].items()]

    def verdict(self, name: str, norm: str, error: float) -> Verdict:
        unit = torch.finfo(self.cell.torch_dtype).eps + 4 * torch.finfo(torch.float32).eps
        plain_error = self.plain_errors[name][norm]
        return Verdict(name, norm, error, plain_error, 2 * plain_error + unit * norms(self.expected[name])[norm])


def spread(count: int, total: int) -> Tensor:
    """`count` indexes from the first to the last, evenly."""
    return torch.linspace(0, total - 1, count, dtype=torch.float64).round().long()


def norms(tensor: Tensor) -> dict[str, float]:
    wide = tensor.double().abs()
    return {"largest": wide.max().item(), "rms": wide.square().mean().sqrt().item()}
