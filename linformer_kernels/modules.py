"""Modules: the projections E and F, multi-head Linformer attention, and an encoder layer.

The sharing strategies of the paper (section 4) are layouts of E and F, never copies. Sharing across layers, and any
projection that is not two plain learned matrices, is one `LinformerProjection` passed to every layer that uses it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ._validation import check_pooling, check_tensor, integer, refuse_causal
from .functional import linformer_attention, project_kv, projected_attention

_KINDS = ("learned", "fixed", "mean", "max", "conv")
SHARINGS = ("none", "headwise", "key_value", "layerwise")


class LinformerProjection(nn.Module):
    """E and F: the compression of keys and values from up to `seq_len` rows to `proj_dim`.

    One instance may serve several layers: each registers it as a submodule, `parameters()` (and so optimizers and DDP)
    sees its parameters once, and `state_dict()` lists them under each layer's name, as for all tied weights in torch.

    Args:
        seq_len: N_max, the longest sequence. A shorter one uses the first N columns.
        proj_dim: K.
        num_heads: None: one projection for all heads; otherwise one for each of that many key heads.
        kind:
            "learned": E and F are parameters that start as N(0, 1 / seq_len), so that K' has the spread of the keys.
            "fixed": the same start, kept as buffers: saved with the model, never trained.
            "mean": row k is the mean of window k. A masked or absent position counts as zero.
            "max": row k is the maximum over window k, feature by feature; zero where no position takes part.
            "conv": row k is a learned, depthwise filter over window k (kernel and stride N / K), one filter for each of
                the `head_dim` features. A masked or absent position counts as zero.
            The K windows of the last three divide `seq_len` without overlap and without a dropped tail; where K does
            not divide it, some are one position longer.
        share_kv: E = F. Pooling has no weights, so "mean" and "max" treat keys and values alike in any case.
        head_dim: width of a head, for "conv" alone.

    Raises:
        ValueError: sizes below 1, an unknown kind, more windows than positions, num_heads with "mean" or "max",
            head_dim without "conv" or "conv" without head_dim.
    """

    proj_key: Tensor | None
    proj_value: Tensor | None
    _windows: Tensor | None

    def __init__(
        self,
        seq_len: int,
        proj_dim: int,
        *,
        num_heads: int | None = None,
        kind: str = "learned",
        share_kv: bool = False,
        head_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"seq_len": seq_len, "proj_dim": proj_dim, "num_heads": num_heads, "head_dim": head_dim}
        for name, size in sizes.items():
            if size is not None and integer(name, size) < 1:
                raise ValueError(f"{name} is {size}; wanted: at least 1")
        if kind not in _KINDS:
            raise ValueError(f"kind is {kind!r}; wanted: one of {', '.join(_KINDS)}")
        if kind in ("mean", "max", "conv") and proj_dim > seq_len:
            raise ValueError(f"proj_dim is {proj_dim} but seq_len is {seq_len}; wanted: a position for each window")
        if kind in ("mean", "max") and num_heads is not None:
            raise ValueError(f'num_heads is {num_heads} but kind is "{kind}"; wanted: None, as pooling has no weights')
        if (kind == "conv") != (head_dim is not None):
            raise ValueError(f'head_dim is {head_dim} but kind is "{kind}"; wanted: the head width for "conv" alone')
        self.seq_len, self.proj_dim, self.num_heads = seq_len, proj_dim, num_heads
        self.kind, self.share_kv, self.head_dim = kind, share_kv or kind in ("mean", "max"), head_dim
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if kind in ("max", "conv"):
            windows = torch.empty(self._window_index().shape, dtype=torch.int64, device=device)
            self.register_buffer("_windows", windows, persistent=False)
        shape: tuple[int, ...] = (proj_dim, seq_len) if head_dim is None else (head_dim, -(-seq_len // proj_dim))
        shape = shape if num_heads is None else (num_heads, *shape)
        for name in ("proj_key", "proj_value"):
            if kind == "max" or (name == "proj_value" and self.share_kv):
                self.register_parameter(name, None)
            elif kind in ("learned", "conv"):
                self.register_parameter(name, nn.Parameter(torch.empty(shape, **factory)))
            else:
                self.register_buffer(name, torch.empty(shape, **factory), persistent=kind == "fixed")
        self.reset_parameters()

    @property
    def is_matrix(self) -> bool:
        """Whether K' = E[:, :N] @ key for some E, as the kernels want it."""
        return self.kind not in ("max", "conv")

    def reset_parameters(self) -> None:
        """Draw the weights anew (a mean is computed, not drawn)."""
        for weight in (self.proj_key, self.proj_value):
            if weight is None:
                continue
            with torch.no_grad():
                if self.kind != "mean":
                    nn.init.normal_(weight, std=weight.size(-1) ** -0.5)
        self.reset_windows()

    def reset_windows(self) -> None:
        """Compute anew what is computed and not saved: the matrix of a mean, the positions of windows."""
        with torch.no_grad():
            if self.kind == "mean":
                self.get_buffer("proj_key").copy_(self.window_means())
            elif self.kind in ("max", "conv"):
                self.get_buffer("_windows").copy_(self._window_index())

    def matrices(self) -> tuple[Tensor, Tensor | None]:
        """(E, F), with F None if E = F. For the kinds that are matrices."""
        if not self.is_matrix or self.proj_key is None:
            raise ValueError(f"kind \"{self.kind}\" is not a matrix; wanted: call the module for K' and V'")
        return self.proj_key, self.proj_value

    def forward(self, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """K' (B, H_kv, K, D) and V' of key (B, H_kv, N, D) and value.

        key_padding_mask is (B, N) bool, True = the position takes part.
        """
        if self.is_matrix:
            return project_kv(key, value, *self.matrices(), key_padding_mask=key_padding_mask)
        sizes = self.proj_key, self.head_dim, self.num_heads
        check_pooling(key, value, key_padding_mask, self.seq_len, *sizes)
        value_weight = self.proj_key if self.share_kv else self.proj_value
        return self._pool(key, self.proj_key, key_padding_mask), self._pool(value, value_weight, key_padding_mask)

    def extra_repr(self) -> str:
        return (
            f"{self.seq_len}, {self.proj_dim}, num_heads={self.num_heads}, kind={self.kind!r}, "
            f"share_kv={self.share_kv}" + (f", head_dim={self.head_dim}" if self.head_dim is not None else "")
        )

    def _bounds(self) -> tuple[Tensor, Tensor]:
        """First position of each window, and the first after it."""
        edges = torch.arange(self.proj_dim + 1) * self.seq_len // self.proj_dim
        return edges[:-1, None], edges[1:, None]

    def window_means(self) -> Tensor:
        """(K, seq_len), the matrix of the kind "mean": row k is 1 / its length on window k."""
        start, stop = self._bounds()
        position = torch.arange(self.seq_len)
        return ((position >= start) & (position < stop)) / (stop - start)

    def _window_index(self) -> Tensor:
        """(K, width) positions of each window; seq_len, an absent position, fills up the shorter ones."""
        start, stop = self._bounds()
        position = start + torch.arange(-(-self.seq_len // self.proj_dim))
        return torch.where(position < stop, position, self.seq_len)

    def _pool(self, rows: Tensor, weight: Tensor | None, key_padding_mask: Tensor | None) -> Tensor:
        length, absent, windows = rows.size(2), self.seq_len + 1 - rows.size(2), self._windows
        assert windows is not None  # for mypy: the kinds that pool have it
        if key_padding_mask is None:
            present = (torch.arange(self.seq_len + 1, device=rows.device) < length)[None]
        else:
            present = functional.pad(key_padding_mask, (0, absent))
        taken = present[:, None, windows, None]  # (B or 1, 1, K, width, 1)
        rows = functional.pad(rows, (0, 0, 0, absent))[:, :, windows]  # (B, H, K, width, D)
        if weight is None:
            maximum = torch.where(taken, rows, -torch.inf).amax(3)
            return torch.where(taken.any(3), maximum, 0)
        taps = "dw" if weight.dim() == 2 else "hdw"
        return torch.einsum(f"bhkwd,{taps}->bhkd", torch.where(taken, rows, 0), weight)


class LinformerAttention(nn.Module):
    """Multi-head Linformer attention, in the manner of torch.nn.MultiheadAttention.

    Differences from it:

    * `key_padding_mask` is True where a position TAKES PART, as in torch's scaled_dot_product_attention.
      torch.nn.MultiheadAttention has it the other way round: pass `~mask` when coming from there.
    * The result is the output alone: attention weights never exist as a tensor.
    * `batch_first` is True by default; inputs are always batched; no causal or pairwise masks, no bias_kv or zero_attn.
    * query, key, value have one weight each (`q_proj`, `k_proj`, `v_proj`), started as there.

    Where E is the same for all heads, and it costs fewer operations, keys and values are compressed before their linear
    layers: E (X W^T + 1 b^T) = (E X) W^T + (E 1) b^T. Exact, with E 1 the sum of E over the positions that take part.
    Not so where something else than nn.Linear (an adapter, a quantized layer) stands in for `k_proj` or `v_proj`, or a
    hook is on it: then that is called, with all positions.

    Args:
        embed_dim: width of queries and output.
        num_heads: H.
        seq_len: N_max, the longest key sequence. May be left out with `projection`.
        proj_dim: K. May be left out with `projection`.
        sharing: which E and F the module makes for itself.
            "headwise" (default): one E and one F for all heads. "key_value": one matrix, E = F, for all heads.
            "none": an E and an F for each key head.
            "layerwise": one matrix for all heads, keys, values and layers; make it once, with
            LinformerProjection(seq_len, proj_dim, share_kv=True), and pass it to every layer as `projection`.
        projection: a LinformerProjection to use, of any kind and possibly shared; `sharing` is then "layerwise" or out.
        dropout: probability of dropping an attention weight, in training mode.
        bias: whether the four linear layers have one.
        kdim: width of keys; None: embed_dim.
        vdim: width of values; None: embed_dim.
        num_kv_heads: key and value heads, a divisor of num_heads; None: num_heads.
        head_dim: width of a head; None: embed_dim / num_heads.
        batch_first: inputs are (B, N, width) if true, else (N, B, width).

    Raises:
        ValueError: sizes that do not divide, unknown sharing, a projection that does not fit the other arguments.
        TypeError: projection is not a LinformerProjection.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        seq_len: int | None = None,
        proj_dim: int | None = None,
        sharing: str | None = None,
        *,
        projection: LinformerProjection | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or embed_dim < 1 or (head_dim is None and embed_dim % num_heads != 0):
            raise ValueError(f"embed_dim is {embed_dim} and num_heads {num_heads}; wanted: embed_dim a multiple of it")
        if head_dim is not None and head_dim < 1:
            raise ValueError(f"head_dim is {head_dim}; wanted: at least 1, or None for embed_dim / num_heads")
        if num_kv_heads < 1 or num_heads % num_kv_heads != 0:
            raise ValueError(f"num_kv_heads is {num_kv_heads}; wanted: a divisor of num_heads = {num_heads}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout is {dropout}; wanted: a float in [0, 1)")
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, num_kv_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.dropout, self.batch_first = dropout, batch_first
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if projection is None:
            projection = _own_projection(seq_len, proj_dim, sharing, num_kv_heads, factory)
        else:
            _check_projection(projection, seq_len, proj_dim, sharing, num_kv_heads, self.head_dim)
        self.projection = projection
        width, kv_width = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(embed_dim, width, bias=bias, **factory)
        self.k_proj = nn.Linear(self.kdim, kv_width, bias=bias, **factory)
        self.v_proj = nn.Linear(self.vdim, kv_width, bias=bias, **factory)
        self.out_proj = nn.Linear(width, embed_dim, bias=bias, **factory)
        # Multiplications per key row: K * input width, against those of the linear layer and then K * output width.
        inputs, outputs = self.kdim + self.vdim, 2 * kv_width
        linear = inputs * kv_width
        self.compress_first = (
            projection.is_matrix
            and projection.num_heads is None
            and projection.proj_dim * inputs <= linear + projection.proj_dim * outputs
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start the linear layers as torch.nn.MultiheadAttention does. The projection starts itself."""
        for linear in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(linear.weight)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend from query to key and value.

        Args:
            query: (B, N_q, embed_dim), or (N_q, B, embed_dim) without batch_first.
            key: (B, N, kdim); None: the query (self-attention).
            value: (B, N, vdim); None: the key.
            key_padding_mask: (B, N) bool, True = the position TAKES PART (not as in torch.nn.MultiheadAttention).
            need_weights: refused if true.
            is_causal: refused if true.

        Returns:
            The output, shaped as query.

        Raises:
            ValueError, TypeError: shapes or dtypes do not fit.
            NotImplementedError: need_weights or is_causal.
        """
        refuse_causal(is_causal)
        if need_weights:
            raise NotImplementedError(
                "need_weights=True came; wanted: need_weights=False, as the kernels never form the weights, which are "
                "over K compressed rows and not over positions"
            )
        key = query if key is None else key
        value = key if value is None else value
        inputs = {"query": (query, self.embed_dim), "key": (key, self.kdim), "value": (value, self.vdim)}
        for name, (tensor, width) in inputs.items():
            check_tensor(name, tensor)
            if tensor.dim() != 3 or tensor.size(-1) != width:
                order = "B, N" if self.batch_first else "N, B"
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; wanted: ({order}, {width})")
        if not self.batch_first:
            same = value is key
            query, key = query.transpose(0, 1), key.transpose(0, 1)
            value = key if same else value.transpose(0, 1)

        queries = _heads(self.q_proj(query), self.num_heads)
        dropout_p = self.dropout if self.training else 0.0
        if self.compress_first and _is_its_weights(self.k_proj) and _is_its_weights(self.v_proj):
            rows = compress_first(self.projection, key, value, self.k_proj, self.v_proj, key_padding_mask)
            keys, values = (_heads(x, self.num_kv_heads) for x in rows)
            out = projected_attention(queries, keys, values, dropout_p=dropout_p)
        else:
            keys = _heads(self.k_proj(key), self.num_kv_heads)
            values = _heads(self.v_proj(value), self.num_kv_heads)
            if self.projection.is_matrix:
                mask, matrices = key_padding_mask, self.projection.matrices()
                out = linformer_attention(queries, keys, values, *matrices, key_padding_mask=mask, dropout_p=dropout_p)
            else:
                keys, values = self.projection(keys, values, key_padding_mask)
                out = projected_attention(queries, keys, values, dropout_p=dropout_p)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        return out if self.batch_first else out.transpose(0, 1)


class LinformerEncoderLayer(nn.Module):
    """One encoder block: Linformer attention and a feed-forward network, after torch.nn.TransformerEncoderLayer.

    Differences from it: `seq_len`, `proj_dim`, `sharing`, `projection`, `num_kv_heads` and `head_dim` as in
    `LinformerAttention`; `batch_first` is True by default; `src_key_padding_mask` is True where a position TAKES PART;
    no `src_mask`.

    Args:
        d_model: width of the model.
        nhead: number of heads.
        seq_len, proj_dim, sharing, projection, num_kv_heads, head_dim: see `LinformerAttention`.
        dim_feedforward: width inside the feed-forward network.
        dropout: after attention, in and after the feed-forward network, and on the attention weights.
        activation: "relu", "gelu" or a callable.
        layer_norm_eps: of both layer norms.
        batch_first: (B, N, d_model) if true, else (N, B, d_model).
        norm_first: layer norms before attention and feed-forward network instead of after.
        bias: whether linear layers and layer norms have one.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        seq_len: int | None = None,
        proj_dim: int | None = None,
        sharing: str | None = None,
        *,
        projection: LinformerProjection | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        layer_norm_eps: float = 1e-5,
        batch_first: bool = True,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        activations: dict[str, Callable[[Tensor], Tensor]] = {"relu": functional.relu, "gelu": functional.gelu}
        if isinstance(activation, str):
            if activation not in activations:
                raise ValueError(f'activation is {activation!r}; wanted: "relu", "gelu" or a callable')
            activation = activations[activation]
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.self_attn = LinformerAttention(
            d_model,
            nhead,
            seq_len,
            proj_dim,
            sharing,
            projection=projection,
            dropout=dropout,
            bias=bias,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            batch_first=batch_first,
            **factory,
        )
        self.linear1 = nn.Linear(d_model, dim_feedforward, bias=bias, **factory)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias=bias, **factory)
        self.norm1 = nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **factory)
        self.norm2 = nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **factory)
        self.dropout, self.dropout1, self.dropout2 = nn.Dropout(dropout), nn.Dropout(dropout), nn.Dropout(dropout)
        self.activation, self.norm_first = activation, norm_first

    def forward(self, src: Tensor, *, src_key_padding_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """src (B, N, d_model) through the block. src_key_padding_mask (B, N) bool: True = TAKES PART."""

        def attend(x: Tensor) -> Tensor:
            return self.dropout1(self.self_attn(x, key_padding_mask=src_key_padding_mask, is_causal=is_causal))

        def feed_forward(x: Tensor) -> Tensor:
            return self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))

        if self.norm_first:
            src = src + attend(self.norm1(src))
            return src + feed_forward(self.norm2(src))
        src = self.norm1(src + attend(src))
        return self.norm2(src + feed_forward(src))


def compress_first(
    projection: LinformerProjection,
    key: Tensor,
    value: Tensor,
    k_proj: nn.Linear,
    v_proj: nn.Linear,
    key_padding_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """K' and V' (B, K, width) of key and value (B, N, input width), the linear layers applied to K rows instead of N.

    E (X W^T + 1 b^T) = (E X) W^T + (E 1) b^T, exact for a projection that is a matrix and the same for all heads.
    """
    proj_key, proj_value = projection.matrices()
    if proj_value is None and value is key and key.size(-1) > 1:
        # E X serves keys and values: the two halves of X's columns keep both products of the op busy.
        left, right = key[:, None].tensor_split(2, dim=-1)
        compressed = project_kv(left, right, proj_key, key_padding_mask=key_padding_mask)
        key_rows = value_rows = torch.cat(compressed, dim=-1).squeeze(1)
    else:
        mask = key_padding_mask
        compressed = project_kv(key[:, None], value[:, None], proj_key, proj_value, key_padding_mask=mask)
        key_rows, value_rows = (rows.squeeze(1) for rows in compressed)
    keys = functional.linear(key_rows, k_proj.weight)
    values = functional.linear(value_rows, v_proj.weight)
    length = key.size(1)
    if k_proj.bias is not None:
        keys = keys + _row_sum(proj_key, length, key_padding_mask) * k_proj.bias
    if v_proj.bias is not None:
        values = (
            values + _row_sum(proj_key if proj_value is None else proj_value, length, key_padding_mask) * v_proj.bias
        )
    return keys, values


def _own_projection(
    seq_len: int | None, proj_dim: int | None, sharing: str | None, num_kv_heads: int, factory: dict[str, Any]
) -> LinformerProjection:
    sharing = "headwise" if sharing is None else sharing
    if sharing not in SHARINGS:
        raise ValueError(f"sharing is {sharing!r}; wanted: one of {', '.join(SHARINGS)}")
    if sharing == "layerwise":
        raise ValueError(
            'sharing is "layerwise" but projection is None; wanted: one LinformerProjection(seq_len, proj_dim, '
            "share_kv=True) passed to every layer as projection="
        )
    if seq_len is None or proj_dim is None:
        raise ValueError(f"seq_len is {seq_len} and proj_dim {proj_dim}; wanted: both, or a projection")
    heads = num_kv_heads if sharing == "none" else None
    return LinformerProjection(seq_len, proj_dim, num_heads=heads, share_kv=sharing == "key_value", **factory)


def _check_projection(
    projection: object,
    seq_len: int | None,
    proj_dim: int | None,
    sharing: str | None,
    num_kv_heads: int,
    head_dim: int,
) -> None:
    if not isinstance(projection, LinformerProjection):
        raise TypeError(f"projection is a {type(projection).__name__}; wanted: a LinformerProjection or None")
    if sharing not in (None, "layerwise"):
        raise ValueError(f'sharing is {sharing!r} but a projection came; wanted: one of the two, or "layerwise"')
    for name, given, has in (
        ("seq_len", seq_len, projection.seq_len),
        ("proj_dim", proj_dim, projection.proj_dim),
        ("num_kv_heads", num_kv_heads, num_kv_heads if projection.num_heads is None else projection.num_heads),
        ("head_dim", head_dim, head_dim if projection.head_dim is None else projection.head_dim),
    ):
        if given is not None and given != has:
            raise ValueError(f"{name} is {given} but the projection has {has}; wanted: one value in both")


def _is_its_weights(linear: nn.Module) -> bool:
    """Whether nothing but weight and bias makes its result: no adapter stands in its place, no hook is on it."""
    hooks = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks
    return type(linear).forward is nn.Linear.forward and "forward" not in linear.__dict__ and not hooks


def _heads(rows: Tensor, num_heads: int) -> Tensor:
    """(B, N, H * D) as (B, H, N, D), a view."""
    return rows.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _row_sum(proj: Tensor, length: int, key_padding_mask: Tensor | None) -> Tensor:
    """E 1 over the positions that take part: (K, 1) or, masked, (B, K, 1)."""
    if torch.compiler.is_exporting():  # a slice would make torch decide, for all N, whether it is the whole
        batch = 1 if key_padding_mask is None else key_padding_mask.size(0)
        ones = proj.new_ones(batch, 1, length, 1)
        sums = project_kv(ones, ones, proj, key_padding_mask=key_padding_mask)[0].squeeze(1)
        return sums if key_padding_mask is not None else sums.squeeze(0)
    proj = proj[:, :length]
    if key_padding_mask is None:
        return proj.sum(-1, keepdim=True)
    return (key_padding_mask.to(proj.dtype) @ proj.transpose(0, 1))[..., None]
