"""One call of the operation as data: sizes, layouts, masks; its inputs, its plain PyTorch form, and the comparison."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import numpy as np
import oracle
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import linformer_kernels as lk

NAN = float("nan")
ARGUMENTS = ("query", "key", "value", "proj_key", "proj_value")
NAMESPACE = "linformer_kernels"


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int = 2
    heads: int = 4
    kv_heads: int = 4
    n_q: int = 96
    n: int = 96
    extra: int = 0  # columns of E and F beyond the longest sequence; they are NaN
    k: int = 64
    d: int = 32
    d_v: int | None = None  # None: as d
    dtype: torch.dtype = torch.float32
    sharing: str = "headwise"  # headwise: E and F; key-value: E = F; per-head; per-head-key-value; same: E given twice
    mask: str | None = None  # random, prefix, alternate, one, all, or nothing (for sequence 0); masked rows are NaN
    layout: str = "bhnd"  # bhnd, bnhd, padded, offset, expanded, strided (the last dimension too)
    grad: str = "bhnd"  # a layout, or scalar: one number expanded to the whole shape
    alias: str = ""  # kv: key is value; qk: query is key; qkv: both
    lengths: tuple[int, ...] | None = None  # packed: rows of key of each sequence
    lengths_q: tuple[int, ...] | None = None  # packed: rows of query of each sequence; None: as lengths
    scale: float | None = None
    size: float = 1.0  # of the query's entries
    dropout_p: float = 0.0
    tf32: bool = False  # the user has allowed TF32 in torch; of no account on a CPU

    def __str__(self) -> str:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        return ",".join(f"{name}={value}" for name, value in values.items()).replace(" ", "").replace("torch.", "")


MOST_WORK = 2e7  # what executes kernels slowly takes many seconds for more


def work(case: Case) -> int:
    """Products of sizes: rows of all sequences and heads, K, and the width, of which kernels take no less than 32."""
    if case.lengths is None:
        rows = case.batch * max(case.n, case.n_q)
    else:
        rows = max(sum(case.lengths), sum(case.lengths_q or case.lengths))
    return case.heads * rows * case.k * max(case.d, case.d_v or 0, 32)


def strided(shape, layout: str, dtype: torch.dtype, device: str, size: float = 1.0) -> torch.Tensor:
    """Normal numbers in the layout. Memory between and around them is NaN, so that a read outside the tensor shows."""
    values = (size * torch.randn(shape, dtype=torch.float64, device=device)).to(dtype)
    if layout == "expanded" and shape[0] > 0:
        return values[:1].expand(shape)
    if layout == "bnhd" and len(shape) == 4:
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if layout in ("padded", "strided"):
        memory = torch.full((*shape[:-1], 2 * shape[-1] + 5), NAN, dtype=dtype, device=device)
        view = memory[..., 1 : 1 + shape[-1]] if layout == "padded" else memory[..., 1 : 1 + 2 * shape[-1] : 2]
    elif layout == "offset":
        memory = torch.full((values.numel() + 66,), NAN, dtype=dtype, device=device)
        view = memory[33 : 33 + values.numel()].view(shape)
    else:
        return values
    return view.copy_(values)


def make_mask(pattern: str | None, batch: int, n: int, device: str) -> torch.Tensor | None:
    if pattern is None:
        return None
    at = torch.arange(n, device=device).expand(batch, n)
    random, length = torch.rand(batch, n, device=device) < 0.6, torch.randint(0, n + 1, (batch, 1), device=device)
    patterns = {"random": random, "prefix": at < length, "alternate": at % 2 == 1, "one": at == length, "all": at >= 0}
    patterns["nothing"] = random & (torch.arange(batch, device=device)[:, None] > 0)
    return torch.stack([~patterns[pattern], patterns[pattern]], dim=-1)[..., 1]  # not contiguous


def cumulative(lengths, device: str, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=dtype, device=device)


class Inputs:
    """The tensors of a case, all requiring gradients."""

    def __init__(self, case: Case, device: str):
        c, d_v = case, case.d if case.d_v is None else case.d_v
        self.case, self.cu_seqlens_q, self.cu_seqlens_k = case, None, None
        n, shape_q, shape_kv = c.n, (c.batch, c.heads, c.n_q), (c.batch, c.kv_heads, c.n)
        if c.lengths is not None:
            lengths_q = c.lengths if c.lengths_q is None else c.lengths_q
            self.cu_seqlens_q = cumulative(lengths_q, device, torch.int64)
            self.cu_seqlens_k = cumulative(c.lengths, device)
            n, shape_q, shape_kv = max(c.lengths, default=0), (sum(lengths_q), c.heads), (sum(c.lengths), c.kv_heads)
        shape_e = (*((c.kv_heads,) if c.sharing.startswith("per-head") else ()), c.k, n + c.extra)
        layout_e = c.layout if c.layout != "expanded" or len(shape_e) == 3 else "bhnd"
        self.key = strided((*shape_kv, c.d), c.layout, c.dtype, device)
        self.value = self.key if "kv" in c.alias else strided((*shape_kv, d_v), c.layout, c.dtype, device)
        self.query = self.key if "qk" in c.alias else strided((*shape_q, c.d), c.layout, c.dtype, device, c.size)
        self.proj_key = strided(shape_e, layout_e, c.dtype, device, max(n, 1) ** -0.5)
        self.proj_value = strided(shape_e, layout_e, c.dtype, device, max(n, 1) ** -0.5)
        self.mask = make_mask(c.mask, c.batch, c.n, device)
        if self.mask is not None and c.layout != "expanded" and "qk" not in c.alias:
            self.key.masked_fill_(~self.mask[:, None, :, None], NAN)
            self.value.masked_fill_(~self.mask[:, None, :, None], NAN)
        for projection in (self.proj_key, self.proj_value):
            if c.layout != "expanded" or len(shape_e) == 2:
                projection[..., n:] = NAN
        if c.sharing.endswith("key-value"):
            self.proj_value = None
        elif c.sharing == "same":
            self.proj_value = self.proj_key
        if c.grad == "scalar":
            self.grad_out = torch.full((), 0.7, dtype=c.dtype, device=device).expand(*shape_q, d_v)
        else:
            self.grad_out = strided((*shape_q, d_v), c.grad, c.dtype, device)
        self.seed, self.rng_state = int(torch.randint(2**31, ())), None
        if c.dropout_p:  # what the functions will draw
            torch.manual_seed(self.seed)
            drawn = torch.randint(0, 2**63 - 1, (1,), device=device)
            self.rng_state = torch.cat([drawn, torch.zeros_like(drawn)])
        leaves: dict[int, torch.Tensor] = {}
        for name in ARGUMENTS:  # a tensor given twice stays one tensor
            x = getattr(self, name)
            setattr(self, name, None if x is None else leaves.setdefault(id(x), x.detach().requires_grad_()))

    def positional(self) -> tuple[torch.Tensor, ...]:
        return tuple(getattr(self, name) for name in ARGUMENTS)

    def cu_seqlens(self) -> dict:
        return {"cu_seqlens_q": self.cu_seqlens_q, "cu_seqlens_k": self.cu_seqlens_k}

    def leaves(self) -> dict[str, torch.Tensor]:
        """The different tensors, each by the first of its names."""
        first: dict[int, str] = {}
        for name in ARGUMENTS:
            if getattr(self, name) is not None:
                first.setdefault(id(getattr(self, name)), name)
        return {name: getattr(self, name) for name in first.values()}

    def results(self, out: torch.Tensor) -> dict[str, torch.Tensor]:
        """`out` and the gradients of the leaves that require them, with grad_out for gradient."""
        leaves = {name: leaf for name, leaf in self.leaves().items() if leaf.requires_grad}
        grads = torch.autograd.grad(out, list(leaves.values()), self.grad_out)
        return {"out": out, **{f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def run(x: Inputs, backend: str | None) -> dict[str, torch.Tensor]:
    """Through linformer_attention or its packed form."""
    options = {"scale": x.case.scale, "backend": backend, "dropout_p": x.case.dropout_p}
    torch.manual_seed(x.seed)
    with tf32(x.case.tf32):
        if x.case.lengths is not None:
            out = lk.linformer_attention_varlen(*x.positional(), **x.cu_seqlens(), **options)
        else:
            out = lk.linformer_attention(*x.positional(), key_padding_mask=x.mask, **options)
    return x.results(out)


def run_halves(x: Inputs, backend: str | None) -> dict[str, torch.Tensor]:
    """Through project_kv, then projected_attention; with K' and V'."""
    options = {"cu_seqlens_q": x.cu_seqlens_q, "scale": x.case.scale, "dropout_p": x.case.dropout_p, "backend": backend}
    with tf32(x.case.tf32):
        k, v = lk.project_kv(*x.positional()[1:], key_padding_mask=x.mask, cu_seqlens_k=x.cu_seqlens_k, backend=backend)
        torch.manual_seed(x.seed)
        out = lk.projected_attention(x.query, k, v, **options)
    return x.results(out) | {"key_proj": k, "value_proj": v}


def plain(x: Inputs) -> dict[str, torch.Tensor]:
    """The formula as a user writes it, sequence by sequence, in the type of the inputs."""
    c, scale = x.case, x.query.shape[-1] ** -0.5 if x.case.scale is None else x.case.scale
    f = x.proj_key if x.proj_value is None else x.proj_value
    outs, key_projs, value_projs = [], [], []
    for b in range(c.batch if c.lengths is None else len(c.lengths)):
        q = _sequence(x.query, b, x.cu_seqlens_q)
        k, v = (_sequence(t, b, x.cu_seqlens_k) for t in (x.key, x.value))
        if x.mask is not None:
            k, v = (t.masked_fill(~x.mask[b][:, None], 0) for t in (k, v))
        key_projs.append(x.proj_key[..., : k.shape[1]] @ k)
        value_projs.append(f[..., : v.shape[1]] @ v)
        k, v = (t[-1].repeat_interleave(c.heads // c.kv_heads, 0) for t in (key_projs, value_projs))
        p = torch.softmax(scale * (q @ k.mT), dim=-1)
        if c.dropout_p:
            p = p * torch.from_numpy(_multiplier(x, b, p.shape)).to(p)
        outs.append(p @ v if c.lengths is None else (p @ v).transpose(0, 1))
    if not outs:  # an empty batch
        zero = sum((t * 0).sum() for t in x.leaves().values())
        empty = [torch.zeros(0, c.kv_heads, c.k, t.shape[-1], dtype=t.dtype) for t in (x.key, x.value)]
        return x.results(zero + torch.zeros_like(x.grad_out)) | {"key_proj": empty[0], "value_proj": empty[1]}
    out = torch.stack(outs) if c.lengths is None else torch.cat(outs)
    return x.results(out) | {"key_proj": torch.stack(key_projs), "value_proj": torch.stack(value_projs)}


def exact(x: Inputs, roundings=oracle.EXACT) -> dict[str, np.ndarray]:
    """What the oracle says, with these roundings."""
    arrays = {name: as_array(getattr(x, name)) for name in ARGUMENTS}
    cu = {name: None if t is None else t.cpu().numpy() for name, t in x.cu_seqlens().items()}
    result = oracle.attention(
        **arrays, grad_out=as_array(x.grad_out), mask=as_array(x.mask, bool), scale=x.case.scale,
        dropout_p=x.case.dropout_p, rng_state=as_array(x.rng_state, np.int64), roundings=roundings, **cu,
    )  # fmt: skip
    for name in ARGUMENTS:  # a tensor given twice has the sum for gradient
        for leaf, tensor in x.leaves().items():
            if tensor is getattr(x, name) and leaf != name:
                result[f"grad_{leaf}"] = result[f"grad_{leaf}"] + result.pop(f"grad_{name}")
    return result


def check(case: Case, device: str, backend: str | None, through=run) -> None:
    """Output and gradients of the backend against the oracle."""
    x = Inputs(case, device)
    compare({case: through(x, backend)}, x)


def compare(results: dict[object, dict[str, torch.Tensor]], x: Inputs) -> None:
    """Several results for the same inputs, each under a name for messages."""
    want, usual, draws = exact(x), {}, ()
    if x.case.dtype != torch.float64:
        with tf32(x.case.tf32), RoundedProducts() if x.case.tf32 else contextlib.nullcontext():
            usual = plain(x)
        epsilon, draws = TF32_EPS if x.case.tf32 else torch.finfo(x.case.dtype).eps, oracle.Roundings.ALL
    peer = functools.cache(lambda draw: exact(x, oracle.Roundings(epsilon, draw)))
    for title, got in results.items():
        for name, tensor in got.items():
            peers = (peer(draw)[name] for draw in draws)
            oracle.assert_close(tensor, want[name], usual.get(name), f"{name} [{title}]", peers)


# Softmax over many nearly equal scores, whose sums of exponentials are as large as they come.
ENORMOUS = [
    Case(batch=1, heads=2, kv_heads=2, n=40, n_q=20, k=200, d=8, d_v=4, scale=0.01),
    Case(batch=1, heads=2, kv_heads=1, n=40, n_q=20, k=129, d=8, d_v=4, scale=-0.01, sharing="per-head"),
    Case(lengths=(30, 7), lengths_q=(5, 9), heads=2, kv_heads=2, k=400, d=8, d_v=4, scale=0.0, dropout_p=0.2),
]


def enormous(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    """Values near the largest number of the type, and gradients so that dP is as large; results are finite."""
    x = Inputs(dataclasses.replace(case, dtype=dtype), device)
    with torch.no_grad():
        x.value.abs_().add_(1).mul_(1e37)
        x.proj_value.abs_().mul_(0.2)
        x.grad_out.abs_().mul_(0.1)
    return x


def as_array(x: torch.Tensor | None, dtype=np.float64) -> np.ndarray | None:
    return None if x is None else x.detach().to("cpu", torch.float64 if dtype is np.float64 else x.dtype).numpy()


def _sequence(x: torch.Tensor, b: int, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    return x[b] if cu_seqlens is None else x[int(cu_seqlens[b]) : int(cu_seqlens[b + 1])].transpose(0, 1)


def _multiplier(x: Inputs, b: int, shape) -> np.ndarray:
    heads, rows, columns = shape
    state = as_array(x.rng_state, np.int64)
    return np.stack([
        oracle.dropout_multiplier(state, x.case.dropout_p, b, h, heads, rows, columns) for h in range(heads)
    ])  # fmt: skip


@contextlib.contextmanager
def tf32(allowed: bool):
    """Torch's setting."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


TF32_EPS = 2.0**-10


class RoundedProducts(TorchDispatchMode):
    """Matrix products of float32 with both operands rounded to TF32: what cuBLAS does where the user has allowed it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            # Half a unit in the last place kept, added to the bits, rounds the magnitude to the nearest.
            args = [((t.view(torch.int32) + (1 << 12)) & -(1 << 13)).view(torch.float32) for t in args]
        return func(*args, **(kwargs or {}))


class Spy(TorchDispatchMode):
    """Records the calls of the package's own ops: name and arguments by name."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, dict]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == NAMESPACE:
            names = [argument.name for argument in func._schema.arguments]
            self.calls.append((func._opname, dict(zip(names, args, strict=False)) | (kwargs or {})))
        return func(*args, **(kwargs or {}))
