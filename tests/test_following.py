"""Projections that follow the sequence, where the oracle does not look: bits that may not change, what is exact
attention, numbers that are out of range, gradients of the reference."""

import dataclasses
import itertools

import cases
import pytest
import torch
from cases import Case, Inputs
from torch._subclasses import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

import linformer_kernels as lk

ops = torch.ops.linformer_kernels
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_type = pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "bf16", "fp16"))
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="builds and threads are the CPU kernels' affair")


@pytest.fixture(params=["generic", "avx2", "avx512", "avx512_bf16", "amx"])
def build(request):
    """Of the CPU kernels, for this thread; some run on no machine but a later one."""
    used = ops.cpu_use_capability(request.param)
    if used != request.param:
        ops.cpu_use_capability("")
        pytest.skip(f"this machine does not run {request.param}")
    yield used
    ops.cpu_use_capability("")


@pytest.fixture(params=[1, 2, 5, 64])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def pooled(x: Inputs, backend) -> dict[str, torch.Tensor]:
    """K', V', the counts, and the gradients of key and value for gradients that are their own K' and V'."""
    k, v, count = lk.pool_kv(
        x.key, x.value, x.segments, x.case.k, key_padding_mask=x.mask, cu_seqlens_k=x.cu_seqlens_k, backend=backend
    )
    grads = torch.autograd.grad((k, v), (x.key, x.value), (k.detach(), v.detach()))
    return {"key_proj": k, "value_proj": v, "count": count, "grad_key": grads[0], "grad_value": grads[1]}


def packed_of(x: Inputs, lengths, lengths_q) -> Inputs:
    """The sequences of a padded batch, packed."""
    packed = Inputs(dataclasses.replace(x.case, lengths=lengths, lengths_q=lengths_q, mask=None), str(x.key.device))
    rows = lambda t, of: torch.cat([t.detach()[b, :, :n].transpose(0, 1) for b, n in enumerate(of)])  # noqa: E731
    packed.key, packed.value = (rows(t, lengths).requires_grad_() for t in (x.key, x.value))
    packed.query, packed.grad_out = rows(x.query, lengths_q).requires_grad_(), rows(x.grad_out, lengths_q)
    heads = x.segments if x.segments.dim() == 3 else x.segments[:, None]
    packed.segments = rows(heads[..., None], lengths)[..., 0]
    packed.segments = packed.segments if x.case.segments_per_head else packed.segments[:, 0]
    return packed


def alone_of(x: Inputs, b: int, n: int, n_q: int) -> Inputs:
    """One of them as a batch of one, without padding."""
    alone = Inputs(dataclasses.replace(x.case, batch=1, n=n, n_q=n_q, mask=None), str(x.key.device))
    alone.key, alone.value = (t.detach()[b : b + 1, :, :n].requires_grad_() for t in (x.key, x.value))
    alone.query, alone.grad_out = x.query.detach()[b : b + 1, :, :n_q].requires_grad_(), x.grad_out[b : b + 1, :, :n_q]
    alone.segments = x.segments[b : b + 1, ..., :n]
    return alone


def ragged(dtype: torch.dtype, per_head: bool, pattern: str, device: str) -> tuple[Inputs, Inputs, list[Inputs]]:
    """The same sequences padded and masked, packed, and each alone."""
    lengths, lengths_q = (300, 0, 7, 231), (40, 5, 0, 23)
    case = Case(4, 4, 2, 40, 300, k=50, d=40, d_v=24, dtype=dtype, pooled=pattern, segments_per_head=per_head)
    padded = Inputs(case, device)
    padded.mask = torch.arange(300, device=device) < torch.tensor(lengths, device=device)[:, None]
    with torch.no_grad():
        for tensor in (padded.key, padded.value):
            tensor.movedim(1, 2)[~padded.mask] = cases.NAN
    of_each = zip(itertools.count(), lengths, lengths_q)
    return padded, packed_of(padded, lengths, lengths_q), [alone_of(padded, *sizes) for sizes in of_each]


@on_cpu
@each_type
@pytest.mark.parametrize("pattern, per_head", [("random", True), ("windows", False)])
def test_pooling_has_the_same_bits_padded_packed_alone_and_on_any_number_of_threads(
    pattern, per_head, dtype, device, build, native
):
    padded, packed, alone = ragged(dtype, per_head, pattern, device)
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 5, 64):
        torch.set_num_threads(threads)
        try:
            found += [pooled(padded, native), pooled(packed, native)]
            single = [pooled(one, native) for one in alone]
        finally:
            torch.set_num_threads(before)
        for name in ("key_proj", "value_proj", "count"):
            assert torch.equal(torch.cat([one[name] for one in single]), found[-1][name]), name
        for name in ("grad_key", "grad_value"):
            assert (found[-2][name].movedim(1, 2)[~padded.mask] == 0).all()
            found[-2][name] = found[-2][name].movedim(1, 2)[padded.mask]
            assert torch.equal(torch.cat([one[name][0].movedim(0, 1) for one in single]), found[-1][name]), name
    for other in found[1:]:
        assert all(torch.equal(tensor, found[0][name]) for name, tensor in other.items())


@on_cpu
@each_type
def test_pooled_attention_on_one_thread_has_the_same_bits_padded_packed_and_alone(dtype, device, build, native):
    padded, packed, alone = ragged(dtype, True, "random", device)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        results, whole = cases.run(padded, native), cases.run(packed, native)
        single = [cases.run(one, native) for one in alone]
    finally:
        torch.set_num_threads(before)
    pieces = torch.cat([one["out"][0].movedim(0, 1) for one in single])
    assert torch.equal(whole["out"], pieces)
    queries = torch.arange(40, device=device) < torch.tensor([40, 5, 0, 23], device=device)[:, None]
    assert torch.equal(results["out"].movedim(1, 2)[queries], pieces)
    for b in (1, 2):  # nothing to attend to, nobody who attends
        assert not single[b]["out"].any() and not single[b]["grad_key"].any()


BITS = [
    Case(n=900, n_q=700, k=128, bias="holes", kv_heads=2, d=64), Case(n=300, k=600, bias="out", dtype=torch.float16),
    Case(n=700, k=65, bias="normal", dropout_p=0.2, dtype=torch.bfloat16, sharing="per-sequence-head"),
    Case(lengths=(300, 5, 0, 401), k=130, bias="holes", sharing="per-sequence", kv_heads=1),
    Case(n=1000, n_q=700, k=128, pooled="random", segments_per_head=True, kv_heads=2, mask="random"),
    Case(lengths=(300, 5, 0, 401), pooled="windows", k=200, dtype=torch.bfloat16),
]  # fmt: skip


@pytest.mark.parametrize("case", BITS, ids=str)
def test_two_runs_are_bitwise_equal(case, device, native):
    x = Inputs(case, device)
    first = cases.run(x, native)
    for _ in range(2):
        for name, again in cases.run(x, native).items():
            assert torch.equal(first[name], again), name


@on_cpu
@pytest.mark.parametrize("case", BITS, ids=str)
def test_any_number_of_threads(case, threads, device, native):
    cases.check(case, device, native)


@pytest.mark.parametrize("length, number", [(1, 1), (7, 7), (50, 64), (130, 130)])
@pytest.mark.parametrize("backend", ["native", "composed", "reference"])
def test_a_segment_for_each_position_is_exact_attention(backend, length, number, device, native):
    backend = native if backend == "native" else backend
    query, key, value = (torch.randn(2, heads, length, 32, device=device, requires_grad=True) for heads in (4, 2, 2))
    segments = torch.stack([torch.randperm(number, device=device)[:length] for _ in range(2)])
    out = lk.pooled_attention(query, key, value, segments, number, backend=backend)
    wide = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    want = scaled_dot_product_attention(*wide, enable_gqa=True)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    # Of a sum of squares, whose own gradient is as large as the output: of one row it is tens.
    grads = (torch.autograd.grad(o.square().sum(), x) for o, x in ((out, (query, key, value)), (want, wide)))
    for got, exact in zip(*grads, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=3e-5)


def test_equal_keys_in_one_segment_are_exact_attention(device, native):
    """A mean of copies weighs as many as it stands for: what the bias is for."""
    query, few = torch.randn(1, 4, 9, 16, device=device), torch.randn(2, 1, 2, 5, 16, device=device)
    copies = torch.tensor([1, 7, 2, 30, 3], device=device)
    key, value = few.repeat_interleave(copies, dim=3)
    segments = torch.arange(5, device=device).repeat_interleave(copies)[None]
    out = lk.pooled_attention(query, key, value, segments, 5, backend=native)
    want = scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["native", "composed", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("fp32", "bf16"))
def test_a_bias_of_another_type_and_storage(dtype, backend, device, native):
    """It is float32 for the kernels; the gradient comes in the type that it had."""
    x = Inputs(Case(k=20, kv_heads=2, dtype=dtype), device)
    wide = torch.randn(2, 20, 2, device=device).bfloat16().float()
    wide[0, 3] = -torch.inf
    results = []
    for bias in (wide.mT, wide.mT.contiguous().bfloat16(), wide.mT.double(), wide.bfloat16().transpose(1, 2)):
        leaf = bias.detach().requires_grad_()
        out = lk.linformer_attention(*x.positional(), key_bias=leaf, backend=native if backend == "native" else backend)
        (grad,) = torch.autograd.grad(out, leaf, x.grad_out)
        assert grad.dtype == bias.dtype and grad.shape == bias.shape
        results.append((out, grad.to(torch.bfloat16)))
    for out, grad in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(grad, results[0][1])


def test_only_the_wanted_gradients_with_a_bias(device, native):
    x = Inputs(Case(n=33, n_q=33, k=8, kv_heads=2, bias="holes"), device)
    names, full = list(x.leaves()), cases.run(x, native)
    for wanted in itertools.product([False, True], repeat=len(names)):
        for name, want in zip(names, wanted, strict=True):
            getattr(x, name).requires_grad_(want)
        out = lk.linformer_attention(*x.positional(), key_bias=x.key_bias, backend=native)
        assert out.requires_grad == any(wanted)
        if any(wanted):
            for name, grad in x.results(out).items():
                assert torch.equal(grad, full[name]), f"{name} of {wanted}"


HOSTILE = (-2, 5, 2**31 - 1, -(2**31), 2**31 + 2, -(2**63), 2**63 - 1, 2**32)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_numbers_out_of_range_are_nowhere_where_nobody_may_read_them(dtype, device):
    """Compiled; eagerly on a CPU they are an error. 2^31 + 2 is no number of int32, and does not become one."""
    held = [number for number in HOSTILE if dtype == torch.int64 or -(2**31) <= number < 2**31]
    segments = torch.tensor([[0, 4, *held, 0, -1]], dtype=dtype, device=device)
    key = torch.randn(1, 2, segments.size(1), 8, device=device, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(lk.pool_kv, fullgraph=True, backend="aot_eager")
    results = []
    for function, given in ((compiled, segments), (lk.pool_kv, segments.where((segments >= 0) & (segments < 5), -1))):
        k, _, count = function(key, key.detach(), given, 5)
        results.append((k, count, torch.autograd.grad(k.sum(), key)[0]))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert results[0][1][0, 0].tolist() == [2, 0, 0, 0, 1]
    for number in held if device == "cpu" else ():
        with pytest.raises(ValueError, match=f"segments holds {number} but num_segments is 5"):
            lk.pool_kv(key, key, torch.full_like(segments, number), 5)


def test_fakes_and_meta_read_no_numbers():
    key, segments = torch.randn(2, 2, 9, 8), torch.full((2, 9), 77)
    for convert in (lambda t: t.to("meta"), None):
        mode = FakeTensorMode()
        with mode if convert is None else torch.no_grad():
            given = [mode.from_tensor(t) if convert is None else convert(t) for t in (key, segments)]
            k, v, count = lk.pool_kv(given[0], given[0], given[1], 5)
            out = lk.pooled_attention(given[0], given[0], given[0], given[1], 5)
        assert k.shape == v.shape == (2, 2, 5, 8) and count.shape == (2, 2, 5) and count.dtype == torch.float32
        assert out.shape == key.shape and out.device.type == given[0].device.type


def test_the_count_has_no_gradient_and_unused_halves_are_zero(device, native):
    x = Inputs(Case(pooled="random", k=8, kv_heads=2), device)
    k, v, count = lk.pool_kv(x.key, x.value, x.segments, 8, backend=native)
    assert k.requires_grad and v.requires_grad and not count.requires_grad
    grads = torch.autograd.grad(k.sum(), (x.key, x.value), allow_unused=True)
    assert grads[0].any() and (grads[1] is None or not grads[1].any())
    (only,) = torch.autograd.grad(lk.pool_kv(x.key.detach(), x.value, x.segments, 8, backend=native)[1].sum(), x.value)
    assert only.any()


@pytest.mark.parametrize("per_head", [False, True])
def test_derivatives_of_the_reference(per_head, device):
    """First and second, of the bias, of E of each sequence, and of means; a sequence without a key, a row without one,
    and a head whose rows are all out."""
    make = lambda *shape: torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)  # noqa: E731
    query, key, value, bias = make(2, 2, 3, 2), make(2, 2, 4, 2), make(2, 2, 4, 3), make(2, 2, 3)
    with torch.no_grad():
        bias[0, 0] = bias[1, 1, 2] = -torch.inf
    proj = make(2, 2 if per_head else 1, 3, 5)
    out_of = bias.detach().isneginf()

    def attend(*t):
        return lk.linformer_attention(*t[:4], key_bias=t[4].masked_fill(out_of, -torch.inf), backend="reference")

    finite = bias.detach().masked_fill(out_of, 0).requires_grad_()
    inputs = query, key, value, proj, finite
    assert torch.autograd.gradcheck(attend, inputs) and torch.autograd.gradgradcheck(attend, inputs)
    segments = torch.tensor([[0, 2, -1, 2], [-1] * 4], device=device)
    if per_head:
        segments = torch.stack([segments, segments.flip(-1)], dim=1)
    pool = lambda *t: lk.pooled_attention(*t, segments, 3, backend="reference")  # noqa: E731
    assert torch.autograd.gradcheck(pool, inputs[:3]) and torch.autograd.gradgradcheck(pool, inputs[:3])


def test_a_second_derivative_names_the_remedy(device, native):
    x = Inputs(Case(pooled="random", k=8), device)
    k, _, _ = lk.pool_kv(x.key, x.value, x.segments, 8, backend=native)
    (grad,) = torch.autograd.grad(k.square().sum(), x.key, create_graph=True)
    with pytest.raises(RuntimeError, match="reference"):
        grad.sum().backward()


def test_autocast_casts_keys_and_leaves_the_bias(device, native):
    x = Inputs(Case(k=20, kv_heads=2, bias="holes", pooled="random"), device)
    lower = [t.detach().bfloat16() for t in (x.query, x.key, x.value)]
    want = lk.pooled_attention(*lower, x.segments, 20, backend=native)
    halves = lk.pool_kv(*lower[1:], x.segments, 20, backend=native)
    with_bias = lk.projected_attention(lower[0], *halves[:2], key_bias=x.key_bias, backend=native)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(lk.pooled_attention(x.query, x.key, x.value, x.segments, 20, backend=native), want)
        k, v, count = lk.pool_kv(x.key, x.value, x.segments, 20, backend=native)
        with cases.Spy() as spy:
            out = lk.projected_attention(x.query, k, v, key_bias=x.key_bias, backend=native)
    assert k.dtype == v.dtype == torch.bfloat16 and count.dtype == torch.float32
    assert torch.equal(out, with_bias) and spy.calls[-1][1]["key_bias"].dtype == torch.float32


def test_segments_of_any_storage(device, native):
    """Strided, expanded over the batch and over heads."""
    key = torch.randn(3, 2, 20, 8, device=device)
    one = torch.randint(-1, 5, (20,), device=device)
    several = [one.expand(3, 20), one.expand(3, 2, 20), one.repeat_interleave(3)[::3].expand(3, 20)]
    several += [s.int() for s in several] + [
        torch.stack([one, one, one], dim=1).T,
        one.int()[None, None].expand(3, 2, 20),
    ]
    results = [lk.pool_kv(key, key, segments, 5, backend=native) for segments in several]
    for others in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], others, strict=True))


def test_the_module_functions_take_numpy_integers_and_no_other_numbers(device):
    numpy = pytest.importorskip("numpy")
    key, segments = torch.randn(1, 1, 4, 8, device=device), torch.tensor([[0, 1, 1, -1]], device=device)
    assert lk.pool_kv(key, key, segments, numpy.int64(2))[0].shape == (1, 1, 2, 8)
    for wrong in (2.0, "2", None, True):
        with pytest.raises(TypeError, match="num_segments is"):
            lk.pool_kv(key, key, segments, wrong)


@pytest.mark.parametrize("name", ["generic", "avx2", "avx512", "avx512_bf16", "emulate_amx"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_out_and_what_is_no_number(name, dtype):
    """A bias takes all rows out: zeros. All scores are -inf by themselves: NaN, as the formula has it."""
    key, value = -torch.rand(1, 2, 3, 8, dtype=dtype) - 0.1, torch.randn(1, 2, 3, 8, dtype=dtype)
    query = torch.rand(1, 2, 20, 8, dtype=dtype) + 0.1
    query[0, 1, 7] = torch.inf
    ops.cpu_use_capability(name)
    try:
        out = lk.projected_attention(query, key, value, backend="cpu")
        none = lk.projected_attention(query, key, value, key_bias=torch.tensor(-torch.inf), backend="cpu")
    finally:
        ops.cpu_use_capability("")
    assert out[0, 1, 7].isnan().all() and out.isnan().sum() == 8
    assert not none[0, 0].any()
