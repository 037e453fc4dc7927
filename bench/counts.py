"""`python -m bench.counts`: what the CUDA kernels do, counted without a GPU. Counts and bounds, never measured times.

The compiled kernels of the built library run in the tests' emulator (tests/emulator), which counts their work; the
compiler's own figures come from cuobjdump. Divided by published rates each count gives a time below which no GPU of
that kind can be: the largest of these bounds names the resource that limits the kernel.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import emulated
import torch

from bench import cost, options
from bench.candidates import make_inputs
from linformer_kernels import linformer_attention
from linformer_kernels._library import path

NOTES = """\
needed FLOP and floor bytes: python -m bench explains them. unique: device bytes with a perfect L2, 32-byte sectors,
each counted once, and what a launch writes and reads again is not read from the device. L2: sectors between L2 and
multiprocessors, a request at a time; hits in L1 are not modelled, so it is an upper count; polls of counters are left
out. conflicts: wavefronts of shared memory beyond the least. instr: warp instructions of PTX for each tensor
instruction. bound: the longest of count / rate; the rates are NVIDIA's published peaks; nothing reaches them."""


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
        polls = sum(line["sectors"] for line in stats.lines if line["op"].startswith("ld.acquire"))
        self.l2_bytes += 32 * (sectors - polls)
        self.wavefronts += stats.shared_wavefronts
        self.conflicts += stats.bank_conflicts
        self.warp_instructions += stats.warp_instructions
        self.tensor_instructions += sum(line["warps"] for line in stats.lines if line["op"].startswith("mma."))
        self.special += stats.by_class.get("special_f32", 0)


def count(cell: options.Cell, gpu: Gpu) -> tuple[list[tuple[str, Counts, int]], int]:
    """Each launch with its counts and bytes of shared memory, and how many launches the forward has."""
    inputs = make_inputs(cell, "cpu")
    with emulated.emulated(gpu.arch, gpu.multiprocessors, races=False) as run:
        out = linformer_attention(*inputs.tensors, backend="cpu")
        forward = len(run.kernels)
        if cell.op == "full":
            out.backward(torch.randn_like(out))
    launches = []
    for name, stats, shared in zip(run.kernels, run.stats, run.shared, strict=True):
        counts = Counts(cell.dtype == "float32")
        counts.add(stats)
        launches.append((name, counts, shared))
    return launches, forward


def resources(arch: int) -> dict[str, dict[str, int]]:
    """Registers, stack and static shared memory of each kernel, as compiled for the architecture."""
    text = subprocess.run([emulated.cuobjdump(), "-res-usage", str(path())], capture_output=True, text=True).stdout
    found: dict[str, dict[str, int]] = {}
    current = None
    for line in text.splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            current = int(match.group(1))
        if match := re.search(r"Function (\w+):", line):
            name = match.group(1)
        if current == arch and "REG:" in line:
            found[name] = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.counts", description=__doc__.split("\n")[0])
    parser.add_argument("--op", type=options.names("fwd full"), default=["fwd"], help="fwd, full")
    parser.add_argument("--dtype", type=options.names("float32 bfloat16 float16"), default=["bfloat16"])
    parser.add_argument("--seq-len", type=options.sizes, default=[512, 1000, 4096])
    parser.add_argument("--proj-dim", type=options.sizes, default=[128, 256])
    parser.add_argument("--head-dim", type=options.sizes, default=[64])
    parser.add_argument("--batch", type=options.sizes, default=[1])
    parser.add_argument("--heads", type=options.sizes, default=[8])
    parser.add_argument("--sharing", type=options.names("headwise key_value none"), default=["headwise"])
    parser.add_argument("--gpu", choices=[gpu.name for gpu in GPUS], default="A100")
    parser.add_argument("--csv", help="write the rows here")
    settings = parser.parse_args()
    if reason := emulated.why_not():
        sys.exit(f"nothing to count: {reason}")
    gpu = next(gpu for gpu in GPUS if gpu.name == settings.gpu)
    compiled = resources(gpu.arch)
    print(NOTES, "", sep="\n")
    rows = []
    for cell in options.cells(settings):
        launches, forward = count(cell, gpu)
        total = Counts(cell.dtype == "float32")
        for _, counts, _ in launches:
            for name in vars(counts):
                if name != "wide":
                    setattr(total, name, getattr(total, name) + getattr(counts, name))
        products = 3 if total.wide else 1  # 3 TF32 products for one of fp32
        print(f"{cell}: {len(launches)} launches, {forward} of them forward")
        floor = cost.floor_bytes(cell)
        for name, counts, shared in [*launches, ("all", total, 0)]:
            bounds = gpu.bounds(counts)
            tightest = max(bounds, key=bounds.__getitem__)
            row = {
                "cell": str(cell), "kernel": name,
                "tensor_flop": counts.tensor_flop, "unique_bytes": counts.unique_bytes,
                "l2_bytes": counts.l2_bytes, "conflicts": counts.conflicts, "wavefronts": counts.wavefronts,
                "instructions_a_tensor_instruction": counts.warp_instructions / max(counts.tensor_instructions, 1),
                **{f"bound_us_{key}": 1e6 * value for key, value in bounds.items()}, **compiled.get(name, {}),
            }  # fmt: skip
            if "REG" in row:  # CTAs of 256 threads that fit by registers and by shared memory
                row["shared_bytes"] = shared
                row["ctas_a_multiprocessor"] = min(
                    2**16 // (256 * -(-row["REG"] // 8) * 8), emulated.SHARED_BYTES[gpu.arch] // shared
                )
            if name == "all":
                row["tensor_flop_x_needed"] = counts.tensor_flop / (products * cost.flop(cell))
                row["unique_bytes_x_floor"] = counts.unique_bytes / floor
                row["l2_bytes_x_floor"] = counts.l2_bytes / floor
            rows.append(row)
            print(
                f"  {name.removeprefix('linformer_'):28} {counts.tensor_flop / 1e9:8.3f} GFLOP  "
                f"unique {counts.unique_bytes / 2**20:7.2f} MiB  L2 {counts.l2_bytes / 2**20:7.2f} MiB  "
                f"conflicts {counts.conflicts:,} of {counts.wavefronts:,}  "
                f"instr {row['instructions_a_tensor_instruction']:.1f}  "
                f"bound {1e6 * bounds[tightest]:.1f} us by {tightest} (tensor {1e6 * bounds['tensor']:.1f})"
                + (
                    f"  {row['REG']} registers, stack {row['STACK']}, {shared:,} bytes shared, "
                    f"{row['ctas_a_multiprocessor']} CTA a multiprocessor"
                    if "REG" in row
                    else ""
                )
            )
        print(
            f"  tensor FLOP {row['tensor_flop_x_needed']:.3f} x needed, unique bytes "
            f"{row['unique_bytes_x_floor']:.2f} x floor, L2 bytes {row['l2_bytes_x_floor']:.2f} x floor\n",
            flush=True,
        )
    if settings.csv:
        with open(settings.csv, "w", newline="") as file:
            keys = list(dict.fromkeys(key for row in rows for key in row))
            writer = csv.DictWriter(file, keys)
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
