"""`python -m bench.counts`: what the GPU kernels do, counted without a GPU. Counts and bounds, never measured times.

The CUDA kernels of the built library and the Triton kernels, compiled as on a GPU, run in the tests' emulator
(tests/emulator), which counts their work; beside them a plain Triton kernel of exact attention, to set linear against
quadratic. The compilers' own figures come from cuobjdump and ptxas. Divided by published rates each count gives a time
below which no GPU of that kind can be: the largest of these bounds names the resource that limits the kernel.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.util
import os
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where nobody has chosen

import emulated
from emulator.kernels import SHARED_LIMIT_KIB
from emulator.stats import classify

from bench import cost, options, plot
from bench.candidates import Inputs, make_inputs
from linformer_kernels import _backends, linformer_attention, pooled_attention

NOTES = """\
needed FLOP and floor bytes: python -m bench explains them; those of exact attention are its own. unique: device bytes
with a perfect L2, 32-byte sectors, each counted once, and what a launch writes and reads again is not read from the
device. L2: sectors between L2 and multiprocessors, a request at a time; hits in L1 are not modelled, so it is an upper
count; polls of counters are left out. conflicts: wavefronts of shared memory beyond the least; what wgmma reads itself
is not among them. instr: warp instructions of PTX for each tensor instruction, of which a wgmma is a large one. bound:
the longest of count / rate; the rates are NVIDIA's published peaks; nothing reaches them."""
BACKENDS = ("cuda", "triton", "exact")


@dataclass(frozen=True)
class Gpu:
    """Published rates; a second."""

    name: str
    arch: int
    multiprocessors: int
    clock: float
    tensor_16: float  # FLOP, 16-bit inputs
    device_bytes: float
    l2_bytes_a_clock: float

    def bounds(self, counts: Counts) -> dict[str, float]:
        """Seconds by resource. TF32 runs at half the rate of 16 bits; a multiprocessor has 4 schedulers, one shared
        memory wavefront and 16 special functions a clock."""
        clocks = self.clock * self.multiprocessors
        return {
            "tensor": counts.tensor_flop / (self.tensor_16 / (2 if counts.wide else 1)),
            "device memory": counts.unique_bytes / self.device_bytes,
            "L2": counts.l2_bytes / (self.l2_bytes_a_clock * self.clock),
            "shared memory": counts.wavefronts / clocks,
            "issue": counts.warp_instructions / (4 * clocks),
            "exponentials": counts.special / (16 * clocks),
        }


GPUS = (
    Gpu("A100", 80, 108, 1.41e9, 312e12, 2.039e12, 5120),
    Gpu("H100", 90, 132, 1.83e9, 989e12, 3.35e12, 5120),
)


@dataclass
class Counts:
    wide: bool
    tensor_flop: int = 0
    unique_bytes: int = 0
    l2_bytes: int = 0
    wavefronts: int = 0
    conflicts: int = 0
    warp_instructions: int = 0
    tensor_instructions: int = 0
    special: int = 0

    def add(self, stats) -> None:  # type: ignore[no-untyped-def]
        self.tensor_flop += stats.tensor_flops
        # What a launch itself writes it reads out of L2: once, not twice.
        self.unique_bytes += sum(
            max(b["read_bytes"], b["write_bytes"]) if b["write_bytes"] else b["read_bytes"]
            for b in stats.buffers.values()
        )
        sectors = stats.global_read_sectors + stats.global_write_sectors + stats.global_atomic_sectors
        polls = sum(line["sectors"] for line in stats.lines if {"ld", "acquire"} <= set(line["op"].split(".")))
        self.l2_bytes += 32 * (sectors - polls)
        self.wavefronts += stats.shared_wavefronts
        self.conflicts += stats.bank_conflicts
        self.warp_instructions += stats.warp_instructions
        self.tensor_instructions += sum(
            line["warps"] for line in stats.lines if classify(line["op"], line["space"]) == "tensor"
        )
        self.special += stats.by_class.get("special_f32", 0)

    def __add__(self, other: Counts) -> Counts:
        sums = {field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)[1:]}
        return Counts(self.wide, **sums)


@dataclass(frozen=True)
class Launch:
    kernel: str
    counts: Counts
    threads: int
    registers: int
    stack: int
    shared: int

    def ctas(self, gpu: Gpu) -> int:
        """That fit on a multiprocessor; each takes 1 KiB of shared memory beside its own."""
        registers = -(-self.registers // 8) * 8 * self.threads
        shared = 1024 * (SHARED_LIMIT_KIB[gpu.arch] + 1) // (self.shared + 1024)
        return min(2**16 // registers, 2048 // self.threads, shared)


def count(backend: str, cell: options.Cell, gpu: Gpu) -> tuple[list[Launch], int]:
    """Each launch, and how many of them are of the forward."""
    if backend == "exact":  # K and the sharing are nothing to it
        return _count(backend, replace(cell, proj_dim=1, sharing="key_value"), gpu)
    return _count(backend, cell, gpu)


@functools.cache
def _count(backend: str, cell: options.Cell, gpu: Gpu) -> tuple[list[Launch], int]:
    return _count_cuda(cell, gpu) if backend == "cuda" else _count_triton(backend, cell, gpu)


def _count_cuda(cell: options.Cell, gpu: Gpu) -> tuple[list[Launch], int]:
    inputs = make_inputs(cell, "cpu")
    with emulated.emulated(gpu.arch, gpu.multiprocessors, races=False) as run:
        forward = _call(cell, inputs, "cpu", run)
    compiled = {name: of for (arch, name), of in emulated.resources().items() if arch.rstrip("a") == str(gpu.arch)}
    launches = []
    for name, stats, shared in zip(run.kernels, run.stats, run.shared, strict=True):
        of = compiled[name]
        launches.append(_launch(name, cell, stats, of["REG"], of["STACK"], shared + of["SHARED"]))
    return launches, forward


def _count_triton(backend: str, cell: options.Cell, gpu: Gpu) -> tuple[list[Launch], int]:
    import emulated_triton

    inputs = make_inputs(cell, "cpu")
    with emulated_triton.emulated(gpu.arch, gpu.multiprocessors, races=False) as run:
        if backend == "exact":
            from bench.exact_triton import exact_attention

            exact_attention(*inputs.tensors[:3])
            forward = 1
        else:
            forward = _call(cell, inputs, backend, run)
    launches = []
    for name, stats, compiled in zip(run.kernels, run.stats, run.compiled, strict=True):
        of = emulated_triton.resources(compiled)
        launches.append(_launch(name, cell, stats, of["REG"], of["STACK"], of["shared"]))
    return launches, forward


def _call(cell: options.Cell, inputs: Inputs, backend: str, run: Any) -> int:
    """Run the cell; how many launches the forward has."""
    if cell.sharing == "pooled":  # windows, and so a bias: log(count)
        segments = torch.arange(cell.seq_len) * min(cell.proj_dim, cell.seq_len) // cell.seq_len
        rows, k = inputs.tensors[:3], cell.proj_dim
        out = pooled_attention(*rows, segments.expand(cell.batch, -1), k, backend=backend)
    else:
        out = linformer_attention(*inputs.tensors, backend=backend)
    forward = len(run.kernels)
    if cell.op == "full":
        out.backward(inputs.grad_out)
    return forward


def _launch(name: str, cell: options.Cell, stats: Any, registers: int, stack: int, shared: int) -> Launch:
    counts = Counts(cell.dtype == "float32")
    counts.add(stats)
    return Launch(name, counts, stats.block[0], registers, stack, shared)


def why_not(backend: str) -> str | None:
    """The reason why nothing of a backend can be counted here."""
    if backend == "cuda":
        return emulated.why_not()
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if _backends.interpreting():
        return "Triton's interpreter compiles nothing; unset TRITON_INTERPRET"
    return _backends.triton_problem()


def refuses(backend: str, cell: options.Cell) -> str | None:
    """Why a backend that is there does not count this cell."""
    if backend != "exact":
        return None
    from bench.exact_triton import why_not

    return "it has a forward only" if cell.op == "full" else why_not(cell.head_dim, cell.torch_dtype.itemsize)


def rows_of(backend: str, cell: options.Cell, gpu: Gpu) -> list[dict[str, Any]]:
    """A row for each launch, and one for all of them."""
    launches, forward = count(backend, cell, gpu)
    rows = []
    for launch in launches:
        own = {
            "registers": launch.registers, "stack": launch.stack, "shared_bytes": launch.shared,
            "ctas_a_multiprocessor": launch.ctas(gpu),
        }  # fmt: skip
        rows.append(_row(backend, cell, launch.kernel, launch.counts, gpu) | own)
    total = sum((launch.counts for launch in launches), Counts(cell.dtype == "float32"))
    exact = backend == "exact"
    products = 3 if total.wide else 1  # 3 TF32 products for one of fp32
    floor = cost.floor_bytes(cell, exact)
    rows.append(
        _row(backend, cell, "all", total, gpu)
        | {
            "launches": len(launches),
            "forward_launches": forward,
            "tensor_flop_x_needed": total.tensor_flop / (products * cost.flop(cell, exact)),
            "unique_bytes_x_floor": total.unique_bytes / floor,
            "l2_bytes_x_floor": total.l2_bytes / floor,
        }
    )
    return rows


def _row(backend: str, cell: options.Cell, kernel: str, counts: Counts, gpu: Gpu) -> dict[str, Any]:
    bounds = gpu.bounds(counts)
    return {
        "cell": cell, "backend": backend, "kernel": kernel,
        "tensor_flop": counts.tensor_flop, "unique_bytes": counts.unique_bytes, "l2_bytes": counts.l2_bytes,
        "conflicts": counts.conflicts, "wavefronts": counts.wavefronts,
        "warp_instructions": counts.warp_instructions,
        "instructions_a_tensor_instruction": counts.warp_instructions / max(counts.tensor_instructions, 1),
        "bound_us": 1e6 * max(bounds.values()), "bound_by": max(bounds, key=bounds.__getitem__),
        **{f"bound_us_{name}": 1e6 * value for name, value in bounds.items()},
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    name = f"{row['backend']} {row['kernel'].removeprefix('linformer_')}"
    text = (
        f"  {name:30} {row['tensor_flop'] / 1e9:8.3f} GFLOP  unique {row['unique_bytes'] / 2**20:7.2f} MiB  "
        f"L2 {row['l2_bytes'] / 2**20:7.2f} MiB  conflicts {row['conflicts']:,} of {row['wavefronts']:,}  "
        f"instr {row['instructions_a_tensor_instruction']:.1f}  "
        f"bound {row['bound_us']:.1f} us by {row['bound_by']} (tensor {row['bound_us_tensor']:.1f})"
    )
    if row["kernel"] != "all":
        return text + (
            f"  {row['registers']} registers, stack {row['stack']}, {row['shared_bytes']:,} bytes shared, "
            f"{row['ctas_a_multiprocessor']} CTA a multiprocessor"
        )
    return text + (
        f"\n    launches {row['launches']}, of the forward {row['forward_launches']}; tensor FLOP "
        f"{row['tensor_flop_x_needed']:.3f} x needed, unique bytes {row['unique_bytes_x_floor']:.2f} x floor, "
        f"L2 bytes {row['l2_bytes_x_floor']:.2f} x floor"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.counts", description=__doc__.split("\n")[0])
    parser.add_argument("--backend", type=options.names(" ".join(BACKENDS)), help="cuda, triton, exact (default: all)")
    parser.add_argument("--op", type=options.names("fwd full"), default=["fwd"], help="fwd, full")
    parser.add_argument("--dtype", type=options.names("float32 bfloat16 float16"), default=["bfloat16"])
    parser.add_argument("--seq-len", type=options.sizes, default=[512, 1000, 4096])
    parser.add_argument("--proj-dim", type=options.sizes, default=[128, 256])
    parser.add_argument("--head-dim", type=options.sizes, default=[64])
    parser.add_argument("--batch", type=options.sizes, default=[1])
    parser.add_argument("--heads", type=options.sizes, default=[8])
    parser.add_argument("--sharing", type=options.names("headwise key_value none pooled"), default=["headwise"])
    parser.add_argument("--gpu", choices=[gpu.name for gpu in GPUS], default="A100")
    parser.add_argument("--csv", help="write the rows here")
    parser.add_argument("--plot", help="picture to write, of the counts against N")
    settings = parser.parse_args()
    settings.layout = ["bhnd"]
    options.check_files(parser, settings.csv, settings.plot)
    gpu = next(gpu for gpu in GPUS if gpu.name == settings.gpu)
    reasons = {backend: why_not(backend) for backend in settings.backend or BACKENDS}
    for backend, reason in reasons.items():
        if reason is not None:
            print(f"{backend} is not counted: {reason}", file=sys.stderr)
    backends = [backend for backend, reason in reasons.items() if reason is None]
    if not backends:
        return 1
    print(NOTES, "", sep="\n")
    rows: list[dict[str, Any]] = []
    for cell in options.cells(settings):
        print(f"{cell}, {gpu.name}")
        for backend in backends:
            if reason := refuses(backend, cell):
                print(f"  {backend} is not counted: {reason}")
                continue
            found = rows_of(backend, cell, gpu)
            rows += found
            print(*map(line, found), sep="\n", flush=True)
        print()
    if settings.csv:
        with open(settings.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
    if settings.plot and (remark := plot.draw_counts(settings.plot, rows, gpu.name)):
        print(remark)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
