"""`LinformerAttention` in the place of torch.nn.MultiheadAttention, whose contract it keeps.

Names, order, defaults and meaning of arguments are those of torch.nn, and so are results; what Linformer adds is
keyword-only. Masks are torch.nn's too: True = IGNORED. (The functions of this package have those of
`scaled_dot_product_attention`: True = takes part.)

The sharing strategies of the paper (section 4) are layouts of E and F, never copies.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ._masks import refuse_mask, takes_part
from ._validation import check_tensor, integer, refuse_causal
from .projections import LinformerProjection

SHARINGS = ("none", "headwise", "key_value", "layerwise")


class LinformerAttention(nn.Module):
    """Multi-head Linformer attention in the place of torch.nn.MultiheadAttention (Wang et al. 2020, Eq. 7).

    All of its linear layers and its projection are called, so that adapters, hooks, sharding and offloading work on
    them. Heads are counted from what the layers return: under tensor parallelism each process has some.

    Where nothing but plain nn.Linear and one matrix for all heads is there, and it costs fewer operations, keys and
    values are compressed before their linear layers: E (X W^T + 1 b^T) = (E X) W^T + (E 1) b^T. Exact, with E 1 the sum
    of E over the positions that take part.

    Args:
        embed_dim: width of queries and output.
        num_heads: H.
        dropout: probability of dropping an attention weight, in training mode.
        bias: whether the four linear layers have one.
        add_bias_kv, add_zero_attn: refused if true.
        kdim: width of keys; None: embed_dim.
        vdim: width of values; None: embed_dim.
        batch_first: inputs are (B, N, width) if true, else (N, B, width).
        seq_len: N_max, the longest key sequence. May be left out with `projection`.
        proj_dim: K. May be left out with `projection`.
        sharing: which E and F the module makes for itself.
            "headwise" (default): one E and one F for all heads. "key_value": one matrix, E = F, for all heads.
            "none": an E and an F for each key head.
            "layerwise": none, and so no sizes. It is given to each call as `projection`, by `LinformerEncoder` for
            example.
        projection: a LinformerProjection to use, of any kind; `sharing` and `init` are then out.
        init: how E and F start, see `LinformerProjection`; None: "gaussian".
        num_kv_heads: key and value heads, a divisor of num_heads; None: num_heads.
        head_dim: width of a head; None: embed_dim / num_heads.

    Raises:
        ValueError: sizes that do not divide, unknown sharing, a projection that does not fit the other arguments.
        TypeError: projection is not a LinformerProjection, a size no integer, dropout no number.
        NotImplementedError: add_bias_kv, add_zero_attn.
    """

    # As in a MultiheadAttention of separate weights: torch.nn's encoder layers call it, past their fast path.
    _qkv_same_embed_dim = False
    bias_k = bias_v = None
    add_zero_attn = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        seq_len: int | None = None,
        proj_dim: int | None = None,
        sharing: str | None = None,
        projection: LinformerProjection | None = None,
        init: str | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            if value:
                raise NotImplementedError(
                    f"{name}=True came; wanted: False, as a row beyond the sequence has no column in E and F"
                )
        kdim, vdim = embed_dim if kdim is None else kdim, embed_dim if vdim is None else vdim
        for name, size in (("embed_dim", embed_dim), ("num_heads", num_heads), ("kdim", kdim), ("vdim", vdim)):
            if integer(name, size) < 1:
                raise ValueError(f"{name} is {size}; wanted: at least 1")
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if head_dim is None and embed_dim % num_heads != 0:
            raise ValueError(f"embed_dim is {embed_dim} and num_heads {num_heads}; wanted: embed_dim a multiple of it")
        if head_dim is not None and integer("head_dim", head_dim) < 1:
            raise ValueError(f"head_dim is {head_dim}; wanted: at least 1, or None for embed_dim / num_heads")
        if integer("num_kv_heads", num_kv_heads) < 1 or num_heads % num_kv_heads != 0:
            raise ValueError(f"num_kv_heads is {num_kv_heads}; wanted: a divisor of num_heads = {num_heads}")
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
            raise TypeError(f"dropout is {dropout!r}; wanted: a float in [0, 1)")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout is {dropout}; wanted: a float in [0, 1)")
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, num_kv_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.kdim, self.vdim = kdim, vdim
        self.dropout, self.batch_first = dropout, batch_first
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if projection is not None:
            check_projection(projection, seq_len, proj_dim, sharing, init, num_kv_heads, self.head_dim)
        elif sharing == "layerwise":
            _refuse_sizes(seq_len=seq_len, proj_dim=proj_dim, init=init)
        else:
            projection = make_projection(seq_len, proj_dim, sharing, num_kv_heads, init, **factory)
        self.projection = projection
        width, kv_width = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(embed_dim, width, bias=bias, **factory)
        self.k_proj = nn.Linear(self.kdim, kv_width, bias=bias, **factory)
        self.v_proj = nn.Linear(self.vdim, kv_width, bias=bias, **factory)
        self.out_proj = nn.Linear(width, embed_dim, bias=bias, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start the linear layers as torch.nn.MultiheadAttention does. The projection starts itself."""
        # There one matrix holds the weights of all three, if they are alike, and is drawn for that size.
        gain = 0.5**0.5 if self.kdim == self.vdim == self.embed_dim else 1.0
        for linear in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(linear.weight, gain)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    @property
    def in_proj_weight(self) -> Tensor | None:
        """A copy, as torch.nn.MultiheadAttention has it: torch.nn.TransformerEncoder looks at it."""
        if not self.kdim == self.vdim == self.embed_dim:
            return None
        return self._joined("weight")

    @property
    def in_proj_bias(self) -> Tensor | None:
        """A copy, see `in_proj_weight`."""
        return self._joined("bias")

    def _joined(self, name: str) -> Tensor | None:
        """None where a layer has none, or keeps it in another way, as torch.ao's quantized ones behind a method."""
        parts: list[Any] = [getattr(linear, name, None) for linear in (self.q_proj, self.k_proj, self.v_proj)]
        if not all(isinstance(part, Tensor) for part in parts):
            return None
        try:
            return torch.cat(parts)
        except NotImplementedError:  # of a quantizer's tensors: one of them, which tells torch.nn to keep its hands off
            return cast(Tensor, parts[0])

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        projection: nn.Module | None = None,
    ) -> tuple[Tensor, None]:
        """Attend from query to key and value.

        Args:
            query: (N_q, B, embed_dim), (B, N_q, embed_dim) with batch_first, or (N_q, embed_dim) without a batch. Or a
                nested tensor of B sequences (N_b, embed_dim), as are then key and value.
            key: (N, B, kdim), (B, N, kdim) or (N, kdim); None: the query (self-attention).
            value: as key, of width vdim; None: the key.
            key_padding_mask: (B, N), or (N,) without a batch. True = the position is IGNORED, as in torch.nn (and not
                as in `linformer_attention`). Or floating: 0 where it takes part, -inf where it is ignored.
            need_weights: refused if true. (In torch.nn it is true by default.)
            attn_mask: refused.
            average_attn_weights: of no meaning without need_weights.
            is_causal: refused if true.
            projection: used in place of the module's own.

        Returns:
            The output, shaped as query, and None where torch.nn has attention weights.

        Raises:
            ValueError, TypeError: shapes or dtypes do not fit, a floating mask with other numbers, linear layers that
                return no whole heads.
            NotImplementedError: need_weights, attn_mask or is_causal.
        """
        refuse_causal(is_causal)
        refuse_mask("attn_mask", attn_mask)
        if need_weights:
            raise NotImplementedError(
                "need_weights=True came; wanted: need_weights=False, as the kernels never form the weights, which are "
                "over K compressed rows and not over positions"
            )
        projection = self.projection if projection is None else projection
        if projection is None:
            raise ValueError(
                'sharing is "layerwise" but the call has no projection; wanted: projection=, in each call, as '
                "LinformerEncoder gives it to its layers"
            )
        if not isinstance(projection, nn.Module):
            raise TypeError(f"projection is a {type(projection).__name__}; wanted: a LinformerProjection or None")
        key = query if key is None else key
        value = key if value is None else value
        inputs = {"query": (query, self.embed_dim), "key": (key, self.kdim), "value": (value, self.vdim)}
        for name, (tensor, width) in inputs.items():
            check_tensor(name, tensor)
            if tensor.dim() not in (2, 3) or tensor.dim() != query.dim() or tensor.size(-1) != width:
                batched = f"(B, N, {width})" if self.batch_first else f"(N, B, {width})"
                shape = "a nested tensor" if tensor.is_nested else f"shape {tuple(tensor.shape)}"
                raise ValueError(f"{name} has {shape}; wanted: {batched}, or (N, {width}), all with a batch or none")
        nested = [tensor.is_nested for tensor in (query, key, value)]
        if not any(nested):
            self._check_rows(query, key, value)
        mask = takes_part("key_padding_mask", key_padding_mask)
        same = value is key, key is query
        cu_seqlens: dict[str, Tensor] = {}
        if any(nested):
            if mask is not None or not all(nested):
                raise ValueError(
                    "query, key or value is a nested tensor; wanted: all three, without key_padding_mask, or none of "
                    "them, by .to_padded_tensor(0.0)"
                )
            turn = lambda rows: torch.cat(rows.unbind())  # noqa: E731
            lengths = [_lengths(tensor) for tensor in (query, key, value)]
            if lengths[1] != lengths[2] or len(lengths[0]) != len(lengths[1]):
                raise ValueError(
                    f"query, key and value are nested tensors of {lengths[0]}, {lengths[1]} and {lengths[2]} rows; "
                    "wanted: as many sequences in all, and key and value alike"
                )
            cu_seqlens = {"cu_seqlens_q": _offsets(lengths[0], query), "cu_seqlens_k": _offsets(lengths[1], key)}
        elif query.dim() == 2:
            turn = lambda rows: rows[None]  # noqa: E731
            if mask is not None and mask.shape != key.shape[:1]:
                raise ValueError(
                    f"key_padding_mask has shape {tuple(mask.shape)}; wanted: (N,) = ({key.size(0)},), as query has no "
                    "batch"
                )
            mask = None if mask is None else mask[None]
        else:
            turn = lambda rows: rows if self.batch_first else rows.transpose(0, 1)  # noqa: E731
        queries = turn(query)
        keys = queries if same[1] else turn(key)
        out = self._attend(queries, keys, keys if same[0] else turn(value), mask, cu_seqlens, projection)
        if query.is_nested:
            return _nested_like(out, query), None
        return (out.squeeze(0) if query.dim() == 2 else turn(out)), None

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        cu_seqlens: dict[str, Tensor],
        projection: Any,
    ) -> Tensor:
        """Of (B, N, width), or packed rows (total, width). The mask is the op's: True = takes part."""
        packed, cu_seqlens_k = bool(cu_seqlens), cu_seqlens.get("cu_seqlens_k")
        queries = self._heads("q_proj", self.q_proj(query))
        options: dict[str, Any] = {**cu_seqlens, "dropout_p": self.dropout if self.training else 0.0}
        if self._compresses_first(projection):
            rows = self._compressed(projection, key, value, mask, cu_seqlens_k)
            keys, values = (self._heads(name, x) for name, x in zip(("k_proj", "v_proj"), rows, strict=True))
            self._check_heads(queries, keys, values)
            length = key.size(-2)
            out = projection.attend(queries, keys, values, length, key_padding_mask=mask, **options)
        else:
            keys, values = self._heads("k_proj", self.k_proj(key)), self._heads("v_proj", self.v_proj(value))
            self._check_heads(queries, keys, values)
            out = projection(keys, values, mask, query=queries, **options)
        return self.out_proj((out if packed else out.transpose(1, 2)).flatten(-2))

    def _check_rows(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Here, in the shapes that the caller knows: the op would show those of heads."""
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"value has shape {tuple(value.shape)} but key has {tuple(key.shape)}; wanted: the same but for the "
                "last dimension"
            )
        batch = 0 if self.batch_first else 1
        if query.dim() == 3 and query.size(batch) != key.size(batch):
            raise ValueError(
                f"query has shape {tuple(query.shape)} but key has {tuple(key.shape)}; wanted: the same batch size, "
                f"which is dimension {batch}, as batch_first is {self.batch_first}"
            )

    def _heads(self, name: str, rows: Tensor) -> Tensor:
        """(B, N, H * D) as (B, H, N, D), packed (total, H * D) as (total, H, D); views."""
        if hasattr(rows, "to_local"):
            raise ValueError(
                f"{name} returned a DTensor; wanted: a plain tensor of some heads, as by ColwiseParallel() with "
                "use_local_output=True"
            )
        if rows.size(-1) % self.head_dim != 0:
            raise ValueError(
                f"{name} returned rows of width {rows.size(-1)}; wanted: whole heads, a multiple of head_dim = "
                f"{self.head_dim}. Under tensor parallelism: a number of processes that divides num_heads = "
                f"{self.num_heads} and num_kv_heads = {self.num_kv_heads}"
            )
        rows = rows.unflatten(-1, (rows.size(-1) // self.head_dim, self.head_dim))
        return rows.transpose(1, 2) if rows.dim() == 4 else rows

    def _check_heads(self, *tensors: Tensor) -> None:
        heads = [tensor.size(1) for tensor in tensors]
        if heads[1] != heads[2] or heads[0] * self.num_kv_heads != heads[1] * self.num_heads:
            raise ValueError(
                f"q_proj, k_proj and v_proj returned {heads[0]}, {heads[1]} and {heads[2]} heads; wanted: the same "
                f"part of {self.num_heads}, {self.num_kv_heads} and {self.num_kv_heads}. Under tensor parallelism: all "
                "three by columns, out_proj by rows"
            )

    def _compresses_first(self, projection: Any) -> bool:
        """Whether to, for fewer operations, and only where nobody can tell the difference."""
        if not (_is_plain(projection, LinformerProjection) and projection.alike):
            return False
        if not (_is_plain(self.k_proj, nn.Linear) and _is_plain(self.v_proj, nn.Linear)):
            return False
        # Multiplications per key row: K * input width, against those of the linear layer and then K * output width.
        inputs, outputs = self.kdim + self.vdim, self.k_proj.out_features + self.v_proj.out_features
        linear = self.k_proj.out_features * self.kdim + self.v_proj.out_features * self.vdim
        return bool(projection.proj_dim * inputs <= linear + projection.proj_dim * outputs)

    def _compressed(
        self,
        projection: Any,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        cu_seqlens_k: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """K' and V' (B, K, width), k_proj and v_proj called with K rows a sequence instead of N."""
        if projection.share_kv and value is key and key.size(-1) > 1:
            # E X serves keys and values: the two halves of X's columns keep both products of the op busy.
            left, right = key.unsqueeze(1).tensor_split(2, dim=-1)
            key_rows = value_rows = torch.cat(projection(left, right, mask, cu_seqlens_k=cu_seqlens_k), dim=-1)
        else:
            rows = key.unsqueeze(1), value.unsqueeze(1)
            key_rows, value_rows = projection(*rows, mask, cu_seqlens_k=cu_seqlens_k)
        keys, values = self.k_proj(key_rows.squeeze(1)), self.v_proj(value_rows.squeeze(1))
        if self.k_proj.bias is None and self.v_proj.bias is None:
            return keys, values
        # A linear layer adds its bias, what it gives for zeros, once, where E 1 of it are wanted.
        ones = key.new_ones(*(key.shape[:-1] if mask is not None or cu_seqlens_k is not None else (1, key.size(1))), 1)
        sums = projection(ones.unsqueeze(1), ones.unsqueeze(1), mask, cu_seqlens_k=cu_seqlens_k)
        key_more, value_more = (x.squeeze(1) - 1 for x in sums)
        keys = keys + key_more * self.k_proj(key.new_zeros(1, self.kdim))
        return keys, values + value_more * self.v_proj(value.new_zeros(1, self.vdim))


def make_projection(
    seq_len: int | None,
    proj_dim: int | None,
    sharing: str | None,
    num_kv_heads: int,
    init: str | None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> LinformerProjection:
    """The learned projection of one layer."""
    sharing = "headwise" if sharing is None else sharing
    if sharing not in SHARINGS:
        raise ValueError(f"sharing is {sharing!r}; wanted: one of {', '.join(SHARINGS)}")
    if seq_len is None or proj_dim is None:
        raise ValueError(
            f"seq_len is {seq_len} and proj_dim {proj_dim}; wanted: both, the longest sequence and K, or a projection"
        )
    heads, share_kv = num_kv_heads if sharing == "none" else None, sharing == "key_value"
    options: dict[str, Any] = {"init": "gaussian" if init is None else init, "device": device, "dtype": dtype}
    return LinformerProjection(seq_len, proj_dim, num_heads=heads, share_kv=share_kv, **options)


def check_projection(
    projection: object,
    seq_len: int | None,
    proj_dim: int | None,
    sharing: str | None,
    init: str | None,
    num_kv_heads: int,
    head_dim: int,
) -> None:
    if not isinstance(projection, LinformerProjection):
        raise TypeError(f"projection is a {type(projection).__name__}; wanted: a LinformerProjection or None")
    if sharing not in (None, "layerwise"):
        raise ValueError(f'sharing is {sharing!r} but a projection came; wanted: one of the two, or "layerwise"')
    if init is not None:
        raise ValueError(f"init is {init!r} but a projection came, which has its own start; wanted: one of the two")
    for name, given, has in (
        ("seq_len", seq_len, projection.seq_len),
        ("proj_dim", proj_dim, projection.proj_dim),
        ("num_kv_heads", num_kv_heads, num_kv_heads if projection.num_heads is None else projection.num_heads),
        ("head_dim", head_dim, head_dim if projection.head_dim is None else projection.head_dim),
    ):
        if given is not None and given != has:
            raise ValueError(f"{name} is {given} but the projection has {has}; wanted: one value in both")


def _refuse_sizes(**given: int | str | None) -> None:
    """Of a layer without a projection of its own, which would ignore them."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f'{name} is {value!r} but sharing is "layerwise", where the projection comes with each call; wanted: '
                f"{name} for that projection alone, as LinformerEncoder takes it"
            )


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether it does what its class does and nothing more: no subclass, no hook, no forward of its own."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) is kind and "forward" not in module.__dict__ and not hooks


def _lengths(nested: Tensor) -> list[int]:
    return [sequence.size(0) for sequence in nested.unbind()]


def _offsets(lengths: list[int], like: Tensor) -> Tensor:
    return functional.pad(torch.tensor(lengths, dtype=torch.int64, device=like.device).cumsum(0), (1, 0))


def _nested_like(rows: Tensor, nested: Any) -> Tensor:
    """Packed rows as the sequences of a nested tensor; of a jagged one also such that the two can be added."""
    if nested.layout == torch.jagged and nested.lengths() is None:
        return torch.nested.nested_tensor_from_jagged(rows, nested.offsets())
    return torch.nested.as_nested_tensor(list(rows.split(_lengths(nested))), layout=nested.layout)
