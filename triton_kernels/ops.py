"""The ops of the package, run by the Triton kernels: from tensors to launches.

Arguments and results are those of `linformer_kernels._ops`, which also makes the results' shapes and strides.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .. import _ops
from .common import Mask, Sizes, Strides
from .config import Device, Shape, config_for, power_of_2, unit_for
from .forward import forward

SPLIT_ROWS = 256  # of a sequence, at the least, that one split sums


@dataclass
class Launch:
    """A kernel of Triton with its grid, its arguments by name, and the options of the compiler."""

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    num_warps: int


def launch(one: Launch) -> None:
    """The one place that launches; the tests put their emulator here."""
    one.kernel[(one.grid,)](**one.arguments, num_warps=one.num_warps)


def device_of(tensor: Tensor) -> Device:
    """The GPU of the tensor; for Triton's interpreter, which has none, a small one."""
    if triton.knobs.runtime.interpret:
        return Device("interpreter", 80, 4)
    return _device(tensor.device.index or 0)


@functools.cache
def _device(index: int) -> Device:
    driver = triton.runtime.driver.active
    target = driver.get_current_target()
    properties = driver.utils.get_device_properties(index)
    capability = target.arch if target.backend == "cuda" else 0
    return Device(target.backend, capability, properties["multiprocessor_count"])


class _Call:
    """One call of an op: its tensors by name, with what all launches derive from them in the same way."""

    def __init__(
        self,
        tensors: dict[str, Tensor | None],
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        allow_tf32: bool = False,
    ):
        self.tensors = tensors
        self.cu_seqlens = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
        like = next(tensor for tensor in tensors.values() if tensor is not None)
        self.like, self.device = like, device_of(like)
        query, key, proj_key = (tensors.get(name) for name in ("query", "key", "proj_key"))
        key_proj, value_proj = tensors["key_proj"], tensors["value_proj"]
        assert key_proj is not None and value_proj is not None  # of every op, or their gradients in their place
        batch, heads_kv, proj_dim, head_dim = key_proj.shape
        heads, len_q = (0, 0) if query is None else (query.size(1), query.size(2 if cu_seqlens_q is None else 0))
        len_k = 0 if key is None else key.size(2 if cu_seqlens_k is None else 0)
        self.sizes = Sizes(batch, heads, heads_kv, len_q, len_k, 0 if proj_key is None else proj_key.size(-1))
        self.shared_kv = proj_key is not None and tensors.get("proj_value") is None
        per_head = proj_key is not None and proj_key.dim() == 3
        self.shape = Shape(like.element_size(), proj_dim, head_dim, value_proj.size(-1), per_head, self.shared_kv)
        self.config, self.unit = config_for(self.shape, self.device), unit_for(self.shape)
        self.units = -(-heads_kv // self.unit.heads)
        self.precision = {"cuda": "tf32" if allow_tf32 else "tf32x3", "hip": "ieee"}.get(self.device.backend, "interpreter")

    def arguments(self, *names: str) -> dict[str, Any]:
        """Pointers and strides of tensors, and sizes; a tensor that is not there is None."""
        tensors = {name: self.tensors.get(name) for name in names}
        strides = {name: self._strides(name, tensor) for name, tensor in tensors.items()}
        vector = 16 // self.like.element_size()
        aligned = all(
            tensor is None or (tensor.data_ptr() % 16 == 0 and all(s % vector == 0 for s in strides[name]))
            for name, tensor in tensors.items()
        )
        unit = vector if aligned else 1
        units = {name: Strides(*(s // unit for s in strides[name])) for name in names}
        return {
            **tensors, "strides": namedtuple("Layout", names)(**units), "sizes": self.sizes, "unit": unit,
            "K": self.shape.proj_dim, "D": self.shape.head_dim, "D_V": self.shape.value_dim,
            "PRECISION": self.precision,
        }  # fmt: skip

    def _strides(self, name: str, tensor: Tensor | None) -> tuple[int, int, int]:
        """Batch, head, row; of (B, H, N, D), of packed (total, H, D), of E (K, N_max) and (H_kv, K, N_max)."""
        if tensor is None:
            return 0, 0, 0
        of = [stride if size > 1 else 0 for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)]
        if tensor.dim() == 3 and "proj" not in name:
            of.reverse()
        return tuple((0,) * (3 - len(of)) + tuple(of))  # type: ignore[return-value]

    def columns(self) -> dict[str, Any]:
        """How heads share tiles of projections."""
        return {
            "PIECE": self.unit.piece, "PARTS": self.unit.parts, "UNIT_HEADS": self.unit.heads,
            "UNIT_TILES": self.unit.tiles, "SHARED_KV": self.shared_kv,
        }  # fmt: skip

    def softmax(self, rng_state: Tensor | None, dropout_p: float, scale: float) -> dict[str, Any]:
        """Scores times `exponent`, negated first where scale is negative, are powers of two."""
        threshold = max(1, min(int(dropout_p * 2**32), 2**32 - 1)) if dropout_p > 0 else 0
        return {
            "rng_state": rng_state if dropout_p > 0 else None,
            "threshold": threshold - 2**32 if threshold >= 2**31 else threshold,
            "keep": 1 / (1 - dropout_p), "exponent": abs(scale) * math.log2(math.e), "NEGATIVE": scale < 0,
        }  # fmt: skip

    def widths(self) -> dict[str, int]:
        return {"BLOCK_D": power_of_2(self.shape.head_dim), "BLOCK_DV": power_of_2(self.shape.value_dim)}

    def tiles(self, packed: str, length: int, block: int) -> int:
        """Tiles of `block` rows over all sequences; for packed ones, whose lengths only the GPU knows, at most."""
        if self.cu_seqlens[packed] is not None:
            return length // block + self.sizes.batch
        return self.sizes.batch * -(-length // block)

    def splits(self, tiles: int, rows: int) -> int:
        """Parts of a tile's sum over `rows`, so that about one tile comes on each multiprocessor."""
        return max(1, min(self.device.multiprocessors // max(tiles, 1), rows // SPLIT_ROWS))

    def counters(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32, device=self.like.device)

    def partial(self, elements: int) -> Tensor | None:
        return torch.empty(elements, dtype=torch.float32, device=self.like.device) if elements else None

    def launch(self, kernel: Any, grid: int, arguments: dict[str, Any], num_warps: int) -> None:
        if grid == 0:
            return
        # Triton launches on the current device.
        with torch.cuda.device(self.like.device) if self.like.is_cuda else contextlib.nullcontext():
            launch(Launch(kernel, grid, arguments, num_warps))


def _mask(mask: Tensor | None) -> Mask:
    return Mask(None, 0, 0) if mask is None else Mask(mask, *mask.stride())


def _forward(call: _Call, mask: Tensor | None, softmax: dict[str, Any], project: bool, attend: bool) -> None:
    config, sizes, shape = call.config.forward, call.sizes, call.shape
    tiles = splits = tickets = 0
    if project:
        tiles = sizes.batch * call.units * call.unit.tiles * -(-shape.proj_dim // config.block_k)
        splits = call.splits(tiles, sizes.len_k)
        tickets = tiles * splits
    queries = call.tiles("cu_seqlens_q", sizes.len_q, config.block_q) * sizes.heads if attend else 0
    partial = call.partial(tickets * config.block_k * config.block_c if splits > 1 else 0)
    arguments = {
        **call.arguments("query", "key", "value", "proj_key", "proj_value", "key_proj", "value_proj", "out"),
        **call.cu_seqlens, **softmax, **call.columns(), **call.widths(), "mask": _mask(mask),
        "counters": call.counters(1 + sizes.batch * call.units + tiles), "partial": partial,
        "project_tiles": tickets, "splits": splits, "units": call.units, "SPLIT": splits > 1,
        "PROJECT": project, "ATTEND": attend, "BLOCK_K": config.block_k, "BLOCK_C": config.block_c,
        "BLOCK_N": config.block_n, "PROJECT_STAGES": config.project_stages, "BLOCK_Q": config.block_q,
        "BLOCK_S": config.block_s, "ATTEND_STAGES": config.attend_stages,
    }  # fmt: skip
    call.launch(forward, tickets + queries, arguments, config.num_warps)


def attention(
    query: Tensor, key: Tensor, value: Tensor, proj_key: Tensor, proj_value: Tensor | None,
    key_padding_mask: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    rng_state: Tensor | None, dropout_p: float, scale: float, allow_tf32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """out, K', V'."""
    out, key_proj, value_proj = _ops.empty_attention(query, key, value, proj_key, cu_seqlens_k)
    tensors = {
        "query": query, "key": key, "value": value, "proj_key": proj_key, "proj_value": proj_value,
        "key_proj": key_proj, "value_proj": value_proj, "out": out,
    }  # fmt: skip
    call = _Call(tensors, cu_seqlens_q, cu_seqlens_k, allow_tf32)
    _forward(call, key_padding_mask, call.softmax(rng_state, dropout_p, scale), True, True)
    return out, key_proj, value_proj


def project(
    key: Tensor, value: Tensor, proj_key: Tensor, proj_value: Tensor | None, key_padding_mask: Tensor | None,
    cu_seqlens_k: Tensor | None, allow_tf32: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """K', V'."""
    key_proj, value_proj = _ops._empty_projections(key, value, proj_key, cu_seqlens_k)
    tensors = {
        "key": key, "value": value, "proj_key": proj_key, "proj_value": proj_value, "key_proj": key_proj,
        "value_proj": value_proj,
    }  # fmt: skip
    call = _Call(tensors, None, cu_seqlens_k, allow_tf32)
    _forward(call, key_padding_mask, call.softmax(None, 0.0, 1.0), True, False)
    return key_proj, value_proj


def projected_attention(
    query: Tensor, key_proj: Tensor, value_proj: Tensor, cu_seqlens_q: Tensor | None, rng_state: Tensor | None,
    dropout_p: float, scale: float, allow_tf32: bool = False,
) -> Tensor:  # fmt: skip
    """out."""
    out = _ops._like(query, value_proj.size(-1))
    call = _Call({"query": query, "key_proj": key_proj, "value_proj": value_proj, "out": out}, cu_seqlens_q, None, allow_tf32)
    _forward(call, None, call.softmax(rng_state, dropout_p, scale), False, True)
    return out
