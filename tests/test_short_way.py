"""The short way of a call and the long one: the same results, the same errors, whatever comes."""

import dataclasses
import random

import emulated
import pytest
import torch
from cases import Spy

import linformer_kernels as lk
from linformer_kernels import _backends, _library

pytestmark = pytest.mark.skipif(_backends._SHORT is None, reason="Triton's interpreter comes first")


def attention(draw):
    b, h, n, n_max, k, d, d_v = (draw.choice((1, 2, 3)) for _ in range(7))
    proj = (*draw.choice(((), (), (h,), (b, h), (b, 1))), k, n + n_max)
    arguments = {
        "query": torch.randn(b, h * draw.choice((1, 2)), draw.choice((0, 1, 4)), d),
        "key": torch.randn(b, h, n, d),
        "value": torch.randn(b, h, n, d_v),
        "proj_key": torch.randn(proj),
        "proj_value": torch.randn(proj) if draw.random() < 0.5 else None,
        "key_padding_mask": torch.rand(b, n) < 0.5 if draw.random() < 0.5 else None,
    }
    return lk.linformer_attention, arguments


def project(draw):
    _, arguments = attention(draw)
    del arguments["query"]
    return lk.project_kv, arguments


def projected(draw):
    b, h, n, k, d, d_v = (draw.choice((1, 2, 3)) for _ in range(6))
    query, key, value = torch.randn(b, 2 * h, n, d), torch.randn(b, h, k, d), torch.randn(b, h, k, d_v)
    return lk.projected_attention, {"query": query, "key_proj": key, "value_proj": value}


def resized(tensor, draw):
    shape = list(tensor.shape)
    if shape:
        shape[draw.randrange(len(shape))] = draw.choice((0, 1, 2, 3, 4, 6))
    return torch.ones(shape, dtype=tensor.dtype)


CHANGES = {
    "resized": resized,
    "resized twice": lambda t, draw: resized(resized(t, draw), draw),
    "without a dimension": lambda t, draw: t.sum(0).to(t.dtype) if t.dim() else t,
    "with one more": lambda t, draw: t[None],
    "a number": lambda t, draw: t.sum().to(t.dtype),
    "half": lambda t, draw: t.half(),
    "double": lambda t, draw: t.double(),
    "integers": lambda t, draw: t.long(),
    "truths": lambda t, draw: t.bool(),
    "transposed": lambda t, draw: t.transpose(-1, -2) if t.dim() > 1 else t,
    "columns apart": lambda t, draw: t.repeat_interleave(2, -1)[..., ::2] if t.dim() else t,
    "rows apart": lambda t, draw: t.repeat_interleave(2, -2)[..., ::2, :] if t.dim() > 1 else t,
    "expanded": lambda t, draw: t[..., :1].expand(t.shape) if t.dim() and t.size(-1) else t,
    "of heads and rows": lambda t, draw: t.transpose(1, 2).contiguous().transpose(1, 2) if t.dim() > 2 else t,
    "meta": lambda t, draw: t.to("meta"),
    "sparse": lambda t, draw: t.to_sparse(),
    "a parameter": lambda t, draw: torch.nn.Parameter(t) if t.is_floating_point() else t,
    "with gradients": lambda t, draw: t.clone().requires_grad_() if t.is_floating_point() else t,
    "of a class of its own": lambda t, draw: t.as_subclass(Own),
    "nothing": lambda t, draw: None,
    "a list": lambda t, draw: t.tolist(),
}
NUMBERS = {
    "scale": (None, 0.0, 0.5, -1.0, 1, True, float("nan"), float("inf"), "1", [1.0], torch.tensor(1.0)),
    "dropout_p": (0.0, -0.0, 0, False, 1.0, -0.5, float("nan"), None, "0"),
    "is_causal": (False, True, 0, 1, None),
    "backend": (None, "cpu", "reference", "cuda", "abacus", 5, ["cpu"]),
}


class Own(torch.Tensor):
    pass


def outcome(function, arguments):
    """What comes of a call: results with their gradients, or the error."""
    try:
        results = function(**arguments)
    except Exception as error:
        return type(error), str(error).split(" object at ")[0]
    results = results if isinstance(results, tuple) else (results,)
    leaves = [t for t in arguments.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    if leaves and results[0].requires_grad:
        grads = torch.autograd.grad(sum(r.sum() for r in results), leaves, allow_unused=True)
        results = *results, *grads
    return [r if r is None else (r.shape, r.stride(), r.dtype, r.device, r.requires_grad, r.detach()) for r in results]


def alike(one, other):
    if isinstance(one, tuple) or isinstance(other, tuple):
        return one == other
    return len(one) == len(other) and all(
        a is b is None or (a[:5] == b[:5] and (a[5].is_meta or torch.equal(a[5].nan_to_num(7.5), b[5].nan_to_num(7.5))))
        for a, b in zip(one, other, strict=True)
    )


@pytest.fixture(params=["cpu", "as on a GPU"])
def where(request):
    """As on a GPU: the ops check and plan what they would launch there, and nothing is computed."""
    if request.param == "cpu":
        yield
    elif not _library.cuda_architectures():
        pytest.skip("the native library has no CUDA kernels")
    else:
        with emulated.unlaunched():
            yield


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [attention, project, projected], ids=lambda make: make.__name__)
def test_both_ways_are_one(make, where, seed, monkeypatch):
    """Right calls, changed in up to two places. So the native ops refuse whatever the checks refuse."""
    draw = random.Random(seed)
    short, taken = _backends._SHORT, []

    def count(operation):
        def counted(*arguments):
            result = operation(*arguments)
            taken.append(1)
            return result

        return counted

    counting = dataclasses.replace(short, **{f.name: count(getattr(short, f.name)) for f in dataclasses.fields(short)})
    errors = 0
    for _ in range(500):
        function, arguments = make(draw)
        told = []
        for _ in range(draw.choice((0, 1, 1, 2))):
            name = draw.choice(list(arguments) + [n for n in NUMBERS if n in function.__kwdefaults__])
            if name in NUMBERS:
                arguments[name] = draw.choice(NUMBERS[name])
                told.append((name, arguments[name]))
            elif type(arguments[name]) in (torch.Tensor, torch.nn.Parameter) and not arguments[name].is_sparse:
                change = draw.choice(list(CHANGES))
                if not (arguments[name].is_meta and change in ("a list", "sparse")):
                    arguments[name] = CHANGES[change](arguments[name], draw)
                told.append((name, change))
        monkeypatch.setattr(_backends, "_SHORT", None)
        want = outcome(function, arguments)
        monkeypatch.setattr(_backends, "_SHORT", counting)
        assert alike(outcome(function, arguments), want), told
        errors += isinstance(want, tuple)
    assert len(taken) >= 100 and errors >= 50


def took_the_short_way(monkeypatch, call):
    taken = []
    count = lambda *a: (taken.append(1), _backends._autograd.EAGER_NATIVE.attention(*a))[1]  # noqa: E731
    monkeypatch.setattr(_backends, "_SHORT", dataclasses.replace(_backends._autograd.EAGER_NATIVE, attention=count))
    call()
    return bool(taken)


def test_who_goes_the_long_way(monkeypatch):
    """Whoever asks for a backend, casts, traces or transforms; asked anew in each call."""
    x, proj = torch.randn(1, 2, 4, 8), torch.randn(3, 4)
    call = lambda: lk.linformer_attention(x, x, x, proj)  # noqa: E731
    monkeypatch.delenv("LINFORMER_BACKEND", raising=False)
    assert took_the_short_way(monkeypatch, call)
    with lk.use_backend("reference"):
        assert not took_the_short_way(monkeypatch, call)
        with Spy() as spy:
            call()
        assert not spy.calls
    monkeypatch.setenv("LINFORMER_BACKEND", "reference")
    assert not took_the_short_way(monkeypatch, call)
    with Spy() as spy:
        call()
    assert not spy.calls
    monkeypatch.delenv("LINFORMER_BACKEND")
    assert took_the_short_way(monkeypatch, call)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not took_the_short_way(monkeypatch, call) and call().dtype == torch.bfloat16
    vmapped = lambda: torch.func.vmap(lambda t: lk.linformer_attention(t, t, t, proj))(x[None])  # noqa: E731
    assert not took_the_short_way(monkeypatch, vmapped)
    torch._dynamo.reset()
    compiled = torch.compile(lk.linformer_attention, fullgraph=True, backend="aot_eager")
    assert not took_the_short_way(monkeypatch, lambda: compiled(x, x, x, proj))
    assert took_the_short_way(monkeypatch, call)


@pytest.mark.filterwarnings("ignore")
def test_a_tracer_sees_the_long_way(monkeypatch):
    x, proj = torch.randn(1, 2, 4, 8), torch.randn(3, 4)
    function = lambda x: lk.linformer_attention(x, x, x, proj)  # noqa: E731
    assert not took_the_short_way(monkeypatch, lambda: torch.jit.trace(function, x, check_trace=False))


def test_a_tensor_that_outlived_a_transform():
    """Its wrapper is dead, and what the op gets is what is inside."""
    escaped = []
    torch.func.grad(lambda x: (escaped.append(x * 2), x.sum())[1])(torch.ones(1, 1, 4, 8))
    dead, proj = escaped[0], torch.randn(2, 4, requires_grad=True)
    assert torch._C._functorch.is_functorch_wrapped_tensor(dead)
    alive = torch.full((1, 1, 4, 8), 2.0)
    grads = []
    for x in (dead, alive):
        out = lk.linformer_attention(x, x, x, proj)
        grads.append((out.detach(), torch.autograd.grad(out.sum(), proj)[0]))
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("capability", "dtype", "architectures", "wanted"), [
    ((8, 0), torch.bfloat16, "80,90", True),
    ((9, 0), torch.float32, "80,90", True),
    ((9, 0), torch.bfloat16, "80,90", False),  # Triton's is first
    ((9, 0), torch.float32, "80", False),
    ((7, 5), torch.float16, "70+PTX", False),
])  # fmt: skip
def test_who_goes_the_short_way_on_a_gpu(capability, dtype, architectures, wanted, monkeypatch):
    """Calls that "cuda" would serve if they went the long way."""
    monkeypatch.setattr(_backends, "_capability", lambda device: capability)
    monkeypatch.setattr(_backends, "_driver_problem", lambda ptx: "")
    monkeypatch.setattr(_backends, "_ARCHITECTURES", architectures)
    monkeypatch.setattr(_backends, "UNFENCED_TRITON", None)
    for name in ("cuda", "triton"):
        monkeypatch.setitem(_backends.BACKENDS, name, dataclasses.replace(_backends.BACKENDS[name], missing=None))
    asked = _backends.cuda_comes_first.__wrapped__
    assert asked(torch.device("cuda", 0), dtype) == wanted
    monkeypatch.setattr(_backends, "UNFENCED_TRITON", "it lacks a fence")
    has_code = architectures != "80" and capability[0] >= 8
    assert asked(torch.device("cuda", 0), dtype) == (has_code or wanted)
