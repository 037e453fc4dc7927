"""What one launch did: sums over the counters of its instructions."""

from __future__ import annotations

import re
from collections import Counter

_SPECIAL = ("ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh")
_CLASSES = {  # by the first word of the opcode
    "mma": "tensor",
    "mbarrier": "mbarrier",
    "setp": "compare",
    "set": "compare",
    "selp": "select",
    **dict.fromkeys(("ldmatrix", "stmatrix", "movmatrix", "mov", "cvt", "prmt"), None),  # a class of their own
    **dict.fromkeys(("shfl", "vote", "match", "redux", "elect", "activemask"), "warp_collective"),
    **dict.fromkeys(("bra", "brx", "call", "ret", "exit", "trap"), "control"),
    **dict.fromkeys(("fence", "membar", "cvta", "tensormap", "griddepcontrol", "nanosleep"), "misc"),
    **dict.fromkeys(("createpolicy", "setmaxnreg", "isspacep", "prefetch"), "misc"),
    **dict.fromkeys(("mapa", "getctarank"), "misc"),
}


def classify(opcode: str, space: str) -> str:
    """The class under which `Stats.by_class` counts an instruction."""
    words = opcode.split(".")
    name, kind = words[0], words[-1]
    if name in ("ld", "st", "atom", "red"):
        access = {"ld": "load", "st": "store"}.get(name, "atomic")
        return f"{access}_{space}"
    if name == "wgmma":
        return "tensor" if "mma_async" in words else "tensor_sync"
    if name == "cp":
        return "tma" if "bulk" in words else "cp_async"
    if name in ("bar", "barrier"):
        return "warp_sync" if "warp" in words else "barrier"
    if name in _CLASSES:
        return _CLASSES[name] or name
    if name in _SPECIAL or (name == "div" and kind[0] == "f"):
        return f"special_{kind}"
    return f"float_{kind}" if kind in ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2") else "int"


def _tensor_flops(opcode: str) -> int:
    """Of one warp."""
    m, n, k = map(int, re.search(r"\.m(\d+)n(\d+)k(\d+)", opcode).groups())
    return 2 * (16 if opcode.startswith("wgmma") else m) * n * k  # four warps share one wgmma


class Stats:
    """Instruction counts are of executed PTX instructions. `buffers` holds the unique 32-byte sectors of each array."""

    def __init__(self, raw: dict):
        self.raw, self.issues, self.lines = raw, raw["issues"], raw["lines"]
        self.warp_steps, self.resident, self.shared_bytes = raw["steps"], raw["resident"], raw["shared_bytes"]
        self.grid: tuple[int, int, int] = (0, 0, 0)
        self.block: tuple[int, int, int] = (0, 0, 0)
        self.buffers = {
            name: {"size": size, "read_bytes": 32 * read, "write_bytes": 32 * written}
            for name, size, read, written in raw["buffers"]
        }
        self.unique_read_bytes = sum(buffer["read_bytes"] for buffer in self.buffers.values())
        self.unique_write_bytes = sum(buffer["write_bytes"] for buffer in self.buffers.values())
        self.by_class: Counter[str] = Counter()
        self.by_opcode: Counter[str] = Counter()
        self.tensor_flops = self.float_flops = 0
        self.global_read_sectors = self.global_write_sectors = self.global_atomic_sectors = self.global_requests = 0
        for line in self.lines:
            self._add(line)
        self.thread_instructions = sum(line["threads"] for line in self.lines)
        self.warp_instructions = sum(line["warps"] for line in self.lines)
        self.shared_wavefronts = sum(line["wavefronts"] for line in self.lines)
        self.shared_ideal_wavefronts = sum(line["ideal"] for line in self.lines)

    def _add(self, line: dict) -> None:
        opcode, threads, sectors = line["op"], line["threads"], line["sectors"]
        words = opcode.split(".")
        name, kind = words[0], words[-1]
        group = classify(opcode, line["space"])
        self.by_class[group] += threads
        self.by_opcode[opcode] += threads
        if sectors:
            self.global_requests += line["requests"]
        if name in ("atom", "red"):
            self.global_atomic_sectors += sectors
        elif name == "st" or (group == "tma" and words[5:6] == ["global"]):
            self.global_write_sectors += sectors
        else:
            self.global_read_sectors += sectors
        if group == "tensor":
            self.tensor_flops += _tensor_flops(opcode) * (threads // 32)
        if group.startswith("float_") and name in ("add", "sub", "mul", "fma", "mad"):
            self.float_flops += threads * (2 if name in ("fma", "mad") else 1) * (2 if kind.endswith("x2") else 1)

    @property
    def bank_conflicts(self) -> int:
        return self.shared_wavefronts - self.shared_ideal_wavefronts

    def kinds(self) -> list[str]:
        """The kinds of issues that were seen, soft ones included."""
        return sorted({issue["kind"] for issue in self.issues})

    def hot(self, n: int = 10, key: str = "threads") -> list[dict]:
        """The n PTX instructions with the largest count of threads, sectors, wavefronts..."""
        return sorted(self.lines, key=lambda line: -line[key])[:n]

    def summary(self) -> str:
        top = ", ".join(f"{name} {count:,}" for name, count in self.by_class.most_common())
        return (
            f"{self.thread_instructions:,} thread instructions ({self.warp_instructions:,} of warps): {top}\n"
            f"global sectors read {self.global_read_sectors:,} written {self.global_write_sectors:,} "
            f"atomic {self.global_atomic_sectors:,}; "
            f"unique bytes read {self.unique_read_bytes:,} written {self.unique_write_bytes:,}\n"
            f"shared wavefronts {self.shared_wavefronts:,} (ideal {self.shared_ideal_wavefronts:,}); "
            f"tensor FLOP {self.tensor_flops:,}; float FLOP {self.float_flops:,}; issues {self.kinds()}"
        )
