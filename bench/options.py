"""The command line: names and comma lists in, a grid of cells out."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "layerwise": "key_value"}
SUFFIXES = {"k": 1024, "m": 1024**2}


@dataclass(frozen=True)
class Cell:
    """One point of the grid; the fields are in the order of `GRID`."""

    op: str
    dtype: str
    batch: int
    heads: int
    proj_dim: int
    head_dim: int
    sharing: str
    seq_len: int
    layout: str = "bhnd"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def __str__(self) -> str:
        sizes = f"B={self.batch} H={self.heads} N={self.seq_len} K={self.proj_dim} D={self.head_dim}"
        return f"{self.op} {self.dtype} {sizes} sharing={self.sharing} layout={self.layout}"


def names(valid: str) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        items = [ALIASES.get(item.strip(), item.strip()) for item in text.split(",")]
        for item in items:
            if item not in valid.split():
                raise argparse.ArgumentTypeError(f"unknown name {item!r}; valid: {valid.replace(' ', ', ')}")
        return list(dict.fromkeys(items))

    return parse


def size(text: str) -> int:
    factor = SUFFIXES.get(text[-1:].lower(), 1)
    digits = text[:-1] if factor > 1 else text
    if not digits.isdecimal() or int(digits) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write a positive integer, or 4k for 4096, or 1m")
    return int(digits) * factor


def sizes(text: str) -> list[int]:
    return list(dict.fromkeys(size(item.strip()) for item in text.split(",")))


def positive(text: str) -> float:
    value = float(text)
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def share(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


SHARING_HELP = "headwise (one E, one F), key_value (E = F; layerwise is the same to a single op), none (E, F a head)"
FLASH = torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None
LAYOUT_HELP = "storage of query, key and value: bnhd (B, N, H, D), what linear layers leave; bhnd (B, H, N, D)"
RIVALS_HELP = (
    "eager formula; sdpa_proj: matmul, then SDPA on K', V'; eager_packed, sdpa_packed: the same with one product for "
    "all heads, E @ (N, H * D), unless each head has its E; bmm: E expanded over the batch, so that nothing is copied, "
    "and SDPA; upcast: sdpa_proj in float32, for 16-bit inputs; "
    "compile: torch.compile of eager; exact: SDPA over the whole sequence; "
    "flash: the same by the package flash_attn, for 16-bit inputs on a GPU; none"
)
OURS = "auto cuda triton cpu composed reference"
GRID = (
    ("--op", names("fwd bwd full"), "fwd", "fwd, bwd (backward alone), full (forward and backward)"),
    ("--dtype", names("float32 bfloat16 float16"), "float32", "float32, bfloat16, float16, or fp32, bf16, fp16"),
    ("--batch", sizes, "1", "B"),
    ("--heads", sizes, "8", "H"),
    ("--proj-dim", sizes, "256", "K"),
    ("--head-dim", sizes, "64", "D"),
    ("--sharing", names("headwise key_value none"), "headwise", SHARING_HELP),
    ("--seq-len", sizes, "1k,4k", "N"),
    ("--layout", names("bnhd bhnd"), "bnhd", LAYOUT_HELP),
)
OTHERS = (
    ("--backend", names(OURS), "auto", "list of ours: " + OURS.replace(" ", ", ")),
    (
        "--rivals",
        names("eager sdpa_proj eager_packed sdpa_packed bmm upcast compile exact flash none"),
        "eager,sdpa_proj,eager_packed,sdpa_packed,bmm,upcast,compile,exact" + (",flash" if FLASH else ""),
        RIVALS_HELP,
    ),
    (
        "--capability",
        lambda text: text.split(","),
        None,
        "list of builds of the CPU kernels, timed side by side in place of --backend: avx2, avx512, ...",
    ),
    ("--threads", size, torch.get_num_threads(), "CPU threads, one value"),
    ("--repeats", size, 20, "samples of each candidate, at most"),
    ("--min-time", positive, 0.02, "seconds a sample lasts at least"),
    ("--cell-time", positive, 60.0, "seconds of samples a cell, about; three rounds are made in any case"),
    (
        "--probe",
        share,
        0.75,
        "on a CPU, samples count if a probe of 40 us, before and after, runs at this share of its best; 0: all count",
    ),
    ("--max-seconds", positive, 20.0, "skip a candidate predicted to take longer a call"),
    ("--max-memory", positive, None, "GiB; skip what is predicted to need more (default: 70 %% of what is free)"),
    ("--csv", str, None, "file to write, a line for each result"),
    ("--json", str, None, "file to write, with all samples"),
    ("--plot", str, None, "picture to write, of time and extra memory against N"),
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Times Linformer attention against what PyTorch offers, in one run, sample by sample in turn.",
        epilog="Exit status: 1 if an answer was wrong or a backend of ours failed, 2 for a bad command line, else 0.",
    )
    grid = parser.add_argument_group("grid (comma lists; 4k is 4096)")
    for rows, group in ((GRID, grid), (OTHERS, parser)):
        for flag, kind, default, text in rows:
            text += "" if default is None else " (default: %(default)s)"
            group.add_argument(flag, type=kind, default=default, help=text, metavar="X")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: CPU time, needs --threads 1")
    parser.add_argument(
        "--timing",
        choices=("events", "graph"),
        default="events",
        help="on a GPU: events around calls, which see the host where it is the slower one, or replays of CUDA graphs, "
        "the GPU alone (default: %(default)s)",
    )
    parser.add_argument("--flush", action="store_true", help="sweep the caches before each call")
    parser.add_argument("--dry-run", action="store_true", help="list the cells and their predicted cost, then exit")
    parser.add_argument("--refcheck", action="store_true", help="check the answers against float64, time nothing")

    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    if options.clock == "cpu" and (options.device != "cpu" or options.threads != 1):
        parser.error("--clock cpu counts the time of one CPU thread; add --device cpu --threads 1")
    if options.timing == "graph" and (options.device != "cuda" or options.flush):
        parser.error("--timing graph replays CUDA graphs: add --device cuda, leave out --flush")
    if options.capability and options.device != "cpu":
        parser.error("--capability names builds of the CPU kernels; add --device cpu")
    check_files(parser, options.csv, options.json, options.plot)
    options.max_memory = options.max_memory or 0.7 * free_bytes(options.device) / 2**30
    return options


def check_files(parser: argparse.ArgumentParser, *paths: str | os.PathLike[str] | None) -> None:
    """That they can be written, before hours of measuring."""
    for path in filter(None, paths):
        folder = os.path.dirname(path) or "."
        if not os.path.isdir(folder):
            parser.error(f"cannot write {path}: no such directory")
        if os.path.isdir(path):
            parser.error(f"cannot write {path}: it is a directory; wanted: a file")
        if not os.access(path if os.path.exists(path) else folder, os.W_OK):
            parser.error(f"cannot write {path}: this user may not")


def free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 8 << 30


def cells(options: argparse.Namespace) -> list[Cell]:
    axes = (getattr(options, flag[2:].replace("-", "_")) for flag, *_ in GRID)
    return [Cell(*point) for point in itertools.product(*axes)]
