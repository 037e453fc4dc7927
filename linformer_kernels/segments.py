"""Which segment of its sequence each position belongs to: windows over the positions that take part, single tokens.

Positions are counted by rank, 0 to L - 1 among those of the sequence that take part, so that a padded sequence, on
whichever side, a packed and a single one get the same segments. A sequence of at most K positions has one for each.

The choice of single tokens is discrete, and must not hang on the order in which sums are rounded. So its arithmetic is
fixed: products and sums of float32, each rounded, sums by halves: x[:n/2] + x[n/2:] until one number is left, for n the
next power of two, filled up with zeros. `choose_segments` has it in PyTorch's elementwise operators, for every device;
csrc/cpu/choose.cpp the same for CPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

# Queries of a head whose mean chooses, evenly spaced. Of MiniLM's embeddings of 30 reviews they keep a cosine of 0.9446
# at K = 128, the mean of all queries 0.9440.
SAMPLES = 64


def ranks(
    key_padding_mask: Tensor | None, cu_seqlens_k: Tensor | None, shape: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Rank of each position among those that take part, -1 for the others, and how many there are: int64, (B or 1, N)
    and (B or 1, 1); packed (total,) and, for each row, the length of its sequence. `shape`: (B, N), or (1, total)."""
    position = torch.arange(shape[1], device=device)
    if cu_seqlens_k is not None:
        sequence = torch.searchsorted(cu_seqlens_k[1:], position, right=True).clamp(
            max=max(cu_seqlens_k.numel() - 2, 0)
        )
        return position - cu_seqlens_k[sequence], cu_seqlens_k.diff()[sequence]
    if key_padding_mask is None:
        return position[None], torch.full((1, 1), shape[1], device=device)
    rank = key_padding_mask.cumsum(1) - 1
    return torch.where(key_padding_mask, rank, -1), key_padding_mask.sum(1, keepdim=True)


def window_segments(rank: Tensor, length: Tensor, num_segments: int, keep: tuple[int, int] = (0, 0)) -> Tensor:
    """Segments of windows over the positions that take part: min(K, L) of them, as even as they come, but for `keep`
    positions at the beginning and at the end, which have one each."""
    first, last = keep
    windows = num_segments - first - last
    inner = (rank - first) * windows // (length - first - last).clamp(min=1) + first
    segment = torch.where(rank < first, rank, torch.where(rank >= length - last, rank - length + num_segments, inner))
    segment = torch.where(length <= num_segments, rank, segment)
    return torch.where(rank < 0, -1, segment).to(torch.int32)


def window_counts(length: Tensor, num_segments: int, keep: tuple[int, int] = (0, 0)) -> Tensor:
    """How many positions each segment of `window_segments` has, (B, K) float32, for lengths (B, 1)."""
    first, last = keep
    windows, inner = num_segments - first - last, (length - first - last).clamp(min=1)
    row = torch.arange(num_segments, device=length.device)
    # Window j has the ranks t with t * windows // inner = j: from ceil(j * inner / windows) on.
    edge = lambda j: -(-(j * inner) // windows)  # noqa: E731
    count = edge(row - first + 1) - edge(row - first)
    count = torch.where((row < first) | (row >= num_segments - last), 1, count)
    return torch.where(length <= num_segments, row < length, count).float()


def choose_segments(
    query: Tensor,
    key: Tensor,
    key_padding_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    num_segments: int,
    singles: int,
    first: int,
    last: int,
) -> Tensor:
    """Segments of single tokens and windows, one list a key head: (B, H_kv, N) int32, packed (total, H_kv).

    The first and the last positions that take part, and those that the mean query of the head attends to most,
    `singles` in all, have a segment each; the others are divided into windows. Of equal scores the earlier wins.
    """
    packed = cu_seqlens_k is not None
    rows = key.transpose(0, 1)[None] if packed else key  # (B or 1, H_kv, N or total, D)
    batch, heads, total, _ = rows.shape
    rank, length = ranks(key_padding_mask, cu_seqlens_k, (batch, total), key.device)
    rank, length = (rank[None], length[None]) if packed else (rank.expand(batch, total), length.expand(batch, 1))
    if total == 0:
        return key.new_zeros(key.shape[:-1], dtype=torch.int32)
    asked = _mean_query(query, key_padding_mask, cu_seqlens_q, heads, total)  # (sequences, H_kv, D)
    if packed:
        assert cu_seqlens_k is not None  # for mypy
        position = torch.arange(total, device=key.device)
        sequence = torch.searchsorted(cu_seqlens_k[1:], position, right=True)
        of_row = asked[sequence.clamp(max=asked.size(0) - 1)].transpose(0, 1)[None]
    else:
        sequence, of_row = None, asked[:, :, None]
    segment = divided(scores(rows, of_row), rank, length, sequence, cu_seqlens_k, num_segments, singles, first, last)
    return segment[0].transpose(0, 1).contiguous() if packed else segment.contiguous()


def scores(key: Tensor, asked: Tensor) -> Tensor:
    """(B, H_kv, N) float32, of keys (B, H_kv, N, D) and what asks each of them."""
    return _sum_by_halves(key.float() * asked, -1)


def divided(
    score: Tensor,
    rank: Tensor,
    length: Tensor,
    sequence: Tensor | None,
    cu_seqlens_k: Tensor | None,
    num_segments: int,
    singles: int,
    first: int,
    last: int,
) -> Tensor:
    """Segments (B, H_kv, N) by scores, for the ranks (B, N) and lengths; `sequence`: that of each packed row."""
    candidate = (rank >= first) & (rank < length - last)
    chosen = _largest(score, candidate, singles - first - last, sequence)
    single = chosen | ((rank >= 0) & ~candidate)[:, None]

    # Ranks among the singles, and among the others, of the sequence.
    taken = (rank >= 0)[:, None].expand_as(single)
    place = single.cumsum(-1) - 1
    other = (taken & ~single).cumsum(-1) - 1
    if sequence is not None:
        assert cu_seqlens_k is not None  # for mypy
        begin = cu_seqlens_k[sequence.clamp(max=cu_seqlens_k.numel() - 2)]
        before = lambda flags: pad(flags.cumsum(-1), (1, 0)).index_select(-1, begin)  # noqa: E731
        place, other = place - before(single), other - before(taken & ~single)
    rank, length = rank[:, None], length[:, None]
    window = singles + other * (num_segments - singles) // (length - singles).clamp(min=1)
    segment = torch.where(length <= num_segments, rank, torch.where(single, place, window))
    return torch.where(taken, segment, -1).to(torch.int32)


def _mean_query(
    query: Tensor, key_padding_mask: Tensor | None, cu_seqlens_q: Tensor | None, heads: int, length: int
) -> Tensor:
    """The sum of SAMPLES queries of each sequence and key head: (B, H_kv, D) float32. Of a sequence that attends to
    itself those that the mask leaves; the heads of a group are added in their order."""
    if cu_seqlens_q is not None:
        lengths = cu_seqlens_q.diff()[:, None]
        at = cu_seqlens_q[:-1, None] + torch.arange(SAMPLES, device=query.device) * lengths // SAMPLES
        rows = pad(query, (0, 0, 0, 0, 0, 1))[at.clamp(max=query.size(0))].permute(0, 2, 1, 3)  # (B, H, SAMPLES, D)
    else:
        own = key_padding_mask if query.size(2) == length else None
        at, lengths = sampled(own, query.size(2), query.device)
        rows = query if query.size(2) else pad(query, (0, 0, 0, 1))
        rows = rows.gather(2, at[:, None, :, None].expand(*query.shape[:2], -1, query.size(3)))
    return sum_of_samples(rows, lengths, heads)


def sampled(key_padding_mask: Tensor | None, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of the SAMPLES queries among `length`, of those that the mask leaves, and how many those are:
    (B or 1, SAMPLES) and (B or 1, 1)."""
    step = torch.arange(SAMPLES, device=device)
    if key_padding_mask is None:
        return step[None] * length // SAMPLES, torch.full((1, 1), length, device=device)
    lengths = key_padding_mask.sum(1, keepdim=True)
    at = torch.searchsorted(key_padding_mask.cumsum(1), step * lengths // SAMPLES + 1)
    return at.clamp(max=length - 1), lengths


def sum_of_samples(rows: Tensor, lengths: Tensor, heads: int) -> Tensor:
    """(B, H_kv, D) float32, of the sampled queries (B, H, SAMPLES, D) of sequences of these lengths."""
    rows = torch.where((lengths > 0)[:, None, :, None], rows, 0).float()
    summed = _sum_by_halves(rows, 2).unflatten(1, (heads, -1))
    total = summed[:, :, 0]
    for member in range(1, summed.size(2)):
        total = total + summed[:, :, member]
    return total


def _sum_by_halves(x: Tensor, dim: int) -> Tensor:
    x = x.movedim(dim, -1)
    while x.size(-1) > 1:
        half = 1 << ((x.size(-1) - 1).bit_length() - 1)
        more = x[..., half:]
        x = x[..., :half] + (more if more.size(-1) == half else pad(more, (0, half - more.size(-1))))
    return x.squeeze(-1)


def _largest(score: Tensor, candidate: Tensor, count: int, sequence: Tensor | None) -> Tensor:
    """Which `count` candidates of each sequence have the largest scores; of equal ones the earlier."""
    if count <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    # Bits of floats as integers in the order of the floats; + 0.0 turns -0.0 into 0.0.
    bits = (score + 0.0).view(torch.int32)
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    order = torch.where(candidate[:, None], order, -(1 << 31) - 1)
    position = torch.arange(score.size(-1), device=score.device)
    if sequence is None:
        unique = (order << 30) - position
        best = unique.topk(min(count, score.size(-1)), -1, sorted=False).indices
        return torch.zeros_like(candidate[:, None].expand_as(score)).scatter(-1, best, True) & candidate[:, None]
    by_score = order.sort(stable=True, dim=-1, descending=True).indices
    by_sequence = by_score.gather(-1, sequence[by_score].sort(stable=True, dim=-1).indices)
    begin = torch.searchsorted(sequence, sequence)  # sequences lie one after the other
    chosen = torch.zeros_like(candidate[:, None].expand_as(score))
    return chosen.scatter(-1, by_sequence, (position - begin < count).expand_as(score)) & candidate[:, None]
