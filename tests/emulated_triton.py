"""A GPU for the Triton kernels on machines without one: they are compiled for real, and their PTX runs in the emulator.

Triton's own path from arguments to a compiled kernel is kept (which arguments specialise a kernel, its cache on disk);
only the driver says which GPU there is without looking, and a launch goes to the emulator. CPU tensors stand for the
GPU's.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import emulator
import torch
import triton
from emulator.kernels import SHARED_LIMIT_KIB
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

from linformer_kernels import _backends


class _Driver:
    """What triton.runtime.driver.active says, for a GPU that is not there."""

    def __init__(self, arch: int, multiprocessors: int):
        self.arch = arch
        properties = {"multiprocessor_count": multiprocessors, "max_shared_mem": 1024 * SHARED_LIMIT_KIB[arch]}
        self.utils = SimpleNamespace(get_device_properties=lambda device: properties)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> Any:
        return self.arch  # the key of Triton's caches of kernels

    def get_current_stream(self, device: Any) -> int:
        return 0


@dataclass
class Run:
    """What was launched within `emulated`."""

    kernels: list[str] = field(default_factory=list)
    grids: list[int] = field(default_factory=list)
    compiled: list[Any] = field(default_factory=list)
    stats: list[emulator.Stats] = field(default_factory=list)


def _flat(signature: Any, value: Any) -> list[Any]:
    """The arguments that a compiled kernel has: tuples opened, and without those that were compiled in."""
    if isinstance(signature, tuple):
        return [x for s, v in zip(signature, value, strict=True) for x in _flat(s, v)]
    return [] if signature == "constexpr" else [value]


def _bits(value: Any) -> Any:
    return value.view(torch.uint8) if isinstance(value, torch.Tensor) and value.dtype == torch.bool else value


@contextmanager
def emulated(arch: int = 80, multiprocessors: int = 3, execute: bool = True, **options: Any) -> Iterator[Run]:
    """Within the block backend "triton" takes CPU tensors: its kernels are compiled for `arch` and run in the emulator
    (`options` are those of its Kernel.launch), or, without `execute`, are only compiled."""
    from linformer_kernels.triton_kernels import ops

    run = Run()

    def launch(one: ops.Launch, tensors: Sequence[torch.Tensor | None] = ()) -> None:
        arguments = one.filled(tensors)
        compiled = one.kernel.run(**arguments, grid=(one.grid,), warmup=True, num_warps=one.num_warps)
        run.kernels.append(compiled.name)
        run.grids.append(one.grid)
        run.compiled.append(compiled)
        if not execute:
            return
        signature = compiled.src.signature
        args = [_bits(x) for name, of in signature.items() for x in _flat(of, arguments.get(name))]
        names = [n for name, of in signature.items() for n in _flat(of, _names(name, of))] + ["scratch", "profile"]
        run.stats.append(_kernel(compiled).launch(one.grid, args, names=names, **options))

    with on_cpu(_Driver(arch, multiprocessors)):
        usual, ops.launch = ops.launch, launch
        try:
            yield run
        finally:
            ops.launch = usual


@contextmanager
def on_cpu(driver: Any) -> Iterator[None]:
    """Within the block backend "triton" takes CPU tensors, and Triton asks this driver about the GPU."""
    assert _backends.triton_problem() is None, _backends.triton_problem()
    from linformer_kernels.triton_kernels import ops

    def forget() -> None:
        ops._device.cache_clear()
        ops.forget()

    backend = _backends.BACKENDS["triton"]
    _backends.BACKENDS["triton"] = dataclasses.replace(backend, missing=None, limits=lambda call: None)
    config = triton.runtime.driver
    before = config._active
    config.set_active(driver)
    forget()
    try:
        yield
    finally:
        _backends.BACKENDS["triton"] = backend
        config._active = before
        forget()


def _names(name: str, signature: Any) -> Any:
    if isinstance(signature, tuple):
        return tuple(_names(f"{name}.{i}", of) for i, of in enumerate(signature))
    return name


_KERNELS: dict[str, Any] = {}


def _kernel(compiled: Any) -> Any:
    if compiled.hash not in _KERNELS:
        _KERNELS[compiled.hash] = emulator.from_triton(compiled)
    return _KERNELS[compiled.hash]


def parameter_count(compiled: Any) -> int:
    """Of the kernel, by its PTX."""
    ptx = compiled.asm["ptx"]
    entry = ptx[ptx.index(".entry") :]
    return entry[: entry.index("{")].count(".param")


def resources(compiled: Any) -> dict[str, int]:
    """What Triton's ptxas says of the kernel: REG, STACK, bytes `spilled` (stores and loads), how often it says that it
    `serialized` products (C7510 and its neighbours: each wgmma waits for the one before it); and shared memory."""
    target = re.search(r"^\.target (sm_(\d+)\w*)", compiled.asm["ptx"], re.MULTILINE)
    assert target, compiled.name
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        ptxas = get_ptxas(int(target.group(2))).path
        command = [ptxas, "-v", f"--gpu-name={target.group(1)}", file.name, "-o", os.devnull]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
    registers = re.search(r"Used (\d+) registers", text)
    assert stack and registers, text
    found = {"REG": registers[1], "STACK": stack[1], "spilled": int(stack[2]) + int(stack[3])}
    found["serialized"] = len(re.findall(r"\(C75\d\d\)", text))
    found["shared"] = compiled.metadata.shared
    return {name: int(value) for name, value in found.items()}
