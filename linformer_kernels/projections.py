"""`LinformerProjection`: E and F as a module, the only place where attention to compressed rows meets their weights.

Whoever attends calls it, with a query for the attention and without for K' and V' alone, so that what stands in its
place or hangs on it (PEFT's copies, FSDP, offloading, hooks) takes part.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ._backends import for_onnx, is_distributed
from ._masks import readable
from ._ops import OPS
from ._validation import (
    check_adaptive,
    check_both_packed,
    check_pooling,
    check_project,
    check_tensor,
    integer,
    is_known,
    refuse_both,
)
from .functional import (
    autocast,
    linformer_attention,
    linformer_attention_varlen,
    pool_kv,
    pooled_attention,
    project_kv,
    projected_attention,
)
from .segments import ranks, window_counts, window_segments

_choose_segments = OPS.choose_segments
KINDS = ("learned", "fixed", "mean", "max", "conv", "adaptive")
WEIGHTLESS = ("mean", "max", "adaptive")
STARTS = ("gaussian", "mean", "identity")
WINDOWS = ("seq_len", "valid")
# Of the K rows of "adaptive", those for single tokens: by the cosines in docs/results.md.
SINGLES = 0.375


class LinformerProjection(nn.Module):
    """E and F: the compression of keys and values from up to `seq_len` rows to `proj_dim` (Wang et al. 2020, Eq. 7).

    One instance may serve several layers: `parameters()` (and so optimizers and DDP) sees its parameters once.

    Column n of E meets the n-th position of a sequence, counted from the first that takes part: padding on the left, on
    the right or none, the answer is the same. With from_first=False it meets position n, whatever is masked.

    Where rows stand for windows of positions (kinds "mean", "max", "conv", and starts "mean", "identity"), a row whose
    window has no position that takes part has no share of the softmax.

    Kind "adaptive" has no weights and needs none: what it makes of a sequence follows the sequence, and keeps most of
    what an encoder knows that was trained with exact attention. It chooses by the query, so it is called with one.

    Args:
        seq_len: N_max, the longest sequence. A shorter one uses the first N columns. None: any length, for "adaptive"
            and with windows="valid".
        proj_dim: K. At most seq_len, but where windows follow the sequence.
        num_heads: None: one projection for all heads; otherwise one for each of that many key heads.
        kind:
            "learned": E and F are parameters.
            "fixed": they are buffers: saved with the model, never trained.
            "mean": row k is the mean of window k. A masked or absent position counts as zero.
            "max": row k is the maximum over window k, feature by feature; zero where no position takes part.
            "conv": row k is a learned, depthwise filter over window k (kernel and stride N / K), one filter for each of
                the `head_dim` features. A masked or absent position counts as zero.
            "adaptive": rows of K' are single positions, `singles` of them, and means of windows over the others. Single
                are those of `keep`, and those to which the mean of a head's queries (64 of them, evenly spaced) attends
                most. A mean that stands for n positions has the weight of n. Up to K positions attention is exact. It
                takes O(N * D), and no E.
            The K windows divide `seq_len` without overlap and without a dropped tail; where K does not divide it, some
            are one position longer.
        share_kv: E = F. Pooling has no weights, so "mean" and "max" treat keys and values alike in any case.
        head_dim: width of a head, for "conv" alone.
        init: how "learned" and "fixed" start.
            "gaussian": N(0, 1 / seq_len), so that K' has the spread of the keys.
            "mean": the means over K windows, for weights that were trained with exact attention.
            "identity": row k picks the first position of window k; with proj_dim = seq_len attention is exact.
        from_first: whether columns of E are counted from the first position that takes part, or else from the first.
        windows: of "mean" and "max".
            "seq_len": K windows of positions 0 to seq_len - 1.
            "valid": min(K, L) windows over the L positions of a sequence that take part, and of "mean" each has the
                weight of as many positions as it stands for.
        keep: for windows="valid" and "adaptive": how many positions at the beginning and at the end of what takes part
            have a row each, as the special tokens of a text. None: (1, 1) for "adaptive", else none.
        singles: for "adaptive": the part of K for single positions, those of `keep` included.
        length_norm: for "learned" and "fixed": K' and V' of a sequence of L positions times sqrt(seq_len / L), so that
            K' has the spread of the keys whatever L is.

    Raises:
        TypeError: a size is no integer, singles no number.
        ValueError: sizes below 1, an unknown kind, init or windows, proj_dim above seq_len, num_heads with "mean",
            "max" or "adaptive", head_dim without "conv" or "conv" without head_dim, init for a kind that has a start of
            its own, windows, keep, singles or length_norm for a kind without them, keep larger than K.
    """

    proj_key: Tensor | None
    proj_value: Tensor | None

    def __init__(
        self,
        seq_len: int | None,
        proj_dim: int,
        *,
        num_heads: int | None = None,
        kind: str = "learned",
        share_kv: bool = False,
        head_dim: int | None = None,
        init: str = "gaussian",
        from_first: bool = True,
        windows: str = "seq_len",
        keep: tuple[int, int] | None = None,
        singles: float = SINGLES,
        length_norm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"seq_len": seq_len, "proj_dim": proj_dim, "num_heads": num_heads, "head_dim": head_dim}
        for name, size in sizes.items():
            if size is not None and integer(name, size) < 1:
                raise ValueError(f"{name} is {size}; wanted: at least 1")
        for name, value, known in (("kind", kind, KINDS), ("init", init, STARTS), ("windows", windows, WINDOWS)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; wanted: one of {', '.join(known)}")
        pooling, weightless = kind not in ("learned", "fixed"), kind in WEIGHTLESS
        follows = kind == "adaptive" or windows == "valid"
        if windows == "valid" and kind not in ("mean", "max"):
            raise ValueError(f'windows is "valid" but kind is "{kind}"; wanted: "mean" or "max"')
        if seq_len is None and not follows:
            raise ValueError(f'seq_len is None but kind is "{kind}"; wanted: the longest sequence')
        if pooling and init != "gaussian":
            raise ValueError(f'init is {init!r} but kind is "{kind}", which has a start of its own; wanted: "gaussian"')
        if seq_len is not None and not follows:
            check_sizes(seq_len, proj_dim)
        if weightless and num_heads is not None:
            raise ValueError(f'num_heads is {num_heads} but kind is "{kind}"; wanted: None, as pooling has no weights')
        if (kind == "conv") != (head_dim is not None):
            raise ValueError(f'head_dim is {head_dim} but kind is "{kind}"; wanted: the head width for "conv" alone')
        if length_norm and pooling:
            raise ValueError(f'length_norm is true but kind is "{kind}"; wanted: "learned" or "fixed"')
        if keep is not None and not follows:
            raise ValueError(f'keep is {keep} but kind is "{kind}"; wanted: "adaptive", or windows="valid"')
        self.keep = _checked_keep(keep, proj_dim, kind == "adaptive")
        if isinstance(singles, bool) or not isinstance(singles, (int, float)):
            raise TypeError(f"singles is {singles!r}; wanted: a part of K, between 0 and 1")
        if not 0.0 <= singles <= 1.0:
            raise ValueError(f"singles is {singles}; wanted: a part of K, between 0 and 1")
        if singles != SINGLES and kind != "adaptive":
            raise ValueError(f'singles is {singles} but kind is "{kind}"; wanted: "adaptive"')
        self.singles = min(max(sum(self.keep), int(singles * proj_dim)), proj_dim - 1)
        self.seq_len, self.proj_dim, self.num_heads = seq_len, proj_dim, num_heads
        self.kind, self.share_kv, self.head_dim = kind, share_kv or weightless, head_dim
        self.init, self.rows_are_windows = init, pooling or init != "gaussian"
        self.from_first, self.windows, self.length_norm = from_first, windows, length_norm
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        length = seq_len or 0
        shape: tuple[int, ...] = (proj_dim, length) if head_dim is None else (head_dim, -(-length // proj_dim))
        shape = shape if num_heads is None else (num_heads, *shape)
        for name in ("proj_key", "proj_value"):
            if weightless or (name == "proj_value" and self.share_kv):
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
                    rows = self.window_rows(self.init == "mean").to(weight.device).expand(weight.shape)
                    weight.copy_(_sharded_like(rows, weight) if is_distributed(weight) else rows)

    def window_rows(self, mean: bool) -> Tensor:
        """(K, seq_len) in float64, on the CPU: row k is the mean of window k, or picks its first position."""
        edges, position = self._edges("cpu")[:, None], torch.arange(self._longest, device="cpu")
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
            query: (B, H, N_q, D), or packed (total_q, H, D) with cu_seqlens_q. Kind "adaptive" wants one.
            cu_seqlens_q: as in `linformer_attention_varlen`.
            dropout_p: of the softmax, for a query.
            scale: of the scores, for a query; None: 1 / sqrt(D).

        Returns:
            Without a query K' (B, H_kv, K, D) and V' (B, H_kv, K, D_v); with one the output, shaped as the query, with
            D_v columns.

        Raises:
            ValueError, TypeError: as `linformer_attention` and `linformer_attention_varlen`; also for what is of a
                query, without one, and for "adaptive" without a query.
        """
        check_tensor("key", key)
        key, value, query = autocast(key, value, query)
        if query is not None:
            check_both_packed(cu_seqlens_q, cu_seqlens_k)
        elif cu_seqlens_q is not None or dropout_p != 0.0 or scale is not None:
            raise ValueError("cu_seqlens_q, dropout_p or scale came without a query; wanted: a query, or none of them")
        if cu_seqlens_k is not None:
            refuse_both(key_padding_mask)
        mask, length = key_padding_mask, key.size(-2)
        options: dict[str, Any] = {"dropout_p": dropout_p, "scale": scale}
        packed: dict[str, Any] = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
        if self.kind == "adaptive":
            chosen = self.segments(query, key, value, mask, **packed)
            assert query is not None  # for mypy: it has been refused
            return pooled_attention(
                query, key, value, chosen, self.proj_dim, key_padding_mask=mask, **packed, **options
            )
        if query is not None and self.kind in ("learned", "fixed") and not self.length_norm:
            key, value, mask = self._turned(key, value, mask)
            matrices: Any = query, key, value, self.proj_key, self.proj_value
            options["key_bias"] = self._bias(length, mask, cu_seqlens_k, key)
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

    def segments(
        self,
        query: Tensor | None,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
    ) -> Tensor:
        """Of "adaptive": the segments that `pooled_attention` gets, (B, H_kv, N) int32, or packed (total_k, H_kv).

        Raises:
            ValueError: no query, or as `pooled_attention`.
            NotImplementedError: within torch.onnx.export without linformer_kernels.onnx.TABLE.
        """
        if query is None:
            raise ValueError(
                'kind is "adaptive" but no query came; wanted: projection(key, value, query=query), as the queries '
                "choose which keys have a row of their own"
            )
        if for_onnx():
            raise NotImplementedError(
                'kind is "adaptive" within torch.onnx.export; wanted: torch.onnx.export(..., '
                "custom_translation_table=linformer_kernels.onnx.TABLE), as ONNX has no operator for the choice of "
                "segments"
            )
        query, key, value = autocast(query, key, value)
        call = check_adaptive(query, key, value, key_padding_mask, cu_seqlens_q, cu_seqlens_k)
        self._check_length(key.size(-2), call.cu_seqlens_k)
        numbers = self.proj_dim, self.singles, *self.keep
        if is_distributed(call.key):
            from . import _sharding  # which loads torch.distributed

            _sharding.check_distributed(dataclasses.replace(call, key_padding_mask=key_padding_mask))
            if _sharding.chosen_in_parts(call.query, call.key, key_padding_mask, cu_seqlens_k):
                return _sharding.choose_segments(call.query, call.key, key_padding_mask, *numbers)
        rows = (call.query, call.key, key_padding_mask, call.cu_seqlens_q, call.cu_seqlens_k)
        chosen: Tensor = _choose_segments(*rows, *numbers)
        return chosen

    def compress(
        self, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, cu_seqlens_k: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """K' and V' of rows that have no padding before them. For subclasses to replace; users call the module."""
        if self.kind == "adaptive":
            self.segments(None, key, value)
        if self.kind in ("learned", "fixed"):
            matrices: Any = self.proj_key, self.proj_value
            rows = project_kv(key, value, *matrices, key_padding_mask=key_padding_mask, cu_seqlens_k=cu_seqlens_k)
            if not self.length_norm:
                return rows
            lengths = _lengths(key.size(-2), key_padding_mask, cu_seqlens_k, key.device)
            factor = (self._longest / lengths.clamp(min=1).to(_wide(key))).sqrt()[:, :, None, None]
            return rows[0] * factor.to(rows[0].dtype), rows[1] * factor.to(rows[1].dtype)
        if self.kind == "conv":
            if cu_seqlens_k is not None:
                key, value, key_padding_mask = self._unpacked(key, value, cu_seqlens_k)
            sizes = self.proj_key, self.head_dim, self.num_heads
            check_pooling(key, value, key_padding_mask, self._longest, *sizes)
            value_weight = self.proj_key if self.share_kv else self.proj_value
            return self._filter(key, self.proj_key, key_padding_mask), self._filter(
                value, value_weight, key_padding_mask
            )
        longest = key.size(0 if cu_seqlens_k is not None else 2) if self.seq_len is None else self.seq_len
        check_project(
            key, value, key.new_empty(1, longest), None, key_padding_mask, cu_seqlens_k
        )  # any E of this length
        segments = self._windows(key, key_padding_mask, cu_seqlens_k)
        if self.kind == "max":
            rows_of = lambda rows: _maxima(rows, segments, self.proj_dim, cu_seqlens_k)  # noqa: E731
            return rows_of(key), rows_of(value)
        key_proj, value_proj, count = pool_kv(
            key, value, segments, self.proj_dim, key_padding_mask=key_padding_mask, cu_seqlens_k=cu_seqlens_k
        )
        if self.windows == "valid":
            return key_proj, value_proj
        # Positions that are masked or absent count as zeros.
        part = (count.to(_wide(key)) / self._edges(key.device).diff())[..., None].to(key_proj.dtype)
        return key_proj * part, value_proj * part

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
        options: dict[str, Any] = {"cu_seqlens_q": cu_seqlens_q, "dropout_p": dropout_p, "scale": scale}
        bias = self._bias(length, key_padding_mask, cu_seqlens_k, query)
        return projected_attention(query, key_proj, value_proj, key_bias=bias, **options)

    def extra_repr(self) -> str:
        return (
            f"{self.seq_len}, {self.proj_dim}, num_heads={self.num_heads}, kind={self.kind!r}, "
            f"share_kv={self.share_kv}"
            + (f", head_dim={self.head_dim}" if self.head_dim is not None else "")
            + (f", init={self.init!r}" if self.init != "gaussian" else "")
            + ("" if self.from_first else ", from_first=False")
            + (f", windows={self.windows!r}" if self.windows != "seq_len" else "")
            + (f", keep={self.keep}" if any(self.keep) else "")
            + (f", singles={self.singles} of {self.proj_dim}" if self.kind == "adaptive" else "")
            + (", length_norm=True" if self.length_norm else "")
        )

    def _turned(self, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        # Windows that follow what takes part find it wherever it lies.
        return from_the_first(key, value, mask) if self.from_first and self.windows != "valid" else (key, value, mask)

    @property
    def _longest(self) -> int:
        """seq_len of the kinds that have one."""
        return self.seq_len or 0

    def _edges(self, device: torch.device | str) -> Tensor:
        """(K + 1,): window k holds the positions from edge k up to edge k + 1."""
        return torch.arange(self.proj_dim + 1, device=device) * self._longest // self.proj_dim

    def _check_length(self, length: int, cu_seqlens_k: Tensor | None) -> None:
        if self.seq_len is None:
            return
        if cu_seqlens_k is not None:
            length = max(cu_seqlens_k.diff().tolist(), default=0) if is_known(cu_seqlens_k) else 0
        if length > self.seq_len:
            raise ValueError(
                f"key has sequence length N = {length} but the projection is made for seq_len = {self.seq_len}; "
                "wanted: no more, or a projection of seq_len=None"
            )

    def _windows(self, key: Tensor, key_padding_mask: Tensor | None, cu_seqlens_k: Tensor | None) -> Tensor:
        """The segments of "mean" and "max": (B, N) int32, or packed (total,)."""
        shape = (key.size(0), key.size(2)) if cu_seqlens_k is None else (1, key.size(0))
        if self.windows == "valid":
            rank, length = ranks(key_padding_mask, cu_seqlens_k, shape, key.device)
            segments = window_segments(rank, length, self.proj_dim, self.keep)
        else:  # padding has been turned to the end
            position, _ = ranks(None, cu_seqlens_k, shape, key.device)
            # The last window whose edge, k * seq_len // K, is not beyond; in numbers that ONNX knows.
            segments = (((position + 1) * self.proj_dim - 1) // self._longest).to(torch.int32)
            if key_padding_mask is not None:
                segments = torch.where(key_padding_mask, segments, -1)
        return segments if cu_seqlens_k is not None else segments.expand(shape)

    def _bias(
        self, length: int, key_padding_mask: Tensor | None, cu_seqlens_k: Tensor | None, like: Tensor
    ) -> Tensor | None:
        """(B or 1, 1, K) for the scores: the weight of each row of K', -inf for one that stands for nothing; None where
        it is known without a look at the data that all weigh the same. On the device of `like`."""
        device = like.device
        if self.windows == "valid":
            lengths = _lengths(length, key_padding_mask, cu_seqlens_k, device)
            counts = window_counts(lengths, self.proj_dim, self.keep).to(_wide(like))
            return (counts.log() if self.kind == "mean" else torch.where(counts > 0, 0.0, -torch.inf))[:, None]
        if not self.rows_are_windows:
            return None
        # Not asked of a compiler: an exported program of any length up to seq_len would have to exclude that one.
        asked = key_padding_mask is None and cu_seqlens_k is None and not torch.compiler.is_compiling()
        if asked and length == self.seq_len:
            return None
        edges = self._edges(device)
        if cu_seqlens_k is not None:
            reached = edges[:-1] < cu_seqlens_k.diff()[:, None]
        elif key_padding_mask is None:
            reached = (edges[:-1] < length)[None]
        else:
            if self.from_first:
                edges = edges + _first(key_padding_mask)
            edges = edges.clamp(max=length)
            before = functional.pad(key_padding_mask.cumsum(1), (1, 0)).gather(
                1, edges.expand(key_padding_mask.size(0), -1)
            )
            reached = before[:, 1:] > before[:, :-1]
        return torch.where(reached, 0.0, -torch.inf)[:, None]

    def _unpacked(self, key: Tensor, value: Tensor, cu_seqlens_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Packed rows as (B, H_kv, seq_len, D), with the mask of those that are there."""
        check_project(key, value, key.new_empty(1, self._longest), None, None, cu_seqlens_k)  # any E of this length
        position = torch.arange(self._longest, device=key.device)
        mask = position < cu_seqlens_k.diff()[:, None]
        source = torch.where(mask, position + cu_seqlens_k[:-1, None], key.size(0)).clamp(0, key.size(0))
        pad = lambda rows: functional.pad(rows, (0, 0, 0, 0, 0, 1))[source].transpose(1, 2)  # noqa: E731
        return pad(key), pad(value), mask

    def _filter(self, rows: Tensor, weight: Tensor | None, key_padding_mask: Tensor | None) -> Tensor:
        assert weight is not None  # for mypy: of "conv" alone
        length, absent = rows.size(2), self._longest + 1 - rows.size(2)
        edges, width = self._edges(rows.device)[:, None], -(-self._longest // self.proj_dim)
        windows = edges[:-1] + torch.arange(width, device=rows.device)
        windows = torch.where(windows < edges[1:], windows, self._longest)  # an absent position fills up shorter ones
        if key_padding_mask is None:
            present = (torch.arange(self._longest + 1, device=rows.device) < length)[None]
        else:
            present = functional.pad(key_padding_mask, (0, absent))
        taken = present[:, None, windows, None]  # (B or 1, 1, K, width, 1)
        rows = functional.pad(rows, (0, 0, 0, absent))[:, :, windows]  # (B, H, K, width, D)
        rows = torch.where(taken, rows, 0)
        return torch.einsum(f"bhkwd,{'dw' if weight.dim() == 2 else 'hdw'}->bhkd", rows, weight)


def check_sizes(seq_len: int, proj_dim: int) -> None:
    """That there are fewer rows than positions, or as many: more would cost more than exact attention, for no more."""
    if proj_dim > seq_len:
        raise ValueError(
            f"proj_dim is {proj_dim} but seq_len is {seq_len}; wanted: at most seq_len, as K' of more rows than "
            "positions holds nothing more and costs more than exact attention"
        )


def _checked_keep(keep: Any, proj_dim: int, adaptive: bool) -> tuple[int, int]:
    """As (first, last), with a row left for windows."""
    if keep is None:
        return (1, 1) if adaptive and proj_dim > 2 else (0, 0)
    if not isinstance(keep, (tuple, list)) or len(keep) != 2:
        raise TypeError(f"keep is {keep!r}; wanted: (first, last), two integers")
    first, last = (integer(f"keep[{i}]", number) for i, number in enumerate(keep))
    if min(first, last) < 0 or first + last >= proj_dim:
        raise ValueError(
            f"keep is {(first, last)} but proj_dim is {proj_dim}; wanted: numbers of at least 0, less than K in all"
        )
    return first, last


def _sharded_like(rows: Tensor, weight: Any) -> Tensor:
    """What every process has whole, as the DTensor `weight` is, as by fully_shard."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(rows, weight.device_mesh, weight.placements)


def _wide(like: Tensor) -> torch.dtype:
    """What factors and weights of its rows are computed in."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def _lengths(length: int, key_padding_mask: Tensor | None, cu_seqlens_k: Tensor | None, device: torch.device) -> Tensor:
    """How many positions of each sequence take part: (B or 1, 1)."""
    if cu_seqlens_k is not None:
        return cu_seqlens_k.diff()[:, None]
    if key_padding_mask is not None:
        return key_padding_mask.sum(1, keepdim=True)
    return torch.full((1, 1), length, device=device)


def _maxima(rows: Tensor, segments: Tensor, number: int, cu_seqlens_k: Tensor | None) -> Tensor:
    """(B, H, K, D): maxima over segments, feature by feature; zero in a row without a position."""
    if cu_seqlens_k is None:
        batch, heads, _, width = rows.shape
        at = torch.where(segments < 0, number, segments).long()[:, None, :, None].expand_as(rows)
        rows = torch.where((segments < 0)[:, None, :, None], 0, rows)  # whatever they hold, NaN included
        most = rows.new_full((batch, heads, number + 1, width), -torch.inf).scatter_reduce(2, at, rows, "amax")[
            :, :, :-1
        ]
    else:
        batch = cu_seqlens_k.numel() - 1
        sequence = torch.searchsorted(cu_seqlens_k[1:], torch.arange(rows.size(0), device=rows.device), right=True)
        # Inside, whatever the offsets say where nobody reads them.
        at = (sequence * number + segments).clamp(0, batch * number - 1)[:, None, None].expand_as(rows)
        most = rows.new_full((batch * number, *rows.shape[1:]), -torch.inf).scatter_reduce(0, at, rows, "amax")
        most = most.unflatten(0, (batch, number)).transpose(1, 2)
    return torch.where(most == -torch.inf, 0, most)


def _first(key_padding_mask: Tensor) -> Tensor:
    """(B, 1): the first position that takes part, 0 where none does."""
    if key_padding_mask.size(1) == 0:  # argmax refuses
        return key_padding_mask.new_zeros(key_padding_mask.size(0), 1, dtype=torch.int64)
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
    source = torch.arange(mask.size(1), device=mask.device) + first
    source = torch.where(source < mask.size(1), source, source - mask.size(1))  # PyTorch has no % of a size for ONNX
    turned = lambda rows: rows.gather(2, source[:, None, :, None].expand_as(rows))  # noqa: E731
    key_rows = turned(key)
    return key_rows, key_rows if value is key else turned(value), mask.gather(1, source)
