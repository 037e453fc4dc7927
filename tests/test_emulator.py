"""The PTX emulator: right answers for kernels known to be right, planted bugs caught, counters that are right."""

from __future__ import annotations

import math
import os
import re
import shutil
import struct
from pathlib import Path

import emulator
import numpy as np
import pytest
import torch

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default; unset, Triton warns

WARP = 32
SAMPLES = Path(emulator.__file__).parent / "samples.cu"


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def cuda(request: pytest.FixtureRequest) -> emulator.Module:
    """The kernels of samples.cu."""
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not on PATH")
    return emulator.from_nvcc(SAMPLES, request.param)


@pytest.fixture(autouse=True)
def seeded(seed: int) -> None:
    torch.manual_seed(seed)


def bf16_bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16)


def line(stats: emulator.Stats, opcode: str) -> dict:
    """The counters of the only instruction whose opcode begins like that."""
    (found,) = (entry for entry in stats.lines if entry["op"].startswith(opcode))
    return found


# CUDA kernels


def test_saxpy(cuda):
    x, y = torch.randn(1000), torch.randn(1000)
    want = 2.5 * x.double() + y.double()
    stats = cuda.kernel("saxpy").launch(4, 256, [x, y, 2.5, 1000])
    torch.testing.assert_close(y.double(), want, rtol=1e-6, atol=1e-6)
    assert stats.issues == []


def test_sum_through_shared_memory(cuda):
    x, total = torch.randn(5000), torch.zeros(1)
    stats = cuda.kernel("sum").launch(3, 256, [x, total, 5000])
    torch.testing.assert_close(total[0].double(), x.double().sum(), rtol=0, atol=1e-3)
    assert stats.issues == []


@pytest.mark.parametrize("order", [0, 1, 2])
def test_matmul_with_cp_async_and_ldmatrix(cuda, order):
    m, n, k = 128, 64, 160
    a, b, c = torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16(), torch.full((m, n), math.nan)
    kernel = cuda.kernel("matmul_bf16")
    stats = kernel.launch((n // 64, m // 64), 128, [bf16_bits(a), bf16_bits(b), c, n, k], seed=order)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-4)
    assert stats.issues == []
    assert stats.tensor_flops == 2 * m * n * k
    loads = [entry for entry in stats.lines if entry["op"].startswith("ldmatrix")]
    assert all(entry["wavefronts"] == entry["ideal"] > 0 for entry in loads)  # the padding works


def test_matmul_tf32(cuda):
    a, b, c = torch.randn(16, 8), torch.randn(8, 8), torch.zeros(16, 8)
    stats = cuda.kernel("matmul_tf32").launch(1, WARP, [a, b, c, 8])
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=0, atol=2e-2)
    assert not torch.equal(c, a @ b)  # the operands were rounded
    assert stats.tensor_flops == 2 * 16 * 8 * 8


def test_blocks_that_wait_for_each_other(cuda):
    blocks = 50
    x = torch.randint(-100, 100, (blocks * WARP,), dtype=torch.int32)
    out, ticket, sums, ready = (torch.zeros(size, dtype=torch.int32) for size in (x.numel(), 1, blocks, blocks))
    stats = cuda.kernel("scan").launch(blocks, WARP, [x, out, ticket, sums, ready])
    assert torch.equal(out, x.cumsum(0).int())
    assert stats.kinds() in ([], ["global-conflict"])  # soft: the flags order those accesses


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on PATH")
@pytest.mark.parametrize("waits", [True, False])
def test_a_block_that_does_not_wait_is_found_out(waits):
    """In order, each block is done before the next starts. Shuffled, they run side by side."""
    source = SAMPLES.read_text()
    if not waits:
        source, count = re.subn(r"while \(!done\)", "while (false)", source)
        assert count == 1
    kernel = emulator.from_nvcc(source).kernel("scan")
    blocks = 8
    x = torch.arange(blocks * WARP, dtype=torch.int32)
    right = []
    for seed in range(1, 21):
        out, ticket, sums, ready = (torch.zeros(size, dtype=torch.int32) for size in (x.numel(), 1, blocks, blocks))
        kernel.launch(blocks, WARP, [x, out, ticket, sums, ready], seed=seed)
        right.append(torch.equal(out, x.cumsum(0).int()))
    assert all(right) == waits


def test_conversions_to_half_and_back(cuda):
    every_half = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    between = every_half + torch.tensor([0.5, 0.25, 2.0**-26])[:, None].mul(every_half.abs() * 2.0**-10)
    x = torch.cat(
        [every_half, between.flatten(), torch.randn(1000) * 1e-6, torch.tensor([65519.9, 65520.0, 7e4, 1e-8])]
    )
    nearest, toward_zero = torch.zeros(2, x.numel(), dtype=torch.int16)
    back = torch.zeros_like(x)
    cuda.kernel("to_half").launch((x.numel() + 255) // 256, 256, [x, nearest, toward_zero, back, x.numel()])
    want = x.half()
    number = ~x.isnan()
    assert torch.equal(nearest.view(torch.float16)[number], want[number])
    assert torch.equal(back[number], want.float()[number])
    assert back[~number].isnan().all()
    finite = number & x.isfinite()
    truncated = toward_zero.view(torch.float16).numpy()[finite]
    exact = np.abs(x.numpy()[finite])
    with np.errstate(over="ignore"):
        outward = np.nextafter(np.abs(truncated), np.float16(np.inf)).astype(np.float32)
    assert (np.abs(truncated.astype(np.float32)) <= exact).all()
    assert ((exact < outward) | np.isinf(outward)).all()


def test_ordinary_arithmetic(cuda):
    size = 256
    a, b = (torch.randint(1, 2**62, (size,)) >> torch.randint(0, 60, (size,)) for _ in range(2))
    d = torch.randn(size, dtype=torch.float64)
    integers, reals = torch.zeros(size, 4, dtype=torch.int64), torch.zeros(size, 2, dtype=torch.float64)
    cuda.kernel("mixed").launch(1, size, [a, b, d, integers, reals])
    for i, (x, y) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
        pool = struct.pack("<2I", x % 2**32, y % 2**32)
        bits = {
            0: y.bit_count(),
            1: 64 - y.bit_length(),
            2: int(f"{y:064b}"[::-1], 2),
            3: x * y >> 64,
            4: (y & -y).bit_length(),
            5: y >> x % 64,
            6: int.from_bytes(bytes(pool[j] for j in (0, 4, 2, 6)), "little"),
        }[x % 7]
        want = [math.gcd(x, y), bits, (x * (x % 8) + y) % 2**64, x // (y | 1)]
        assert [value % 2**64 for value in integers[i].tolist()] == want
    want = torch.stack([d.abs().sqrt() / (1 + d * d), d * d + 1 / d], 1)
    torch.testing.assert_close(reals, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("n", [20, 50, 64])
def test_barrier_after_divergence(cuda, n):
    """Lanes of a warp that come to a barrier one after the other, or have returned, are no divergent barrier."""
    x, y = torch.randn(64), torch.zeros(64)
    stats = cuda.kernel("return_early").launch(1, 64, [x, y, n])
    assert stats.issues == []
    assert y[:n].count_nonzero() == n
    assert y[n:].count_nonzero() == 0


LATE = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry late()
{
  .reg .pred %p;
  .reg .b32 %r<3>;
  mov.u32 %r1, %tid.x;
  setp.lt.u32 %p, %r1, 16;
  @%p bra DETOUR;
MEET:
  shfl.sync.idx.b32 %r2, %r1, 0, 31, -1;
  ret;
DETOUR:
  bra MEET;
}
"""


def test_a_collective_that_waits_counts_once():
    """Half a warp that came first and waited for the other half was counted then, and again with all of it."""
    shuffle = line(emulator.Module(LATE).kernel().launch(1, WARP, []), "shfl")
    assert (shuffle["warps"], shuffle["threads"]) == (1, WARP)


# Clusters, TMA to several blocks, the proxies of global memory, registers that move: right kernels and planted bugs


@pytest.fixture(scope="module")
def hopper() -> emulator.Module:
    """The kernels of samples_sm90.cu."""
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not on PATH")
    return emulator.from_nvcc(SAMPLES.with_name("samples_sm90.cu"), "sm_90a")


ORDERS = pytest.mark.parametrize("order", range(4))


@ORDERS
@pytest.mark.parametrize("cluster", [1, 2, 4])
def test_blocks_read_their_neighbours_shared_memory(hopper, cluster, order):
    x, y = torch.randn(256), torch.zeros(256)
    stats = hopper.kernel("turn_right").launch(4, 64, [x, y], cluster=cluster, seed=order)
    assert torch.equal(x, y)
    assert stats.issues == []


def test_clusters_that_the_kernel_asks_for(hopper):
    x, y = torch.randn(256), torch.zeros(256)
    kernel = hopper.kernel("turn_right_by_two")
    assert kernel.launch(4, 64, [x, y], max_resident=1).resident == 2  # whole clusters
    assert torch.equal(x, y)
    with pytest.raises(emulator.PtxError, match=r"the kernel wants clusters of \(2,1,1\)"):
        kernel.launch(4, 64, [x, y], cluster=4)
    with pytest.raises(emulator.PtxError, match="a grid of 3 blocks is no multiple of clusters of 2"):
        kernel.launch(3, 64, [x, y])
    with pytest.raises(emulator.PtxError, match="clusters of more than 8 blocks"):
        hopper.kernel("turn_right").launch(16, 64, [x, y], cluster=16)


@ORDERS
@pytest.mark.parametrize("bug, kind", [
    ("turn_without_sync", "race"), ("turn_and_leave", "early-exit"), ("arrive_twice", "barrier"),
])  # fmt: skip
def test_misused_barrier_of_a_cluster(hopper, bug, kind, order):
    args = [torch.randn(256), torch.zeros(256)]
    assert kind in kinds_of(hopper.kernel(bug), 4, 64, args, cluster=2, seed=order)


@ORDERS
@pytest.mark.parametrize("bug, kind", [
    (None, None), ("send_without_sync", "race"), ("send_without_wait", "early-exit"), ("read_as_own", "oob-shared"),
])  # fmt: skip
def test_store_and_arrival_in_another_block(hopper, bug, kind, order):
    x, y = torch.randn(WARP), torch.zeros(WARP)
    if bug:
        args = [y] if bug == "read_as_own" else [x, y]
        assert kind in kinds_of(hopper.kernel(bug), 2, WARP, args, seed=order)
        return
    assert hopper.kernel("send_right").launch(2, WARP, [x, y], seed=order).issues == []
    assert torch.equal(y, x.flip(0))


@ORDERS
@pytest.mark.parametrize("bug, kind", [
    (None, None), ("sum_columns_of_own", "race"), ("sum_columns_of_half", "race-async"),
])  # fmt: skip
def test_multicast(hopper, bug, kind, order):
    """Without word from the other block that it has read a tile, and with the bytes of a half expected."""
    x, sums = torch.randn(64, 32), torch.zeros(2, 32)
    args = [emulator.tensor_map(x, (32, 8)), sums, 64]
    if bug:
        assert kind in kinds_of(hopper.kernel(bug), 2, WARP, args, seed=order)
        return
    stats = hopper.kernel("sum_columns_right").launch(2, WARP, args, seed=order)
    torch.testing.assert_close(sums.double(), x.double().sum(0).expand(2, -1), rtol=0, atol=1e-4)
    assert stats.issues == []
    assert 32 * stats.global_read_sectors == 4 * x.numel()  # each byte once for both


@ORDERS
@pytest.mark.parametrize("kernel, kind", [
    ("fenced_by_reader", None), ("fenced_by_writer", None), ("by_tma", None),
    ("unfenced", "proxy-fence"), ("tma_unfenced", "proxy-fence"), ("tma_half_waited", "race-async"),
])  # fmt: skip
def test_proxies_of_global_memory(hopper, kernel, kind, order):
    x, between, y = torch.randn(8, WARP), *torch.zeros(2, 8, WARP)
    args = [x, emulator.tensor_map(between, (32, 8)), between, torch.zeros(1, dtype=torch.int32), y]
    kernel = hopper.kernel(f"pass_on_{kernel}")
    if kind:
        assert kinds_of(kernel, 2, WARP, args, seed=order) == [kind]
        assert kind not in kernel.launch(2, WARP, args, seed=order, check=False, proxy_fences=False).kinds()
        return
    assert kernel.launch(2, WARP, args, seed=order).issues == []
    assert torch.equal(y, x + 1)


@ORDERS
def test_registers_move_between_warps(hopper, order):
    y = torch.zeros(384, dtype=torch.int32)
    assert hopper.kernel("share_registers_right").launch(1, 384, [y], seed=order).issues == []
    assert torch.equal(y, torch.arange(384, dtype=torch.int32))
    bugs = {"share_too_many": "deadlock", "share_downwards": "setmaxnreg", "share_in_one_warp": "setmaxnreg"}
    for bug, kind in bugs.items():
        assert kinds_of(hopper.kernel(bug), 1, 384, [y], seed=order) == [kind]


def test_a_collective_reached_within_a_turn_of_its_own():
    """A lane that got its turn for having waited came last to a collective that the others waited at: all were there,
    and the emulator said that none of them ever arrived."""
    loop = "mov.u32 %r2, COUNT;\nAGAIN:\nsub.u32 %r2, %r2, 1;\nsetp.ne.u32 %p, %r2, 0;\n@%p bra AGAIN;\nbra MEET;"
    for count in range(290, 390):
        source = LATE.replace("bra MEET;\n}", loop.replace("COUNT", str(count)) + "\n}")
        assert emulator.Module(source).kernel().launch(1, WARP, []).issues == []


# Kernels known to be right that nobody here wrote


@pytest.fixture
def triton_samples():
    pytest.importorskip("triton", reason="triton is not installed")
    from emulator import samples

    return samples


TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
MATMUL = {"m": "i32", "n": "i32", "k": "i32"}


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("dtype", TYPES, ids=TYPES.values())
@pytest.mark.parametrize("capability", [80, 90])
def test_triton_matmul(triton_samples, capability, dtype, stages):
    m, n, k = 100, 90, 130
    constants = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "STAGES": stages}
    signature = {**MATMUL, "p_a": f"*{TYPES[dtype]}", "p_b": f"*{TYPES[dtype]}", "p_c": "*fp32"}
    compiled = triton_samples.compile_for(capability, triton_samples.matmul, signature, constants, warps=4)
    a, b, c = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype), torch.full((m, n), math.nan)
    stats = emulator.from_triton(compiled).launch((2, 2), [a, b, c, m, n, k])
    tolerance = 5e-2 if dtype == torch.float32 else 1e-4  # tf32
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-5, atol=tolerance)
    assert stats.issues == []
    assert stats.tensor_flops == 2 * 128 * 128 * 160


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("capability", [80, 90])
def test_triton_attention(triton_samples, capability, stages):
    heads, n, d = 2, 150, 64
    constants = {"D": d, "BLOCK_M": 64, "BLOCK_N": 32, "STAGES": stages}
    signature = {"p_q": "*bf16", "p_k": "*bf16", "p_v": "*bf16", "p_o": "*fp32", "scale": "fp32", "n": "i32"}
    compiled = triton_samples.compile_for(capability, triton_samples.attention, signature, constants, warps=4)
    q, k, v = (torch.randn(heads, n, d).bfloat16() for _ in range(3))
    out = torch.full((heads, n, d), math.nan)
    args = [q, k, v, out, d**-0.5 * math.log2(math.e), n]
    stats = emulator.from_triton(compiled).launch((3, heads), args)
    want = torch.softmax(d**-0.5 * q.double() @ k.double().mT, -1) @ v.double()
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-2)
    assert stats.issues == []
    assert ("wgmma" in compiled.asm["ptx"]) == (capability == 90)


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("where", ["device", "host"])
def test_triton_matmul_by_tma(triton_samples, where, stages):
    """Tensor memory accelerator, mbarriers, wgmma."""
    m, n, k = 128, 128, 144
    constants = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "STAGES": stages}
    a, b, c = torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16(), torch.full((m, n), math.nan)
    if where == "device":
        kernel, args = triton_samples.matmul_tma, [a, b, c, m, n, k]
        signature = {**MATMUL, "p_a": "*bf16", "p_b": "*bf16", "p_c": "*fp32"}
    else:
        kernel, args = triton_samples.matmul_host_tma, [emulator.TensorDesc(a), emulator.TensorDesc(b), c, n, k]
        signature = {**MATMUL, "a": "tensordesc<bf16[64,32]>", "b": "tensordesc<bf16[32,64]>", "p_c": "*fp32"}
    compiled = triton_samples.compile_for(90, kernel, signature, constants, warps=4)
    assert "cp.async.bulk.tensor" in compiled.asm["ptx"]
    stats = emulator.from_triton(compiled).launch((2, 2), args)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-4)
    assert stats.issues == []
    assert stats.by_class["tma"] > 0


# Planted bugs


def kinds_of(kernel: emulator.Kernel, *args, **options) -> list[str]:
    """What the launch raises."""
    with pytest.raises(emulator.PtxIssues) as caught:
        kernel.launch(*args, **options)
    return caught.value.stats.kinds()


def test_read_out_of_bounds(cuda):
    x, y = torch.randn(64), torch.zeros(64)
    with pytest.raises(emulator.PtxIssues, match=r"read of 4 bytes.* 0 bytes past the end of 'x'") as caught:
        cuda.kernel("read_beyond").launch(1, 64, [x, y], names=["x", "y"])
    assert caught.value.stats.kinds() == ["oob-global"]
    assert torch.equal(y, torch.cat([x[1:], torch.zeros(1)]))


def test_write_out_of_bounds(cuda):
    memory = torch.zeros(80)
    x, y = torch.randn(64), memory[:64]
    assert kinds_of(cuda.kernel("write_beyond"), 1, 64, [x, y]) == ["oob-global"]
    assert memory[64:].count_nonzero() == 0  # the access was dropped


def test_misaligned(cuda):
    assert kinds_of(cuda.kernel("read_misaligned"), 1, 8, [torch.randn(64), torch.zeros(32)]) == ["misaligned"]


@pytest.mark.parametrize("order", [0, 1])
def test_missing_sync(cuda, order):
    x, y = torch.randn(64), torch.zeros(64)
    kinds = kinds_of(cuda.kernel("reverse_without_sync"), 1, 64, [x, y], seed=order)
    assert "race" in kinds


def test_no_race_detector_no_race(cuda):
    x, y = torch.randn(64), torch.zeros(64)
    assert cuda.kernel("reverse_without_sync").launch(1, 64, [x, y], races=False).issues == []


def test_unwritten_shared_memory(cuda):
    x, y = torch.randn(64), torch.zeros(64)
    stats = cuda.kernel("read_unwritten").launch(1, 64, [x, y])
    assert stats.kinds() == ["uninit-shared"]
    assert y[0].isnan()  # fresh shared memory is NaN
    assert torch.equal(y[1:], x[:63].flip(0))


def test_sync_in_branch(cuda):
    x, y = torch.randn(64), torch.zeros(64)
    assert "divergent-barrier" in kinds_of(cuda.kernel("sync_in_branch"), 1, 64, [x, y])


def test_deadlock(cuda):
    args = [torch.zeros(1, dtype=torch.int32), torch.zeros(64)]
    with pytest.raises(emulator.PtxIssues, match=r"block \(0,0,0\) warp 1 .* waits at a barrier") as caught:
        cuda.kernel("wait_forever").launch(1, 64, args)
    assert caught.value.stats.kinds() == ["deadlock"]


def test_step_limit(cuda):
    y = torch.zeros(3, dtype=torch.int32)
    assert kinds_of(cuda.kernel("count_forever"), 1, 1, [y], max_steps=10_000) == ["step-limit"]


@pytest.mark.parametrize("kind", ["assert", "trap"])
def test_abort(cuda, kind):
    kernel = cuda.kernel("fail_assertion" if kind == "assert" else "fail_trap")
    kernel.launch(1, WARP, [torch.ones(WARP)])
    assert kinds_of(kernel, 1, WARP, [-torch.ones(WARP)]) == [kind]


@pytest.mark.parametrize("missing", ["wait", "sync"])
def test_missing_wait_or_sync_of_a_copy(cuda, missing):
    m = n = k = 64
    a, b, c = torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16(), torch.zeros(m, n)
    kernel = cuda.kernel(f"matmul_without_{missing}")
    kinds = kinds_of(kernel, 1, 128, [bf16_bits(a), bf16_bits(b), c, n, k])
    assert ("race-async" in kinds) if missing == "wait" else ("race" in kinds)
    if missing == "wait":
        assert not torch.allclose(c.double(), a.double() @ b.double(), atol=1e-2)


# Counters


@pytest.mark.parametrize(("stride", "sectors"), [(1, 4), (2, 8), (8, 32), (32, 32)])
def test_sectors_of_a_read(cuda, stride, sectors):
    x, out = torch.randn(WARP * stride), torch.zeros(WARP)
    stats = cuda.kernel("read_strided").launch(1, WARP, [x, out, stride], names=["x", "out", "stride"])
    assert torch.equal(out, x[::stride])
    assert stats.global_read_sectors == sectors
    assert stats.global_write_sectors == 4
    assert stats.buffers["x"] == {"size": 4 * WARP * stride, "read_bytes": 32 * sectors, "write_bytes": 0}
    assert stats.unique_write_bytes == 4 * WARP


def test_unique_bytes_count_once(cuda):
    x, out = torch.randn(WARP), torch.zeros(WARP)
    stats = cuda.kernel("read_strided").launch(10, WARP, [x, out, 1])
    assert stats.global_read_sectors == 10 * 4
    assert stats.unique_read_bytes == 4 * WARP


@pytest.mark.parametrize(("width", "wavefronts"), [(32, 32), (33, 1), (34, 2), (36, 4)])
def test_bank_conflicts(cuda, width, wavefronts):
    x, out = torch.randn(32, 32), torch.zeros(32)
    stats = cuda.kernel("read_column").launch(1, WARP, [x, out, width], shared=4 * 32 * width)
    assert torch.equal(out, x[:, 5])
    read = line(stats, "ld.shared")
    assert (read["wavefronts"], read["ideal"]) == (wavefronts, 1)
    assert stats.bank_conflicts == wavefronts - 1


def test_instructions_by_class(cuda):
    x, y = torch.randn(256), torch.randn(256)
    stats = cuda.kernel("saxpy").launch(1, 256, [x, y, 2.0, 200])
    assert stats.by_class["load_global"] == 2 * 200
    assert stats.by_class["store_global"] == 200
    assert stats.float_flops == 2 * 200
    assert line(stats, "fma.rn.f32")["threads"] == 200
    assert line(stats, "fma.rn.f32")["warps"] in (7, 8)  # the last warp may branch around it


# Arguments and errors


def test_struct_with_pointers(cuda):
    x, y = torch.randn(100), torch.zeros(100)
    problem = emulator.Raw(struct.pack("<QQif", 0, 0, 100, 3.0), {0: x, 8: y})
    cuda.kernel("scale").launch(1, WARP, [problem])
    assert torch.equal(y, 3.0 * x)


def test_bytes_that_hold_host_addresses(cuda):
    x, y = torch.randn(100), torch.zeros(100)
    data = struct.pack("<QQif", x.data_ptr(), y.data_ptr(), 100, 3.0)
    stats = cuda.kernel("scale").launch(1, WARP, [data], isolate=False, extra={"x": x, "y": y})
    assert torch.equal(y, 3.0 * x)
    assert stats.buffers["x"]["read_bytes"] >= 400
    assert "oob-global" in kinds_of(cuda.kernel("scale"), 1, WARP, [data], isolate=False, extra=[x])


def test_numpy_and_scalars(cuda):
    x, y = np.arange(8, dtype=np.float32), np.ones(8, dtype=np.float32)
    cuda.kernel("saxpy").launch((1,), (32, 1), [x, y, np.float32(0.5), np.int64(8)])
    assert (y == 1 + x / 2).all()


PTX = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry odd(.param .u64 p)
{
  .reg .b32 %r<4>;
  mov.u32 %r1, 1;
  INSTRUCTION
  ret;
}
"""


UNSUPPORTED = ["dp4a.u32.u32 %r1, %r1, %r1, %r1;", "barrier.cluster.arrive.relaxed;", "frobnicate.b32 %r1;"]


@pytest.mark.parametrize("instruction", [*UNSUPPORTED, "add.b33 %r1, %r1, 1;"])
def test_unsupported_instruction_is_named(instruction):
    module = emulator.Module(PTX.replace("INSTRUCTION", instruction))
    with pytest.raises(emulator.PtxError, match=rf"PTX line 9: .*{instruction.split()[0]}"):
        module.kernel("odd")


def test_bad_launches(cuda):
    kernel = cuda.kernel("saxpy")
    x = torch.randn(4)
    with pytest.raises(emulator.PtxError, match="takes 4 arguments, 3 given"):
        kernel.launch(1, 32, [x, x, 1.0])
    with pytest.raises(emulator.PtxError, match="more than 1024 threads"):
        kernel.launch(1, 2048, [x, x, 1.0, 4])
    with pytest.raises(emulator.PtxError, match="of shared memory, the limit is"):
        kernel.launch(1, 32, [x, x, 1.0, 4], shared=228 * 1024)
    with pytest.raises(emulator.PtxError, match="candidates"):
        cuda.kernel("no such kernel")
