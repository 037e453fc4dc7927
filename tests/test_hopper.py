"""The kernels for compute capability 9.0 without a GPU: executed by the emulator, against the oracle; which problems
they take, and how their compiled code looks.
"""

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cases
import emulated
import pytest
import torch
from cases import Case

import linformer_kernels as lk
from linformer_kernels import _library

REASON = emulated.why_not()
if REASON is None and "90a" not in _library.cuda_architectures().split(","):
    REASON = "the native library was built without architecture 90"
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
BF16, FP16 = torch.bfloat16, torch.float16
NAMES = ["linformer_hopper_project", "linformer_hopper_attend"]


def forward(x: cases.Inputs) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {"out": lk.linformer_attention(*x.positional(), scale=x.case.scale, backend="cpu")}


def halves(x: cases.Inputs) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        k, v = lk.project_kv(*x.positional()[1:], backend="cpu")
        out = lk.projected_attention(x.query, k, v, scale=x.case.scale, backend="cpu")
    return {"out": out, "key_proj": k, "value_proj": v}


def launched(run: emulated.Run) -> list[str]:
    """Without type and size."""
    return [re.sub("_(bf16|fp16|fp32)_.*", "", name) for name in run.kernels]


SMALL = Case(batch=2, heads=2, kv_heads=2, n=200, n_q=200, k=128, d=64)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=("bf16", "fp16"))
@pytest.mark.parametrize("case", [
    SMALL,
    Case(batch=2, heads=2, kv_heads=2, n=328, n_q=130, k=256, d=64),
    Case(batch=3, heads=4, kv_heads=2, n=72, n_q=300, k=70, d=64, layout="bnhd", scale=-0.3),
    Case(batch=1, heads=6, kv_heads=3, n=8, n_q=1, k=1, d=40, d_v=64, sharing="per-head"),
    Case(batch=5, heads=1, kv_heads=1, n=136, n_q=65, k=200, d=48, d_v=40, sharing="key-value", extra=8),
    Case(batch=3, heads=2, kv_heads=1, n=136, n_q=200, k=128, d=128),
    Case(batch=1, heads=3, kv_heads=3, n=200, n_q=260, k=200, d=96, d_v=128, size=10),
    Case(batch=2, heads=2, kv_heads=2, n=72, n_q=100, k=100, d=40, d_v=72, sharing="per-head", scale=-0.2),
    Case(batch=2, heads=4, kv_heads=1, n=600, n_q=257, k=129, d=64, sharing="per-head-key-value", size=30),
], ids=str)  # fmt: skip
def test_forward(case, dtype, seed):
    """Sizes that are no multiple of a tile, heads and rows behind the end of a tile; E is NaN behind the sequence."""
    x = cases.Inputs(dataclasses.replace(case, dtype=dtype), "cpu")
    results = {}
    for order, multiprocessors in ((0, 3), (seed + 1, 2), (seed + 2, 5)):
        with emulated.emulated(90, multiprocessors, seed=order) as run:
            results[order] = forward(x)
        assert launched(run) == NAMES and all(stats.issues == [] for stats in run.stats)
    cases.compare(results, x)
    assert all(torch.equal(got["out"], results[0]["out"]) for got in results.values())


@pytest.mark.parametrize("case, many", [
    (SMALL, 12), (Case(batch=2, heads=2, kv_heads=1, n=136, n_q=100, k=200, d=128), 12),
    (Case(batch=3, heads=3, kv_heads=3, n=200, n_q=70, k=130, d=64, sharing="per-head"), 24),
], ids=str)  # fmt: skip
def test_one_piece_a_cta(case, many):
    """Where two would leave half of so many multiprocessors idle. The sums have the same order."""
    x, results = cases.Inputs(dataclasses.replace(case, dtype=BF16), "cpu"), []
    for multiprocessors, columns in ((2, "n128"), (many, "n64")):
        with emulated.emulated(90, multiprocessors) as run:
            results.append(forward(x))
        assert f"_{columns}_" in run.kernels[0] and launched(run) == NAMES
    cases.compare({"": results[1]}, x)
    assert torch.equal(results[0]["out"], results[1]["out"])


def test_halves():
    x = cases.Inputs(dataclasses.replace(SMALL, dtype=BF16, heads=4, k=100), "cpu")
    with emulated.emulated(90) as run:
        got = halves(x)
    assert launched(run) == NAMES
    cases.compare({"": got}, x)


def test_gradients():
    """The backward reads the K' and V' that these kernels left."""
    x = cases.Inputs(dataclasses.replace(SMALL, dtype=BF16), "cpu")
    with emulated.emulated(90) as run:
        got = cases.run(x, "cpu")
    assert launched(run)[:2] == NAMES and len(run.kernels) == 4
    cases.compare({"": got}, x)


@pytest.mark.parametrize("other", [
    {"dtype": torch.float32}, {"d": 32}, {"d": 136}, {"k": 264}, {"scale": 0.0}, {"mask": "random"}, {"bias": "normal"},
    {"dropout_p": 0.1}, {"sharing": "per-sequence"}, {"n": 44}, {"layout": "padded"}, {"layout": "expanded"},
    {"lengths": (30, 10)},
], ids=str)  # fmt: skip
def test_other_problems_go_to_the_other_kernels(other):
    case = Case(batch=2, heads=2, kv_heads=2, n=48, n_q=40, k=32, d=64, dtype=BF16)
    x = cases.Inputs(dataclasses.replace(case, **other), "cpu")
    with emulated.emulated(90) as run:
        cases.run(x, "cpu")
    assert launched(run)[0] == "linformer_forward"


def test_few_tiles_and_other_gpus():
    """Where most multiprocessors would have nothing to do, and on GPUs that do not know the instructions."""
    x = cases.Inputs(dataclasses.replace(SMALL, dtype=BF16), "cpu")
    for arch, multiprocessors in ((90, 132), (80, 3)):
        if f"{arch}+PTX" not in _library.cuda_architectures().split(","):
            continue
        with emulated.emulated(arch, multiprocessors) as run:
            got = forward(x)
        assert launched(run) == ["linformer_forward"]
        cases.compare({"": got}, x)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on PATH")
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_products_overlap_and_nothing_spills(dtype, tmp_path):
    """C75xx is ptxas saying that it waits for each wgmma."""
    source = Path(__file__).parents[1] / "csrc" / "cuda" / "hopper.cu"
    command = [
        "nvcc",
        "-std=c++17",
        "-O3",
        f"-DLINFORMER_CUDA_TYPE={dtype}",
        "-gencode",
        "arch=compute_90a,code=sm_90a",
    ]
    command += ["-Xptxas", "-v", "-cubin", "-o", str(tmp_path / "kernels"), str(source)]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    text = said.stdout + said.stderr
    assert "C75" not in text, text
    assert text.count("0 bytes spill stores, 0 bytes spill loads") == text.count("Compiling entry function") == 8, text


@pytest.mark.parametrize("k", [128, 256])
def test_bounds(k):
    """By counts and published rates, the bytes that nobody avoids decide at K = 128; at K = 256 all else together takes
    no longer than the products by 1 / 0.6."""
    pytest.importorskip("triton", reason="bench.counts imports it")
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from bench import cost, counts, options

    h100 = counts.GPUS[1]
    cell = options.Cell("fwd", "bfloat16", 1, 8, k, 64, "headwise", 1024)
    launches, _ = counts.count("cuda", cell, dataclasses.replace(h100, multiprocessors=8))
    total = sum((launch.counts for launch in launches), counts.Counts(False))
    bounds = h100.bounds(total)
    floor = cost.floor_bytes(cell) / h100.device_bytes
    assert total.conflicts == 0 and total.tensor_flop == cost.flop(cell)
    if k == 128:
        assert max(bounds.values()) <= 1.15 * floor
    assert bounds["issue"] + bounds["shared memory"] + bounds["L2"] <= bounds["tensor"] / 0.6 or k == 128
