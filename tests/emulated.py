"""A GPU for machines without one: launches of the CUDA backend go to the emulator, with the PTX of the built library.

Everything but the launch itself is what runs on a GPU: the ops, the plans, and the compiled kernels. CPU tensors stand
for the GPU's.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from unittest import mock

import emulator
import numpy as np
import torch

from linformer_kernels import _library, functional

RESERVED = 64  # bytes of shared memory for the kernels' own variables, as in csrc/cuda/launch.cu
SHARED_BYTES = {80: 163 * 1024 - RESERVED, 86: 99 * 1024 - RESERVED, 90: 227 * 1024 - RESERVED}
PTX = Path(__file__).parents[1] / "build" / "ptx"


class _Region(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("bytes", ctypes.c_int64)]


_LAUNCH = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint64,
    ctypes.POINTER(_Region), ctypes.c_uint64,
)  # fmt: skip


@dataclass
class Run:
    """What was launched within `emulated`."""

    kernels: list[str] = field(default_factory=list)
    grids: list[int] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)
    stats: list[emulator.Stats] = field(default_factory=list)
    error: Exception | None = None


def why_not() -> str | None:
    """The reason why nothing can be emulated here."""
    if _library.load() is not None or not _library.cuda_architectures():
        return "the native library has no CUDA kernels"
    return None if cuobjdump() else "cuobjdump was not found; Triton and the CUDA toolkit bring it"


@cache
def cuobjdump() -> str | None:
    """The program, on PATH or in the installed Triton."""
    inside = Path(sysconfig.get_paths()["platlib"]) / "triton" / "backends" / "nvidia" / "bin"
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(inside))


@cache
def modules(arch: int) -> dict[str, emulator.Module]:
    """Kernel name to the module it is in, out of the library as it was built."""
    library = _library.path()
    assert library is not None
    digest = hashlib.sha256(library.read_bytes()).hexdigest()[:16]
    folder = PTX / digest
    if not folder.exists():
        shutil.rmtree(PTX, ignore_errors=True)
        part = PTX / (digest + ".part")
        part.mkdir(parents=True)
        subprocess.run([cuobjdump(), "-xptx", "all", str(library)], cwd=part, check=True, capture_output=True)
        part.rename(folder)
    found = [emulator.Module(path.read_text()) for path in sorted(folder.glob(f"*sm_{arch}*.ptx"))]
    return {name: module for module in found for name in module.kernels}


@cache
def resources() -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, kernel) to its registers, stack and static shared memory, out of the library as it was built."""
    text = subprocess.run([cuobjdump(), "-res-usage", str(_library.path())], capture_output=True, text=True).stdout
    found, arch, name = {}, "", ""
    for line in text.splitlines():
        if match := re.search(r"arch = sm_(\w+)", line):
            arch = match.group(1)
        if match := re.search(r"Function (\w+):", line):
            name = match.group(1)
        if "REG:" in line:
            found[arch, name] = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
    return found


@contextmanager
def emulated(arch: int = 80, multiprocessors: int = 3, shared_bytes: int | None = None, **options) -> Iterator[Run]:
    """Within the block the native CPU ops run the CUDA kernels, in the emulator; `options` are those of Kernel.launch.

    Raises at its end what the emulator found wrong.
    """
    run = Run()

    def launch(name, grid, block, shared, arguments, argument_bytes, regions, count):  # type: ignore[no-untyped-def]
        if run.error is not None:
            return
        try:
            memory = {}
            for region in regions[:count]:
                bytes_at = (ctypes.c_uint8 * region.bytes).from_address(region.data)
                memory[region.name.decode()] = np.ctypeslib.as_array(bytes_at)
            kernel = modules(arch)[name.decode()].kernel(name.decode())
            args = [ctypes.string_at(arguments, argument_bytes)]
            stats = kernel.launch(grid, block, args, shared=shared, isolate=False, extra=memory, **options)
            run.kernels.append(name.decode())
            run.grids.append(grid)
            run.shared.append(shared)
            run.stats.append(stats)
        except Exception as error:  # an exception cannot pass through the library
            run.error = error

    library = ctypes.CDLL(str(_library.path()))
    callback = _LAUNCH(launch)
    limit = SHARED_BYTES[arch] if shared_bytes is None else shared_bytes
    hopper = arch == 90 and "90a" in _library.cuda_architectures().split(",")
    library.linformer_emulate(callback, multiprocessors, limit, hopper)
    asked = functional._allow_tf32  # only of a GPU's tensors
    try:
        with mock.patch.object(
            functional,
            "_allow_tf32",
            lambda call: asked(replace(call, device=torch.device("cuda"), device_type="cuda")),
        ):
            yield run
    finally:
        library.linformer_emulate(_LAUNCH(), 0, 0, False)
    if run.error is not None:
        raise run.error


@contextmanager
def unlaunched(multiprocessors: int = 132, arch: int = 90) -> Iterator[None]:
    """Within the block the native CPU ops do all that they do for a GPU but the launches, which go nowhere."""
    library = ctypes.CDLL(str(_library.path()))
    nothing = ctypes.cast(ctypes.CDLL(None).abs, ctypes.c_void_p)  # looks at one argument and touches no memory
    library.linformer_emulate(nothing, multiprocessors, SHARED_BYTES[arch])
    try:
        yield
    finally:
        library.linformer_emulate(_LAUNCH(), 0, 0)
