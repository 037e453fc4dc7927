"""`tune`: measure on this GPU, once, for one model's shapes: other tiles of the Triton kernels, and other backends."""

from __future__ import annotations

import contextlib
from functools import partial

import torch
from torch import Tensor

from ._backends import choose, contenders
from ._validation import check_attention
from .functional import linformer_attention


def tune(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    proj_key: Tensor,
    proj_value: Tensor | None = None,
    *,
    backward: bool = True,
    verbose: bool = False,
) -> dict[str, tuple[float, float]]:
    """Try tile sizes for calls like linformer_attention(query, key, value, proj_key, proj_value), and keep the fastest.

    Then try the other backends that take the call, "composed" for one: the fastest serves such calls from now on,
    unless they name a backend or have a mask, a bias, dropout or packed sequences, which were not tried.

    Without this call tiles and backends follow rules, and nothing is ever tried out. What is found serves every later
    call with the same GPU, element size, K, head widths and sharing, in this process and, through a file, in later
    ones: `python -m linformer_kernels.info` shows it and says where it is (environment variable LINFORMER_TUNED names
    another file; delete it to go back to the rules). Results may change in the last bits, as sums are ordered by tiles.
    Takes a minute or two, most of it compilation.

    Args:
        query, key, value, proj_key, proj_value: as in `linformer_attention`, of the sizes that matter to you.
        backward: tune the backward kernels as well, and compare backends by forward and backward together.
        verbose: print each trial.

    Returns:
        For each Triton kernel the seconds of its operation before and after; for each other backend that was tried, by
        its name, the seconds of a whole call on "triton" as tuned, and on that backend.

    Raises:
        ValueError, TypeError: as `linformer_attention` with backend="triton".
    """
    call = check_attention(query, key, value, proj_key, proj_value, None, None, None, None, 0.0, None, False, False)
    choose(call, "triton", "tune")
    from .triton_kernels import tune as tuner

    say = partial(print, flush=True) if verbose else lambda text: None
    given = (call.query, call.key, call.value, call.proj_key, call.proj_value)
    inputs = tuple(None if tensor is None else tensor.detach() for tensor in given)
    leaves = tuple(None if tensor is None else tensor.detach().requires_grad_(backward) for tensor in given)
    # Timers run on the current device, which need not be that of the tensors.
    with torch.cuda.device(call.device) if call.device_type == "cuda" else contextlib.nullcontext():
        found = tuner.tune(inputs, backward, say)
        times = {"triton": tuner.seconds(partial(_once, leaves, backend="triton"))}
        names = contenders(call)
        for name in names:
            times[name] = times.get(name) or tuner.seconds(partial(_once, leaves, backend=name))
            say(f"{name}: {1e6 * times[name]:.1f} us")
        tuner.keep_fastest(inputs, min(names, key=times.__getitem__))
    return found | {name: (times["triton"], times[name]) for name in names if name != "triton"}


def _once(tensors: tuple[Tensor | None, ...], *, backend: str) -> None:
    out = linformer_attention(*tensors, backend=backend)  # type: ignore[arg-type]
    if out.requires_grad:
        torch.autograd.grad(out, [tensor for tensor in tensors if tensor is not None], out)
