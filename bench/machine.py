"""The machine: its facts, and the peaks that results are held against, measured here."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import cache
from typing import Any

import torch

PROBE_TRIES = 50


@cache
def native_library() -> str | None:
    """None if the native library is loaded, else the reason."""
    try:
        return importlib.import_module("linformer_kernels._library").load()
    except ImportError as error:
        return str(error)


def facts(options: argparse.Namespace) -> dict[str, Any]:
    cuda = options.device == "cuda"
    reason = native_library()
    capability = torch.backends.cpu.get_cpu_capability()
    if cuda:
        capability = "sm_{}{}".format(*torch.cuda.get_device_capability())
    elif reason is None:
        capability = torch.ops.linformer_kernels.cpu_capability()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if cuda else cpu_name(),
        "capability": capability,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "load_average": load_average(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "peak": peak_source(options.device),
        "native_library": "loaded" if reason is None else reason,
        "clock": "cuda events" if cuda else options.clock,
        "probe": "none"
        if options.device != "cpu" or not options.probe
        else f"samples from {options.probe} of its best",
        "copy_gb_per_s": round(copy_bandwidth(options.device) / 1e9, 1),
    }


_capability = ""


def use_capability(name: str) -> None:
    """Our CPU kernels run on this build from now on; "": on the process's own."""
    global _capability
    if name == _capability:
        return
    if reason := native_library():
        raise RuntimeError(reason)
    found = torch.ops.linformer_kernels.cpu_use_capability(name)
    _capability = name
    if name and found != name:
        use_capability("")
        raise NotImplementedError(f"{name} cannot run here, or does not exist; {found} would run in its place")


class Probe:
    """How fast this processor is at this moment, by 40 us of multiply-adds: shared machines have slow phases, mostly
    while a neighbor uses the other half of the core. What is slow is known by the best rate of the whole run."""

    best = 0.0

    def __init__(self, share: float, device: str) -> None:
        self.active = share > 0 and device == "cpu" and native_library() is None
        self.share = share
        for _ in range(PROBE_TRIES):
            self.rate()

    def rate(self) -> float:
        if not self.active:
            return 0.0
        use_capability("")  # the probes of two builds differ
        rate = torch.ops.linformer_kernels.cpu_probe_gflops()
        Probe.best = max(Probe.best, rate)
        return rate

    def quiet(self, *rates: float) -> bool:
        return min(rates) >= self.share * self.best if self.active else True


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def load_average() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def peak_source(device: str) -> str:
    if device == "cpu" and native_library() is None:
        return "register-only multiply-adds on one thread, times threads"
    return "a square torch.matmul"


def peak_flops(dtype: str, device: str) -> float:
    """FLOP/s that the device can reach, the best of a few tries."""
    if device == "cpu":
        # fp16 is computed in fp32 by every CPU kernel here, and so is bf16 where torch.matmul has no fast path.
        if native_library() is None:
            name = "bfloat16" if dtype == "bfloat16" else "float32"
            measure = torch.ops.linformer_kernels.cpu_peak_gflops
            return max(measure(name) for _ in range(3)) * 1e9 * torch.get_num_threads()
        dtype = "float32"
    size = 1024 if device == "cpu" else 8192
    square = torch.randn(size, size, device=device).to(getattr(torch, dtype))
    return 2 * size**3 / best_seconds(lambda: square @ square, device)


@cache
def copy_bandwidth(device: str) -> float:
    """Bytes read plus bytes written a second, copying a tensor far larger than the caches."""
    source = torch.ones(64 << 20, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source), device)


def best_seconds(call: Callable[[], object], device: str) -> float:
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
