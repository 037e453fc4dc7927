"""`python -m bench.host --gpu`: host time of a forward call on a GPU, without a GPU.

CPU tensors stand for the GPU's. The CUDA backend does all but launch; the launches of the Triton backend go through
Triton's own launcher to a stub of libcuda (tests/stubbed.py), which does nothing. So what the driver takes is not in
these times, nor what torch takes to find the current device and stream. A GPU's memory comes from a cache of torch's,
the stand-ins' from malloc, so sizes are small here; they change nothing else.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import emulated
import stubbed

from linformer_kernels import _autograd, _backends, _library, linformer_attention

SIZES = {"batch": 1, "heads": 2, "length": 64, "proj_dim": 128, "head_dim": 64}
SCALARS = (0.0, 0.125, False)
# A piece with what it is called, in the order of a call: each contains those below it, but for torch's own.
Pieces = dict[str, Callable[[], Any]]


_LIBRARY = torch.library.Library("linformer_bench", "DEF")


def idle_op(results: Any) -> Any:
    """An op of the same schema that ends in a Python function that does nothing: what every op in Python pays torch."""
    schema = str(torch.ops.linformer_kernels.attention.triton._schema)
    _LIBRARY.define("idle" + schema[schema.index("(") :])
    _LIBRARY.impl("idle", lambda *arguments: results, "CompositeExplicitAutograd")
    return torch.ops.linformer_bench.idle.default


def cuda_pieces(inputs: tuple[Any, ...]) -> Pieces:
    op = torch.ops.linformer_kernels.attention.default
    like = inputs[0]
    b, h, _, d = like.shape
    k = inputs[3].size(0)
    shapes = [like.shape, (b, h, k, d), (b, h, k, d), (1024,)]  # the last as a workspace
    return {
        "cuda: linformer_attention": lambda: linformer_attention(*inputs),
        "cuda: the op": lambda: _autograd._below_autograd(op, *inputs, *(None,) * 6, *SCALARS),
        "cuda: torch's allocation of what it makes": lambda: [like.new_empty(shape) for shape in shapes],
    }


def triton_pieces(inputs: tuple[Any, ...]) -> Pieces:
    ops = importlib.import_module("linformer_kernels.triton_kernels.ops")
    op = torch.ops.linformer_kernels.attention.triton
    arguments = (*inputs, *(None,) * 6, *SCALARS)
    linformer_attention(*inputs, backend="triton")  # makes the plan and compiles
    (plan,) = ops._PLANS.values()
    results = ops.attention(*arguments)
    idle = idle_op(results)
    tensors: list[Any] = []
    usual, ops.launch = ops.launch, lambda one, these: tensors.append(these)
    ops.attention(*arguments)
    ops.launch = usual
    (launch,) = plan._launches
    return {
        "triton: linformer_attention": lambda: linformer_attention(*inputs, backend="triton"),
        "triton: the op": lambda: _autograd._below_autograd(op, *arguments),
        "triton: torch's dispatch of an op in Python": lambda: _autograd._below_autograd(idle, *arguments),
        "triton: torch's allocation of what it makes": plan.make,
        "triton: Triton's launcher": lambda: launch.run(tensors[0]),
    }


@contextmanager
def prepared(names: list[str]) -> Iterator[Pieces]:
    size = SIZES
    shape = (size["batch"], size["heads"], size["length"], size["head_dim"])
    rows = [torch.randn(shape).bfloat16() for _ in range(3)]
    inputs = (*rows, torch.randn(size["proj_dim"], size["length"]).bfloat16())
    pieces: Pieces = {}
    with stubbed.stubbed(90, 132) if "triton" in names else emulated.unlaunched():
        if "triton" in names:
            pieces |= triton_pieces(inputs)
        with emulated.unlaunched():
            if "cuda" in names:
                pieces |= cuda_pieces(inputs)
            yield pieces


def why_not(name: str) -> str | None:
    """Why there is nothing to time for a backend here."""
    if name == "cuda":
        missing = _library.load() or ("" if _library.cuda_architectures() else "the library has no CUDA kernels")
        return missing or None
    return _backends.triton_problem() or stubbed.why_not()


def microseconds(pieces: Pieces, rounds: int, seconds: float) -> dict[str, list[float]]:
    """CPU time a call, `rounds` samples of each piece, in turn."""
    calls = {}
    for name, call in pieces.items():
        for _ in range(20):
            call()
        began = time.process_time()
        for _ in range(100):
            call()
        calls[name] = max(100, int(seconds / max((time.process_time() - began) / 100, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in pieces}
    for _ in range(rounds):
        for name, call in pieces.items():
            began = time.process_time()
            for _ in range(calls[name]):
                call()
            samples[name].append(1e6 * (time.process_time() - began) / calls[name])
    return samples


def main(options: argparse.Namespace) -> list[dict[str, Any]]:
    names = []
    for name in ("cuda", "triton"):
        if reason := why_not(name):
            print(f"{name}: {reason}")
        else:
            names.append(name)
    print(", ".join(f"{name} {value}" for name, value in SIZES.items()), end=", bfloat16, ")
    print(f"forward without gradients, us of CPU time a call: median, least and most of {options.rounds} rounds")
    results = []
    if names:
        with prepared(names) as pieces:
            for name, samples in microseconds(pieces, options.rounds, options.round_time).items():
                print(f"{name:<46} {statistics.median(samples):7.1f}   {min(samples):7.1f} {max(samples):7.1f}")
                results.append({"name": name, "microseconds": samples})
    return results
