"""The start "svd" of E and F, from what a model's keys and values are on calibration data.

Position by position: sums of X X^T over the data, their strongest eigenvectors, and the rows of "identity" projected
onto those.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from ...projections import LinformerProjection, from_the_first
from .interface import of_keys, padding_mask
from .models import device_of, shape_of_heads

_MOMENTS = "linformer_moments"


def position_moments(
    model: PreTrainedModel, layers: list[nn.Module], seq_len: int, calibration: Iterable[dict[str, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """For each layer sum(X X^T) over the calibration data, for X the keys and the values of one head:
    (H, seq_len, seq_len) in float64, of the model with its own attention, each scaled to the trace 1."""
    own, batches, device = model.config._attn_implementation, 0, device_of(model)
    training = {module: module.training for module in model.modules()}
    for layer in layers:
        heads, _ = shape_of_heads(layer)
        shape = (heads, seq_len, seq_len)
        layer.__dict__[_MOMENTS] = tuple(torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(2))
    model.set_attn_implementation(_MOMENTS)
    model.eval()
    try:
        with torch.no_grad():
            for batch in calibration:
                if not isinstance(batch, Mapping):
                    raise TypeError(
                        f"calibration holds a {type(batch).__name__}; wanted: batches of the model's inputs by name, "
                        'as [{"input_ids": ..., "attention_mask": ...}]'
                    )
                model(**batch)
                batches += 1
    finally:
        model.set_attn_implementation(own)
        for module, mode in training.items():
            module.training = mode
        sums = [layer.__dict__.pop(_MOMENTS) for layer in layers]
    if batches == 0:
        raise ValueError("calibration is empty; wanted: at least one batch")
    trace = lambda total: total.diagonal(dim1=-2, dim2=-1).sum()  # noqa: E731
    if not all(trace(total) > 0 for pair in sums for total in pair):
        raise ValueError("calibration has no position that takes part; wanted: text, and its own padding mask")
    return [(keys / trace(keys), values / trace(values)) for keys, values in sums]


def _record_moments(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> Any:
    """The model's own attention, which also adds to the sums that `position_moments` has hung into the layer."""
    mask = of_keys(mask)
    *turned, taken = from_the_first(key, value, mask)
    for total, rows in zip(module.__dict__[_MOMENTS], turned, strict=True):
        length = rows.size(2)
        if length > total.size(-1):
            raise ValueError(f"calibration has {length} positions but seq_len is {total.size(-1)}; wanted: no more")
        rows = rows.double() if taken is None else rows.double() * taken[:, None, :, None]
        total[:, :length, :length] += torch.einsum("bhnd,bhmd->hnm", rows, rows)
    mask = None if mask is None else mask[:, None, None, :]
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **options)


AttentionInterface.register(_MOMENTS, _record_moments)
AttentionMaskInterface.register(_MOMENTS, padding_mask)


def of_projection(moments: list[tuple[Tensor, Tensor]], index: int, count: int) -> tuple[Tensor, Tensor]:
    """Moments of keys and of values of the layers that one projection serves."""
    if count == len(moments):
        return moments[index]
    keys, values = (torch.stack([pair[which] for pair in moments]).sum(0) for which in (0, 1))
    return keys, values


def start(matrices: LinformerProjection, moments: tuple[Tensor, Tensor]) -> None:
    """The start "svd", of the rows of "identity"."""
    for which, weight in enumerate((matrices.proj_key, matrices.proj_value)):
        if weight is None:
            continue
        total = moments[0] + moments[1] if matrices.share_kv else moments[which]
        total = total if matrices.num_heads is not None else total.sum(0)
        with torch.no_grad():
            weight.copy_(_in_strongest_directions(matrices.window_rows(mean=False), total).expand_as(weight))


def _in_strongest_directions(rows: Tensor, moments: Tensor) -> Tensor:
    """The rows (K, N), each of one position, projected onto the K strongest eigenvectors of the moments (..., N, N).
    Positions without moments are left; what is left of rounding is cleared, so that with K = N rows come out as they
    were."""
    strongest = torch.linalg.eigh(moments).eigenvectors[..., -rows.size(0) :]  # (..., N, K), ascending
    rows = rows.to(strongest)
    inside = rows @ strongest @ strongest.transpose(-1, -2)
    reached = rows @ moments.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) > 0
    return torch.where(reached, torch.where(inside.abs() < 1e-6, 0.0, inside), rows)
