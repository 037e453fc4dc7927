"""The backend of PyTorch's own parts: the cases of the kernels, and what it alone has to show."""

import dataclasses
import types

import cases
import numpy as np
import pytest
import test_attention as attention
import test_properties as properties
import torch
from cases import Case, Inputs
from torch.utils._python_dispatch import TorchDispatchMode

import linformer_kernels as lk
from linformer_kernels import _backends


def served(case: Case) -> bool:
    return case.lengths is None and case.dropout_p == 0


CHOSEN = [case for case in attention.CHOSEN if served(case)]


def compare(results, x):
    """By the rule, with PyTorch's own SDPA on K' and V' as one peer more, whose digits are what this backend has: its
    backward makes the softmax again from one rounded number a row, and rounds the gradients of 16-bit rows."""
    cases.compare(results, x, [cases.plain(x, fused=True)])


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_chosen(case, device, seed):
    """Whole and in halves, in one of the types."""
    x = Inputs(dataclasses.replace(case, dtype=attention.DTYPES[seed % 3]), device)
    compare({through: through(x, "composed") for through in (cases.run, cases.run_halves)}, x)


@pytest.mark.parametrize("index", range(20))
def test_sampled(index, device, seed):
    rng = np.random.default_rng(seed)
    x = Inputs(next(filter(served, iter(lambda: attention.sampled(rng), None))), device)
    compare({x.case: cases.run(x, "composed")}, x)


@pytest.mark.parametrize("dtype", attention.DTYPES[1:], ids=str)
def test_the_gradient_of_a_bias_keeps_its_digits(dtype, device):
    """Of 16-bit rows it was a sum over all queries, rounded to 16 bits: beyond the rule now and then."""
    x = Inputs(Case(n_q=900, n=20, k=6, d=8, bias="normal", dtype=dtype), device)
    gradient = cases.run(x, "composed")["grad_key_bias"]
    assert not torch.equal(gradient.to(dtype).float(), gradient)
    cases.compare({"composed": cases.run(x, "composed")}, x)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (7,), (5, 0, 64, 31), (1, 130)], ids=str)
def test_packed_pooling(lengths, per_head, device):
    """No value of cu_seqlens is read: the number of a row's sequence is looked up on the device."""
    case = Case(pooled="random", lengths=lengths, k=20, kv_heads=2, segments_per_head=per_head)
    x = Inputs(case, device)
    results = []
    for backend in ("composed", "reference"):
        rows = [tensor.detach().requires_grad_() for tensor in (x.key, x.value)]
        made = lk.pool_kv(*rows, x.segments, 20, cu_seqlens_k=x.cu_seqlens_k, backend=backend)
        results.append((*made, *torch.autograd.grad([t.square().sum() for t in made[:2]], rows)))
    for got, want in zip(*results, strict=True):
        assert got.is_contiguous() and got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@properties.ragged
@pytest.mark.parametrize("sharing", ["headwise", "key-value", "per-head"])
@pytest.mark.parametrize("mask", ["random", "prefix", "nothing"])
def test_what_takes_no_part_neither_leaks_nor_moves(mask, sharing, dtype, device):
    properties.test_what_takes_no_part_neither_leaks_nor_moves(mask, sharing, dtype, device, "composed")


@properties.ragged
def test_a_nan_stays_in_its_sequence(dtype, device):
    properties.test_a_nan_stays_in_its_sequence(False, dtype, device, "composed")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("name", [*cases.ARGUMENTS, "grad_out"])
def test_not_finite_is_what_the_plain_formula_gives(name, value, device):
    """NaN in all gradients too; of infinite scores SDPA's backward makes fewer than the formula."""
    x = Inputs(Case(n=40, n_q=30, k=17, kv_heads=2, d=17), device)
    with torch.no_grad():
        tensor = getattr(x, name)
        tensor.view(-1)[torch.randint(tensor.numel(), ())] = value
    got, plain = cases.run(x, "composed"), cases.plain(x)
    for result in got if np.isnan(value) else ["out"]:
        assert torch.equal(got[result].isfinite(), plain[result].isfinite()), result


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU torch promises as much in deterministic mode alone")
@pytest.mark.parametrize("case", [*filter(served, properties.REPEATED), Case(pooled="random", n=900, k=70)], ids=str)
def test_two_runs_are_bitwise_equal(case, device):
    torch.use_deterministic_algorithms(False)
    properties.test_two_runs_are_bitwise_equal(case, device, "composed")


@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_huge_scores(scale, device):
    query = torch.rand(1, 2, 300, 32, device=device).add(1).mul(1e5)
    key = torch.arange(1e4, 71e4, 1e4, device=device)[:, None] * query.new_ones(2, 70, 32)
    value = torch.randn(1, 2, 70, 32, device=device)
    out = lk.projected_attention(query, key[None], value, scale=scale, backend="composed")
    largest = value[:, :, -1 if scale > 0 else 0, None]
    torch.testing.assert_close(out, largest.expand_as(out), rtol=1e-6, atol=1e-6)


class Operators(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shape", [(9, 40), (2, 1, 9, 40)], ids=["shared", "per-sequence"])
def test_one_product_for_all_heads_and_no_copy(shape, grad, device):
    """Where rows are stored as (B, N, H, D): neither rows nor E are copied, with gradients either."""
    rows = torch.randn(2, 40, 4, 8, device=device).transpose(1, 2).requires_grad_(grad)
    proj = torch.randn(shape, device=device, requires_grad=grad)
    with Operators() as ran:
        lk.linformer_attention(rows, rows, rows, proj, backend="composed")
    assert ran.names.count("bmm") == 2 and any("scaled_dot_product" in name for name in ran.names), ran.names
    assert not {"clone", "copy_", "_to_copy", "mm", "matmul"} & set(ran.names), ran.names


class Both(torch.nn.Module):
    def forward(self, rows, proj, bias, segments):
        mask = segments >= 0
        out = lk.linformer_attention(rows, rows, rows, proj, key_bias=bias, key_padding_mask=mask, backend="composed")
        return out + lk.pooled_attention(rows, rows, rows, segments, 5, backend="composed")


def arguments(batch, device):
    rows = torch.randn(batch, 30, 4, 8, device=device).transpose(1, 2).requires_grad_()
    bias = torch.randn(batch, 4, 9, device=device, requires_grad=True)
    proj = torch.randn(9, 30, device=device, requires_grad=True)
    return rows, proj, bias, torch.randint(-1, 5, (batch, 30), device=device)


def test_compile_and_export(device):
    """In one graph; and exported with a free batch."""
    torch._dynamo.reset()
    module, batch = Both(), torch.export.Dim("batch")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    free = {"rows": {0: batch}, "proj": None, "bias": {0: batch}, "segments": {0: batch}}
    exported = torch.export.export(module, arguments(2, device), dynamic_shapes=free).module()
    for size in (2, 5):
        given = arguments(size, device)
        want = module(*given)
        grads = torch.autograd.grad(want.square().sum(), given[:3])
        torch.testing.assert_close(exported(*given), want)
        out = compiled(*given)
        torch.testing.assert_close(out, want)
        for got, grad in zip(torch.autograd.grad(out.square().sum(), given[:3]), grads, strict=True):
            torch.testing.assert_close(got, grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("change", "word"), [
    (dict(dtype=torch.float64), "float64"), (dict(dropout_p=0.2), "dropout"), (dict(lengths=(3, 4)), "packed"),
])  # fmt: skip
def test_what_it_refuses(change, word, device):
    x = Inputs(Case(**change), device)
    with pytest.raises(NotImplementedError, match=rf'"composed".*{word}.*"reference"'):
        cases.run(x, "composed")


def call(device, **change):
    """A validated call as the choice sees it."""
    tensor = types.SimpleNamespace(shape=(1, 2, 4, change.pop("width", 8)))
    given = dict(
        device=torch.device(device), device_type=torch.device(device).type, dtype=torch.float32, query=tensor,
        key=tensor, value=tensor, key_proj=None, value_proj=None, segments=None, cu_seqlens_q=None, cu_seqlens_k=None,
        dropout_p=0.0,
    )  # fmt: skip
    return types.SimpleNamespace(**given | change)


@pytest.mark.parametrize(("of", "name"), [
    (call("mps"), "composed"),
    (call("mps", dtype=torch.float16), "composed"),
    (call("mps", dtype=torch.float64), "reference"),
    (call("mps", dropout_p=0.1), "reference"),
    (call("mps", cu_seqlens_q="offsets"), "reference"),
    (call("mps", cu_seqlens_k="offsets", segments="numbers"), "composed"),
    (call("cuda", width=300), "composed"),
    (call("cpu", width=300), "cpu"),
])  # fmt: skip
def test_when_it_is_chosen(of, name, monkeypatch):
    monkeypatch.delenv("LINFORMER_BACKEND", raising=False)
    monkeypatch.setattr(_backends, "_capability", lambda device: (8, 0))
    assert _backends.choose(of, None).name == name


def test_any_device():
    """One without kernels and without memory: "meta"."""
    rows = torch.empty(2, 4, 9, 8, device="meta")
    assert lk.linformer_attention(rows, rows, rows, torch.empty(3, 9, device="meta")).shape == rows.shape
