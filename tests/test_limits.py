"""What a machine cannot do: memory it has not, sizes beyond its numbers, a build of the kernels that there is not; and
that a built library carries nothing of the machine that built it."""

import itertools
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import torch

import linformer_kernels as lk
from linformer_kernels import _library

ROOT = Path(__file__).parents[1]
ops = torch.ops.linformer_kernels
R = torch.randn


def tall(rows: int, *shape: int, at: int = 2) -> torch.Tensor:
    """As many rows as you like in the memory of one."""
    one = torch.ones(*shape[:at], 1, *shape[at:])
    return one.expand(*shape[:at], rows, *shape[at:])


def tall_segments(rows: int, at: int = 0) -> torch.Tensor:
    shape = [1, 1, 1]
    shape[at] = rows
    return torch.zeros(1, 1, 1, dtype=torch.int32).expand(shape)


BIG = 2**36 - 64  # rows: more memory than a machine has, and sizes that still can be computed with
FEW = R(1, 1, 3, 8)
TOO_MUCH = {
    "its workspace": lambda: lk.projected_attention(FEW, tall(BIG, 1, 1, 8), tall(BIG, 1, 1, 8), backend="cpu"),
    "the result": lambda: lk.projected_attention(tall(BIG, 1, 1, 8), FEW, FEW, backend="cpu"),
    "the result, packed": lambda: lk.linformer_attention_varlen(
        tall(BIG, 1, 8, at=0), R(9, 1, 8), R(9, 1, 8), R(3, 9), backend="cpu",
        cu_seqlens_q=torch.tensor([0, BIG]), cu_seqlens_k=torch.tensor([0, 9]),
    ),
    "K' and V'": lambda: lk.linformer_attention(FEW, FEW, FEW, tall(BIG, 3, at=0), backend="cpu"),
    "K' and V', alone": lambda: lk.project_kv(FEW, FEW, tall(BIG, 3, at=0), backend="cpu"),
    "a gradient": lambda: ops.projected_attention_backward(
        tall(BIG, 1, 1, 8), tall(BIG, 1, 1, 8), FEW, FEW, None, None, None, 0.0, 1.0, False, 7
    ),
    "a gradient, of E": lambda: ops.project_backward(
        tall(BIG, 1, 1, 8), tall(BIG, 1, 1, 8), FEW, FEW, tall(BIG, 3, at=0), None, None, None, False, 4
    ),
    "K' and V', pooled": lambda: ops.pool(
        tall(64, 1, 1, 8, at=0), tall(64, 1, 1, 8, at=0), tall_segments(64), None, 2**31 - 1
    ),
    "a gradient, pooled": lambda: ops.pool_backward(
        tall(1, 1, 1, 8), tall(1, 1, 1, 8), torch.ones(1, 1, 1), tall_segments(BIG, at=2), None, False, 3
    ),
    "a gradient, of E of each sequence": lambda: ops.project_backward(
        tall(BIG, 1, 1, 8), tall(BIG, 1, 1, 8), FEW, FEW, tall(BIG, 1, 1, 3), None, None, None, False, 4
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", TOO_MUCH)
def test_out_of_memory_says_so(what):
    """The stable ABI gives an error without its text: "API call failed". Those who look for "memory" in it, as
    accelerate's find_executable_batch_size does, took it for another error and did not try a smaller batch."""
    with pytest.raises(RuntimeError) as caught:
        TOO_MUCH[what]()
    said = str(caught.value)
    assert "CPU out of memory. Tried to allocate " in said and f" for {what.split(',')[0]}." in said
    bytes_wanted = int(said.split("Tried to allocate ")[1].split()[0])
    assert 8 * BIG < bytes_wanted < 2**12 * BIG, said
    accelerate = pytest.importorskip("accelerate.utils.memory")
    assert accelerate.should_reduce_batch_size(caught.value)


def sizes_of(huge: int) -> dict:
    """Every dimension that can be expanded, alone."""
    rows, heads = tall(huge, 1, 1, 8), tall(huge, 1, 1, 8, at=1)
    batch, state = tall(huge, 1, 1, 8, at=0), torch.zeros(2, dtype=torch.int64)
    return {
        "K": lambda: ops.projected_attention(FEW, rows, rows, None, None, None, 0.0, 1.0, False),
        "K, dropped": lambda: ops.projected_attention(FEW, rows, rows, None, None, state, 0.5, 1.0, False),
        "K, backward": lambda: ops.projected_attention_backward(
            FEW, FEW, rows, rows, None, None, None, 0.0, 1.0, False, 7
        ),
        "K, backward, no gradient": lambda: ops.projected_attention_backward(
            FEW, FEW, rows, rows, None, None, None, 0.0, 1.0, False, 0
        ),
        "N_q": lambda: ops.projected_attention(rows, FEW, FEW, None, None, None, 0.0, 1.0, False),
        "B": lambda: ops.projected_attention(batch, batch, batch, None, None, None, 0.0, 1.0, False),
        "B without rows": lambda: ops.projected_attention(
            batch[:, :, :0], batch, batch, None, None, None, 0.0, 1.0, False
        ),
        "H": lambda: ops.projected_attention(heads, FEW, FEW, None, None, None, 0.0, 1.0, False),
        "H_kv": lambda: ops.projected_attention(heads, heads, heads, None, None, None, 0.0, 1.0, False),
        "D_v of one": lambda: ops.projected_attention(
            FEW, FEW, tall(huge, 1, 1, 3, at=3), None, None, None, 0.0, 1.0, False
        ),
        "K of E": lambda: ops.attention(FEW, FEW, FEW, tall(huge, 3, at=0), *[None] * 6, 0.0, 1.0, False),
        "K of E, project": lambda: ops.project(FEW, FEW, tall(huge, 3, at=0), None, None, None, False),
        "K of E, no rows": lambda: ops.project(
            FEW[:, :, :0], FEW[:, :, :0], tall(huge, 3, at=0), None, None, None, False
        ),
        "K, project_backward": lambda: ops.project_backward(
            rows, rows, FEW, FEW, tall(huge, 3, at=0), None, None, None, False, 15
        ),
        "B of E": lambda: ops.project(batch, batch, tall(huge, 1, 2, 3, at=0), None, None, None, False),
        "H of E": lambda: ops.project(heads, heads, tall(huge, 1, 2, 3, at=1), None, None, None, False),
        "K, biased": lambda: ops.projected_attention(FEW, rows, rows, tall(huge, 1, 1), None, None, 0.0, 1.0, False),
        "N, pooled": lambda: ops.pool(rows, rows, tall_segments(huge, 2), None, 3),
        "B, pooled": lambda: ops.pool(batch, batch, tall_segments(huge), None, 3),
        "H, pooled": lambda: ops.pool(heads, heads, torch.zeros(1, 1, 1, dtype=torch.int32), None, 3),
        "K, pooled": lambda: ops.pool(FEW, FEW, torch.zeros(1, 1, 3, dtype=torch.int32), None, huge),
        "N, pool_backward": lambda: ops.pool_backward(
            FEW, FEW, torch.ones(1, 1, 3), tall_segments(huge, 2), None, False, 3
        ),
        "B of keys": lambda: ops.project(batch, batch, R(2, 3), None, None, None, False),
        "H of keys": lambda: ops.project(heads, heads, R(2, 3), None, None, None, False),
    }


@pytest.mark.parametrize("huge", [2**59, 2**57, 2**54])
def test_sizes_beyond_64_bits_are_refused(huge):
    """With K' and V' expanded to 2^59 rows, sums of sizes overflowed, the workspace came out small, the kernels wrote
    behind it, and the process died."""
    for name, call in sizes_of(huge).items():
        with pytest.raises((RuntimeError, ValueError)) as caught:
            call()
        said = str(caught.value)
        wanted = ("beyond what can be computed", "out of memory", "adjacent elements")
        assert any(words in said for words in wanted), (name, said)


def test_sizes_just_below_the_limit_are_tried():
    """They end at the memory, not at the check."""
    with pytest.raises(RuntimeError, match="out of memory"):
        ops.projected_attention(FEW, tall(2**35, 1, 1, 8), tall(2**35, 1, 1, 8), None, None, None, 0.0, 1.0, False)


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


CAPABILITY = """
import sys, torch
import linformer_kernels as lk
from linformer_kernels import info
x, proj = torch.randn(1, 2, 10, 16), torch.randn(4, 10)
ops = torch.ops.linformer_kernels
calls = [lambda: lk.linformer_attention(x, x, x, proj), lambda: lk.project_kv(x, x, proj, backend="cpu"),
         lambda: ops.cpu_capability(), lambda: ops.cpu_peak_gflops("float32")]
for call in calls:
    try:
        call()
    except RuntimeError as error:
        print(error)
lk.linformer_attention(x, x, x, proj, backend="reference")  # which has nothing to do with it
print(info.collect()["backends"]["cpu"]["reason"])
"""


@pytest.mark.parametrize("value", ["AVX2", " avx2"])
def test_a_capability_that_does_not_exist_is_an_error(value):
    """It was the default without a word, so that a comparison of instruction sets compared a build with itself."""
    done = python(CAPABILITY, LINFORMER_CPU_CAPABILITY=value)
    assert done.returncode == 0 and not done.stderr, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 5, said
    for line in said:
        assert f"LINFORMER_CPU_CAPABILITY is '{value}'; wanted: one of \"generic\"" in line


def test_an_empty_capability_is_none():
    """As an empty LINFORMER_BACKEND is."""
    done = python(CAPABILITY, LINFORMER_CPU_CAPABILITY="")
    assert done.returncode == 0 and not done.stderr and len(done.stdout.splitlines()) == 1, done


def backends():
    yield "cpu", torch.float32
    yield "cpu", torch.bfloat16
    if torch.cuda.is_available():
        yield from itertools.product((None, "triton"), (torch.float32, torch.bfloat16))


@pytest.mark.parametrize("backend, dtype", list(backends()))
@pytest.mark.parametrize("case", cases.ENORMOUS, ids=str)
def test_values_near_the_largest_number(case, backend, dtype, device):
    """The sum of unnormalised exponentials times V' overflowed where probabilities times V' are finite: of 200 rows of
    1e37 with equal scores, whose mean is 1e37. The same in dP, whose mean the backward pass subtracts."""
    if backend == "cpu":
        device = "cpu"
    x = cases.enormous(case, dtype, device)
    cases.compare({case: cases.run(x, backend)}, x)


@pytest.mark.parametrize(
    "build", ["generic", "avx2", "avx512", "avx512_bf16", "emulate_avx512_bf16", "emulate_amx", "emulate_neon_bf16"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("fp32", "bf16"))
def test_a_row_far_below_the_others_has_no_part(dtype, build):
    """Without AVX-512 its exponential was 2^-126 of the largest, or more where there are many rows, and times a number
    near the largest that is thousands: behind a bias of -10,000 lies whatever was in memory."""
    query, key, value = (torch.rand(1, 2, rows, 16, dtype=dtype) for rows in (30, 200, 200))
    far, bias, low = torch.arange(200) % 2 == 0, torch.zeros(200), key.clone()
    value[:, :, far], low[:, :, far], bias[far] = 3e38, -3e38, -1e4
    try:
        if ops.cpu_use_capability(build) != build:
            pytest.skip(f"this machine has no {build}")
        by_bias = lk.projected_attention(query, key, value, key_bias=bias)
        by_score = lk.projected_attention(query, low, value)
        want = lk.projected_attention(query, key[:, :, ~far], value[:, :, ~far])
    finally:
        ops.cpu_use_capability("")
    torch.testing.assert_close(by_bias, want)
    torch.testing.assert_close(by_score, want)


def test_the_library_has_no_path_of_the_machine_that_built_it():
    """Errors of the stable ABI carried the paths of its headers, with the home of who built them, and so did ours."""
    path = _library.path()
    if path is None:
        pytest.skip("the native library is missing")
    library = path.read_bytes()
    for place in {ROOT, Path(torch.__file__).parent, Path(sys.prefix), Path.home()}:
        assert f"{place}/".encode() not in library, place
    with pytest.raises(RuntimeError) as caught:
        ops.project(R(1, 1, 3, 8), R(1, 1, 4, 8), R(2, 3), None, None, None, False)
    assert "csrc/ops/arguments.cpp" in str(caught.value) and str(ROOT) not in str(caught.value)


@pytest.mark.parametrize("name", [
    "csrc/ops.cpp", "csrc/ops/arguments.cpp", "csrc/ops/run.cpp", "csrc/ops/tensors.cpp", "csrc/cpu/dispatch.cpp",
    "csrc/cpu/plan.cpp", "csrc/cpu/kernels.cpp",
])  # fmt: skip
def test_clang_compiles(name):
    """The installation asks for g++ or clang++. clang++ 14 does not know __builtin_cpu_supports("f16c")."""
    clang = shutil.which("clang++")
    if clang is None:
        pytest.skip("there is no clang++")
    flags = ["-std=c++17", "-fsyntax-only", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DLINFORMER_NAMESPACE=mine"]
    flags += ["-isystem", str(Path(torch.__file__).parent / "include")]
    portable = ["-DLINFORMER_CPU_WIDTH=4", "-DLINFORMER_CPU_TILE_ROWS=6", "-DLINFORMER_CPU_TILE_VECTORS=2"]
    builds = [[*portable, "-DLINFORMER_CPU_BF16=1"], [*portable, "-DLINFORMER_CPU_BF16=4"]]
    if platform.machine() in ("x86_64", "AMD64"):
        flags.append("-DLINFORMER_CPU_X86")
        avx512 = ["-DLINFORMER_CPU_WIDTH=16", "-DLINFORMER_CPU_TILE_ROWS=6", "-DLINFORMER_CPU_TILE_VECTORS=4"]
        builds.append([*avx512, "-march=x86-64-v4", "-mavx512bf16", "-DLINFORMER_CPU_BF16=2"])
    for build in builds if name.endswith("kernels.cpp") else [[]]:
        table = ["-DLINFORMER_CPU_TABLE=kTable", '-DLINFORMER_CPU_NAME="one"'] if build else []
        done = subprocess.run([clang, *flags, *build, *table, str(ROOT / name)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
