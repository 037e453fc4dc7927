"""Host time of small calls, ours and scaled_dot_product_attention's of the same query and N, in turn in one run.

    python -m bench.host
    python -m bench.host --json build/host.json
    python -m bench.host --gpu

The first problem is as good as empty: what it takes is the time of the call itself. SDPA attends to N rows, ours to K.
`grad` is the forward pass of tensors that require gradients, `full` that and the backward pass.

With --gpu: the host's part of a call on a GPU, without a GPU; see bench/host_gpu.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench import machine
from bench.measure import Samples, Stopwatch, percentiles, take_samples
from bench.options import check_files
from linformer_kernels import linformer_attention

PROBLEMS = ((1, 1, 1, 8, 8), (1, 1, 16, 8, 8), (1, 12, 128, 32, 64), (8, 12, 128, 32, 64), (8, 12, 512, 64, 64))
MODES = ("no_grad", "grad", "full")


class HostRunner:
    """`calls` calls in a row."""

    def __init__(self, call: Callable[..., Tensor], inputs: list[Tensor], mode: str, calls: int) -> None:
        self.call, self.mode, self.calls = call, mode, calls
        self.inputs = [tensor.detach().requires_grad_(mode != "no_grad") for tensor in inputs]
        self.grad_out = torch.ones_like(inputs[0])

    def prepare(self) -> None:
        return None

    def run(self, _: None) -> None:
        with torch.set_grad_enabled(self.mode != "no_grad"):
            for _call in range(self.calls):
                out = self.call(*self.inputs)
                if self.mode == "full":
                    torch.autograd.grad(out, self.inputs, self.grad_out)


def measure(problem: tuple[int, ...], mode: str, options: argparse.Namespace) -> dict[str, Samples]:
    """Samples of one problem, in seconds a call."""
    b, h, n, k, d = problem
    rows = [torch.randn(b, n, h, d).to(getattr(torch, options.dtype)).transpose(1, 2) for _ in range(3)]
    proj = (torch.randn(k, n) / n**0.5).to(rows[0].dtype)
    calls = max(1, 400 // (b * h * n))
    runners = {
        "sdpa": HostRunner(scaled_dot_product_attention, rows, mode, calls),
        "ours": HostRunner(linformer_attention, [*rows, proj], mode, calls),
    }
    for runner in runners.values():
        for _ in range(10):
            runner.run(runner.prepare())
    samples = take_samples(runners, Stopwatch(options), options, lambda done: None)
    for one in samples.values():
        one.counted[:] = [seconds / calls for seconds in one.counted]
        one.slow[:] = [seconds / calls for seconds in one.slow]
    return samples


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.split("\n")[0])
    parser.add_argument("--mode", default=",".join(MODES), help="no_grad, grad, full (default: all)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="cpu", help="cpu: time of the process")
    parser.add_argument("--repeats", type=int, default=100, help="samples of each")
    parser.add_argument("--cell-time", type=float, default=2.0, help="seconds a line, about")
    parser.add_argument("--probe", type=float, default=0.75, help="as in python -m bench")
    parser.add_argument("--json", type=Path, help="write the samples to this file")
    parser.add_argument("--gpu", action="store_true", help="the backends for GPUs, up to the driver; without a GPU")
    parser.add_argument("--rounds", type=int, default=7, help="with --gpu: samples of each, in turn")
    parser.add_argument("--round-time", type=float, default=0.2, help="with --gpu: seconds of a sample, about")
    options = parser.parse_args(arguments)
    if not set(options.mode.split(",")) <= set(MODES):
        parser.error(f"--mode is {options.mode}; wanted: {', '.join(MODES)}, or some of them")
    check_files(parser, options.json)
    options.device, options.flush, options.min_time = "cpu", False, 1e-4
    torch.set_num_threads(1)
    about = machine.facts(options)
    print(", ".join(f"{name} {value}" for name, value in about.items() if value is not None))
    if options.gpu:
        os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where nobody has chosen
        from bench import host_gpu  # it needs the tests' stub of a driver

        return write(options, about, host_gpu.main(options))
    print(f"{options.dtype}, one thread, us a call: medians, and how many samples counted of how many")
    results: list[dict[str, Any]] = []
    for problem in PROBLEMS:
        for mode in options.mode.split(","):
            samples = measure(problem, mode, options)
            medians = {name: percentiles(one.seconds)[1] for name, one in samples.items()}
            counted = ", ".join(f"{len(one.counted)}/{len(one.counted + one.slow)}" for one in samples.values())
            sizes = " ".join(f"{letter}={size}" for letter, size in zip("BHNKD", problem, strict=True))
            print(
                f"{sizes:<28} {mode:<8} sdpa {1e6 * medians['sdpa']:9.1f}   ours {1e6 * medians['ours']:9.1f}   "
                f"{medians['ours'] / medians['sdpa']:5.2f} x   {counted}",
                flush=True,
            )
            for name, one in samples.items():
                results.append(
                    {"problem": sizes, "mode": mode, "name": name, "seconds": one.counted, "slow_seconds": one.slow}
                )
    write(options, about, results)


def write(options: argparse.Namespace, about: dict[str, Any], results: list[dict[str, Any]]) -> None:
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        options.json.write_text(
            json.dumps({"machine": about, "options": settings, "results": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    sys.exit(main())
