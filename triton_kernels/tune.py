"""Tiles found by trying, for those who ask for it with `linformer_kernels.tune`; nobody's first call waits for this."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import triton
from torch import Tensor

from . import ops
from .config import Config, Device, Shape, power_of_2
from .tuned import Fastest, config_of, fastest, key_of, save, table

_ROWS = ("block_k", "block_s", "block_r")  # of K
_TRIED = {
    "forward": (
        {"attend_stages": 1}, {"attend_stages": 3}, {"block_q": 64}, {"block_q": 128}, {"block_q": 256},
        {"block_s": 32}, {"block_s": 64}, {"block_s": 128}, {"block_k": 64}, {"block_k": 128}, {"block_k": 256},
        {"block_n": 32}, {"block_n": 64}, {"project_stages": 2}, {"project_stages": 4}, {"num_warps": 4},
    ),
    "backward": (
        {"fused": False}, {"block_q": 16}, {"block_q": 64}, {"block_k": 32}, {"block_k": 64}, {"block_rows": 32},
        {"block_rows": 128}, {"column_stages": 1}, {"column_stages": 3}, {"row_stages": 1}, {"row_stages": 3},
        {"num_warps": 4}, {"num_warps": 8},
    ),
    "project_backward": (
        {"block_r": 64}, {"block_n": 64}, {"block_w": 32}, {"block_k": 32}, {"stages": 3}, {"stages": 4},
        {"num_warps": 4},
    ),
}  # fmt: skip


def changed(config: Config, part: str, change: dict[str, int], shape: Shape) -> Config:
    """The tiles with one kernel's changed. A program that keeps all of K' cannot do with less of it."""
    new = replace(getattr(config, part), **change)
    if part == "backward" and new.fused and new.block_k < shape.proj_dim:
        new = replace(new, fused=False)
    return replace(config, **{part: new})


def _use(key: str, tiles: Config) -> None:
    table()[key] = tiles
    ops.forget()


def search(
    shape: Shape, device: Device, seconds: Callable[[str], float], say: Callable[[str], None]
) -> dict[str, tuple[float, float]]:
    """Greedy, kernel by kernel: a change that lessens `seconds(kernel)` stays; tiles that do not fit are passed over.

    What was found is in the table and the file from now on; each trial is told. Returns seconds before and after for
    each kernel.
    """
    key = key_of(shape, device)
    best = config_of(shape, device)
    found = {}
    for part, changes in _TRIED.items():
        _use(key, best)
        before = least = seconds(part)
        say(f"{part}: {1e6 * before:.1f} us")
        for change in changes:
            new = changed(best, part, change, shape)
            if new == best or any(
                name in _ROWS and value > power_of_2(shape.proj_dim) for name, value in change.items()
            ):
                continue
            _use(key, new)
            try:
                taken = seconds(part)
            except triton.runtime.errors.OutOfResources:
                say(f"{part}, {change}: does not fit")
                continue
            say(f"{part}, {change}: {1e6 * taken:.1f} us")
            if taken < least:
                best, least = new, taken
        found[part] = (before, least)
    _use(key, best)
    save()
    return found


def seconds(run: Callable[[], object]) -> float:
    """What a call takes on the current GPU, the host's part with it where that is the longer one."""
    return triton.testing.do_bench(run, return_mode="median") / 1000


def keep_fastest(inputs: tuple[Tensor | None, ...], backend: str) -> None:
    """Which backend serves calls like that of these inputs from now on."""
    call = ops.attention_call(*inputs)
    fastest()[key_of(call.shape, call.device)] = Fastest(backend, call.device.name, call.shape)
    save()


def tune(
    inputs: tuple[Tensor | None, ...], backward: bool, say: Callable[[str], None]
) -> dict[str, tuple[float, float]]:
    """`search` with the time of the ops on these (query, key, value, proj_key, proj_value), in seconds."""
    call = ops.attention_call(*inputs)
    query = inputs[0]
    arguments = (*inputs, None, None, None, None, None)
    scalars = (0.0, query.size(-1) ** -0.5, False)
    out, key_proj, value_proj = ops.attention(*arguments, *scalars)
    run = {
        "forward": lambda: ops.attention(*arguments, *scalars),
        "backward": lambda: ops.attention_backward(out, *arguments, key_proj, value_proj, *scalars, 0b11111),
    }
    run["project_backward"] = run["backward"]
    wanted = lambda part: seconds(run[part]) if backward or part == "forward" else 0.0  # noqa: E731
    return search(call.shape, call.device, wanted, say)
