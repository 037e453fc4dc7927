"""The formula in plain PyTorch: the yardstick of the kernels, and the backend that runs anywhere.

Same arguments and results as the ops in `_ops`, for any floating dtype, differentiable any number of times.
`allow_tf32` changes nothing here: torch's own products follow torch's setting.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    proj_key: Tensor,
    proj_value: Tensor | None,
    key_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    rng_state: Tensor | None,
    dropout_p: float,
    scale: float,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, K' and V'."""
    key_proj, value_proj = project(key, value, proj_key, proj_value, key_padding_mask, cu_seqlens_k, allow_tf32)
    rows = query, key_proj, value_proj, key_bias
    out = projected_attention(*rows, cu_seqlens_q, rng_state, dropout_p, scale, allow_tf32)
    return out, key_proj, value_proj


def project(
    key: Tensor,
    value: Tensor,
    proj_key: Tensor,
    proj_value: Tensor | None,
    key_padding_mask: Tensor | None,
    cu_seqlens_k: Tensor | None,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor]:
    """K' = E[:, :N] @ key and V' = F[:, :N] @ value."""
    proj_value = proj_key if proj_value is None else proj_value
    if cu_seqlens_k is None:
        return _compress(proj_key, key, key_padding_mask), _compress(proj_value, value, key_padding_mask)
    batch = cu_seqlens_k.size(0) - 1
    spans = _spans(cu_seqlens_k) or [(0, 0)]  # torch.stack wants at least one; an empty batch is cut back to size 0
    key_proj, value_proj = (
        torch.stack(
            [
                _compress(_of_sequence(proj, b), rows[start:stop].transpose(0, 1), None)
                for b, (start, stop) in enumerate(spans)
            ]
        )[:batch]
        for proj, rows in ((proj_key, key), (proj_value, value))
    )
    return key_proj, value_proj


def _of_sequence(proj: Tensor, b: int) -> Tensor:
    """Its E, which may be that of all sequences; of an empty batch something of the same shape."""
    if proj.dim() != 4:
        return proj
    return proj[b] if len(proj) else proj.sum(0)


def projected_attention(
    query: Tensor,
    key_proj: Tensor,
    value_proj: Tensor,
    key_bias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    rng_state: Tensor | None,
    dropout_p: float,
    scale: float,
    allow_tf32: bool,
) -> Tensor:
    """softmax(scale * query @ K'^T + key_bias) @ V', with dropout after the softmax."""
    rows, numbers = (key_proj, value_proj, key_bias), (rng_state, dropout_p, scale)
    if cu_seqlens_q is None:
        return _attend(query, *rows, *numbers)
    outs = []
    for b, (start, stop) in enumerate(_spans(cu_seqlens_q)):
        of_one = query[start:stop].transpose(0, 1)[None], key_proj[[b]], value_proj[[b]]
        outs.append(_attend(*of_one, None if key_bias is None else key_bias[[b]], *numbers, b))
    outs = outs or [_attend(query.transpose(0, 1)[None][:0], *rows, *numbers)]
    return torch.cat([out.transpose(1, 2).flatten(0, 1) for out in outs])


def pool(
    key: Tensor, value: Tensor, segments: Tensor, cu_seqlens_k: Tensor | None, num_segments: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Row k of K' and V' is the mean of the rows whose segment is k, and `count` is how many those are."""
    if cu_seqlens_k is None:
        return _pool(key, value, segments, num_segments)
    batch = cu_seqlens_k.size(0) - 1
    turned = lambda rows, start, stop: rows[start:stop].transpose(0, 1)[None]  # noqa: E731
    made = [
        _pool(turned(key, *span), turned(value, *span), turned(segments, *span), num_segments)
        for span in _spans(cu_seqlens_k) or [(0, 0)]
    ]
    key_proj, value_proj, count = (torch.cat(parts)[:batch] for parts in zip(*made, strict=True))
    return key_proj, value_proj, count


def _pool(key: Tensor, value: Tensor, segments: Tensor, num_segments: int) -> tuple[Tensor, Tensor, Tensor]:
    inside = (segments >= 0) & (segments < num_segments)
    # What takes part nowhere goes to one row more, as zeros, so that no NaN of it reaches a gradient.
    at = torch.where(inside, segments, num_segments).long().expand(*key.shape[:-1])
    wide = torch.promote_types(key.dtype, torch.float32)
    count = inside.new_zeros((*key.shape[:2], num_segments + 1), dtype=wide)
    count = count.scatter_add(2, at, torch.ones_like(at, dtype=wide))[..., :-1]

    def mean(rows: Tensor) -> Tensor:
        rows = torch.where(inside[..., None], rows, 0).to(wide)
        total = rows.new_zeros((*rows.shape[:2], num_segments + 1, rows.size(-1)))
        total = total.scatter_add(2, at[..., None].expand_as(rows), rows)[..., :-1, :]
        return (total / count.clamp(min=1)[..., None]).to(key.dtype)

    return mean(key), mean(value), count.float()


def _spans(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    if cu_seqlens.is_meta:
        raise NotImplementedError(
            'cu_seqlens_q or cu_seqlens_k is on "meta" and says no lengths; wanted: padded sequences, or, for shapes '
            "alone, torch._subclasses.FakeTensorMode"
        )
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(cu_seqlens) and torch._is_functional_tensor(cu_seqlens):
        torch._sync(cu_seqlens)  # within functionalize: the values are inside
        cu_seqlens = torch._from_functional_tensor(cu_seqlens)
    if functorch.is_batchedtensor(cu_seqlens):
        raise NotImplementedError(
            "cu_seqlens_q or cu_seqlens_k differs within torch.vmap, and the reference loops over sequences; wanted: "
            "offsets that all calls share, or a backend of kernels"
        )
    return list(pairwise(cu_seqlens.tolist()))


def _compress(proj: Tensor, rows: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    if key_padding_mask is not None:
        # Selected, not multiplied: 0 * NaN is NaN, and a NaN behind the mask must reach neither value nor gradient.
        rows = torch.where(key_padding_mask[:, None, :, None], rows, 0)
    return proj[..., : rows.size(-2)] @ rows


def _attend(
    query: Tensor,
    key_proj: Tensor,
    value_proj: Tensor,
    key_bias: Tensor | None,
    rng_state: Tensor | None,
    dropout_p: float,
    scale: float,
    first_sequence: int = 0,
) -> Tensor:
    group = query.size(1) // key_proj.size(1)
    if group != 1:
        key_proj, value_proj = (t.repeat_interleave(group, dim=1) for t in (key_proj, value_proj))
    scores = query @ key_proj.transpose(-2, -1) * scale
    if key_bias is None:
        probs = torch.softmax(scores, dim=-1)
    else:
        bias = key_bias.repeat_interleave(group, dim=1)[:, :, None]
        some = (bias != -math.inf).any(-1, keepdim=True)
        probs = torch.softmax(torch.where(some, scores + bias, 0), dim=-1)
        probs = torch.where(some, probs, 0).to(query.dtype)
    if rng_state is not None:
        keep = dropout_mask(rng_state, dropout_p, probs.shape, first_sequence)
        probs = torch.where(keep, probs * (1.0 / (1.0 - dropout_p)), 0)
    return probs @ value_proj


_MASK32 = 0xFFFFFFFF


def _philox4x32(key: tuple[Tensor, Tensor], counter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox 4x32 (Salmon et al. 2011) on 32-bit words held in int64."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        # The 64-bit product wraps around in int64, which keeps every bit; masking after the shift makes it logical.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK32) ^ c1 ^ k0,
            p1 & _MASK32,
            ((p0 >> 32) & _MASK32) ^ c3 ^ k1,
            p0 & _MASK32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def dropout_mask(rng_state: Tensor, dropout_p: float, shape: tuple[int, ...], first_sequence: int = 0) -> Tensor:
    """Which elements of P (B, H, N_q, K) are kept; a function of position and seed alone, the same on every backend."""
    batch, heads, rows, columns = shape
    device = rng_state.device
    quads = (columns + 3) // 4
    column = torch.arange(quads, device=device)
    row = torch.arange(rows, device=device)[:, None]
    head = torch.arange(batch * heads, device=device)[:, None, None] + first_sequence * heads
    seed, offset = rng_state[0], rng_state[1]
    words = _philox4x32((seed & _MASK32, (seed >> 32) & _MASK32), (column, row, head, offset & _MASK32))
    word = torch.stack(torch.broadcast_tensors(*words), dim=-1).reshape(batch, heads, rows, quads * 4)
    threshold = min(math.floor(dropout_p * 2**32), _MASK32)
    return word[..., :columns] >= threshold
