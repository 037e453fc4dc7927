"""What `python -m bench.counts` counts, and the kernel of exact attention it counts beside ours."""

import csv
import dataclasses
import sys
from pathlib import Path

import emulated
import oracle
import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1]))
import emulated_triton

from bench import cost, counts, exact_triton, options

A100, H100 = counts.GPUS
ALIGNED = options.Cell("fwd", "bfloat16", 1, 2, 128, 64, "headwise", 512)


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return torch.softmax(query @ key.mT * query.size(-1) ** -0.5, dim=-1) @ value


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    "dtype, length, width",
    [(torch.bfloat16, 200, 64), (torch.bfloat16, 40, 128), (torch.float16, 1, 16), (torch.float32, 150, 64)],
)
def test_exact_kernel(dtype, length, width, arch):
    """Lengths that are no multiple of a block, and, in the emulator, no race and nothing out of bounds."""
    inputs = [torch.randn(2, 2, length, width).to(dtype) for _ in range(3)]
    with emulated_triton.emulated(arch) as run:
        out = exact_triton.exact_attention(*inputs)
    assert run.kernels == ["exact_forward"] and run.stats[0].issues == []
    oracle.assert_close(out, plain(*(x.double() for x in inputs)).numpy(), plain(*inputs), "out")


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype, width", [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 64)])
def test_exact_kernel_spills_nothing(dtype, width, arch):
    """Else it would not be a fair neighbour."""
    inputs = [torch.empty(1, 1, 256, width, dtype=dtype) for _ in range(3)]
    with emulated_triton.emulated(arch, execute=False) as run:
        exact_triton.exact_attention(*inputs)
    assert emulated_triton.resources(run.compiled[0])["spilled"] == 0


def test_exact_kernel_says_what_it_does_not_take():
    x = torch.randn(1, 1, 8, 64)
    with pytest.raises(ValueError, match="key: shape"):
        exact_triton.exact_attention(x, x[..., :4, :], x)
    with pytest.raises(ValueError, match="value: shape"):
        exact_triton.exact_attention(x, x, x.mT.contiguous().mT)
    with pytest.raises(ValueError, match="heads of 128 columns of 4 bytes; wanted: 16, 32, 64"):
        exact_triton.exact_attention(*[torch.randn(1, 1, 8, 128)] * 3)


def total(backend: str, cell: options.Cell, gpu: counts.Gpu = A100) -> dict:
    return counts.rows_of(backend, cell, gpu)[-1]


@pytest.mark.parametrize("gpu", [A100, H100], ids=lambda gpu: gpu.name)
def test_needed_flop(gpu):
    """Where all sizes are multiples of the tiles a kernel does the products that are needed and no others."""
    for backend in counts.BACKENDS:
        if backend == "cuda" and emulated.why_not():
            continue
        row = total(backend, ALIGNED, gpu)
        assert row["tensor_flop"] == cost.flop(ALIGNED, backend == "exact"), backend
        assert row["tensor_flop_x_needed"] == 1
        assert row["conflicts"] == 0 and row["unique_bytes_x_floor"] >= 1 and row["l2_bytes_x_floor"] >= 1


@pytest.mark.skipif(emulated.why_not() is not None, reason="no CUDA kernels")
@pytest.mark.parametrize("op", ["fwd", "full"])
def test_pooling(op):
    """Attention alone has products; a bias in shared memory meets no bank twice."""
    cell = dataclasses.replace(ALIGNED, op=op, sharing="pooled")
    *launches, row = counts.rows_of("cuda", cell, A100)
    assert [launch["kernel"] for launch in launches if "pool" in launch["kernel"]] == [
        f"linformer_pool{way}_bf16" for way in ("", "_backward")[: 1 + (op == "full")]
    ]
    assert row["conflicts"] == 0 and row["unique_bytes_x_floor"] >= 1
    if op == "fwd":  # backward, scores and dP twice
        assert row["tensor_flop_x_needed"] == 1


def test_linear_and_quadratic():
    """Twice the sequence: twice the operations for us, four times for exact attention, which writes nothing between."""
    twice = options.Cell(*{**vars(ALIGNED), "seq_len": 1024}.values())
    assert total("triton", twice)["tensor_flop"] == 2 * total("triton", ALIGNED)["tensor_flop"]
    assert total("exact", twice)["tensor_flop"] == 4 * total("exact", ALIGNED)["tensor_flop"]
    assert total("exact", twice)["unique_bytes_x_floor"] == 1


def test_command_line(tmp_path, monkeypatch, capsys):
    """Rows of all backends, a picture, and a reason for what is not counted."""
    pytest.importorskip("matplotlib")
    where, picture = tmp_path / "counts.csv", tmp_path / "counts.png"
    arguments = "--backend triton,exact --op full,fwd --heads 2 --seq-len 512 --proj-dim 128"
    monkeypatch.setattr("sys.argv", ["counts", *arguments.split(), "--csv", str(where), "--plot", str(picture)])
    assert counts.main() == 0
    with open(where) as file:
        rows = list(csv.DictReader(file))
    kernels = ["forward", "backward", "project_backward", "all", "forward", "all", "exact_forward", "all"]
    assert [row["kernel"] for row in rows] == kernels
    assert [row["backend"] for row in rows] == 6 * ["triton"] + 2 * ["exact"]
    assert picture.stat().st_size > 0
    assert "exact is not counted: it has a forward only" in capsys.readouterr().out
