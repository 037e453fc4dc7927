"""A CUDA driver for Triton's own launcher on machines without one: a stub of libcuda that is compiled here.

Triton compiles its kernels and its launcher as on a GPU, and hands each launch to the stub. CPU tensors stand for the
GPU's. Nothing computes: what arrives at the driver can be looked at, and the time until it arrives measured.

Only for a process of its own: the stub takes the place of a real libcuda, which then nothing else can load.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCE = Path(__file__).parent / "stub" / "libcuda.c"
BUILD = Path(__file__).parents[1] / "build" / "stub"
STREAM = 0x5EED

_LAUNCHED = ctypes.CFUNCTYPE(
    None, ctypes.c_size_t, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_uint), ctypes.c_uint,
    ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip


def why_not() -> str | None:
    """The reason why there can be no stub here."""
    if _compiler() is None:
        return "no C compiler was found (gcc, clang, or $CC); Triton needs one for its launcher too"
    return None


def _compiler() -> str | None:
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def library() -> Path:
    """The stub, built where its source has changed."""
    folder = BUILD / hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    built = folder / "libcuda.so.1"
    if not built.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{os.getpid()}.part"
        compiler = _compiler()
        assert compiler is not None, why_not()
        flags = ["-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([compiler, *flags, str(SOURCE), "-o", str(part)], check=True)
        part.replace(built)
    return built


@dataclasses.dataclass
class Arrived:
    """A launch as the driver saw it."""

    function: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_bytes: int
    stream: int
    parameters: list[bytes]


@contextmanager
def stubbed(
    arch: int = 80, multiprocessors: int = 3, sizes_of: Callable[[int], list[int]] | None = None
) -> Iterator[list[Arrived]]:
    """Within the block backend "triton" takes CPU tensors, and its launches go through Triton's launcher to the stub.

    `sizes_of` gives the bytes of each parameter of a function, by its handle: with it the launches are kept, in the
    list. Without, nothing is done with them, which is for measuring.
    """
    path = library()
    stub = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # whoever asks for libcuda.so.1 from now on has this one
    import emulated_triton
    from triton.backends.nvidia.driver import CudaDriver

    os.environ["TRITON_LIBCUDA_PATH"] = str(path.parent)
    stub.stub_be(arch, multiprocessors, 1024 * emulated_triton.SHARED_LIMIT_KIB[arch])
    arrived: list[Arrived] = []

    def launched(function, grid, block, shared_bytes, stream, parameters):  # type: ignore[no-untyped-def]
        assert sizes_of is not None
        values = [ctypes.string_at(parameters[i], size) for i, size in enumerate(sizes_of(function))]
        arrived.append(Arrived(function, tuple(grid[:3]), tuple(block[:3]), shared_bytes, stream, values))

    callback = _LAUNCHED(launched) if sizes_of else _LAUNCHED()
    stub.stub_on_launch(callback)
    driver = CudaDriver()
    # Torch knows of no GPU here, and so of no current device and stream.
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda device: STREAM
    driver.get_device_capability = (
        driver.utils.get_device_capability
        if hasattr(driver.utils, "get_device_capability")
        else lambda device: divmod(arch, 10)
    )
    try:
        with emulated_triton.on_cpu(driver):
            yield arrived
    finally:
        stub.stub_on_launch(_LAUNCHED())
