"""Kernels that are loaded while a CUDA graph is captured: CUDA lets only threads do that which ask for it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


@contextmanager
def may_load() -> Iterator[None]:
    """Within the block, this thread may load kernels whether or not its stream is being captured.

    Triton loads a kernel at its first launch. That does not go into the graph, and would end the capture with an error.
    """
    if torch.version.cuda is None or not torch.cuda.is_current_stream_capturing():
        yield
        return
    mode = ctypes.c_int(_RELAXED)
    exchange = _driver().cuThreadExchangeStreamCaptureMode  # the other mode comes back in the argument
    exchange(ctypes.byref(mode))
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))
