"""What only a GPU can show: streams, graph capture, a second device, more than 2^31 elements.

The rest of the tests run on a GPU by themselves, see conftest.py.
"""

import dataclasses

import cases
import oracle
import pytest
import test_attention
import torch
from cases import Case

import linformer_kernels as lk

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")
GPU_BACKENDS = ("cuda", "triton")
CASE = Case(batch=2, heads=4, kv_heads=2, n=300, n_q=300, k=64, d=64, dtype=torch.bfloat16)


@pytest.fixture(params=GPU_BACKENDS)
def backend(request) -> str:
    return request.param


@pytest.mark.parametrize("dtype", test_attention.DTYPES, ids=("fp32", "bf16", "fp16"))
@pytest.mark.parametrize("case", test_attention.CHOSEN, ids=str)
def test_chosen(case, dtype, backend):
    cases.check(dataclasses.replace(case, dtype=dtype), "cuda", backend)


def test_tf32_where_torch_allows_it(backend):
    cases.check(dataclasses.replace(CASE, dtype=torch.float32, tf32=True), "cuda", backend)


@pytest.mark.parametrize("case", [
    dataclasses.replace(CASE, batch=40, n=304), dataclasses.replace(CASE, batch=20, n=1000, k=200, layout="bnhd"),
    dataclasses.replace(CASE, batch=20, kv_heads=4, n=200, k=256, d=128, sharing="per-head"),
    dataclasses.replace(CASE, batch=20, heads=6, kv_heads=6, n=72, k=130, d=96, dtype=torch.float16, scale=-0.1),
], ids=str)  # fmt: skip
def test_enough_heads_for_the_kernels_of_9_0(case):
    """Which want half of the multiprocessors at work. On other GPUs these are calls like all others."""
    cases.check(case, "cuda", "cuda")


def call(x: cases.Inputs, backend: str) -> torch.Tensor:
    return lk.linformer_attention(*x.positional(), backend=backend)


def test_runs_on_the_current_stream(backend):
    """Behind work that takes a while: on another stream it would read what is not there yet."""
    x, stream = cases.Inputs(CASE, "cuda"), torch.cuda.Stream()
    want = call(x, backend)
    torch.cuda.synchronize()
    query = torch.full_like(x.query, float("nan"))
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(100_000_000)
        query.copy_(x.query)
        got = lk.linformer_attention(query, *x.positional()[1:], backend=backend)
    stream.synchronize()
    assert torch.equal(got, want)


def test_two_streams_share_nothing(backend):
    xs = [cases.Inputs(CASE, "cuda") for _ in range(2)]
    want = [call(x, backend) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    for _ in range(20):
        got = []
        for x, stream in zip(xs, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(call(x, backend))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_can_be_captured_in_a_graph(backend):
    x = cases.Inputs(CASE, "cuda")
    want = cases.run(x, backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = cases.run(x, backend)
    for tensor in got.values():
        tensor.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_second_device(backend):
    x = cases.Inputs(CASE, "cuda:1")
    assert torch.cuda.current_device() == 0
    cases.compare({CASE: cases.run(x, backend)}, x)
    assert torch.cuda.current_device() == 0


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(backend):
    """The last head, which lies beyond 32-bit offsets."""
    batch, n, d = 9, 2**19, 64  # 8 heads: 2.4e9 elements
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    x = torch.randn(batch, 8, n, d, dtype=torch.bfloat16, device="cuda")
    proj = (torch.randn(64, n, device="cuda") / n**0.5).to(torch.bfloat16)
    out = lk.linformer_attention(x, x, x, proj, backend=backend)
    last = x[-1:, -1:]
    plain = torch.softmax(last @ (proj @ last).mT * d**-0.5, dim=-1) @ (proj @ last)
    exact = oracle.attention(*(cases.as_array(t) for t in (last, last, last, proj)))["out"]
    oracle.assert_close(out[-1:, -1:], exact, plain, "out")
