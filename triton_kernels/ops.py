"""The ops of the package, run by the Triton kernels: from tensors to launches.

Arguments and results are those of `linformer_kernels._ops`, which also makes the results' shapes and strides.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import namedtuple
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .. import _ops
from .backward import backward
from .checks import check
from .common import Bias, Mask, Sizes, Strides, opaque
from .config import Device, Shape, power_of_2, unit_for
from .forward import forward
from .pool import members
from .pool import pool as pool_kernel
from .pool import pool_backward as pool_backward_kernel
from .project_backward import project_backward as project_backward_kernel
from .tuned import config_of

SPLIT_ROWS = 256  # of a sequence, at the least, that one split sums
PART_ROWS = 48  # that a tile sums while a part of one goes to memory, or comes from there
POOL_ROWS = 16  # of a sequence that a program of pooling has at a time


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
        return Device("Triton's interpreter", "interpreter", 80, 4)
    return _device(tensor.device.index or 0)


@functools.cache
def _device(index: int) -> Device:
    driver = triton.runtime.driver.active
    target = driver.get_current_target()
    properties = driver.utils.get_device_properties(index)
    capability = target.arch if target.backend == "cuda" else 0
    name = f"{target.backend} {target.arch}"
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(index)
        if target.backend == "cuda":  # the target is that of the current GPU, which may be of another kind
            major, minor = torch.cuda.get_device_capability(index)
            capability = 10 * major + minor
    return Device(name, target.backend, capability, properties["multiprocessor_count"])


@functools.cache
def _layout(names: tuple[str, ...]) -> Any:
    """The type of the strides of tensors by name. Making one takes longer than a launch."""
    return namedtuple("Layout", names)


@functools.cache
def splits_of(tiles: int, multiprocessors: int, rows: int, filled: bool) -> int:
    """Parts of each of so many tiles that sum over `rows`: those that take the least time, counted in rows.

    A last wave that fills few multiprocessors takes as long as the others, and more parts fill it better. But they go
    through memory, and the program that comes last adds those of its tile. `filled`: other work follows that fills the
    last wave, and only where there are too few tiles for one wave they are split. csrc/cuda/plan.cpp has the same rule.
    """

    def time(splits: int) -> int:
        part = PART_ROWS if splits > 1 else 0
        return -(-tiles * splits // multiprocessors) * (-(-rows // splits) + part) + splits * part

    if filled and tiles >= multiprocessors:
        return 1
    return min(range(1, max(1, min(rows // SPLIT_ROWS, multiprocessors)) + 1), key=time)


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
        self.per_batch = proj_key is not None and proj_key.dim() == 4
        per_head = proj_key is not None and (proj_key.dim() == 3 or (self.per_batch and proj_key.size(1) != 1))
        self.shape = Shape(like.element_size(), proj_dim, head_dim, value_proj.size(-1), per_head, self.shared_kv)
        self.config, self.unit = config_of(self.shape, self.device), unit_for(self.shape)
        self.units = -(-heads_kv // self.unit.heads)
        of_cuda = "tf32" if allow_tf32 else "tf32x3"
        self.precision = {"cuda": of_cuda, "interpreter": "interpreter"}.get(self.device.backend, "ieee")

    def arguments(self, *names: str) -> dict[str, Any]:
        """Pointers and strides of tensors, and sizes; a tensor that is not there is None."""
        tensors = {name: self.tensors.get(name) for name in names}
        strides = {name: self._strides(name, tensor) for name, tensor in tensors.items()}
        matrices = [name for name in names if name.endswith(("proj_key", "proj_value"))]
        units = {"unit": self._unit(set(names) - set(matrices), strides), "unit_e": self._unit(matrices, strides)}
        if self.sizes.seq_len_max % units["unit_e"]:
            units["unit_e"] = 1
        of = {name: units["unit_e" if name in matrices else "unit"] for name in names}
        layout = _layout(names)(*(Strides(*(opaque(s // of[name]) for s in strides[name])) for name in names))
        if not matrices:
            del units["unit_e"]
        return {
            **tensors, "strides": layout, "sizes": Sizes(*map(opaque, self.sizes)), **units, "K": self.shape.proj_dim,
            "D": self.shape.head_dim, "D_V": self.shape.value_dim,
        }  # fmt: skip

    def _unit(self, names: Iterable[str], strides: dict[str, tuple[int, int, int]]) -> int:
        """The elements of 16 bytes if all rows of these tensors start at multiples of 16 bytes, else 1."""
        vector = 16 // self.like.element_size()
        for name in names:
            tensor = self.tensors.get(name)
            if tensor is not None and (tensor.data_ptr() % 16 or any(s % vector for s in strides[name])):
                return 1
        return vector

    def _strides(self, name: str, tensor: Tensor | None) -> tuple[int, int, int]:
        """Batch, head, row; of (B, H, N, D), of packed (total, H, D), of E (K, N_max), (H_kv, K, N_max) and
        (B, 1 or H_kv, K, N_max)."""
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

    def softmax(
        self, key_bias: Tensor | None, rng_state: Tensor | None, dropout_p: float, scale: float
    ) -> dict[str, Any]:
        """Scores times `exponent`, negated first where scale is negative, are powers of two; with a bias, scores times
        `exponent` plus bias are powers of e.

        They are divided by 2^HEADROOM, K at least: the sums of unnormalised exponentials times values then stay where
        those of probabilities would, and overflow for no values for which the formula does not. Not in float16: its
        values cannot overflow a sum in float32, but its small exponentials would lose digits.
        """
        threshold = max(1, min(int(dropout_p * 2**32), 2**32 - 1)) if dropout_p > 0 else 0
        return {
            "rng_state": rng_state if dropout_p > 0 else None,
            "threshold": threshold - 2**32 if threshold >= 2**31 else threshold,
            "keep": 1 / (1 - dropout_p), "key_bias": _bias(key_bias),
            "exponent": abs(scale) * math.log2(math.e) if key_bias is None else scale,
            "NEGATIVE": scale < 0 and key_bias is None,
            "HEADROOM": 0 if self.like.dtype == torch.float16 else (self.shape.proj_dim - 1).bit_length(),
        }  # fmt: skip

    def widths(self) -> dict[str, int]:
        return {"BLOCK_D": power_of_2(self.shape.head_dim), "BLOCK_DV": power_of_2(self.shape.value_dim)}

    def tiles(self, packed: str, length: int, block: int) -> int:
        """Tiles of `block` rows over all sequences; for packed ones, whose lengths only the GPU knows, at most."""
        if self.cu_seqlens[packed] is not None:
            return length // block + self.sizes.batch
        return self.sizes.batch * -(-length // block)

    def splits(self, tiles: int, packed: str, length: int, filled: bool) -> int:
        """Parts of each of so many tiles that sum over a sequence; over the mean of packed ones."""
        rows = length if self.cu_seqlens[packed] is None else length // max(self.sizes.batch, 1)
        return splits_of(tiles, self.device.multiprocessors, rows, filled)

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
    return Mask(mask, *map(opaque, (0, 0) if mask is None else mask.stride()))


def _bias(bias: Tensor | None) -> Bias:
    return Bias(None, None, None) if bias is None else Bias(bias, *map(opaque, bias.stride()[:2]))


def attention_call(query: Tensor, key: Tensor, value: Tensor, proj_key: Tensor, proj_value: Tensor | None) -> _Call:
    """What a forward with these tensors derives from them; nothing is launched."""
    key_proj, value_proj = _ops._empty_projections(key, value, proj_key, None)
    tensors = {"query": query, "key": key, "proj_key": proj_key, "proj_value": proj_value}
    return _Call({**tensors, "key_proj": key_proj, "value_proj": value_proj})


def _forward(call: _Call, mask: Tensor | None, softmax: dict[str, Any], project: bool, attend: bool) -> None:
    config, sizes, shape = call.config.forward, call.sizes, call.shape
    tiles = splits = tickets = 0
    if project:
        tiles = sizes.batch * call.units * call.unit.tiles * -(-shape.proj_dim // config.block_k)
        splits = call.splits(tiles, "cu_seqlens_k", sizes.len_k, attend)
        tickets = tiles * splits
    queries = call.tiles("cu_seqlens_q", sizes.len_q, config.block_q) * sizes.heads if attend else 0
    partial = call.partial(tickets * config.block_k * config.block_c if splits > 1 else 0)
    arguments = {
        **call.arguments("query", "key", "value", "proj_key", "proj_value", "key_proj", "value_proj", "out"),
        **call.cu_seqlens, **softmax, **call.columns(), **call.widths(), "mask": _mask(mask),
        "counters": call.counters(1 + sizes.batch * call.units + tiles), "partial": partial,
        "project_tiles": tickets, "splits": splits, "units": call.units, "SPLIT": splits > 1,
        "PROJECT": project, "ATTEND": attend, "PRECISION": call.precision, "BLOCK_K": config.block_k,
        "BLOCK_C": config.block_c, "BLOCK_N": config.block_n, "PROJECT_STAGES": config.project_stages,
        "BLOCK_Q": config.block_q, "BLOCK_S": config.block_s, "ATTEND_STAGES": config.attend_stages,
    }  # fmt: skip
    call.launch(forward, tickets + queries, arguments, config.num_warps)


def attention(
    query: Tensor, key: Tensor, value: Tensor, proj_key: Tensor, proj_value: Tensor | None, key_bias: Tensor | None,
    key_padding_mask: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    rng_state: Tensor | None, dropout_p: float, scale: float, allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """out, K', V'."""
    inputs = {"query": query, "key": key, "value": value, "proj_key": proj_key, "proj_value": proj_value}
    check(inputs, cu_seqlens_q, cu_seqlens_k, key_padding_mask, rng_state, dropout_p, key_bias)
    out, key_proj, value_proj = _ops.empty_attention(query, key, value, proj_key, cu_seqlens_k)
    tensors = {**inputs, "key_proj": key_proj, "value_proj": value_proj, "out": out}
    call = _Call(tensors, cu_seqlens_q, cu_seqlens_k, allow_tf32)
    _forward(call, key_padding_mask, call.softmax(key_bias, rng_state, dropout_p, scale), True, True)
    return out, key_proj, value_proj


def project(
    key: Tensor, value: Tensor, proj_key: Tensor, proj_value: Tensor | None, key_padding_mask: Tensor | None,
    cu_seqlens_k: Tensor | None, allow_tf32: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """K', V'."""
    inputs = {"key": key, "value": value, "proj_key": proj_key, "proj_value": proj_value}
    check(inputs, None, cu_seqlens_k, key_padding_mask)
    key_proj, value_proj = _ops._empty_projections(key, value, proj_key, cu_seqlens_k)
    tensors = {**inputs, "key_proj": key_proj, "value_proj": value_proj}
    call = _Call(tensors, None, cu_seqlens_k, allow_tf32)
    _forward(call, key_padding_mask, call.softmax(None, None, 0.0, 1.0), True, False)
    return key_proj, value_proj


def projected_attention(
    query: Tensor, key_proj: Tensor, value_proj: Tensor, key_bias: Tensor | None, cu_seqlens_q: Tensor | None,
    rng_state: Tensor | None, dropout_p: float, scale: float, allow_tf32: bool,
) -> Tensor:  # fmt: skip
    """out."""
    inputs = {"query": query, "key_proj": key_proj, "value_proj": value_proj}
    check(inputs, cu_seqlens_q, None, None, rng_state, dropout_p, key_bias)
    out = _ops._like(query, value_proj.size(-1))
    call = _Call({**inputs, "out": out}, cu_seqlens_q, None, allow_tf32)
    _forward(call, None, call.softmax(key_bias, rng_state, dropout_p, scale), False, True)
    return out


def _attend_backward(
    call: _Call, softmax: dict[str, Any], scale: float, want: tuple[bool, bool, bool], grad_key_bias: Tensor | None
) -> None:
    config, sizes, shape = call.config.backward, call.sizes, call.shape
    want_query, want_key, want_value = want
    want_bias = grad_key_bias is not None
    rows = tiles = splits = 0
    if not config.fused:
        rows = call.tiles("cu_seqlens_q", sizes.len_q, config.block_rows) * sizes.heads
    if config.fused or want_key or want_value or want_bias:
        tiles = sizes.batch * sizes.heads_kv * -(-shape.proj_dim // config.block_k)
        splits = call.splits(tiles, "cu_seqlens_q", sizes.len_q * sizes.heads // max(sizes.heads_kv, 1), False)
    widths = call.widths()
    columns = want_key * widths["BLOCK_D"] + want_value * widths["BLOCK_DV"] + want_bias
    query_rows = sizes.len_q * (1 if call.cu_seqlens["cu_seqlens_q"] is not None else sizes.batch)
    arguments = {
        **call.arguments(
            "query", "key_proj", "value_proj", "grad_out", "grad_query", "grad_key_proj", "grad_value_proj"
        ),
        **softmax, **widths, "cu_seqlens_q": call.cu_seqlens["cu_seqlens_q"], "scale": scale,
        "grad_key_bias": grad_key_bias,
        "statistics": call.partial(0 if config.fused else 3 * query_rows * sizes.heads),
        "counters": call.counters(1 + sizes.batch * sizes.heads_kv + 3 * tiles),
        "partial": call.partial(tiles * splits * config.block_k * columns if splits > 1 else 0),
        "row_tiles": rows, "splits": splits, "tiles": tiles, "FUSED": config.fused, "SPLIT": splits > 1,
        "WANT_QUERY": want_query, "WANT_KEY": want_key, "WANT_VALUE": want_value, "WANT_BIAS": want_bias,
        "PRECISION": call.precision, "BLOCK_ROWS": config.block_rows, "BLOCK_S": config.block_s,
        "BLOCK_K": config.block_k, "BLOCK_Q": config.block_q,
        "ROW_STAGES": config.row_stages, "COLUMN_STAGES": config.column_stages,
    }  # fmt: skip
    # A bias takes registers; with all of K' in them too, four warps have too few.
    warps = 8 if config.fused and softmax["key_bias"].data is not None else config.num_warps
    call.launch(backward, rows + tiles * splits, arguments, warps)


def _project_backward(call: _Call, mask: Tensor | None) -> None:
    config, sizes, shape, tensors = call.config.project_backward, call.sizes, call.shape, call.tensors
    wanted = {f"WANT_{name[5:].upper()}": tensors[name] is not None for name in (
        "grad_key", "grad_value", "grad_proj_key", "grad_proj_value"
    )}  # fmt: skip
    matrix = inputs = 0
    if wanted["WANT_PROJ_KEY"] or wanted["WANT_PROJ_VALUE"]:
        matrix = wanted["WANT_PROJ_KEY"] + wanted["WANT_PROJ_VALUE"]
        matrix *= (sizes.batch if call.per_batch else 1) * (sizes.heads_kv if shape.per_head_proj else 1)
        matrix *= -(-shape.proj_dim // config.block_r) * -(-sizes.seq_len_max // config.block_n)
    if wanted["WANT_KEY"] or wanted["WANT_VALUE"]:
        inputs = call.tiles("cu_seqlens_k", sizes.len_k, config.block_n) * call.units * call.unit.tiles
    pairs = (("grad_key", "grad_value"), ("grad_key_proj", "grad_value_proj"), ("grad_proj_key", "grad_proj_value"))
    for pair in pairs:
        for one, other in (pair, pair[::-1]):
            if tensors[one] is None:  # never written, but it has a type
                tensors[one] = tensors[other]
    arguments = {
        **call.arguments(
            "key", "value", "proj_key", "proj_value", "grad_key_proj", "grad_value_proj", "grad_key", "grad_value",
            "grad_proj_key", "grad_proj_value",
        ),
        **call.columns(), **wanted, "mask": _mask(mask), "cu_seqlens_k": call.cu_seqlens["cu_seqlens_k"],
        "matrix_tiles": matrix, "units": call.units, "PER_BATCH": call.per_batch, "PER_HEAD": shape.per_head_proj,
        "PRECISION": call.precision, "BLOCK_R": config.block_r, "BLOCK_N": config.block_n, "BLOCK_W": config.block_w,
        "BLOCK_C": config.block_c, "BLOCK_K": config.block_k, "STAGES": config.stages,
    }  # fmt: skip
    call.launch(project_backward_kernel, matrix + inputs, arguments, config.num_warps)


def _gradient_of(like: Tensor) -> Tensor:
    """For a gradient of K' or V' that one launch leaves for the next: rows start at multiples of 16 bytes."""
    width = like.size(-1)
    return like.new_empty((*like.shape[:-1], -(-width // 8) * 8))[..., :width]


def _present(grads: Sequence[Tensor], needs: int, there: Sequence[bool]) -> list[Tensor | None]:
    """Those that are wanted, of arguments that are there."""
    return [grad if needs >> i & there[i] else None for i, grad in enumerate(grads)]


def attention_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, proj_key: Tensor, proj_value: Tensor | None,
    key_bias: Tensor | None, key_padding_mask: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    rng_state: Tensor | None, key_proj: Tensor, value_proj: Tensor, dropout_p: float, scale: float, allow_tf32: bool,
    needs: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of query, key, value, proj_key, proj_value, key_bias."""
    inputs = {
        "query": query, "key": key, "value": value, "proj_key": proj_key, "proj_value": proj_value,
        "key_proj": key_proj, "value_proj": value_proj, "grad_out": grad_out,
    }  # fmt: skip
    check(inputs, cu_seqlens_q, cu_seqlens_k, key_padding_mask, rng_state, dropout_p, key_bias)
    grads = _ops.empty_attention_grads(needs, query, key, value, proj_key, proj_value, key_bias)
    shared = proj_value is None
    there = (True, True, True, True, not shared, key_bias is not None)
    grad_query, grad_key, grad_value, grad_proj_key, grad_proj_value, grad_key_bias = _present(grads, needs, there)
    want_key = grad_key is not None or grad_proj_key is not None
    want_value = grad_value is not None or (grad_proj_key if shared else grad_proj_value) is not None
    tensors = {
        **inputs, "grad_query": grad_query, "grad_key": grad_key, "grad_value": grad_value,
        "grad_proj_key": grad_proj_key,
        "grad_proj_value": grad_proj_value, "grad_key_proj": _gradient_of(key_proj) if want_key else None,
        "grad_value_proj": _gradient_of(value_proj) if want_value else None,
    }  # fmt: skip
    call = _Call(tensors, cu_seqlens_q, cu_seqlens_k, allow_tf32)
    if grad_query is not None or want_key or want_value or grad_key_bias is not None:
        softmax = call.softmax(key_bias, rng_state, dropout_p, scale)
        _attend_backward(call, softmax, scale, (grad_query is not None, want_key, want_value), grad_key_bias)
    if want_key or want_value:
        _project_backward(call, key_padding_mask)
    return grads


def project_backward(
    grad_key_proj: Tensor, grad_value_proj: Tensor, key: Tensor, value: Tensor, proj_key: Tensor,
    proj_value: Tensor | None, key_padding_mask: Tensor | None, cu_seqlens_k: Tensor | None, allow_tf32: bool,
    needs: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of key, value, proj_key, proj_value."""
    inputs = {
        "key": key, "value": value, "proj_key": proj_key, "proj_value": proj_value, "grad_key_proj": grad_key_proj,
        "grad_value_proj": grad_value_proj,
    }  # fmt: skip
    check(inputs, None, cu_seqlens_k, key_padding_mask)
    grads = _ops.empty_project_grads(needs, key, value, proj_key, proj_value)
    names = ("grad_key", "grad_value", "grad_proj_key", "grad_proj_value")
    wanted = _present(grads, needs, (True, True, True, proj_value is not None))
    tensors = {
        **inputs, "key_proj": grad_key_proj, "value_proj": grad_value_proj, **dict(zip(names, wanted, strict=True)),
    }  # fmt: skip
    if any(grad is not None for grad in wanted):
        _project_backward(_Call(tensors, None, cu_seqlens_k, allow_tf32), key_padding_mask)
    return grads


def projected_attention_backward(
    grad_out: Tensor, query: Tensor, key_proj: Tensor, value_proj: Tensor, key_bias: Tensor | None,
    cu_seqlens_q: Tensor | None, rng_state: Tensor | None, dropout_p: float, scale: float, allow_tf32: bool, needs: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of query, key_proj, value_proj, key_bias."""
    inputs = {"query": query, "key_proj": key_proj, "value_proj": value_proj, "grad_out": grad_out}
    check(inputs, cu_seqlens_q, None, None, rng_state, dropout_p, key_bias)
    grads = _ops.empty_projected_grads(needs, query, key_proj, value_proj, key_bias)
    there = (True, True, True, key_bias is not None)
    grad_query, grad_key_proj, grad_value_proj, grad_key_bias = _present(grads, needs, there)
    tensors = {
        **inputs, "grad_query": grad_query, "grad_key_proj": grad_key_proj, "grad_value_proj": grad_value_proj,
    }  # fmt: skip
    call = _Call(tensors, cu_seqlens_q, None, allow_tf32)
    wanted = tuple(grad is not None for grad in (grad_query, grad_key_proj, grad_value_proj))
    if any(wanted) or grad_key_bias is not None:
        _attend_backward(call, call.softmax(key_bias, rng_state, dropout_p, scale), scale, wanted, grad_key_bias)
    return grads


def _by_heads(segments: Tensor, cu_seqlens_k: Tensor | None) -> Tensor:
    """(B, 1 or H_kv, N); of packed ones one sequence of all rows."""
    return segments if cu_seqlens_k is None else segments.t()[None]


def pool(
    key: Tensor, value: Tensor, segments: Tensor, cu_seqlens_k: Tensor | None, num_segments: int
) -> tuple[Tensor, Tensor, Tensor]:
    """K', V', count."""
    inputs = {"key": key, "value": value}
    check(inputs, None, cu_seqlens_k, segments=segments, num_segments=num_segments)
    key_proj, value_proj, count = _ops.empty_pool(key, value, cu_seqlens_k, num_segments)
    tensors = {**inputs, "key_proj": key_proj, "value_proj": value_proj}
    call = _Call(tensors, None, cu_seqlens_k)
    by_heads = _by_heads(segments, cu_seqlens_k)
    order, starts = members(by_heads, cu_seqlens_k, call.sizes.batch, num_segments)
    arguments = {
        **call.arguments("key", "value", "key_proj", "value_proj"), **call.widths(), "count": count, "order": order,
        "starts": starts, "PACKED": cu_seqlens_k is not None, "PER_HEAD": by_heads.size(1) > 1, "BLOCK_N": POOL_ROWS,
    }  # fmt: skip
    call.launch(pool_kernel, count.numel(), arguments, 4)
    return key_proj, value_proj, count


def pool_backward(
    grad_key_proj: Tensor, grad_value_proj: Tensor, count: Tensor, segments: Tensor, cu_seqlens_k: Tensor | None,
    heads_inner: bool, needs: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of key, value."""
    inputs = {"grad_key_proj": grad_key_proj, "grad_value_proj": grad_value_proj}
    check(inputs, None, cu_seqlens_k, segments=segments, count=count)
    grads = _ops.empty_pool_grads(grad_key_proj, grad_value_proj, segments, heads_inner, needs)
    grad_key, grad_value = _present(grads, needs, (True, True))
    like = grad_value if grad_key is None else grad_key
    if like is None:
        return grads
    tensors = {
        **inputs, "key_proj": grad_key_proj, "value_proj": grad_value_proj, "key": like, "grad_key": grad_key,
        "grad_value": grad_value,
    }  # fmt: skip
    call = _Call(tensors, None, cu_seqlens_k)
    by_heads = _by_heads(segments, cu_seqlens_k)
    strides = (0 if size == 1 else stride for size, stride in zip(by_heads.shape, by_heads.stride(), strict=True))
    arguments = {
        **call.arguments("grad_key_proj", "grad_value_proj", "grad_key", "grad_value"), **call.widths(),
        "count": count, "segments": segments, "cu_seqlens_k": cu_seqlens_k,
        "segment_strides": Strides(*map(opaque, strides)), "BLOCK_N": POOL_ROWS,
    }  # fmt: skip
    tiles = call.tiles("cu_seqlens_k", call.sizes.len_k, POOL_ROWS) * call.sizes.heads_kv
    call.launch(pool_backward_kernel, tiles, arguments, 4)
    return grads
