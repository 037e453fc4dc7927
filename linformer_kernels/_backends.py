"""The backends, in order of preference, and how one is chosen: argument, then `use_backend`, then LINFORMER_BACKEND.

Without any of the three, the first backend that has no reason to refuse a call serves it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import math
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from . import _autograd, _library, _ops, composed, reference
from ._validation import Call

ENVIRONMENT_VARIABLE = "LINFORMER_BACKEND"


@dataclass(frozen=True)
class Backend:
    """The operations of one backend, with the arguments of the ops in `_ops`, and what it cannot do."""

    name: str
    missing: str | None
    """Why this installation lacks it, else None."""
    limits: Callable[[Call], str | None]
    """Why it refuses one call, else None."""
    attention: Callable[..., Any]
    project: Callable[..., Any]
    projected_attention: Callable[..., Any]
    pool: Callable[..., Any]

    def supports(self, call: Call) -> str | None:
        """The reason for which this backend refuses the call, or None if it takes it."""
        return self.missing or self.limits(call)


def _fused(name: str, missing: str | None, device_types: tuple[str, ...], operations: _autograd.Operations) -> Backend:
    """A backend of kernels behind the ops."""

    def limits(call: Call) -> str | None:
        if call.device_type not in device_types:
            return f"its kernels run on {device_types[0]} tensors and these are on {call.device}"
        if call.dtype == torch.float64:
            return 'its kernels take float32, float16 and bfloat16, and these tensors are float64: use "reference"'
        return _gpu_limits(call, name) if name != "cpu" else None

    made = (getattr(operations, field.name) for field in dataclasses.fields(operations))
    return Backend(name, missing, limits, *made)


_GPU_WIDEST_HEAD = 256
OLDEST_TRITON = (3, 6)  # that of torch 2.10; no older one was tried


def _gpu_limits(call: Call, name: str) -> str | None:
    """What the CUDA and the Triton kernels cannot do."""
    heads = (call.query, call.key, call.value, call.key_proj, call.value_proj)
    widest = max(tensor.shape[-1] for tensor in heads if tensor is not None)
    if widest > _GPU_WIDEST_HEAD:
        return f'its kernels take heads of up to {_GPU_WIDEST_HEAD} columns, and these have {widest}: use "composed"'
    return gpu_problem(call.device, name) if call.device_type == "cuda" else None


def gpu_problem(device: torch.device, name: str) -> str | None:
    """Why the CUDA or the Triton kernels do not run on this GPU, else None."""
    major, minor = _capability(device)
    if major < 8:
        return f'its kernels need compute capability 8.0, and this GPU has {major}.{minor}: use "composed"'
    if name != "cuda":
        return None
    code = _library.code_for(_ARCHITECTURES, major, minor)
    if code is None:
        return (
            f"the native library was built for {_ARCHITECTURES}, and this GPU has compute capability {major}.{minor}: "
            f'reinstall with LINFORMER_CUDA_ARCHS={major}{minor}, or use "triton"'
        )
    return _driver_problem(code == "PTX") or None


def _driver_problem(ptx: bool) -> str:
    return _library.driver_problem(ptx)


def _capability(device: torch.device) -> tuple[int, int]:
    return _asked_capability(device)


_asked_capability = functools.cache(torch.cuda.get_device_capability)  # a call needs it twice, and torch takes its time


# The compiler need not trace them: they do not change within a process.
_driver_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]
_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _cuda_missing() -> str | None:
    """Why this installation has no CUDA backend."""
    if _LIBRARY_MISSING:
        return _LIBRARY_MISSING
    if not _ARCHITECTURES:
        return "the native library was built without CUDA kernels; reinstall linformer_kernels with nvcc on PATH"
    if torch.version.cuda is None:  # torch.backends.cuda.is_built() says yes for ROCm too
        return f"torch {torch.__version__} was built without CUDA"
    return None


def _triton_missing() -> str | None:
    """Why this installation has no Triton backend. Without hardware for it, Triton is not even imported."""
    accelerated = torch.backends.cuda.is_built() or torch.xpu._is_compiled()
    if not accelerated and not interpreting():
        return f"torch {torch.__version__} was built without CUDA, ROCm and XPU"
    return triton_problem()


@functools.cache
def triton_problem() -> str | None:
    """Import Triton and tie its kernels to the ops. Returns why that fails, else None; never raises."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    try:
        version = importlib.import_module("triton").__version__
        if _numbers(version) < OLDEST_TRITON:
            oldest = ".".join(map(str, OLDEST_TRITON))
            return f"Triton {version} is too old, {oldest} or newer is wanted: pip install --upgrade triton"
        from .triton_kernels import ops
    except Exception as error:  # whatever a broken installation raises is the reason
        return f"Triton does not import: {type(error).__name__}: {error}"
    for name in ("attention", "project", "projected_attention", "pool"):
        for op in (name, f"{name}_backward"):
            _ops.LIBRARY.impl(f"{op}.triton", getattr(ops, op), "CompositeExplicitAutograd")
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def unfenced_triton(version: str | None) -> str | None:
    """Why a version of Triton comes after "composed" on `UNFENCED` GPUs, else None."""
    if version is None or _numbers(version) >= (3, 7, 1):
        return None
    return (
        f"Triton {version} leaves out a fence between copies and products (proxy fence, cp.async and wgmma) on compute "
        "capability 9.x and 10.x, where results may be wrong: it comes after composed there; 3.7.1 has it"
    )


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels: on the CPU, slowly, for those who look for bugs."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


# Read once, here: a compiler that traces a call must not meet the loading of a library.
_LIBRARY_MISSING = _library.load()
_ARCHITECTURES = _library.cuda_architectures()

BACKENDS = {
    backend.name: backend
    for backend in (
        _fused("cuda", _cuda_missing(), ("cuda",), _autograd.NATIVE),
        _fused("triton", _triton_missing(), ("cpu", "cuda") if interpreting() else ("cuda", "xpu"), _autograd.TRITON),
        _fused("cpu", _LIBRARY_MISSING, ("cpu",), _autograd.NATIVE),
        Backend(
            "composed",
            None,
            composed.refusal,
            composed.attention,
            composed.project,
            composed.projected_attention,
            composed.pool,
        ),
        Backend(
            "reference",
            None,
            lambda call: None,
            reference.attention,
            reference.project,
            reference.projected_attention,
            reference.pool,
        ),
    )
}

# "cuda" comes before "triton", but for these: bytes of an element, and the compute capability from which on. The CUDA
# kernels use mma.sync, but in forward calls on 9.0 that csrc/cuda/hopper_plan.cpp takes; Triton compiles products of
# 16-bit numbers to wgmma on 9.0 and to tcgen05 on 10.0. A choice by the instructions; nobody has timed it.
TRITON_FIRST = {2: 9}
# Read once, as above.
UNFENCED_TRITON = unfenced_triton(getattr(sys.modules.get("triton"), "__version__", None))
UNFENCED = (9, 10)  # major compute capabilities

# Where `tune` leaves what it finds, for those who can have used it.
_TUNED: Any = None
if BACKENDS["triton"].missing is None:
    _TUNED = importlib.import_module(".triton_kernels.tuned", __package__)

# A thread of its own choice; and unlike a ContextVar, torch.compile can read it and guards on what it read.
_chosen = threading.local()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, this thread's calls run on backend `name` unless the call itself names another.

    Compiled code follows it too (but keeps what the environment variable said when it was compiled). A backward pass
    runs where its forward ran, except under activation checkpointing other than `LinformerEncoder`'s, which repeats the
    forward during backward: keep that inside the block as well. On a GPU torch does so in a thread of its own: there
    take the environment variable.

    Raises ValueError for an unknown name.
    """
    _lookup(name, "use_backend")
    previous = getattr(_chosen, "name", None)
    _chosen.name = name
    try:
        yield
    finally:
        _chosen.name = previous


def on_this_backend(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function on the backend of this block of `use_backend`, whenever and in whatever thread it is called."""
    name = None if torch.compiler.is_compiling() else getattr(_chosen, "name", None)
    if name is None:
        return function

    def on_backend(*arguments: Any, **options: Any) -> Any:
        with use_backend(name):
            return function(*arguments, **options)

    return on_backend


def _in_order(call: Call) -> Iterable[Backend]:
    """The backends as they are tried for this call."""
    if call.device_type not in ("cuda", "xpu"):
        return BACKENDS.values()
    others = [backend for backend in BACKENDS.values() if backend.name != "triton"]
    at, first, last = 1, 0, 1 + [backend.name for backend in others].index("composed")
    if call.device_type == "xpu" or torch.version.hip is not None:
        at = last  # Triton's kernels have not even been compiled for AMD and Intel
    else:
        if _triton_is_unfenced(call):
            at = last
        elif _capability(call.device)[0] >= TRITON_FIRST.get(call.dtype.itemsize, math.inf):
            at = first
    order = [*others[:at], BACKENDS["triton"], *others[at:]]
    name = _found_fastest(call)
    if name is None or (name == "triton" and at == last):  # no speed makes up for results that may be wrong
        return order
    return [BACKENDS[name], *[backend for backend in order if backend.name != name]]


def _triton_is_unfenced(call: Call) -> bool:
    return UNFENCED_TRITON is not None and call.device_type == "cuda" and _capability(call.device)[0] in UNFENCED


def _found_fastest(call: Call) -> str | None:
    """The backend that `tune` has found to be the fastest for such calls on this GPU, if it was asked."""
    found = () if _TUNED is None else _fastest_on(call.device)
    if not found:
        return None
    # Only calls of the kind that was tried.
    query, value, proj = call.query, call.value, call.proj_key
    more = (call.key_bias, call.key_padding_mask, call.cu_seqlens_q, call.cu_seqlens_k)
    if query is None or value is None or proj is None or call.dropout_p or any(one is not None for one in more):
        return None
    per_head = proj.dim() == 3 or (proj.dim() == 4 and proj.shape[1] != 1)
    shape = (call.dtype.itemsize, proj.shape[-2], query.shape[-1], value.shape[-1], per_head, call.proj_value is None)
    for name, *of in found:
        if all(a == b for a, b in zip(of, shape, strict=True)):
            return name
    return None


def _fastest_on(device: torch.device) -> tuple[tuple[Any, ...], ...]:
    """Of each shape that was tuned on this GPU: the backend, and the shape."""
    entries = _TUNED.fastest().values()
    if not entries:  # before the name of the GPU, which takes longer to ask for
        return ()
    name = torch.cuda.get_device_name(device)
    return tuple(
        (one.backend, *dataclasses.astuple(one.shape))
        for one in entries
        if one.device == name and one.backend in BACKENDS
    )


# As what it finds changes with `tune` alone: compiled code keeps what was known when it was compiled.
_fastest_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


def contenders(call: Call) -> list[str]:
    """The backends of which one may be the fastest for a call, by name; "reference" is none."""
    none = ("reference", "triton") if _triton_is_unfenced(call) else ("reference",)
    return [name for name, backend in BACKENDS.items() if name not in none and backend.supports(call) is None]


def choose(call: Call, backend: str | None, source: str = "argument backend") -> Backend:
    """The backend for a call. Raises if the one that `source` asked for is unknown, is missing, or refuses."""
    chosen = _choose(call, backend, source)
    return _spread(chosen, call) if is_distributed(call.query if call.query is not None else call.key) else chosen


def is_distributed(tensor: Any) -> bool:
    """Whether it is a DTensor, told without loading torch.distributed."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "device_mesh")


def _spread(backend: Backend, call: Call) -> Backend:
    """A backend for DTensors."""
    from . import _sharding  # which loads torch.distributed

    _sharding.check_distributed(call)
    if backend.name == "reference" and call.dropout_p:
        raise NotImplementedError(
            f'dropout_p is {call.dropout_p}, and "reference" draws dropout numbers for plain tensors, and not for '
            "DTensors; wanted: 0. To fix it: use a backend of kernels, and no float64"
        )
    if backend.name in ("composed", "reference"):
        return backend  # PyTorch's own operators
    return dataclasses.replace(
        backend,
        attention=functools.partial(_sharding.attention, backend),
        project=functools.partial(_sharding.project, backend),
        projected_attention=functools.partial(_sharding.projected_attention, backend),
        pool=functools.partial(_sharding.pool, backend),
    )


def _choose(call: Call, name: str | None, source: str) -> Backend:
    if name is None:
        name, source = getattr(_chosen, "name", None), "use_backend"
    if name is None:
        name, source = os.environ.get(ENVIRONMENT_VARIABLE) or None, f"environment variable {ENVIRONMENT_VARIABLE}"
    if name is None and for_onnx():
        return BACKENDS["reference"]
    if name is None:
        for candidate in _in_order(call):
            if candidate.supports(call) is None:
                return candidate
        raise AssertionError("the reference takes every validated call")
    forced = _lookup(name, source)
    if forced.missing is not None:
        raise RuntimeError(f'{source}: "{name}" is not available: {forced.missing}')
    refusal = forced.limits(call)
    if refusal is not None:
        raise NotImplementedError(f'{source}: "{name}" refuses this call: {refusal}')
    return forced


# The short way: what the native ops raise for a call that is not for them, and what comes of a query without columns.
REFUSALS = (RuntimeError, IndexError, ZeroDivisionError)
_SHORT = _autograd.EAGER_NATIVE if _LIBRARY_MISSING is None and not interpreting() else None
_SHORT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (torch.Tensor, torch.nn.Parameter)
# os.environ itself raises and catches two errors for a variable that is not set, which takes 1 us.
_VARIABLES, _KEY = (
    (os.environ._data, os.environ.encodekey(ENVIRONMENT_VARIABLE))
    if hasattr(os.environ, "_data")
    else (os.environ, ENVIRONMENT_VARIABLE)
)


def short_way(backend: str | None, first: Any, *others: Any) -> _autograd.Operations | None:
    """The native kernels' operations where a call of these tensors may be tried on them without checks and choice.

    These are half of a small call's time on the host (`python -m bench.host`). The native ops check for themselves what
    memory safety needs, and refuse whatever the checks refuse; tests/test_short_way.py compares the two. So a call that
    they take is right, and one that they refuse goes the long way from its beginning. Not for those who trace a call,
    who ask for a backend, or whose tensors autocast would cast.
    """
    if _SHORT is None or backend is not None or torch.compiler.is_compiling():
        return None
    if torch._C._is_any_autocast_enabled() or torch._C._are_functorch_transforms_active():
        return None
    if type(first) not in _PLAIN or first.dtype not in _SHORT_TYPES:
        return None
    on_cpu = first.is_cpu
    if not on_cpu and not (first.is_cuda and cuda_comes_first(first.device, first.dtype)):
        return None
    if not on_cpu and _TUNED is not None and _TUNED.fastest():  # another backend may be the faster one
        return None
    for tensor in others:
        if tensor is not None and (type(tensor) not in _PLAIN or not (tensor.is_cpu if on_cpu else tensor.is_cuda)):
            return None
    asked = getattr(_chosen, "name", None) is not None or _KEY in _VARIABLES
    return None if asked or torch._C._get_tracing_state() is not None else _SHORT


@functools.cache
def cuda_comes_first(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether "cuda" serves a call of this kind that asks for no backend; heads too wide for it the op refuses."""
    heads = torch.empty(1, 1, 1, 1, device="meta")
    call = Call(dtype, device, "cuda", query=heads, key=heads, value=heads)
    return next(backend.name for backend in _in_order(call) if backend.supports(call) is None) == "cuda"


def for_onnx() -> bool:
    """Within torch.onnx.export without a translation of the ops: the plain formula is what it can write down."""
    return (torch.compiler.is_compiling() or torch.jit.is_tracing()) and _in_onnx_export()


def _in_onnx_export() -> bool:
    if not torch.onnx.is_in_onnx_export():
        return False
    # The exporter does not say which table it was given.
    for frame in callers():
        table = frame.f_locals.get("custom_translation_table")
        if isinstance(table, dict) and _ops.OPS.choose_segments.default in table:
            return False
    return True


def callers() -> Iterator[FrameType]:
    """The frames around whoever asks, from the inside: what torch.onnx's exporter was given it does not hand on."""
    frame = sys._getframe().f_back
    while frame is not None:
        yield frame
        frame = frame.f_back


_in_onnx_export._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _lookup(name: object, source: str) -> Backend:
    if not isinstance(name, str) or name not in BACKENDS:
        wanted = ", ".join(f'"{known}"' for known in BACKENDS)
        raise ValueError(f"{source} is {name!r}; wanted: one of {wanted}")
    return BACKENDS[name]
