"""Modules and kernels: from PTX, from nvcc, from Triton; and how they are launched."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emulator.arguments import Memory, Raw, TensorDesc, is_array, pack, tensor_map
from emulator.build import core
from emulator.errors import SOFT, PtxError, PtxIssues
from emulator.stats import Stats

SHARED_LIMIT_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # a block, by compute capability

Dims = int | Sequence[int]


class Module:
    def __init__(self, ptx: str):
        self.ptx = ptx
        self.core = core().Module(ptx)
        self.kernels: list[str] = self.core.kernels

    def kernel(self, name: str | None = None) -> Kernel:
        """By its name or a unique part of it, mangled or demangled; the only kernel without a name."""
        if name in self.kernels:
            return Kernel(self, name)
        found = [kernel for kernel in self.kernels if name is None or name in kernel]
        if not found:
            plain = subprocess.run(["c++filt"], input="\n".join(self.kernels), capture_output=True, text=True).stdout
            found = [kernel for kernel, text in zip(self.kernels, plain.split("\n"), strict=False) if name in text]
        if len(found) != 1:
            raise PtxError(f"kernel {name!r}: candidates {found or self.kernels}")
        return Kernel(self, found[0])


class Kernel:
    def __init__(self, module: Module, name: str):
        self.module, self.name = module, name
        self.info: dict = module.core.describe(name)
        self.params: list[tuple[int, int]] = self.info["params"]  # offset and size

    def launch(
        self,
        grid: Dims,
        block: Dims,
        args: Sequence[Any],
        shared: int = 0,
        races: bool = True,
        check: bool = True,
        isolate: bool = True,
        seed: int = 0,
        max_steps: int = 0,
        extra: Sequence[Any] | Mapping[str, Any] = (),
        names: Sequence[str] | None = None,
        cooperative: bool = False,
        max_resident: int = 0,
        shared_limit: int = 0,
        proxy_fences: bool = True,
        cluster: Dims = 0,
    ) -> Stats:
        """Run the grid to its end, on the memory of the arrays.

        args          arrays (torch CPU tensors, numpy), ints, floats, None (null pointer), bytes or Raw (structs)
        shared        bytes of dynamic shared memory
        races         run the race detector for shared memory
        check         raise PtxIssues when something went wrong, other than SOFT; without, see Stats.issues
        isolate       run on guarded copies of the arrays, so that a stray access cannot land in another array
        seed          other than 0: shuffle the order in which warps run, and run up to 16 blocks in short turns
        max_steps     give up after so many instructions of warps
        extra         arrays, or arrays by name, that are reached through addresses in bytes (isolate=False, then)
        names         names of the arguments, for Stats.buffers and messages
        cooperative   grid-wide synchronisation is allowed
        max_resident  blocks that may be alive at once (4096)
        shared_limit  bytes of shared memory a block may have (by default those of the architecture)
        proxy_fences  report writes that reach TMA or wgmma without fence.proxy.async
        cluster       blocks of a cluster, as the launch attribute (by default what the kernel wants, or 1)
        """
        grid, block = _three(grid), _three(block)
        if len(args) != len(self.params):
            raise PtxError(f"{self.name} takes {len(self.params)} arguments, {len(args)} given")
        memory = _map_arrays(args, extra, names, isolate)
        parameters = bytearray(self.info["param_bytes"])
        for value, (offset, size) in zip(args, self.params, strict=True):
            parameters[offset : offset + size] = pack(value, size, memory)
        raw = self.module.core.launch(
            name=self.name,
            grid=grid,
            block=block,
            parameters=bytes(parameters),
            buffers=memory.buffers(),
            shared=shared,
            shared_limit=shared_limit or self._shared_limit(),
            races=races,
            proxy_fences=proxy_fences,
            cooperative=cooperative,
            seed=seed,
            max_steps=max_steps,
            max_resident=max_resident,
            cluster=_three(cluster) if cluster else (0, 0, 0),
        )
        memory.copy_back()
        stats = Stats(raw)
        stats.grid, stats.block = grid, block
        hard = [issue for issue in stats.issues if issue["kind"] not in SOFT]
        if check and hard:
            raise PtxIssues(hard, stats)
        return stats

    def _shared_limit(self) -> int:
        target = re.search(r"sm_(\d+)", self.module.core.target)
        return 1024 * SHARED_LIMIT_KIB.get(int(target.group(1)) if target else 0, 227)


class TritonKernel(Kernel):
    def __init__(self, compiled: Any):
        metadata = compiled.metadata
        module = Module(compiled.asm["ptx"])
        super().__init__(module, metadata.name if metadata.name in module.kernels else module.kernels[0])
        if getattr(metadata, "num_ctas", 1) != 1:
            raise PtxError(f"{self.name} is compiled for clusters of {metadata.num_ctas} blocks; use num_ctas=1")
        self.metadata, self.shared = metadata, metadata.shared
        self.block = self.info["required_block"][0] or 32 * metadata.num_warps

    def launch(self, grid: Dims, args: Sequence[Any], **options: Any) -> Stats:
        """`args` are the run-time arguments of the kernel in order; hidden ones are added. `options` as for Kernel."""
        grid = _three(grid)
        args = self._flatten(args)
        hidden = len(self.params) - len(args)
        if hidden not in (0, 1, 2):
            raise PtxError(f"{self.name} takes {len(self.params)} arguments, two of them hidden; {len(args)} given")
        for scratch in ("global_scratch_size", "profile_scratch_size")[:hidden]:
            args.append(_scratch((getattr(self.metadata, scratch, 0) or 0) * grid[0] * grid[1] * grid[2]))
        return super().launch(grid, self.block, args, shared=self.shared, **options)

    def _flatten(self, args: Sequence[Any]) -> list[Any]:
        """Host-side tensor descriptors to what they are at run time."""
        metas = list(getattr(self.metadata, "tensordesc_meta", None) or [])
        flat: list[Any] = []
        for arg in args:
            if not isinstance(arg, TensorDesc):
                flat.append(arg)
                continue
            shape, strides = list(arg.tensor.shape), list(arg.tensor.stride())
            if metas:  # a TMA descriptor, then shape and strides
                meta = metas.pop(0)
                swizzle = {0: 0, 1: 32, 2: 64, 3: 128}[meta["swizzle"]]
                flat += [tensor_map(arg.tensor, meta["block_size"][::-1], swizzle), *shape, *strides]
            else:  # no TMA: base, shape, strides, two flags, shape and strides once more
                flat += [arg.tensor, *shape, *strides, False, False, *shape, *strides]
        return flat


def from_nvcc(source: str | Path, arch: str = "sm_80", flags: Sequence[str] = (), nvcc: str = "nvcc") -> Module:
    """Compile a .cu file, or CUDA source text, to PTX."""
    with tempfile.TemporaryDirectory() as directory:
        path, out = Path(directory) / "kernel.cu", Path(directory) / "kernel.ptx"
        if isinstance(source, str) and "\n" in source:
            path.write_text(source)
        else:
            path = Path(source)
        command = [nvcc, "-ptx", "-O3", "-lineinfo", "-std=c++17", f"-arch={arch}", *flags, str(path), "-o", str(out)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise PtxError(f"nvcc failed: {result.stderr[-4000:]}")
        return Module(out.read_text())


def from_triton(compiled: Any) -> TritonKernel:
    """A kernel from triton.compile."""
    return TritonKernel(compiled)


def _three(dims: Dims) -> tuple[int, int, int]:
    x, y, z = (*dims, 1, 1)[:3] if isinstance(dims, Sequence) else (dims, 1, 1)
    return int(x), int(y), int(z)


def _map_arrays(args: Sequence[Any], extra: Any, names: Sequence[str] | None, isolate: bool) -> Memory:
    named: list[tuple[str, Any]] = []
    for i, value in enumerate(args):
        name = names[i] if names else f"arg{i}"
        if is_array(value):
            named.append((name, value))
        elif isinstance(value, Raw):
            named += [(f"{name}+{offset}", array) for offset, array in value.pointers.items()]
    named += extra.items() if isinstance(extra, Mapping) else [(f"extra{i}", array) for i, array in enumerate(extra)]
    return Memory([array for _, array in named], [name for name, _ in named], isolate)


def _scratch(size: int) -> Any:
    """Zeroed memory aligned to 128 bytes, which tensor descriptors made on the device need."""
    if not size:
        return None
    import numpy as np

    memory = np.zeros(size + 128, np.uint8)
    begin = -memory.ctypes.data % 128
    return memory[begin : begin + size]
