"""Finds and loads the native library, and remembers why it could not."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

_PATH = Path(__file__).with_name("_native.so")


def path() -> Path | None:
    """The native library's file, or None where the package was installed without one."""
    return _PATH if _PATH.exists() else None


@functools.cache
def load() -> str | None:
    """Load the native library once. Returns None when it is loaded, else the reason why not; never raises."""
    if not _PATH.exists():
        return f"the native library is missing ({_PATH.name} is not beside the package); reinstall linformer_kernels"
    try:
        torch.ops.load_library(str(_PATH))
    except OSError as error:
        return f"the native library did not load in torch {torch.__version__}: {error.__cause__ or error}"
    return None


def cuda_architectures() -> str:
    """The CUDA architectures in the native library, e.g. "80+PTX,86"; empty where it has none or did not load."""
    return torch.ops.linformer_kernels.cuda_architectures() if load() is None else ""


@functools.cache
def driver_problem() -> str:
    """Why the driver cannot run the CUDA runtime in the native library, else an empty string. For a process that uses
    CUDA already: asking may load the driver."""
    return torch.ops.linformer_kernels.cuda_driver_problem()


def has_code_for(architectures: str, major: int, minor: int) -> bool:
    """Whether one of the architectures serves a GPU of this compute capability: machine code for its major version, no
    newer than the GPU, or PTX, which the driver compiles for every newer GPU."""
    capability = 10 * major + minor
    for name in filter(None, architectures.split(",")):
        number, _, ptx = name.partition("+")
        if not number.isdecimal():  # 90a: some kernels more for 9.0, beside those of 90
            continue
        if int(number) <= capability and (ptx or int(number) // 10 == major):
            return True
    return False
