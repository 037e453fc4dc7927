"""The same of PyTorch's own parts: one matrix product for all heads, and scaled_dot_product_attention on K' and V'.

For tensors that no kernel of this package takes, on every device that torch knows. Arguments and results are those of
the ops in `_ops`; `allow_tf32` changes nothing here, torch's own products follow torch's setting. What it refuses, and
`reference` does in its place, is in `refusal`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from . import reference
from ._ops import heads_inner
from ._validation import Call


def refusal(call: Call) -> str | None:
    """Why PyTorch's parts do not serve a call, else None."""
    if call.dtype == torch.float64:
        return 'it takes float32, float16 and bfloat16, and these tensors are float64: use "reference"'
    if call.dropout_p:
        return 'SDPA draws dropout numbers of its own, and every backend here drops the same elements: use "reference"'
    if call.segments is not None and hasattr(call.segments, "device_mesh"):
        return 'it numbers the rows of one device, and these tensors are DTensors: use "reference"'
    packed = call.cu_seqlens_q is not None or call.cu_seqlens_k is not None
    if packed and call.segments is None:
        return 'torch has no products of packed sequences without reading where they end: use "reference"'
    return None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    proj_key: Tensor,
    proj_value: Tensor | None,
    key_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens_q: None,
    cu_seqlens_k: None,
    rng_state: None,
    dropout_p: float,
    scale: float,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, K' and V'."""
    proj_value = proj_key if proj_value is None else proj_value
    key_proj, value_proj = _compress(proj_key, key, key_padding_mask), _compress(proj_value, value, key_padding_mask)
    return _attend(query, key_proj, value_proj, key_bias, scale), key_proj, value_proj


def project(
    key: Tensor,
    value: Tensor,
    proj_key: Tensor,
    proj_value: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens_k: None,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor]:
    """K' = E[:, :N] @ key and V' = F[:, :N] @ value."""
    proj_value = proj_key if proj_value is None else proj_value
    key_proj, value_proj = _compress(proj_key, key, key_padding_mask), _compress(proj_value, value, key_padding_mask)
    return key_proj.contiguous(), value_proj.contiguous()


def projected_attention(
    query: Tensor,
    key_proj: Tensor,
    value_proj: Tensor,
    key_bias: Tensor | None,
    cu_seqlens_q: None,
    rng_state: None,
    dropout_p: float,
    scale: float,
    allow_tf32: bool,
) -> Tensor:
    """softmax(scale * query @ K'^T + key_bias) @ V'."""
    return _attend(query, key_proj, value_proj, key_bias, scale)


def pool(
    key: Tensor, value: Tensor, segments: Tensor, cu_seqlens_k: Tensor | None, num_segments: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Row k of K' and V' is the mean of the rows whose segment is k, and `count` is how many those are.

    Sums of index_add: in the order of the positions on a CPU. On a GPU they are atomic, so that last bits may change
    from run to run unless torch.use_deterministic_algorithms is on.
    """
    if cu_seqlens_k is None:
        # As (B, N, H): the order of packed rows, in which heads come last.
        key, value, segments = key.transpose(1, 2), value.transpose(1, 2), segments.transpose(1, 2)
        batch, length, heads = key.shape[:3]
        sequence = torch.arange(batch, device=key.device).repeat_interleave(length)
        key, value, segments = key.flatten(0, 1), value.flatten(0, 1), segments.flatten(0, 1)
    else:
        batch, heads = cu_seqlens_k.size(0) - 1, key.size(1)
        position = torch.arange(key.size(0), device=key.device, dtype=cu_seqlens_k.dtype)
        sequence = torch.searchsorted(cu_seqlens_k[1:].contiguous(), position, right=True)
    inside = (segments >= 0) & (segments < num_segments)
    # What takes part nowhere goes to one row more, as zeros, so that no NaN of it reaches a gradient.
    at = torch.where(inside, segments, num_segments).long() + sequence[:, None] * (num_segments + 1)
    if segments.size(1) != 1:  # each head has its own
        at = at * heads + torch.arange(heads, device=key.device)

    def total(rows: Tensor) -> Tensor:
        """(B, H or 1, K, columns), from rows (total, H or 1, columns)."""
        rows = rows.flatten(0, 1) if segments.size(1) != 1 else rows.flatten(1)
        sums = rows.new_zeros((batch * (num_segments + 1) * at.size(1), rows.size(1)))
        sums = sums.index_add(0, at.flatten(), rows)
        return sums.reshape(batch, num_segments + 1, at.size(1) * rows.size(1))[:, :-1]

    def mean(rows: Tensor) -> Tensor:
        rows = torch.where(inside[..., None], rows, 0).float()
        sums = total(rows).reshape(batch, num_segments, heads, rows.size(-1)).transpose(1, 2)
        return (sums / count.clamp(min=1)[..., None]).to(key.dtype).contiguous()

    count = total(inside.float()[..., None]).transpose(1, 2)
    return mean(key), mean(value), count.expand(-1, heads, -1).contiguous()


def _compress(proj: Tensor, rows: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    proj = proj[..., : rows.size(-2)]
    shared = proj.dim() == 2 or (proj.dim() == 4 and proj.size(1) == 1)
    if not shared or not heads_inner(rows):
        if key_padding_mask is not None:
            # Selected, not multiplied: 0 * NaN is NaN, and a NaN behind the mask must reach no value and no gradient.
            rows = torch.where(key_padding_mask[:, None, :, None], rows, 0)
        return proj @ rows
    # Stored as (B, N, H, D) the heads are columns of one matrix: E @ (N, H * D), without a copy of the rows.
    batch, heads, _, width = rows.shape
    wide = rows.transpose(1, 2).flatten(2)
    if key_padding_mask is not None:
        wide = torch.where(key_padding_mask[..., None], wide, 0)
    # Expanded, as matmul copies the rows of a batch for a matrix that needs gradients.
    one = proj.expand(batch, -1, -1) if proj.dim() == 2 else proj[:, 0]
    return torch.bmm(one, wide).unflatten(2, (heads, width)).transpose(1, 2)


def _attend(query: Tensor, key_proj: Tensor, value_proj: Tensor, key_bias: Tensor | None, scale: float) -> Tensor:
    # Without queries SDPA leaves the bias out of the graph, and in 16 bits it would round the bias' gradient to them.
    learned = key_bias is not None and key_bias.requires_grad and torch.is_grad_enabled()
    if query.numel() == 0 or (learned and query.element_size() == 2):
        return reference.projected_attention(query, key_proj, value_proj, key_bias, None, None, 0.0, scale, False)
    heads_kv = key_proj.size(1)
    group = query.size(1) // heads_kv
    if scale < 0:  # SDPA's kernels take the largest product for the largest score
        query, scale = -query, -scale
    # Queries that read the same head become rows of one head: not every kernel of SDPA's knows groups.
    rows = query if group == 1 else query.unflatten(1, (heads_kv, group)).flatten(2, 3)
    if key_bias is None:
        out = scaled_dot_product_attention(rows, key_proj, value_proj, scale=scale)
    else:
        some = (key_bias != -math.inf).any(-1, keepdim=True)[..., None]
        bias = torch.where(some, key_bias[:, :, None], 0)
        # Not every kernel takes another type than the query's. In 16 bits the differences to the largest keep the
        # digits that count, and the softmax sees nothing else.
        bias = (bias - bias.detach().amax(-1, keepdim=True)).to(query.dtype)
        mask = bias.expand(-1, -1, rows.size(2), -1)
        out = torch.where(some, scaled_dot_product_attention(rows, key_proj, value_proj, mask, scale=scale), 0)
    return out if group == 1 else out.unflatten(2, (group, -1)).flatten(1, 2)
