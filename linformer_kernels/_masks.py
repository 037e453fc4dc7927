"""Padding masks of torch.nn and of transformers as the functions of this package want them: True = takes part."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._validation import check_tensor, is_recording

# What a floating mask holds where a position is ignored, at the most: -inf, the lowest number of a type, -10,000.
IGNORED = -1e4


def readable(tensor: Tensor) -> bool:
    """Whether to look at its values costs nothing: not on a GPU, which it would stall, nor under a tracer."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    if is_recording():
        return False
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu"


def takes_part(name: str, mask: Tensor | None) -> Tensor | None:
    """A mask of torch.nn: True = ignored, or floating."""
    if mask is None:
        return None
    check_tensor(name, mask)
    if mask.dtype == torch.bool:
        return ~mask
    if not mask.is_floating_point():
        raise TypeError(
            f"{name} has dtype {mask.dtype}; wanted: bool, True where a position is ignored, or floating, 0 where it "
            "takes part and -inf where it is ignored"
        )
    return of_scores(name, mask)


def of_scores(name: str, mask: Tensor) -> Tensor:
    """A mask that exact attention would add to scores, as a bool one: True = takes part.

    Values are looked at where that costs nothing; on a GPU and under a compiler all above -10,000 takes part.
    """
    taken = mask > IGNORED
    if readable(mask) and not ((mask <= IGNORED) | (mask == 0)).all():  # nor NaN
        raise ValueError(
            f"{name} adds other numbers to scores than 0 and -10,000 or less; wanted: 0 where a position takes part "
            "and -inf where it is ignored, as Linformer's scores are over K compressed rows"
        )
    return taken


def refuse_mask(name: str, mask: Tensor | None) -> None:
    if mask is not None:
        raise NotImplementedError(
            f"{name} came; wanted: None, as each row of K' mixes all positions, and no mask of (query, key) pairs can "
            "hide one. Padding goes into key_padding_mask or src_key_padding_mask; causal models need exact attention"
        )
