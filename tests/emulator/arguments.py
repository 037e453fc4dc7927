"""Kernel arguments: arrays to addresses, values to bytes."""

from __future__ import annotations

import ctypes
import numbers
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from emulator.errors import PtxError

GUARD = 1 << 16  # bytes around every array of an isolated launch
ALIGN = 512


class Raw:
    """A struct by value: its bytes, with the addresses of arrays put in at byte offsets."""

    def __init__(self, data: bytes, pointers: Mapping[int, Any] | None = None):
        self.data, self.pointers = bytes(data), dict(pointers or {})


class TensorDesc:
    """A host-side tensor descriptor of a Triton kernel; the shape of the block comes from the compiled kernel."""

    def __init__(self, tensor: Any):
        self.tensor = tensor


_MAP_TYPES = {
    "uint8": 0,
    "int8": 0,
    "uint16": 1,
    "int16": 1,
    "uint32": 2,
    "int32": 3,
    "uint64": 4,
    "int64": 5,
    "float16": 6,
    "float32": 7,
    "float64": 9,
    "bfloat16": 10,
}


def tensor_map(array: Any, box: Sequence[int], swizzle: int = 0) -> Raw:
    """A tiled TMA descriptor of a row-major array; `box` innermost first, `swizzle` of 0, 32, 64 or 128 bytes.

    The 128 bytes are in the layout of core/tensor_copy.cpp.
    """
    if is_torch(array):
        item, strides = array.element_size(), [s * array.element_size() for s in array.stride()]
    else:
        item, strides = array.itemsize, list(array.strides)
    if strides[-1] != item:
        raise PtxError("a tensor map needs a contiguous innermost dimension")
    rank = len(array.shape)

    def padded(values: Sequence[int], length: int, filler: int) -> list[int]:
        return [*values, *[filler] * (length - len(values))]

    element_type = _MAP_TYPES[str(array.dtype).removeprefix("torch.")]
    swizzle_code = {0: 0, 32: 1, 64: 2, 128: 3}[swizzle]
    sizes = padded(list(array.shape)[::-1], 5, 1)
    head = struct.pack("<Q5I8B", 0, *sizes, rank - 1, element_type, 0, swizzle_code, 0, 0, 0, 0)
    head += bytes(-len(head) % 8)
    tail = struct.pack("<4Q5H5H", *padded(strides[::-1][1:], 4, 0), *padded(box, 5, 1), *[1] * 5)
    return Raw((head + tail).ljust(128, b"\0"), {0: array})


def is_torch(value: Any) -> bool:
    return hasattr(value, "untyped_storage")


def is_array(value: Any) -> bool:
    return is_torch(value) or (hasattr(value, "__array_interface__") and hasattr(value, "ctypes") and value.ndim > 0)


def extent(array: Any) -> tuple[int, int]:
    """Address and size of the memory that a torch tensor or numpy array can touch."""
    if is_torch(array):
        if array.device.type != "cpu":
            raise PtxError(f"an array is on {array.device}; the emulator needs it on the CPU")
        item, strides, empty = array.element_size(), array.stride(), array.numel() == 0
        address, strides = array.data_ptr(), [s * item for s in strides]
    else:
        item, strides, empty, address = array.itemsize, array.strides, array.size == 0, array.ctypes.data
    if any(s < 0 for s in strides):
        raise PtxError("an array has a negative stride")
    size = 0 if empty else item + sum((n - 1) * s for n, s in zip(array.shape, strides, strict=True))
    return address, size


class Memory:
    """Where the kernel sees the arrays. With `isolate`, each has a guarded copy, which `copy_back` writes back: a stray
    access cannot land in a neighbouring array unnoticed."""

    def __init__(self, arrays: Sequence[Any], names: Sequence[str], isolate: bool):
        regions: list[list] = []  # [begin, end, name], arrays that overlap joined
        sized = [(*extent(array), name) for array, name in zip(arrays, names, strict=True)]
        for begin, size, name in sorted((entry for entry in sized if entry[1]), key=lambda entry: entry[0]):
            if regions and begin < regions[-1][1]:
                regions[-1][1] = max(regions[-1][1], begin + size)
            else:
                regions.append([begin, begin + size, name])
        self.arena = None
        if isolate and regions:
            total = sum(end - begin + 2 * ALIGN + GUARD for begin, end, _ in regions) + GUARD
            self.arena = ctypes.create_string_buffer(total)
        self.regions: list[tuple[int, int, int, str]] = []  # begin, end, where the kernel sees it, name
        at = ctypes.addressof(self.arena) + GUARD if self.arena else 0
        for begin, end, name in regions:
            seen = begin
            if self.arena:
                seen = (at + ALIGN - 1) // ALIGN * ALIGN + begin % ALIGN  # as aligned as the array is
                ctypes.memmove(seen, begin, end - begin)
                at = seen + end - begin + GUARD
            self.regions.append((begin, end, seen, name))

    def address(self, array: Any) -> int:
        address, size = extent(array)
        for begin, end, seen, _ in self.regions:
            if begin <= address < end:
                return seen + address - begin
        return address if size else 0

    def buffers(self) -> list[tuple[int, int, str]]:
        return [(seen, seen + end - begin, name) for begin, end, seen, name in self.regions]

    def copy_back(self) -> None:
        if self.arena:
            for begin, end, seen, _ in self.regions:
                ctypes.memmove(begin, seen, end - begin)


def pack(value: Any, size: int, memory: Memory) -> bytes:
    """One argument as the bytes of a parameter of that size."""
    if is_array(value):
        data = struct.pack("<Q", memory.address(value))
    elif value is None:
        data = bytes(size)
    elif isinstance(value, Raw):
        buffer = bytearray(value.data)
        for offset, array in value.pointers.items():
            struct.pack_into("<Q", buffer, offset, memory.address(array))
        data = bytes(buffer)
    elif isinstance(value, bytes | bytearray):
        data = bytes(value)
    elif isinstance(value, numbers.Integral):
        data = (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    elif isinstance(value, numbers.Real) and size in (2, 4, 8):
        data = struct.pack({2: "<e", 4: "<f", 8: "<d"}[size], value)
    else:
        raise PtxError(f"an argument of type {type(value).__name__} for {size} bytes")
    if len(data) != size:
        raise PtxError(f"an argument of {len(data)} bytes for a parameter of {size}")
    return data
