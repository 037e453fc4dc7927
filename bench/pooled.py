"""Attention to means over segments against the learned projection and against PyTorch's own operators, in turn.

    python -m bench.pooled
    python -m bench.pooled --dtype bf16 --seq-len 1k,4k --json build/pooled.json

CPU time of one thread, medians; ratios are to `pooled`. Segments are those of kind "adaptive": `choice` is the time to
choose them, once for a forward pass. `torch` is index_add over all heads, a division and SDPA with log(count) as its
bias. Each answer is compared with float64 first, by the rule of the tests.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench import machine, options
from bench.candidates import Inputs, exact, make_inputs
from bench.check import norms
from bench.measure import Runner, Stopwatch, percentiles, take_samples
from linformer_kernels import linformer_attention, pooled_attention

SINGLES = 0.375


def in_torch(query: Tensor, key: Tensor, value: Tensor, segments: Tensor, k: int) -> Tensor:
    """As a user writes it who has looked for the fastest way: one index_add for all heads, of rows as they lie."""
    b, h, n, d = key.shape
    place = (torch.arange(b * h).view(b, h, 1) * k + segments).transpose(1, 2).reshape(-1)
    count = torch.bincount(place, minlength=b * h * k).to(key.dtype)

    def mean(rows: Tensor) -> Tensor:
        total = rows.new_zeros(b * h * k, d).index_add(0, place, rows.transpose(1, 2).reshape(-1, d))
        return (total / count.clamp(min=1)[:, None]).view(b, h, k, d)

    bias = count.log().view(b, h, 1, k).expand(-1, -1, n, -1)
    return scaled_dot_product_attention(query, mean(key), mean(value), attn_mask=bias)


def calls(cell: options.Cell, inputs: Inputs) -> dict[str, Callable[..., Any]]:
    query, key = (tensor.detach() for tensor in inputs.tensors[:2] if tensor is not None)
    k = cell.proj_dim
    choose = torch.ops.linformer_kernels.choose_segments
    sizes = k, int(SINGLES * k), 1, 1
    segments = choose(query, key, None, None, None, *sizes)
    made: dict[str, Callable[..., Any]] = {
        "pooled": lambda q, k_, v, *_: pooled_attention(q, k_, v, segments, k),
        "torch": lambda q, k_, v, *_: in_torch(q, k_, v, segments, k),
        "learned": linformer_attention,
        "exact": exact,
    }
    check(cell, inputs, segments, made)
    if cell.op == "fwd":
        made["choice"] = lambda q, k_, *_: choose(q, k_, None, None, None, *sizes)
    return made


def check(cell: options.Cell, inputs: Inputs, segments: Tensor, made: dict[str, Callable[..., Any]]) -> None:
    """That ours is no further from float64 than twice what PyTorch's is, and roundings."""
    rows = [tensor.detach() for tensor in inputs.tensors[:3] if tensor is not None]
    want = in_torch(*(x.double() for x in rows), segments, cell.proj_dim)  # type: ignore[call-arg]
    ours, plain = (norms(made[name](*rows).double() - want) for name in ("pooled", "torch"))
    unit = torch.finfo(cell.torch_dtype).eps + 4 * torch.finfo(torch.float32).eps
    for norm, size in norms(want).items():
        if ours[norm] > 2 * plain[norm] + unit * size:
            sys.exit(f"{cell}: {norm} error {ours[norm]:.2e}, of PyTorch's {plain[norm]:.2e}")


def measure(cell: options.Cell, settings: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds a call of each, and how many samples were beside a slow phase of the machine."""
    inputs = make_inputs(cell, "cpu")
    runners = {
        name: Runner(call, inputs, "fwd" if name == "choice" else cell.op, exact=name != "learned")
        for name, call in calls(cell, inputs).items()
        if name not in settings.without
    }
    for runner in runners.values():
        runner.run(runner.prepare())
    samples = take_samples(runners, Stopwatch(settings), settings, lambda _: None)
    return {
        name: {"seconds": percentiles(one.seconds)[1], "counted": len(one.counted), "slow": len(one.slow)}
        for name, one in samples.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.pooled", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--op", type=options.names("fwd full"), default=["fwd", "full"])
    parser.add_argument("--dtype", type=options.names("float32 bfloat16 float16"), default=["float32"])
    parser.add_argument("--seq-len", type=options.sizes, default=[512, 1024, 4096, 16384])
    parser.add_argument("--proj-dim", type=options.sizes, default=[128])
    parser.add_argument("--without", type=lambda text: text.split(","), default=[], help="names to leave out, as exact")
    parser.add_argument("--cell-time", type=options.positive, default=8.0, help="seconds of samples a cell, about")
    parser.add_argument("--repeats", type=options.size, default=21, help="samples of each, at most")
    parser.add_argument("--json", type=Path, help="file to write")
    settings = parser.parse_args()
    options.check_files(parser, settings.json)
    vars(settings).update(device="cpu", clock="cpu", flush=False, min_time=0.02, probe=0.75)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{machine.cpu_name()}, load {machine.load_average()}, torch {torch.__version__}")
    results = []
    for op in settings.op:
        for dtype in settings.dtype:
            for k in settings.proj_dim:
                for n in settings.seq_len:
                    cell = options.Cell(op, dtype, 1, 8, k, 64, "headwise", n, "bnhd")
                    found = measure(cell, settings)
                    own = found["pooled"]["seconds"]
                    parts = (
                        f"{name} {one['seconds'] * 1e3:.3f} ms ({one['seconds'] / own:.2f}x)"
                        for name, one in found.items()
                    )
                    print(f"{op} {dtype} N={n} K={k}: " + ", ".join(parts), flush=True)
                    results.append({"op": op, "dtype": dtype, "n": n, "k": k, "times": found})
    if settings.json:
        settings.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
