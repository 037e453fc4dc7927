"""The ops of the package, run by the Triton kernels: from tensors to launches.

Arguments and results are those of `linformer_kernels._ops`, which also makes the results' shapes and strides.

A call has two parts. The functions named as the ops make a plan: they see of the tensors only what `_described` keeps,
and say which tensors to make and what to launch. A plan is kept for later calls of the same description, and running it
is all that those do: make the tensors, put addresses into the arguments, and hand these to Triton's launcher.
(python -m bench.host times that.)
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections import namedtuple
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .. import _ops
from .backward import backward
from .capture import may_load
from .checks import CHECKED_APART, check
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
MOST_PLANS = 512  # kept; with more, all are forgotten. Packed batches bring a new one with each number of rows.


@dataclass(frozen=True)
class Slot:
    """Stands for a tensor of the call in the arguments of a plan."""

    index: int


def _with(value: Any, kind: type, put: Callable[[Any], Any]) -> Any:
    """The value, or NamedTuple of values, with put(one) for each `one` of a kind."""
    if isinstance(value, kind):
        return put(value)
    if isinstance(value, tuple) and any(isinstance(one, kind) for one in value):
        return type(value)(*(put(one) if isinstance(one, kind) else one for one in value))
    return value


class Launch:
    """A kernel of Triton with its grid, its arguments by name, tensors or slots for them, and the number of warps."""

    def __init__(self, kernel: Any, grid: int, arguments: dict[str, Any], num_warps: int):
        self.kernel, self.grid, self.arguments, self.num_warps = kernel, grid, arguments, num_warps
        self._compiled: Any = None  # after the first launch
        self._values: list[Any] = []  # in the order of the kernel, and where among them the slots are
        self._slots: list[tuple[int, int]] = []
        self._nested: list[tuple[int, Any]] = []

    def filled(self, tensors: Sequence[Tensor | None]) -> dict[str, Any]:
        """The arguments with the tensors of a call."""
        return {name: _with(value, Slot, lambda slot: tensors[slot.index]) for name, value in self.arguments.items()}

    def run(self, tensors: Sequence[Tensor | None]) -> None:
        """On the current device, always the same one.

        Triton's way from arguments to the compiled kernel looks at each of them and takes most of a call's time. All
        that it looks at but the addresses stands in the plan, and of those the plan's key has what matters, so it is
        asked once. Addresses go to the launcher as numbers: for a tensor it asks the driver whose memory that is.
        """
        if self._compiled is None:
            with may_load():
                compiled = self.kernel[(self.grid,)](**self.filled(tensors), num_warps=self.num_warps)
            if compiled is not None and compiled.metadata.target.backend == "cuda":  # None: interpreted
                self._keep(compiled)
            return
        values = self._values.copy()
        for at, index in self._slots:
            values[at] = tensors[index].data_ptr()  # type: ignore[union-attr]
        for at, value in self._nested:
            values[at] = _with(value, Slot, lambda slot: tensors[slot.index].data_ptr())  # type: ignore[union-attr]
        self._compiled[(self.grid, 1, 1)](*values)

    def _keep(self, compiled: Any) -> None:
        values = [self.arguments[name] for name in self.kernel.arg_names]
        self._slots = [(at, value.index) for at, value in enumerate(values) if isinstance(value, Slot)]
        self._nested = [
            (at, value)
            for at, value in enumerate(values)
            if isinstance(value, tuple) and any(isinstance(one, Slot) for one in value)
        ]
        self._values = values
        self._compiled = compiled  # last: another thread may look at it


def launch(one: Launch, tensors: Sequence[Tensor | None] = ()) -> None:
    """The one place that launches; the tests put their emulator here."""
    one.run(tensors)


class Plan:
    """What a call makes and launches. `tensors` are those of the call while it is planned: stand-ins on "meta"."""

    def __init__(self, tensors: Sequence[tuple[Any, ...] | None]):
        first = next(one for one in tensors if one is not None)
        self.device: torch.device = first[3]
        self.tensors = [None if of is None else _stand_in(*of[:3]) for of in tensors]
        self._unaligned = [own for own, of in zip(self.tensors, tensors, strict=True) if of is not None and not of[4]]
        self._launches: list[Launch] = []
        self._made: list[tuple[bool, tuple[Any, ...]]] = []
        self._results = slice(0)
        self._before: Callable[..., tuple[Tensor, ...]] | None = None

    def is_aligned(self, tensor: Tensor) -> bool:
        """To 16 bytes, which all have that are made here."""
        return all(tensor is not other for other in self._unaligned)

    def results(self, *tensors: Tensor) -> None:
        """What the op returns: tensors like these."""
        self._results = slice(len(self.tensors), len(self.tensors) + len(tensors))
        for tensor in tensors:
            self._make(tensor)

    def temporary(
        self, shape: Sequence[int], dtype: torch.dtype, zero: bool = False, width: int | None = None
    ) -> Tensor:
        """Memory for the time of the launches; of its rows the first `width` elements."""
        tensor = self._make(torch.empty(tuple(shape), dtype=dtype, device="meta"), zero)
        self.tensors[-1] = tensor[..., :width]
        return self.tensors[-1]

    def _make(self, tensor: Tensor, zero: bool = False) -> Tensor:
        self._made.append((zero, (tuple(tensor.shape), tensor.stride(), tensor.dtype)))
        self.tensors.append(tensor)
        return tensor

    def computed(self, function: Callable[..., tuple[Tensor, ...]], *like: Tensor) -> None:
        """function(*tensors of the call) gives tensors like these, before anything else is made."""
        assert not self._made
        self._before = function
        self.tensors.extend(like)

    def launch(self, kernel: Any, grid: int, arguments: dict[str, Any], num_warps: int) -> None:
        """One launch more, after the others."""
        if grid == 0:
            return
        slots = {id(tensor): Slot(i) for i, tensor in enumerate(self.tensors) if tensor is not None}
        arguments = {name: _with(value, Tensor, lambda one: slots[id(one)]) for name, value in arguments.items()}
        self._launches.append(Launch(kernel, grid, arguments, num_warps))

    def done(self) -> Plan:
        """The plan is made: nothing of the tensors that it was made for is kept."""
        self.tensors, self._unaligned = [], []
        return self

    def make(self) -> list[Tensor]:
        """The tensors for one call: results and temporary ones."""
        return [
            torch.zeros(shape, dtype=dtype, device=self.device)
            if zero
            else torch.empty_strided(shape, strides, dtype=dtype, device=self.device)
            for zero, (shape, strides, dtype) in self._made
        ]

    def run(self, inputs: Sequence[Tensor | None]) -> Any:
        before = () if self._before is None else self._before(*inputs)
        tensors = [*inputs, *before, *self.make()]
        if self._launches:
            # Triton launches on the current device.
            with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
                for one in self._launches:
                    launch(one, tensors)
        results = tensors[self._results]
        return tuple(results) if len(results) > 1 else results[0]


def _stand_in(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


_PLANS: dict[Any, Plan] = {}


def forget() -> None:
    """All plans: other tiles may be wanted from now on."""
    _PLANS.clear()


def _described(tensors: Sequence[Tensor | None]) -> list[tuple[Any, ...] | None]:
    """What a plan may know of tensors: shape, strides, dtype, device, and whether they start at a multiple of 16 bytes.
    It is what decides on a launch; addresses do not but for that."""
    return [None if t is None else (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() & 15 == 0) for t in tensors]


def _planned(make: Callable[..., None]) -> Callable[..., Any]:
    """The op that runs the plan that `make` makes of its arguments: tensors, all of them first, and numbers."""
    signature = inspect.signature(make)
    names = list(signature.parameters)[1:]
    count = sum("Tensor" in str(one.annotation) for one in signature.parameters.values())

    @functools.wraps(make)
    def op(*arguments: Any) -> Any:
        tensors = arguments[:count]
        key = (make, arguments[count:], *_described(tensors))
        plan = _PLANS.get(key)
        if plan is None:
            named = dict(zip(names, arguments, strict=True))
            apart = {name: value for name, value in named.items() if name in CHECKED_APART}
            check({name: named[name] for name in names[:count] if name not in apart}, **apart)
            plan = Plan(key[2:])
            make(plan, *plan.tensors, *arguments[count:])
            if len(_PLANS) >= MOST_PLANS:
                forget()
            _PLANS[key] = plan.done()
        return plan.run(tensors)

    return op


def device_of(device: torch.device) -> Device:
    """The GPU; for Triton's interpreter, which has none, a small one."""
    if triton.knobs.runtime.interpret:
        return Device("Triton's interpreter", "interpreter", 80, 4)
    return _device(device.index or 0)


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
        plan: Plan,
        tensors: dict[str, Tensor | None],
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        allow_tf32: bool = False,
    ):
        self.plan, self.tensors = plan, tensors
        self.cu_seqlens = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
        like = next(tensor for tensor in tensors.values() if tensor is not None)
        self.like, self.device = like, device_of(plan.device)
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
            if tensor is not None and (not self.plan.is_aligned(tensor) or any(s % vector for s in strides[name])):
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
        return self.plan.temporary((count,), torch.int32, zero=True)

    def partial(self, elements: int) -> Tensor | None:
        return self.plan.temporary((elements,), torch.float32) if elements else None

    def gradient_of(self, like: Tensor) -> Tensor:
        """For a gradient of K' or V' that one launch leaves for the next: rows start at multiples of 16 bytes."""
        width = like.size(-1)
        return self.plan.temporary((*like.shape[:-1], -(-width // 8) * 8), like.dtype, width=width)


def _mask(mask: Tensor | None) -> Mask:
    return Mask(mask, *map(opaque, (0, 0) if mask is None else mask.stride()))


def _bias(bias: Tensor | None) -> Bias:
    return Bias(None, None, None) if bias is None else Bias(bias, *map(opaque, bias.stride()[:2]))


def attention_call(query: Tensor, key: Tensor, value: Tensor, proj_key: Tensor, proj_value: Tensor | None) -> _Call:
    """What a forward with these tensors derives from them; nothing is launched."""
    plan = Plan(_described((query, key, value, proj_key, proj_value)))
    query, key, value, proj_key, proj_value = plan.tensors
    key_proj, value_proj = _ops._empty_projections(key, value, proj_key, None)
    tensors = {"query": query, "key": key, "proj_key": proj_key, "proj_value": proj_value}
    return _Call(plan, {**tensors, "key_proj": key_proj, "value_proj": value_proj})


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
    call.plan.launch(forward, tickets + queries, arguments, config.num_warps)


@_planned
def attention(
    plan: Plan, query: Tensor, key: Tensor, value: Tensor, proj_key: Tensor, proj_value: Tensor | None,
    key_bias: Tensor | None, key_padding_mask: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    rng_state: Tensor | None, dropout_p: float, scale: float, allow_tf32: bool,
) -> None:  # fmt: skip
    """out, K', V'."""
    inputs = {"query": query, "key": key, "value": value, "proj_key": proj_key, "proj_value": proj_value}
    results = _ops.empty_attention(query, key, value, proj_key, cu_seqlens_k)
    plan.results(*results)
    tensors = {**inputs, **dict(zip(("out", "key_proj", "value_proj"), results, strict=True))}
    call = _Call(plan, tensors, cu_seqlens_q, cu_seqlens_k, allow_tf32)
    _forward(call, key_padding_mask, call.softmax(key_bias, rng_state, dropout_p, scale), True, True)


@_planned
def project(
    plan: Plan, key: Tensor, value: Tensor, proj_key: Tensor, proj_value: Tensor | None,
    key_padding_mask: Tensor | None, cu_seqlens_k: Tensor | None, allow_tf32: bool,
) -> None:  # fmt: skip
    """K', V'."""
    inputs = {"key": key, "value": value, "proj_key": proj_key, "proj_value": proj_value}
    key_proj, value_proj = _ops._empty_projections(key, value, proj_key, cu_seqlens_k)
    plan.results(key_proj, value_proj)
    call = _Call(plan, {**inputs, "key_proj": key_proj, "value_proj": value_proj}, None, cu_seqlens_k, allow_tf32)
    _forward(call, key_padding_mask, call.softmax(None, None, 0.0, 1.0), True, False)


@_planned
def projected_attention(
    plan: Plan, query: Tensor, key_proj: Tensor, value_proj: Tensor, key_bias: Tensor | None,
    cu_seqlens_q: Tensor | None, rng_state: Tensor | None, dropout_p: float, scale: float, allow_tf32: bool,
) -> None:  # fmt: skip
    """out."""
    inputs = {"query": query, "key_proj": key_proj, "value_proj": value_proj}
    out = _ops._like(query, value_proj.size(-1))
    plan.results(out)
    call = _Call(plan, {**inputs, "out": out}, cu_seqlens_q, None, allow_tf32)
    _forward(call, None, call.softmax(key_bias, rng_state, dropout_p, scale), False, True)


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
    call.plan.launch(backward, rows + tiles * splits, arguments, warps)


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
    call.plan.launch(project_backward_kernel, matrix + inputs, arguments, config.num_warps)


def _present(grads: Sequence[Tensor], needs: int, there: Sequence[bool]) -> list[Tensor | None]:
    """Those that are wanted, of arguments that are there."""
    return [grad if needs >> i & there[i] else None for i, grad in enumerate(grads)]


@_planned
def attention_backward(
    plan: Plan, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, proj_key: Tensor,
    proj_value: Tensor | None, key_bias: Tensor | None, key_padding_mask: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, rng_state: Tensor | None, key_proj: Tensor, value_proj: Tensor, dropout_p: float,
    scale: float, allow_tf32: bool, needs: int,
) -> None:  # fmt: skip
    """Gradients of query, key, value, proj_key, proj_value, key_bias."""
    inputs = {
        "query": query, "key": key, "value": value, "proj_key": proj_key, "proj_value": proj_value,
        "key_proj": key_proj, "value_proj": value_proj, "grad_out": grad_out,
    }  # fmt: skip
    grads = _ops.empty_attention_grads(needs, query, key, value, proj_key, proj_value, key_bias)
    plan.results(*grads)
    shared = proj_value is None
    there = (True, True, True, True, not shared, key_bias is not None)
    grad_query, grad_key, grad_value, grad_proj_key, grad_proj_value, grad_key_bias = _present(grads, needs, there)
    want_key = grad_key is not None or grad_proj_key is not None
    want_value = grad_value is not None or (grad_proj_key if shared else grad_proj_value) is not None
    tensors = {
        **inputs, "grad_query": grad_query, "grad_key": grad_key, "grad_value": grad_value,
        "grad_proj_key": grad_proj_key, "grad_proj_value": grad_proj_value,
    }  # fmt: skip
    call = _Call(plan, tensors, cu_seqlens_q, cu_seqlens_k, allow_tf32)
    tensors["grad_key_proj"] = call.gradient_of(key_proj) if want_key else None
    tensors["grad_value_proj"] = call.gradient_of(value_proj) if want_value else None
    if grad_query is not None or want_key or want_value or grad_key_bias is not None:
        softmax = call.softmax(key_bias, rng_state, dropout_p, scale)
        _attend_backward(call, softmax, scale, (grad_query is not None, want_key, want_value), grad_key_bias)
    if want_key or want_value:
        _project_backward(call, key_padding_mask)


@_planned
def project_backward(
    plan: Plan, grad_key_proj: Tensor, grad_value_proj: Tensor, key: Tensor, value: Tensor, proj_key: Tensor,
    proj_value: Tensor | None, key_padding_mask: Tensor | None, cu_seqlens_k: Tensor | None, allow_tf32: bool,
    needs: int,
) -> None:  # fmt: skip
    """Gradients of key, value, proj_key, proj_value."""
    inputs = {
        "key": key, "value": value, "proj_key": proj_key, "proj_value": proj_value, "grad_key_proj": grad_key_proj,
        "grad_value_proj": grad_value_proj,
    }  # fmt: skip
    grads = _ops.empty_project_grads(needs, key, value, proj_key, proj_value)
    plan.results(*grads)
    names = ("grad_key", "grad_value", "grad_proj_key", "grad_proj_value")
    wanted = _present(grads, needs, (True, True, True, proj_value is not None))
    tensors = {
        **inputs, "key_proj": grad_key_proj, "value_proj": grad_value_proj, **dict(zip(names, wanted, strict=True)),
    }  # fmt: skip
    if any(grad is not None for grad in wanted):
        _project_backward(_Call(plan, tensors, None, cu_seqlens_k, allow_tf32), key_padding_mask)


@_planned
def projected_attention_backward(
    plan: Plan, grad_out: Tensor, query: Tensor, key_proj: Tensor, value_proj: Tensor, key_bias: Tensor | None,
    cu_seqlens_q: Tensor | None, rng_state: Tensor | None, dropout_p: float, scale: float, allow_tf32: bool,
    needs: int,
) -> None:  # fmt: skip
    """Gradients of query, key_proj, value_proj, key_bias."""
    inputs = {"query": query, "key_proj": key_proj, "value_proj": value_proj, "grad_out": grad_out}
    grads = _ops.empty_projected_grads(needs, query, key_proj, value_proj, key_bias)
    plan.results(*grads)
    there = (True, True, True, key_bias is not None)
    grad_query, grad_key_proj, grad_value_proj, grad_key_bias = _present(grads, needs, there)
    tensors = {
        **inputs, "grad_query": grad_query, "grad_key_proj": grad_key_proj, "grad_value_proj": grad_value_proj,
    }  # fmt: skip
    call = _Call(plan, tensors, cu_seqlens_q, None, allow_tf32)
    wanted = tuple(grad is not None for grad in (grad_query, grad_key_proj, grad_value_proj))
    if any(wanted) or grad_key_bias is not None:
        _attend_backward(call, call.softmax(key_bias, rng_state, dropout_p, scale), scale, wanted, grad_key_bias)


def _by_heads(segments: Tensor, cu_seqlens_k: Tensor | None) -> Tensor:
    """(B, 1 or H_kv, N); of packed ones one sequence of all rows."""
    return segments if cu_seqlens_k is None else segments.t()[None]


@_planned
def pool(
    plan: Plan, key: Tensor, value: Tensor, segments: Tensor, cu_seqlens_k: Tensor | None, num_segments: int,
) -> None:  # fmt: skip
    """K', V', count."""
    batch = key.size(0) if cu_seqlens_k is None else cu_seqlens_k.size(0) - 1
    by_heads = _by_heads(segments, cu_seqlens_k)
    order = torch.empty(by_heads.numel(), dtype=torch.int64, device="meta")
    starts = torch.empty(batch * by_heads.size(1) * (num_segments + 1), dtype=torch.int64, device="meta")

    def sort(key: Tensor, value: Tensor, segments: Tensor, cu_seqlens_k: Tensor | None) -> tuple[Tensor, Tensor]:
        return members(_by_heads(segments, cu_seqlens_k), cu_seqlens_k, batch, num_segments)

    plan.computed(sort, order, starts)
    key_proj, value_proj, count = _ops.empty_pool(key, value, cu_seqlens_k, num_segments)
    plan.results(key_proj, value_proj, count)
    call = _Call(plan, {"key": key, "value": value, "key_proj": key_proj, "value_proj": value_proj}, None, cu_seqlens_k)
    arguments = {
        **call.arguments("key", "value", "key_proj", "value_proj"), **call.widths(), "count": count, "order": order,
        "starts": starts, "PACKED": cu_seqlens_k is not None, "PER_HEAD": by_heads.size(1) > 1, "BLOCK_N": POOL_ROWS,
    }  # fmt: skip
    plan.launch(pool_kernel, count.numel(), arguments, 4)


@_planned
def pool_backward(
    plan: Plan, grad_key_proj: Tensor, grad_value_proj: Tensor, count: Tensor, segments: Tensor,
    cu_seqlens_k: Tensor | None, heads_inner: bool, needs: int,
) -> None:  # fmt: skip
    """Gradients of key, value."""
    inputs = {"grad_key_proj": grad_key_proj, "grad_value_proj": grad_value_proj}
    grads = _ops.empty_pool_grads(grad_key_proj, grad_value_proj, segments, heads_inner, needs)
    plan.results(*grads)
    grad_key, grad_value = _present(grads, needs, (True, True))
    like = grad_value if grad_key is None else grad_key
    if like is None:
        return
    tensors = {
        **inputs, "key_proj": grad_key_proj, "value_proj": grad_value_proj, "key": like, "grad_key": grad_key,
        "grad_value": grad_value,
    }  # fmt: skip
    call = _Call(plan, tensors, None, cu_seqlens_k)
    by_heads = _by_heads(segments, cu_seqlens_k)
    strides = (0 if size == 1 else stride for size, stride in zip(by_heads.shape, by_heads.stride(), strict=True))
    arguments = {
        **call.arguments("grad_key_proj", "grad_value_proj", "grad_key", "grad_value"), **call.widths(),
        "count": count, "segments": segments, "cu_seqlens_k": cu_seqlens_k,
        "segment_strides": Strides(*map(opaque, strides)), "BLOCK_N": POOL_ROWS,
    }  # fmt: skip
    tiles = call.tiles("cu_seqlens_k", call.sizes.len_k, POOL_ROWS) * call.sizes.heads_kv
    plan.launch(pool_backward_kernel, tiles, arguments, 4)
