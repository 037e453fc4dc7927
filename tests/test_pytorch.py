"""Good citizenship: opcheck, fakes, compile, export, autocast, checkpointing, FLOP counts, double backward, DDP."""

import dataclasses

import cases
import processes
import pytest
import torch
from cases import Case, Inputs, Spy
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import linformer_kernels as lk
from linformer_kernels import functional

ops = torch.ops.linformer_kernels


def recorded_calls(device, native) -> dict[str, tuple]:
    """Arguments that the public functions pass to every op: padded, masked, packed, dropped and (B, N, H, D) calls."""
    several = [
        Case(mask="random", kv_heads=2, layout="bnhd", extra=3, d_v=24),
        Case(sharing="key-value", dropout_p=0.2, dtype=torch.bfloat16),
        Case(sharing="per-head", lengths=(7, 0, 20), lengths_q=(3, 4, 9), layout="padded", kv_heads=2),
        Case(batch=0),
        Case(bias="holes", sharing="per-sequence-head", layout="bnhd", kv_heads=2, mask="random"),
        Case(bias="normal", bias_shape="11k", sharing="per-sequence", lengths=(7, 0, 20), kv_heads=2),
        Case(pooled="random", k=20, layout="bnhd", mask="random", kv_heads=2, d_v=24),
        Case(pooled="windows", k=20, lengths=(7, 0, 20), segments_per_head=True, dtype=torch.bfloat16, layout="padded"),
        Case(pooled="random", batch=0),
    ]
    calls = {}
    for case in several:
        x = Inputs(case, device)
        with Spy() as spy:
            cases.run(x, native)
            cases.run_halves(x, native)
        for name, arguments in spy.calls:
            plain = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments.values())
            calls[f"{name}-{case}"] = (getattr(ops, name), plain)
    assert {name.split("-")[0] for name in calls} == {
        half + end for half in ("attention", "project", "projected_attention", "pool") for end in ("", "_backward")
    }
    return calls


def halves(x: Inputs, native) -> torch.Tensor:
    return lk.projected_attention(x.query, *lk.project_kv(*x.positional()[1:], backend=native), backend=native)


def test_opcheck(device, native):
    for op, arguments in recorded_calls(device, native).values():
        torch.library.opcheck(op.default, arguments)


def test_fakes_have_the_shapes_types_and_strides_of_the_real(device, native):
    for name, (op, arguments) in recorded_calls(device, native).items():
        real = op(*arguments)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
        for r, f in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (real, fake)), strict=True):
            assert (r.shape, r.stride(), r.dtype, r.device) == (f.shape, f.stride(), f.dtype, f.device), name


def loss_and_gradients(function, x: Inputs, *arguments) -> list[torch.Tensor]:
    out = function(*x.positional(), *arguments)
    return [out, *torch.autograd.grad(out, list(x.leaves().values()), x.grad_out)]


def padded(query, key, value, proj_key, proj_value, mask):
    query = query * 1.5  # something for the compiler to do around the op
    return lk.linformer_attention(query, key, value, proj_key, proj_value, key_padding_mask=mask) + 0.25


def packed(query, key, value, proj_key, proj_value, cu_seqlens_q, cu_seqlens_k):
    return lk.linformer_attention_varlen(
        query, key, value, proj_key, proj_value, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k
    )  # fmt: skip


def compile_anew(function, backend: str):
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(function, fullgraph=True, dynamic=True, backend=backend)


def pooled(query, key, value, segments, number, mask=None, **cu_seqlens):
    return lk.pooled_attention(query, key, value, segments, number, key_padding_mask=mask, **cu_seqlens) * 0.5


def biased(query, key, value, proj_key, proj_value, bias):
    """E computed from the data, one a sequence."""
    proj = torch.softmax(proj_key + key.mean(dim=-1).unsqueeze(-2), dim=-1)
    return lk.linformer_attention(query, key, value, proj, key_bias=torch.where(bias > -1, bias, -torch.inf))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_with_a_bias_and_e_of_each_sequence(backend, device):
    compiled = compile_anew(biased, backend)
    for n, n_q, batch in ((65, 40, 3), (130, 50, 7), (90, 91, 9)):
        x = Inputs(Case(batch, 4, 2, n_q, n, k=16, d=8, layout="bnhd", sharing="per-sequence-key-value"), device)
        bias = torch.randn(batch, 2, 16, device=device, requires_grad=True)
        results = []
        for function in (compiled, biased):
            out = function(*x.positional(), bias)
            results.append((out, *torch.autograd.grad(out, (*x.leaves().values(), bias), x.grad_out)))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            assert backend != "aot_eager" or torch.equal(got, want)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("packed", [False, True])
def test_compile_pooled(packed, backend, device):
    """Whatever the sizes; another number of segments is another graph."""
    compiled = compile_anew(pooled, backend)
    lengths = iter([(5, 0, 41, 7, 9), (30, 9, 2, 60, 1, 5, 6), (8, 1, 3, 12, 0, 2, 5, 5, 1), (70, 3, 2, 1, 1, 4)])
    for n, n_q, batch, number in ((65, 40, 3, 20), (130, 50, 7, 20), (90, 91, 9, 20), (80, 47, 5, 33)):
        case = Case(batch, 4, 2, n_q, n, k=number, d=8, layout="bnhd", pooled="random")
        if packed:
            case = dataclasses.replace(case, lengths=next(lengths), layout="bhnd")
        x = Inputs(dataclasses.replace(case, mask=None if packed else "random"), device)
        rest = (x.cu_seqlens() if packed else {"mask": x.mask}) | {"segments": x.segments, "number": number}
        results = (x.results(function(x.query, x.key, x.value, **rest)) for function in (compiled, pooled))
        for got, want in zip(*(one.values() for one in results), strict=True):
            assert torch.equal(got, want)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_is_eager_with_few_recompilations(backend, device):
    compiled = compile_anew(padded, backend)
    for n, n_q, batch in ((65, 40, 3), (130, 50, 7), (257, 31, 5), (90, 91, 9)):  # equal sizes would pass for one
        x = Inputs(Case(batch, 4, 2, n_q, n, 11, 16, d=8, layout="bnhd", mask="random"), device)
        for got, want in zip(*(loss_and_gradients(f, x, x.mask) for f in (compiled, padded)), strict=True):
            assert torch.equal(got, want)
    assert counters["stats"]["unique_graphs"] == 1


def test_compile_packed(device):
    compiled = compile_anew(packed, "aot_eager")
    for lengths in ((5, 0, 41, 7, 9), (30, 9, 2, 60, 1, 5, 6), (8, 1, 3, 12, 0, 2, 5, 5, 1)):
        x = Inputs(Case(k=16, d=8, kv_heads=2, lengths=lengths, sharing="key-value", extra=70 - max(lengths)), device)
        both = (loss_and_gradients(f, x, *x.cu_seqlens().values()) for f in (compiled, packed))
        assert all(torch.equal(got, want) for got, want in zip(*both, strict=True))
    assert counters["stats"]["unique_graphs"] == 1


def test_compile_with_dropout_draws_anew(device):
    torch._dynamo.reset()
    x = Inputs(Case(), device)
    function = lambda: lk.linformer_attention(*x.positional(), dropout_p=0.5)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    first, second = compiled(), compiled()
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    once = compiled()
    torch.manual_seed(5)
    assert torch.equal(once, compiled())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("fp32", "bf16"))
@pytest.mark.parametrize("tf32", [False, True])
def test_every_op_hears_whether_tf32_is_allowed(tf32, dtype, device, native, monkeypatch):
    """Backward as forward; a GPU's ops alone, and of float32."""
    x = Inputs(Case(dtype=dtype, tf32=tf32), device)
    asked = functional._allow_tf32
    for type_of_device in {device, "cuda"}:
        on = torch.device(type_of_device)
        as_if = lambda call, on=on: asked(dataclasses.replace(call, device=on, device_type=on.type))  # noqa: E731
        monkeypatch.setattr(functional, "_allow_tf32", as_if)
        with Spy() as spy:
            cases.run(x, native)
            cases.run_halves(x, native)
        want = tf32 and dtype == torch.float32 and type_of_device == "cuda"
        assert [arguments["allow_tf32"] for _, arguments in spy.calls] == [want] * 6


def test_tf32_is_allowed_in_every_way_that_torch_has():
    """Ways that torch calls mixed among them. Compiled code follows a change."""
    torch._dynamo.reset()
    allowed = lambda x: x + 1 if functional._torch_allows_tf32() else x  # noqa: E731
    compiled, zero = torch.compile(allowed, fullgraph=True, backend="eager"), torch.zeros(())
    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision(), matmul.fp32_precision
    try:
        for allow in (
            lambda: setattr(matmul, "fp32_precision", "tf32"),
            lambda: setattr(torch.backends, "fp32_precision", "tf32"),
            lambda: setattr(matmul, "allow_tf32", True),
            lambda: torch.set_float32_matmul_precision("high"),
        ):
            assert allowed(zero) == compiled(zero) == 0
            allow()
            assert allowed(zero) == compiled(zero) == 1
            torch.set_float32_matmul_precision("highest")
            torch.backends.fp32_precision = matmul.fp32_precision = "none"
    finally:
        torch.set_float32_matmul_precision(before[0])
        matmul.fp32_precision = before[1]


class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.projection = torch.nn.Parameter(torch.randn(16, 80))

    def forward(self, query, key, value, mask):
        return lk.linformer_attention(query, key, value, self.projection, key_padding_mask=mask)


def test_export_with_a_dynamic_shape(device):
    module = Module().to(device)
    tensor = lambda *shape: torch.randn(shape, device=device)  # noqa: E731
    inputs = lambda n: (*(tensor(2, 4, n, 8) for _ in range(3)), tensor(2, n) < 0.7)  # noqa: E731
    n = torch.export.Dim("n", min=2, max=80)
    program = torch.export.export(module, inputs(33), dynamic_shapes=(*({2: n} for _ in range(3)), {1: n}))
    for length in (17, 80):
        given = inputs(length)
        assert torch.equal(program.module()(*given), module(*given))


@pytest.mark.parametrize("strict", [False, True])
def test_export_pooled_with_a_dynamic_length(strict, device):
    class Pooled(torch.nn.Module):
        def forward(self, query, key, segments, mask):
            return lk.pooled_attention(query, key, key, segments, 6, key_padding_mask=mask)

    def inputs(n):
        segments = torch.randint(-1, 6, (2, n), device=device)
        return *(torch.randn(2, 4, n, 8, device=device) for _ in range(2)), segments, segments % 2 == 0

    n = torch.export.Dim("n", min=2, max=80)
    shapes = ({2: n}, {2: n}, {1: n}, {1: n})
    program = torch.export.export(Pooled(), inputs(33), dynamic_shapes=shapes, strict=strict)
    for length in (17, 80):
        given = inputs(length)
        assert torch.equal(program.module()(*given), Pooled()(*given))


@pytest.mark.parametrize("sharing", ["headwise", "key_value"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_export_of_the_module_with_a_dynamic_length(strict, masked, sharing, device):
    """Up to seq_len, compressing first, with a bias, whose sums over E are of a part of it."""

    class Attend(torch.nn.Module):
        def __init__(self):
            super().__init__()
            sizes = dict(seq_len=20, proj_dim=5, sharing=sharing)
            self.attention = lk.LinformerAttention(16, 2, batch_first=True, **sizes)
            torch.nn.init.normal_(self.attention.k_proj.bias)
            torch.nn.init.normal_(self.attention.v_proj.bias)

        def forward(self, x, mask):
            return self.attention(x, key_padding_mask=mask if masked else None)[0]

    module, n = Attend().to(device), torch.export.Dim("n", min=2, max=20)
    inputs = lambda n: (torch.randn(2, n, 16, device=device), torch.rand(2, n, device=device) < 0.7)  # noqa: E731
    program = torch.export.export(module, inputs(11), dynamic_shapes=({1: n}, {1: n}), strict=strict)
    for length in (2, 13, 20):
        given = inputs(length)
        torch.testing.assert_close(program.module()(*given), module(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_compilers_need_not_trace_whether_there_is_autocast(autocast, device, monkeypatch):
    """Dynamo of torch 2.10 and 2.11 cannot trace torch.amp.is_autocast_available: fullgraph, strict export failed."""
    torch._dynamo.reset()
    untraceable = torch.compiler.disable(torch.amp.is_autocast_available)
    monkeypatch.setattr(torch.amp, "is_autocast_available", untraceable)
    module, tensors = Module().to(device), [torch.randn(2, 4, 33, 8, device=device) for _ in range(3)]
    given = (*tensors, torch.rand(2, 33, device=device) < 0.7)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        want = module(*given)
        assert want.dtype == (torch.bfloat16 if autocast else torch.float32)
        assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(*given), want)
        assert torch.equal(torch.export.export(module, given, strict=True).module()(*given), want)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_functionalize(kind, backend, device, native):
    """Packed sequences failed: "tolist() shouldn't be called on a tensor with unallocated storage"."""
    backend = native if backend == "native" else backend
    query, key, proj = (torch.randn(s, device=device, requires_grad=True) for s in ((9, 4, 8), (9, 2, 8), (3, 6)))
    ends = torch.tensor([0, 3, 9], dtype=kind, device=device)

    def packed(query, key, proj, ends):
        out = lk.linformer_attention_varlen(
            query, key, key, proj, cu_seqlens_q=ends, cu_seqlens_k=ends, backend=backend
        )
        halves = lk.project_kv(key, key, proj, cu_seqlens_k=ends, backend=backend)
        return out, lk.projected_attention(query, *halves, cu_seqlens_q=ends, backend=backend)

    def padded(query, key, proj, ends):
        query, key = (t.unflatten(0, (1, 9)).transpose(1, 2)[:, :, :6] for t in (query, key))
        mask = torch.arange(6, device=device)[None] < ends[1]
        return (lk.linformer_attention(query, key, key, proj, key_padding_mask=mask, dropout_p=0.5, backend=backend),)

    def following(query, key, proj, ends):
        segments = torch.arange(9, device=device) // 2 % 3
        ends = {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
        out = lk.pooled_attention(query, key, key, segments, 3, **ends, backend=backend)
        e = proj.expand(2, 1, 3, 6) * key[:2, :1, :1, None]
        return out, lk.linformer_attention_varlen(query, key, key, e, key_bias=key[0, 0, :3], **ends, backend=backend)

    for function in (packed, padded, following):
        results = []
        for run in (function, torch.func.functionalize(function)):
            torch.manual_seed(0)
            out = run(query, key, proj, ends)
            loss = sum((one * torch.arange(one.numel(), device=device).view_as(one)).sum() for one in out)
            results.append((*out, *torch.autograd.grad(loss, (query, key, proj))))
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_raw_ops_refuse_tensors_on_two_devices(device):
    """With one tensor on meta torch calls the fake, which returned CPU tensors of memory that nobody had written."""
    state, ends = torch.tensor([1, 0], device=device), torch.tensor([0, 3], device=device)
    tensor = lambda *shape: torch.randn(shape, device=device)  # noqa: E731
    query, key, grad, proj, k = tensor(3, 4, 8), tensor(3, 2, 8), tensor(3, 4, 8), tensor(5, 7), tensor(1, 2, 5, 8)
    bias, rows, count = tensor(1, 2, 5), torch.zeros(3, 1, dtype=torch.int32, device=device), tensor(1, 2, 5)
    project = dict(key=key, value=key, proj_key=proj, proj_value=proj, key_padding_mask=None, cu_seqlens_k=ends)
    scalars = dict(dropout_p=0.5, scale=1.0, allow_tf32=False)
    forward = dict(query=query, **project, key_bias=bias, cu_seqlens_q=ends, rng_state=state, **scalars)
    attend = dict(query=query, key_proj=k, value_proj=k, key_bias=bias, cu_seqlens_q=ends, rng_state=state, **scalars)
    calls = {
        "project": dict(project, allow_tf32=False),
        "project_backward": dict(project, grad_key_proj=k, grad_value_proj=k, allow_tf32=False, needs=15),
        "attention": forward,
        "attention_backward": dict(forward, grad_out=grad, key_proj=k, value_proj=k, needs=63),
        "projected_attention": attend,
        "projected_attention_backward": dict(attend, grad_out=grad, needs=15),
        "pool": dict(key=key, value=key, segments=rows, cu_seqlens_k=ends, num_segments=5),
        "pool_backward": dict(
            grad_key_proj=k,
            grad_value_proj=k,
            count=count,
            segments=rows,
            cu_seqlens_k=ends,
            heads_inner=False,
            needs=3,
        ),
    }
    ends = dict(key_padding_mask=torch.rand(1, 3, device=device) < 0.5, cu_seqlens_q=ends, cu_seqlens_k=ends)
    calls["choose_segments"] = dict(query=query, key=key, **ends, num_segments=5, singles=2, first=1, last=1)
    for name, arguments in calls.items():
        for overload in ("default", "triton")[: 1 if name == "choose_segments" else 2]:
            op = getattr(getattr(ops, name), overload)
            for moved in (n for n, a in arguments.items() if isinstance(a, torch.Tensor)):
                with pytest.raises(ValueError, match=f"{name}: .* is on .*; wanted: all tensors on one device"):
                    op(**arguments | {moved: arguments[moved].to("meta")})


def test_onnx_gets_the_formula_in_plain_pytorch(tmp_path):
    """ONNX has no translation of the operators, and its error did not say that the reference has one."""
    pytest.importorskip("onnxscript")
    module, tensors = Module(), [torch.randn(2, 4, 33, 8) for _ in range(3)]
    given = (*tensors, torch.rand(2, 33) < 0.7)
    program = torch.onnx.export(module, given, dynamo=True, verbose=False)
    assert not any(node.domain.startswith("linformer") for node in program.model.graph)
    program.save(tmp_path / "module.onnx")
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(tmp_path / "module.onnx", providers=["CPUExecutionProvider"])
    inputs = {one.name: t.numpy() for one, t in zip(session.get_inputs(), given, strict=True)}
    torch.testing.assert_close(torch.from_numpy(session.run(None, inputs)[0]), module(*given), rtol=1e-5, atol=1e-5)


def test_in_an_onnx_export_nobody_names_the_reference(device, monkeypatch):
    """Where ONNX is not installed, what its exporter sees."""
    module, tensors = Module().to(device), [torch.randn(2, 4, 33, 8, device=device) for _ in range(3)]
    given = (*tensors, torch.rand(2, 33, device=device) < 0.7)
    targets = lambda: {str(n.target) for n in torch.export.export(module, given, strict=False).graph.nodes}  # noqa: E731
    assert "linformer_kernels.attention.default" in targets()
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert not any("linformer_kernels" in target for target in targets())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=("bf16", "fp16"))
def test_autocast_computes_in_the_lower_type(dtype, device, native):
    x = Inputs(Case(mask="random", kv_heads=2), device)
    with torch.autocast(device, dtype):
        got = x.results(lk.linformer_attention(*x.positional(), key_padding_mask=x.mask, backend=native).float())
        whole = lk.linformer_attention(*x.positional(), key_padding_mask=x.mask, backend=native)
        projected = lk.project_kv(*x.positional()[1:], key_padding_mask=x.mask, backend=native)
        half, packed_out = lk.projected_attention(x.query, *projected, backend=native), lk.linformer_attention_varlen(
            *(t[0].transpose(0, 1) for t in (x.query, x.key, x.value)), x.proj_key, x.proj_value, backend=native,
            **{f"cu_seqlens_{s}": torch.tensor([0, 96], device=device) for s in "qk"},
        )  # fmt: skip
    assert whole.dtype == half.dtype == packed_out.dtype == dtype
    lower = lk.linformer_attention(*(t.to(dtype) for t in x.positional()), key_padding_mask=x.mask, backend=native)
    assert torch.equal(whole, lower) and torch.equal(half, lower)
    want = x.results(lower.float())
    assert all(got[name].dtype == torch.float32 and torch.equal(got[name], want[name]) for name in got)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_dropout(reentrant, device, native):
    x = Inputs(Case(dropout_p=0.5, kv_heads=2), device)
    function = lambda *tensors: lk.linformer_attention(*tensors, dropout_p=0.5, backend=native)  # noqa: E731
    torch.manual_seed(11)
    want = loss_and_gradients(function, x)
    torch.manual_seed(11)
    leaves = list(x.leaves().values())
    out = checkpoint(function, *leaves, use_reentrant=reentrant, preserve_rng_state=True)
    out.backward(x.grad_out)
    assert all(torch.equal(a, b) for a, b in zip((out, *(t.grad for t in leaves)), want, strict=True))


def test_a_second_derivative_names_the_remedy(device, native):
    x = Inputs(Case(), device)
    out = lk.linformer_attention(*x.positional(), backend=native)
    (grad,) = torch.autograd.grad(out.sum(), x.query, create_graph=True)
    with pytest.raises(RuntimeError, match="reference"):
        grad.sum().backward()


def test_vmap_of_the_bias_and_of_pooling(device, native):
    """As of the other arguments: torch's loop over the op, with gradients."""
    x = Inputs(Case(k=8, kv_heads=2, pooled="random"), device)
    several, bias = torch.randn(3, *x.key.shape, device=device), torch.randn(3, 2, 2, 8, device=device)
    grads = []
    for backend in (native, "reference"):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (several, bias)]

        def call(key, bias, backend=backend):
            k, v, _ = lk.pool_kv(key, key, x.segments, 8, backend=backend)
            return lk.projected_attention(x.query.detach(), k, v, key_bias=bias, backend=backend)

        torch.func.vmap(call)(*leaves).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_torch_func_is_refused_with_the_remedy(device, native):
    key, segments = torch.randn(1, 2, 9, 8, device=device), torch.zeros(1, 9, dtype=torch.int64, device=device)
    call = lambda key: lk.pooled_attention(key, key, key, segments, 2, backend=native).sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match='backend="reference"'):
        torch.func.grad(call)(key)
    with pytest.raises(NotImplementedError, match='backend="reference"'):
        torch.func.jvp(call, (key,), (key,))


def test_vmap_of_offsets_is_refused_by_the_reference(device):
    """It was torch's error about a tensor without storage."""
    rows, proj, ends = torch.randn(9, 2, 8, device=device), torch.randn(3, 9, device=device), [[0, 4, 9], [0, 9, 9]]

    def call(ends):
        offsets = {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
        return lk.linformer_attention_varlen(rows, rows, rows, proj, **offsets, backend="reference")

    with pytest.raises(NotImplementedError, match=r"cu_seqlens_q or cu_seqlens_k differs within torch\.vmap"):
        torch.func.vmap(call)(torch.tensor(ends, device=device))


def test_vmap_keeps_gradients(device, native):
    """Of what is mapped, and of what is not, where no tensor under vmap says that it requires any."""
    x = Inputs(Case(), device)
    several = torch.randn(3, *x.query.shape, device=device)
    grads = []
    for backend in (native, "reference"):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (several, x.key, x.value, x.proj_key)]
        call = lambda query, rest=leaves[1:], backend=backend: lk.linformer_attention(query, *rest, backend=backend)  # noqa: E731
        torch.func.vmap(call)(leaves[0]).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grad", [True, False])
def test_a_result_may_be_changed_in_place(grad, device, native):
    """Of (B, N, H, D) storage too, where it is not contiguous."""
    x = Inputs(Case(layout="bnhd"), device)
    arguments = [tensor.detach().requires_grad_(grad) for tensor in (x.query, x.key, x.value, x.proj_key)]
    out = lk.linformer_attention(*arguments, backend=native)
    assert out.stride(1) < out.stride(2)
    want = out.detach() * 2
    assert torch.equal(out.mul_(2), want)
    if not grad:
        return
    out.sum().backward()
    (twice,) = torch.autograd.grad(lk.linformer_attention(*arguments, backend=native).sum() * 2, arguments[:1])
    torch.testing.assert_close(arguments[0].grad, twice, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_the_reference_has_second_derivatives(shared, device):
    make = lambda *shape: torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)  # noqa: E731
    inputs = make(2, 2, 3, 2), make(2, 1, 4, 2), make(2, 1, 4, 3), make(1, 3, 5), None if shared else make(1, 3, 5)
    mask = torch.tensor([[True, True, False, True], [False] * 4], device=device)
    function = lambda *tensors: lk.linformer_attention(*tensors, key_padding_mask=mask, backend="reference")  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs) and torch.autograd.gradgradcheck(function, inputs)
    with lk.use_backend("reference"):
        out = lk.linformer_attention(*inputs)
        (grad,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
        assert torch.autograd.grad(grad.square().sum(), inputs[1])[0].isfinite().all()


def flops(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_flop_counts_of_pooling(device, native):
    """An addition a number, and what projected_attention takes; the gradient of a mean is copied."""
    b, h, kv, n_q, n, k, d, d_v = 2, 4, 2, 30, 50, 16, 8, 24
    x = Inputs(Case(b, h, kv, n_q, n, k=k, d=d, d_v=d_v, pooled="random"), device)
    attend = 2 * b * h * n_q * k
    call = lambda: lk.pooled_attention(x.query, x.key, x.value, x.segments, k, backend=native)  # noqa: E731
    forward = b * kv * n * (d + d_v) + attend * (d + d_v)
    assert flops(call) == forward
    assert flops(lambda: x.results(call())) == forward + attend * (3 * d + 2 * d_v)


@pytest.mark.parametrize("sharing", ["headwise", "key-value", "per-head", "per-sequence"])
def test_flop_counts(sharing, device, native):
    """By hand, 2 a multiplication. Backward recomputes the scores; a gradient that nobody wants costs nothing."""
    b, h, kv, n_q, n, k, d, d_v = 2, 4, 2, 30, 50, 16, 8, 24
    x = Inputs(Case(b, h, kv, n_q, n, 9, k, d, d_v, sharing=sharing), device)
    project, attend = 2 * b * kv * k * n, 2 * b * h * n_q * k
    call = lambda: lk.linformer_attention(*x.positional(), backend=native)  # noqa: E731
    forward = project * (d + d_v) + attend * (d + d_v)
    assert flops(call) == forward
    assert flops(lambda: halves(x, native)) == forward
    backward = 2 * project * (d + d_v) + attend * (3 * d + 2 * d_v)
    assert flops(lambda: x.results(call())) == forward + backward
    assert flops(lambda: halves(x, native).backward(x.grad_out)) == forward + backward
    for name in cases.ARGUMENTS[1:]:
        setattr(x, name, getattr(x, name) if getattr(x, name) is None else getattr(x, name).detach())
    assert flops(lambda: call().backward(x.grad_out)) == forward + attend * (2 * d + d_v)


DDP = """
import sys, tempfile, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from linformer_kernels import LinformerEncoderLayer, LinformerProjection
from processes import leave

def model():
    torch.manual_seed(0)
    shared = LinformerProjection(32, 8)
    layers = [LinformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, projection=shared) for _ in range(2)]
    return torch.nn.Sequential(*layers)

def worker(rank, where):
    dist.init_process_group("gloo", init_method="file://" + where, rank=rank, world_size=2)
    data = torch.randn(4, 32, 16, generator=torch.Generator().manual_seed(1))
    alone, together = model(), DistributedDataParallel(model())
    alone(data).square().mean().backward()
    together(data[2 * rank : 2 * rank + 2]).square().mean().backward()
    names = [name for name, _ in alone.named_parameters()]
    assert sum("proj_key" in name for name in names) == 1, names  # one matrix, however many layers
    for (name, a), b in zip(alone.named_parameters(), together.parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda m: name + m)
    leave()

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (folder + "/rendezvous",), 2)
"""


def test_ddp_with_a_projection_shared_between_layers(tmp_path):
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    processes.start(script)
