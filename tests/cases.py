"""One call of the operation as data: sizes, layouts, masks; its inputs, its plain PyTorch form, and the comparison."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np
import oracle
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import linformer_kernels as lk

NAN = float("nan")
ARGUMENTS = ("query", "key", "value", "proj_key", "proj_value")
LEAVES = (*ARGUMENTS, "key_bias")
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
    # headwise: E and F; key-value: E = F; same: E given twice; per-head, per-sequence and per-sequence-head, which say
    # what has a matrix of its own, each also with "-key-value"
    sharing: str = "headwise"
    mask: str | None = None  # random, prefix, alternate, one, all, or nothing (for sequence 0); masked rows are NaN
    bias: str | None = None  # normal, holes (some rows -inf), out (all rows of a sequence, and of a head)
    bias_shape: str = "bhk"  # its dimensions, "1" for one that is broadcast: 11k, b11, k
    # means over segments in the place of E and F: random, windows, one (all in one), each (one for each position), none
    pooled: str | None = None
    segments_per_head: bool = False
    segments_dtype: torch.dtype = torch.int64
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


def make_bias(case: Case, batch: int, device: str) -> torch.Tensor | None:
    """float32, as it comes out of a logarithm; with float64 tensors float64."""
    if case.bias is None:
        return None
    sizes = {"b": batch, "h": case.kv_heads, "k": case.k, "1": 1}
    shape = [sizes[letter] for letter in case.bias_shape]
    bias = torch.randn(shape, dtype=torch.float64 if case.dtype == torch.float64 else torch.float32, device=device)
    if case.bias == "holes":
        bias[torch.rand(shape, device=device) < 0.3] = -torch.inf
    elif case.bias == "out" and bias.dim() == 1:
        bias[:] = -torch.inf
    elif case.bias == "out":
        bias[:1] = -torch.inf
        bias[-1:, -1:] = -torch.inf
    return bias


def make_segments(case: Case, lengths: list[int], device: str) -> torch.Tensor:
    """Of each sequence, one after the other: (total,) or (total, H_kv). -1 is one in five at random."""
    heads, made = case.kv_heads if case.segments_per_head else 1, []
    for length in lengths:
        at = torch.arange(length)[:, None].expand(length, heads)
        patterns = {
            "random": torch.randint(0, case.k, at.shape).where(torch.rand(at.shape) < 0.8, -1),
            "windows": (at * min(case.k, length) // max(length, 1) + torch.arange(heads)) % case.k,
            "one": torch.zeros_like(at) + torch.randint(0, case.k, (1, heads)),
            "each": at % case.k,
            "none": torch.full_like(at, -1),
        }
        made.append(patterns[case.pooled])
    segments = torch.cat([*made, torch.empty(0, heads, dtype=torch.int64)]).to(case.segments_dtype)
    segments = torch.stack([segments - 7, segments], dim=-1)[..., 1]  # not contiguous
    return (segments if case.segments_per_head else segments[:, 0]).to(device)


def cumulative(lengths, device: str, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=dtype, device=device)


class Inputs:
    """The tensors of a case, all requiring gradients."""

    def __init__(self, case: Case, device: str):
        c, d_v = case, case.d if case.d_v is None else case.d_v
        self.case, self.cu_seqlens_q, self.cu_seqlens_k = case, None, None
        n, shape_q, shape_kv = c.n, (c.batch, c.heads, c.n_q), (c.batch, c.kv_heads, c.n)
        batch = c.batch if c.lengths is None else len(c.lengths)
        if c.lengths is not None:
            lengths_q = c.lengths if c.lengths_q is None else c.lengths_q
            self.cu_seqlens_q = cumulative(lengths_q, device, torch.int64)
            self.cu_seqlens_k = cumulative(c.lengths, device)
            n, shape_q, shape_kv = max(c.lengths, default=0), (sum(lengths_q), c.heads), (sum(c.lengths), c.kv_heads)
        of_each = {"per-head": (c.kv_heads,), "per-sequence": (batch, 1), "per-sequence-head": (batch, c.kv_heads)}
        shape_e = (*of_each.get(c.sharing.removesuffix("-key-value"), ()), c.k, n + c.extra)
        layout_e = c.layout if c.layout != "expanded" or len(shape_e) >= 3 else "bhnd"
        self.key = strided((*shape_kv, c.d), c.layout, c.dtype, device)
        self.value = self.key if "kv" in c.alias else strided((*shape_kv, d_v), c.layout, c.dtype, device)
        self.query = self.key if "qk" in c.alias else strided((*shape_q, c.d), c.layout, c.dtype, device, c.size)
        self.proj_key = strided(shape_e, layout_e, c.dtype, device, max(n, 1) ** -0.5)
        self.proj_value = strided(shape_e, layout_e, c.dtype, device, max(n, 1) ** -0.5)
        self.key_bias = make_bias(c, batch, device)
        self.mask, self.segments = make_mask(c.mask, c.batch, c.n, device), None
        if self.mask is not None and c.layout != "expanded" and "qk" not in c.alias:
            self.key.masked_fill_(~self.mask[:, None, :, None], NAN)
            self.value.masked_fill_(~self.mask[:, None, :, None], NAN)
        if c.pooled:
            segments = make_segments(c, [c.n] * batch if c.lengths is None else list(c.lengths), device)
            if c.lengths is None:
                segments = segments.view(batch, c.n, *segments.shape[1:])
                segments = segments.transpose(1, 2) if c.segments_per_head else segments
            self.segments = segments
            if c.layout != "expanded" and "qk" not in c.alias:
                out = (segments if c.segments_per_head else segments.unsqueeze(1)) < 0
                self.key.masked_fill_(out[..., None], NAN)
                self.value.masked_fill_(out[..., None], NAN)
        for projection in (self.proj_key, self.proj_value):
            if c.layout != "expanded" or len(shape_e) == 2:
                projection[..., n:] = NAN
        if c.sharing.endswith("key-value"):
            self.proj_value = None
        elif c.sharing == "same":
            self.proj_value = self.proj_key
        if c.pooled:
            self.proj_key = self.proj_value = None
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
        for name in LEAVES:  # a tensor given twice stays one tensor
            x = getattr(self, name)
            setattr(self, name, None if x is None else leaves.setdefault(id(x), x.detach().requires_grad_()))
        if c.bias_shape.endswith("1") and self.key_bias is not None:  # does nothing: its gradient is rounding alone
            self.key_bias.requires_grad_(False)

    def positional(self) -> tuple[torch.Tensor, ...]:
        return tuple(getattr(self, name) for name in ARGUMENTS)

    def cu_seqlens(self) -> dict:
        return {"cu_seqlens_q": self.cu_seqlens_q, "cu_seqlens_k": self.cu_seqlens_k}

    def leaves(self) -> dict[str, torch.Tensor]:
        """The different tensors, each by the first of its names."""
        first: dict[int, str] = {}
        for name in LEAVES:
            if getattr(self, name) is not None:
                first.setdefault(id(getattr(self, name)), name)
        return {name: getattr(self, name) for name in first.values()}

    def results(self, out: torch.Tensor) -> dict[str, torch.Tensor]:
        """`out` and the gradients of the leaves that require them, with grad_out for gradient."""
        leaves = {name: leaf for name, leaf in self.leaves().items() if leaf.requires_grad}
        grads = torch.autograd.grad(out, list(leaves.values()), self.grad_out)
        return {"out": out, **{f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def run(x: Inputs, backend: str | None) -> dict[str, torch.Tensor]:
    """Through linformer_attention, its packed form, or pooled_attention."""
    options = {"scale": x.case.scale, "backend": backend, "dropout_p": x.case.dropout_p}
    torch.manual_seed(x.seed)
    with tf32(x.case.tf32):
        if x.case.pooled:
            assert x.key_bias is None, "pooled_attention has a bias of its own"
            rows = x.query, x.key, x.value, x.segments, x.case.k
            out = lk.pooled_attention(*rows, key_padding_mask=x.mask, **x.cu_seqlens(), **options)
        elif x.case.lengths is not None:
            out = lk.linformer_attention_varlen(*x.positional(), key_bias=x.key_bias, **x.cu_seqlens(), **options)
        else:
            out = lk.linformer_attention(*x.positional(), key_bias=x.key_bias, key_padding_mask=x.mask, **options)
    return x.results(out)


def run_halves(x: Inputs, backend: str | None) -> dict[str, torch.Tensor]:
    """Through project_kv or pool_kv, then projected_attention; with K' and V'."""
    options = {"cu_seqlens_q": x.cu_seqlens_q, "scale": x.case.scale, "dropout_p": x.case.dropout_p, "backend": backend}
    first = {"key_padding_mask": x.mask, "cu_seqlens_k": x.cu_seqlens_k, "backend": backend}
    bias, more = x.key_bias, {}
    with tf32(x.case.tf32):
        if x.case.pooled:
            k, v, count = lk.pool_kv(x.key, x.value, x.segments, x.case.k, **first)
            count = widened(count, x)
            bias, more = count.log() + (0 if bias is None else bias), {"count": count}
        else:
            k, v = lk.project_kv(*x.positional()[1:], **first)
        torch.manual_seed(x.seed)
        out = lk.projected_attention(x.query, k, v, key_bias=bias, **options)
    return x.results(out) | {"key_proj": k, "value_proj": v} | more


def widened(count: torch.Tensor, x: Inputs) -> torch.Tensor:
    return count.double() if x.case.dtype == torch.float64 else count


def plain(x: Inputs, fused: bool = False) -> dict[str, torch.Tensor]:
    """The formula as a user writes it, sequence by sequence, in the type of the inputs; its second half by SDPA."""
    c, scale = x.case, x.query.shape[-1] ** -0.5 if x.case.scale is None else x.case.scale
    batch = c.batch if c.lengths is None else len(c.lengths)
    bias_of = None if x.key_bias is None else x.key_bias.expand(batch, c.kv_heads, c.k)
    outs, key_projs, value_projs, counts = [], [], [], []
    for b in range(batch):
        q = _sequence(x.query, b, x.cu_seqlens_q)
        bias = None if bias_of is None else bias_of[b]
        if c.pooled:
            k, v, count = _plain_means(x, b)
            counts.append(count)
            bias = count.log() + (0 if bias is None else bias)
        else:
            k, v = _plain_products(x, b)
        key_projs.append(k)
        value_projs.append(v)
        k, v = (t.repeat_interleave(c.heads // c.kv_heads, 0) for t in (k, v))
        if fused and q.numel():
            out = _fused(q, k, v, scale, bias)
        else:
            p = _plain_softmax(scale * (q @ k.mT), bias)
            if c.dropout_p:
                p = p * torch.from_numpy(_multiplier(x, b, p.shape)).to(p)
            out = p @ v
        outs.append(out if c.lengths is None else out.transpose(0, 1))
    if not outs:  # an empty batch
        zero = sum((t * 0).sum() for t in x.leaves().values())
        empty = [torch.zeros(0, c.kv_heads, c.k, t.shape[-1], dtype=t.dtype) for t in (x.key, x.value)]
        counts = [torch.zeros(0, c.kv_heads, c.k)] if c.pooled else []
        out = torch.zeros_like(x.grad_out)
        return x.results(out + zero.to(out.dtype)) | _halves(*empty, *counts)
    out = torch.stack(outs) if c.lengths is None else torch.cat(outs)
    made = [torch.stack(t) for t in (key_projs, value_projs, counts) if t]
    return x.results(out) | _halves(*made)


def _halves(*tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip(("key_proj", "value_proj", "count"), tensors, strict=False))


def _plain_products(x: Inputs, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    e, f = (t[b] if t.dim() == 4 else t for t in (x.proj_key, x.proj_key if x.proj_value is None else x.proj_value))
    k, v = (_sequence(t, b, x.cu_seqlens_k) for t in (x.key, x.value))
    if x.mask is not None:
        k, v = (t.masked_fill(~x.mask[b][:, None], 0) for t in (k, v))
    return e[..., : k.shape[1]] @ k, f[..., : v.shape[1]] @ v


def _plain_means(x: Inputs, b: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums with index_add, in float32, row by row as torch does it."""
    c, wide = x.case, torch.float64 if x.case.dtype == torch.float64 else torch.float32
    heads = x.segments if c.segments_per_head else x.segments.unsqueeze(1)
    segments = heads[b] if c.lengths is None else _sequence(heads[..., None], b, x.cu_seqlens_k)[..., 0]
    segments = segments.expand(c.kv_heads, -1).long()
    if x.mask is not None:
        segments = segments.masked_fill(~x.mask[b], -1)
    count = torch.stack([(segments == k).sum(-1) for k in range(c.k)], dim=-1).to(wide)

    def means(rows: torch.Tensor) -> torch.Tensor:
        sums = []
        for of_one, to in zip(rows, segments, strict=True):
            zeros = torch.zeros(c.k, rows.shape[-1], dtype=wide, device=rows.device)
            sums.append(zeros.index_add(0, to[to >= 0], of_one[to >= 0].to(wide)))
        return (torch.stack(sums) / count.clamp(min=1)[..., None]).to(rows.dtype)

    k, v = (_sequence(t, b, x.cu_seqlens_k) for t in (x.key, x.value))
    return means(k), means(v), count


def _of_heads(bias: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(H, 1, K), and where some of a row takes part."""
    bias = bias.repeat_interleave(heads // len(bias), 0)[:, None]
    return bias, bias.isneginf().logical_not().any(-1, keepdim=True)


def _plain_softmax(scores: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if bias is None:
        return torch.softmax(scores, dim=-1)
    bias, some = _of_heads(bias, len(scores))
    return torch.softmax((scores + bias).where(some, 0), dim=-1).where(some, 0).to(scores.dtype)


def _fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, bias: torch.Tensor | None) -> torch.Tensor:
    q, scale = (-q, -scale) if scale < 0 else (q, scale)  # SDPA takes the largest product for the largest score
    sdpa = torch.nn.functional.scaled_dot_product_attention
    if bias is None:
        return sdpa(q[None], k[None], v[None], scale=scale)[0]
    bias, some = _of_heads(bias, len(q))
    mask = bias.where(some, 0).to(q.dtype).expand(-1, q.shape[1], -1)
    return sdpa(q[None], k[None], v[None], mask[None], scale=scale)[0].where(some, 0)


def exact(x: Inputs, roundings=oracle.EXACT) -> dict[str, np.ndarray]:
    """What the oracle says, with these roundings."""
    arrays = {name: as_array(getattr(x, name)) for name in ARGUMENTS}
    cu = {name: None if t is None else t.cpu().numpy() for name, t in x.cu_seqlens().items()}
    batch = x.case.batch if x.case.lengths is None else len(x.case.lengths)
    bias = None if x.key_bias is None else as_array(x.key_bias.expand(batch, x.case.kv_heads, x.case.k))
    pooled = None if x.segments is None else (as_array(x.segments, np.int64), x.case.k)
    result = oracle.attention(
        **arrays, key_bias=bias, pooled=pooled, grad_out=as_array(x.grad_out), mask=as_array(x.mask, bool),
        scale=x.case.scale, dropout_p=x.case.dropout_p, rng_state=as_array(x.rng_state, np.int64), roundings=roundings,
        **cu,
    )  # fmt: skip
    if bias is not None:
        axes = tuple(i for i, letter in enumerate(x.case.bias_shape.rjust(3)) if letter in " 1")
        summed = result["grad_key_bias"].sum(axes, keepdims=True)
        result["grad_key_bias"] = summed.reshape(x.key_bias.shape)
    for name in ARGUMENTS:  # a tensor given twice has the sum for gradient
        for leaf, tensor in x.leaves().items():
            if tensor is getattr(x, name) and leaf != name:
                result[f"grad_{leaf}"] = result[f"grad_{leaf}"] + result.pop(f"grad_{name}")
    return result


def check(case: Case, device: str, backend: str | None, through=run) -> None:
    """Output and gradients of the backend against the oracle."""
    x = Inputs(case, device)
    compare({case: through(x, backend)}, x)


def compare(results: dict[object, dict[str, torch.Tensor]], x: Inputs, others: Sequence[dict] = ()) -> None:
    """Several results for the same inputs, each under a name for messages. `others`: peers by other ways."""
    want, usual, draws = exact(x), {}, ()
    if x.case.dtype != torch.float64:
        with tf32(x.case.tf32), RoundedProducts() if x.case.tf32 else contextlib.nullcontext():
            usual = plain(x)
        epsilon, draws = TF32_EPS if x.case.tf32 else torch.finfo(x.case.dtype).eps, oracle.Roundings.ALL
    peer = functools.cache(lambda draw: exact(x, oracle.Roundings(epsilon, draw)))
    for title, got in results.items():
        for name, tensor in got.items():
            drawn = (peer(draw)[name] for draw in draws)
            peers = itertools.chain((as_array(other[name]) for other in others), drawn)
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
