"""`LinformerProjection`: E and F as a module, the only place where attention to compressed rows meets their weights.

Whoever attends calls it, with a query for the attention and without for K' and V' alone, so that what stands in its
place or hangs on it (PEFT's copies, FSDP, offloading, hooks) takes part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ._masks import readable
from ._validation import check_both_packed, check_pooling, check_project, check_tensor, integer, refuse_both
from .functional import linformer_attention, linformer_attention_varlen, project_kv, projected_attention

KINDS = ("learned", "fixed", "mean", "max", "conv")
STARTS = ("gaussian", "mean", "identity")
# An empty row of K' gets this for a score before scaling; float16 holds it, and exp of it is 0 for any usual scale.
_EMPTY = -3e4


class LinformerProjection(nn.Module):
    """E and F: the compression of keys and values from up to `seq_len` rows to `proj_dim` (Wang et al. 2020, Eq. 7).

    One instance may serve several layers: `parameters()` (and so optimizers and DDP) sees its parameters once.

    Column n of E meets the n-th position of a sequence, counted from the first that takes part: padding on the left, on
    the right or none, the answer is the same. With from_first=False it meets position n, whatever is masked.

    Where rows stand for windows of positions (kinds "mean", "max", "conv", and starts "mean", "identity"), a row whose
    window has no position that takes part has no share of the softmax.

    Args:
        seq_len: N_max, the longest sequence. A shorter one uses the first N columns.
        proj_dim: K, at most seq_len.
        num_heads: None: one projection for all heads; otherwise one for each of that many key heads.
        kind:
            "learned": E and F are parameters.
            "fixed": they are buffers: saved with the model, never trained.
            "mean": row k is the mean of window k. A masked or absent position counts as zero.
            "max": row k is the maximum over window k, feature by feature; zero where no position takes part.
            "conv": row k is a learned, depthwise filter over window k (kernel and stride N / K), one filter for each of
                the `head_dim` features. A masked or absent position counts as zero.
            The K windows divide `seq_len` without overlap and without a dropped tail; where K does not divide it, some
            are one position longer.
        share_kv: E = F. Pooling has no weights, so "mean" and "max" treat keys and values alike in any case.
        head_dim: width of a head, for "conv" alone.
        init: how "learned" and "fixed" start.
            "gaussian": N(0, 1 / seq_len), so that K' has the spread of the keys.
            "mean": the means over K windows, for weights that were trained with exact attention.
            "identity": row k picks the first position of window k; with proj_dim = seq_len attention is exact.
        from_first: whether columns of E are counted from the first position that takes part, or else from the first.

    Raises:
        TypeError: a size is no integer.
        ValueError: sizes below 1, an unknown kind or init, proj_dim above seq_len, num_heads with "mean" or "max",
            head_dim without "conv" or "conv" without head_dim, init for a kind that has a start of its own.
    """

    proj_key: Tensor | None
    proj_value: Tensor | None

    def __init__(
        self,
        seq_len: int,
        proj_dim: int,
        *,
        num_heads: int | None = None,
        kind: str = "learned",
        share_kv: bool = False,
        head_dim: int | None = None,
        init: str = "gaussian",
        from_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"seq_len": seq_len, "proj_dim": proj_dim, "num_heads": num_heads, "head_dim": head_dim}
        for name, size in sizes.items():
            if size is not None and integer(name, size) < 1:
                raise ValueError(f"{name} is {size}; wanted: at least 1")
        for name, value, known in (("kind", kind, KINDS), ("init", init, STARTS)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; wanted: one of {', '.join(known)}")
        pooling = kind in ("mean", "max", "conv")
        if pooling and init != "gaussian":
            raise ValueError(f'init is {init!r} but kind is "{kind}", which has a start of its own; wanted: "gaussian"')
        check_sizes(seq_len, proj_dim)
        if kind in ("mean", "max") and num_heads is not None:
            raise ValueError(f'num_heads is {num_heads} but kind is "{kind}"; wanted: None, as pooling has no weights')
        if (kind == "conv") != (head_dim is not None):
            raise ValueError(f'head_dim is {head_dim} but kind is "{kind}"; wanted: the head width for "conv" alone')
        self.seq_len, self.proj_dim, self.num_heads = seq_len, proj_dim, num_heads
        self.kind, self.share_kv, self.head_dim = kind, share_kv or kind in ("mean", "max"), head_dim
        self.init, self.rows_are_windows = init, pooling or init != "gaussian"
        self.from_first = from_first
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        shape: tuple[int, ...] = (proj_dim, seq_len) if head_dim is None else (head_dim, -(-seq_len // proj_dim))
        shape = shape if num_heads is None else (num_heads, *shape)
        for name in ("proj_key", "proj_value"):
            if kind in ("mean", "max") or (name == "proj_value" and self.share_kv):
                self.register_parameter(name, None)
            elif kind == "fixed":
                self.register_buffer(name, torch.empty(shape, **factory))
            else:
                self.register_parameter(name, nn.Parameter(torch.empty(shape, **factory)))
        self.reset_parameters()

    @property
    def alike(self) -> bool:
        """Whether all features of all heads are compressed by one matrix, so that E (X W) = (E X) W."""
        return self.kind in ("learned", "fixed", "mean") and self.num_heads is None

    def reset_parameters(self) -> None:
        """Start the weights anew."""
        with torch.no_grad():
            for weight in (self.proj_key, self.proj_value):
                if weight is not None and self.init == "gaussian":
                    nn.init.normal_(weight, std=weight.size(-1) ** -0.5)
                elif weight is not None:
                    weight.copy_(self.window_rows(self.init == "mean"))

    def window_rows(self, mean: bool) -> Tensor:
        """(K, seq_len) in float64, on the CPU: row k is the mean of window k, or picks its first position."""
        edges, position = self._edges("cpu")[:, None], torch.arange(self.seq_len, device="cpu")
        if not mean:
            return (position == edges[:-1]).double()
        return ((position >= edges[:-1]) & (position < edges[1:])) / edges.diff(dim=0).double()

    def forward(
        self,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        cu_seqlens_k: Tensor | None = None,
        query: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        dropout_p: float = 0.0,
        scale: float | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """K' and V', or, with a query, what it gets from them.

        Args:
            key: (B, H_kv, N, D), or packed (total_k, H_kv, D) with cu_seqlens_k.
            value: (B, H_kv, N, D_v), or packed.
            key_padding_mask: (B, N) bool, True = the position TAKES PART, as in `linformer_attention`.
            cu_seqlens_k: as in `linformer_attention_varlen`.
            query: (B, H, N_q, D), or packed (total_q, H, D) with cu_seqlens_q.
            cu_seqlens_q: as in `linformer_attention_varlen`.
            dropout_p: of the softmax, for a query.
            scale: of the scores, for a query; None: 1 / sqrt(D).

        Returns:
            Without a query K' (B, H_kv, K, D) and V' (B, H_kv, K, D_v); with one the output, shaped as the query, with
            D_v columns.

        Raises:
            As `linformer_attention` and `linformer_attention_varlen`; ValueError also for what is of a query, without
            one.
        """
        check_tensor("key", key)
        if query is not None:
            check_both_packed(cu_seqlens_q, cu_seqlens_k)
        elif cu_seqlens_q is not None or dropout_p != 0.0 or scale is not None:
            raise ValueError("cu_seqlens_q, dropout_p or scale came without a query; wanted: a query, or none of them")
        if cu_seqlens_k is not None:
            refuse_both(key_padding_mask)
        mask, length = key_padding_mask, key.size(-2)
        if query is not None and self.kind in ("learned", "fixed") and self._all_reached(length, mask, cu_seqlens_k):
            key, value, mask = self._turned(key, value, mask)
            matrices: Any = query, key, value, self.proj_key, self.proj_value
            options: dict[str, Any] = {"dropout_p": dropout_p, "scale": scale}
            if cu_seqlens_k is None:
                return linformer_attention(*matrices, key_padding_mask=mask, **options)
            assert cu_seqlens_q is not None  # for mypy: it has been refused
            return linformer_attention_varlen(
                *matrices, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, **options
            )
        rows = self.compress(*self._turned(key, value, mask), cu_seqlens_k)
        if query is None:
            return rows
        return self.attend(query, *rows, length, mask, cu_seqlens_q, cu_seqlens_k, dropout_p, scale)

    def compress(
        self, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, cu_seqlens_k: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """K' and V' of rows that have no padding before them. For subclasses to replace; users call the module."""
        if self.kind in ("learned", "fixed"):
            matrices: Any = self.proj_key, self.proj_value
            return project_kv(key, value, *matrices, key_padding_mask=key_padding_mask, cu_seqlens_k=cu_seqlens_k)
        if cu_seqlens_k is not None:
            key, value, key_padding_mask = self._unpacked(key, value, cu_seqlens_k)
        sizes = self.proj_key, self.head_dim, self.num_heads
        check_pooling(key, value, key_padding_mask, self.seq_len, *sizes)
        value_weight = self.proj_key if self.share_kv else self.proj_value
        return self._pool(key, self.proj_key, key_padding_mask), self._pool(value, value_weight, key_padding_mask)

    def attend(
        self,
        query: Tensor,
        key_proj: Tensor,
        value_proj: Tensor,
        length: int,
        key_padding_mask: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        dropout_p: float = 0.0,
        scale: float | None = None,
    ) -> Tensor:
        """What a query gets from K' and V', made of sequences of up to `length` rows. No weights take part in it."""
        if not self._all_reached(length, key_padding_mask, cu_seqlens_k):
            scale = query.size(-1) ** -0.5 if scale is None else scale
            # As zeros in K' alone the rows would still have the score 0, so: one more feature, 1 in every query and
            # very negative in these rows.
            reached = self._reached(length, key_padding_mask, cu_seqlens_k, query.device)
            extra = torch.where(reached, 0.0, _EMPTY).to(key_proj.dtype)[:, None, :, None]
            key_proj = torch.cat((key_proj, extra.expand(*key_proj.shape[:-1], 1)), -1)
            query = torch.cat((query, query.new_ones(*query.shape[:-1], 1)), -1)
        options: dict[str, Any] = {"cu_seqlens_q": cu_seqlens_q, "dropout_p": dropout_p, "scale": scale}
        return projected_attention(query, key_proj, value_proj, **options)

    def extra_repr(self) -> str:
        return (
            f"{self.seq_len}, {self.proj_dim}, num_heads={self.num_heads}, kind={self.kind!r}, "
            f"share_kv={self.share_kv}"
            + (f", head_dim={self.head_dim}" if self.head_dim is not None else "")
            + (f", init={self.init!r}" if self.init != "gaussian" else "")
            + ("" if self.from_first else ", from_first=False")
        )

    def _turned(self, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        return from_the_first(key, value, mask) if self.from_first else (key, value, mask)

    def _edges(self, device: torch.device | str) -> Tensor:
        """(K + 1,): window k holds the positions from edge k up to edge k + 1."""
        return torch.arange(self.proj_dim + 1, device=device) * self.seq_len // self.proj_dim

    def _all_reached(self, length: int, key_padding_mask: Tensor | None, cu_seqlens_k: Tensor | None) -> bool:
        """Whether it is known without a look at the data that each row of K' stands for some position."""
        whole = key_padding_mask is None and cu_seqlens_k is None and length == self.seq_len
        return not self.rows_are_windows or whole

    def _reached(
        self, length: int, key_padding_mask: Tensor | None, cu_seqlens_k: Tensor | None, device: torch.device
    ) -> Tensor:
        """Whether window k has a position that takes part: (B or 1, K) bool."""
        edges = self._edges(device)
        if cu_seqlens_k is not None:
            return edges[:-1] < cu_seqlens_k.diff()[:, None]
        if key_padding_mask is None:
            return (edges[:-1] < length)[None]
        first = _first(key_padding_mask) * self.from_first
        edges = (edges + first).clamp(max=length)
        before = functional.pad(key_padding_mask.cumsum(1), (1, 0)).gather(1, edges)
        return before[:, 1:] > before[:, :-1]

    def _unpacked(self, key: Tensor, value: Tensor, cu_seqlens_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Packed rows as (B, H_kv, seq_len, D), with the mask of those that are there."""
        check_project(key, value, key.new_empty(1, self.seq_len), None, None, cu_seqlens_k)  # any E of this length
        position = torch.arange(self.seq_len, device=key.device)
        mask = position < cu_seqlens_k.diff()[:, None]
        source = torch.where(mask, position + cu_seqlens_k[:-1, None], key.size(0))
        pad = lambda rows: functional.pad(rows, (0, 0, 0, 0, 0, 1))[source].transpose(1, 2)  # noqa: E731
        return pad(key), pad(value), mask

    def _pool(self, rows: Tensor, weight: Tensor | None, key_padding_mask: Tensor | None) -> Tensor:
        length, absent = rows.size(2), self.seq_len + 1 - rows.size(2)
        edges, width = self._edges(rows.device)[:, None], -(-self.seq_len // self.proj_dim)
        windows = edges[:-1] + torch.arange(width, device=rows.device)
        windows = torch.where(windows < edges[1:], windows, self.seq_len)  # an absent position fills up shorter ones
        if key_padding_mask is None:
            present = (torch.arange(self.seq_len + 1, device=rows.device) < length)[None]
        else:
            present = functional.pad(key_padding_mask, (0, absent))
        taken = present[:, None, windows, None]  # (B or 1, 1, K, width, 1)
        rows = functional.pad(rows, (0, 0, 0, absent))[:, :, windows]  # (B, H, K, width, D)
        if self.kind == "max":
            maximum = torch.where(taken, rows, -torch.inf).amax(3)
            return torch.where(taken.any(3), maximum, 0)
        rows = torch.where(taken, rows, 0)
        if weight is None:
            return rows.sum(3) / edges.diff(dim=0)
        return torch.einsum(f"bhkwd,{'dw' if weight.dim() == 2 else 'hdw'}->bhkd", rows, weight)


def check_sizes(seq_len: int, proj_dim: int) -> None:
    """That there are fewer rows than positions, or as many: more would cost more than exact attention, for no more."""
    if proj_dim > seq_len:
        raise ValueError(
            f"proj_dim is {proj_dim} but seq_len is {seq_len}; wanted: at most seq_len, as K' of more rows than "
            "positions holds nothing more and costs more than exact attention"
        )


def _first(key_padding_mask: Tensor) -> Tensor:
    """(B, 1): the first position that takes part, 0 where none does."""
    return key_padding_mask.to(torch.uint8).argmax(1, keepdim=True)


def from_the_first(key: Tensor, value: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Each sequence turned about, so that padding on its left comes to lie behind it."""
    mask = key_padding_mask
    if mask is None or key.dim() != 4 or value.shape[:3] != key.shape[:3] or key.size(2) == 0:
        return key, value, mask
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (key.size(0), key.size(2)):
        return key, value, mask  # to be refused, in words
    first = _first(mask)
    if readable(first) and not first.any():
        return key, value, mask
    source = (torch.arange(mask.size(1), device=mask.device) + first) % mask.size(1)
    turned = lambda rows: rows.gather(2, source[:, None, :, None].expand_as(rows))  # noqa: E731
    key_rows = turned(key)
    return key_rows, key_rows if value is key else turned(value), mask.gather(1, source)
