"""`LinformerEncoderLayer` and `LinformerEncoder` in the place of torch.nn's, whose contract they keep."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ._backends import on_this_backend
from ._masks import refuse_mask, takes_part
from ._validation import integer, refuse_causal
from .modules import LinformerAttention, check_projection, make_projection
from .projections import LinformerProjection

_Init = TypeVar("_Init", bound=Callable[..., None])


def _refuse_a_layer(init: _Init) -> _Init:
    """Of `LinformerEncoder`: words for what torch.nn.TransformerEncoder is made of, and not of an argument missing."""

    @wraps(init)
    def checked(self: Any, *arguments: Any, **options: Any) -> None:
        if isinstance(options.get("encoder_layer", arguments[0] if arguments else None), nn.Module):
            raise TypeError(
                "LinformerEncoder came with an encoder layer; wanted: the layer's arguments, as in "
                "LinformerEncoder(d_model, nhead, num_layers=2, seq_len=512, proj_dim=128). To stack layers: "
                "torch.nn.TransformerEncoder; to convert an encoder of torch.nn: from_torch"
            )
        init(self, *arguments, **options)

    return cast(_Init, checked)


class LinformerEncoderLayer(nn.TransformerEncoderLayer):
    """Linformer attention and a feed-forward network in the place of torch.nn.TransformerEncoderLayer.

    `torch.nn.TransformerEncoder` takes it, too, but copies it, and a projection with it: to share one between layers
    take `LinformerEncoder`.

    Args:
        d_model: width of the model.
        nhead: number of heads.
        dim_feedforward: width inside the feed-forward network.
        dropout: after attention, in and after the feed-forward network, and on the attention weights.
        activation: "relu", "gelu" or a callable.
        layer_norm_eps: of both layer norms.
        batch_first: (B, N, d_model) if true, else (N, B, d_model).
        norm_first: layer norms before attention and feed-forward network instead of after.
        bias: whether linear layers and layer norms have one.
        seq_len, proj_dim, sharing, projection, init, num_kv_heads, head_dim: see `LinformerAttention`.

    Raises:
        ValueError, TypeError: as `LinformerAttention`; also for an unknown activation.
    """

    self_attn: LinformerAttention  # type: ignore[assignment]

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = functional.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
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
        if activation not in ("relu", "gelu") and not callable(activation):
            raise ValueError(f'activation is {activation!r}; wanted: "relu", "gelu" or a callable')
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        attention = LinformerAttention(
            d_model,
            nhead,
            dropout,
            bias,
            batch_first=batch_first,
            **factory,
            seq_len=seq_len,
            proj_dim=proj_dim,
            sharing=sharing,
            projection=projection,
            init=init,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
        )
        # With one head, as its attention goes at once, and of those of its own d_model may be no multiple.
        sizes = d_model, 1, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias
        super().__init__(*sizes, **factory)
        self.self_attn = attention

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        projection: nn.Module | None = None,
    ) -> Tensor:
        """src through the layer.

        Args:
            src: (N, B, d_model), (B, N, d_model) with batch_first, (N, d_model) without a batch, or a nested tensor.
            src_mask: refused.
            src_key_padding_mask: (B, N) or (N,). True = IGNORED, as in torch.nn; or floating, 0 or -inf.
            is_causal: refused if true.
            projection: used in place of the layer's own.

        Returns:
            As src.

        Raises:
            ValueError, TypeError: as `LinformerAttention.forward`.
        """
        refuse_mask("src_mask", src_mask)
        own: dict[str, Any] = {} if projection is None else {"projection": projection}
        given: Any = src
        if getattr(given, "is_nested", False) and given.layout == torch.jagged and given.lengths() is not None:
            src = given.contiguous()  # without the holes of torch.nested.narrow, which no sum with it would have

        if self.norm_first:
            src = src + self._sa_block(self.norm1(src), None, src_key_padding_mask, is_causal, **own)
            return src + self._ff_block(self.norm2(src))
        src = self.norm1(src + self._sa_block(src, None, src_key_padding_mask, is_causal, **own))
        return self.norm2(src + self._ff_block(src))

    def _sa_block(  # called by this name, as torch.nn's: for subclasses to replace
        self,
        x: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool = False,
        projection: nn.Module | None = None,
    ) -> Tensor:
        options: dict[str, Any] = {"key_padding_mask": key_padding_mask, "is_causal": is_causal}
        out: Tensor = self.dropout1(self.self_attn(x, x, x, projection=projection, **options)[0])
        return out


class LinformerEncoder(nn.Module):
    """A stack of `LinformerEncoderLayer` in the place of torch.nn.TransformerEncoder.

    Args:
        d_model, nhead, ... dtype: of each layer, see `LinformerEncoderLayer`.
        num_layers: their number.
        norm: a module for the output of the last layer, as nn.LayerNorm(d_model); None: none.
        gradient_checkpointing: whether training computes each layer anew in the backward pass, to save memory.
        proj_dim: K, one number or one a layer.
        sharing: as in `LinformerAttention`, and "layerwise": one matrix, E = F, for all heads and layers. The encoder
            owns it, as `projection`, and gives it to each layer's call.
        projection: a LinformerProjection, of any kind, for all layers.
        seq_len, init, num_kv_heads, head_dim: see `LinformerAttention`.

    Raises:
        ValueError, TypeError: as `LinformerEncoderLayer`; also for a proj_dim a layer that are too few or many, or for
            "layerwise".
    """

    @_refuse_a_layer
    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = functional.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_layers: int,
        norm: nn.Module | None = None,
        gradient_checkpointing: bool = False,
        seq_len: int | None = None,
        proj_dim: int | Sequence[int] | None = None,
        sharing: str | None = None,
        projection: LinformerProjection | None = None,
        init: str | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
    ) -> None:
        super().__init__()
        if integer("num_layers", num_layers) < 1:
            raise ValueError(f"num_layers is {num_layers}; wanted: at least 1")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        sizes = sizes_by_layer(proj_dim, num_layers, sharing if projection is None else "layerwise")
        given, size = projection, sizes[0]
        if projection is None and sharing == "layerwise":
            projection = make_projection(seq_len, size, "key_value", nhead, init, **factory)
        own: dict[str, Any] = {"seq_len": seq_len, "sharing": sharing, "init": init}
        if projection is not None:  # that of the encoder, which has the sizes
            own, sizes = {"sharing": "layerwise"}, [None] * num_layers
        shape = layer_norm_eps, batch_first, norm_first, bias, device, dtype
        self.layers = nn.ModuleList(
            LinformerEncoderLayer(
                d_model,
                nhead,
                dim_feedforward,
                dropout,
                copy.deepcopy(activation),  # which may have weights, as nn.PReLU
                *shape,
                proj_dim=size,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                **own,
            )
            for size in sizes
        )
        if given is not None:
            first: Any = self.layers[0]
            heads = first.self_attn.num_kv_heads, first.self_attn.head_dim
            check_projection(given, seq_len, size, sharing, init, *heads)
        self.num_layers, self.norm, self.projection = num_layers, norm, projection
        self.gradient_checkpointing = gradient_checkpointing

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """src through all layers.

        Args:
            src: (N, B, d_model), (B, N, d_model) with batch_first, (N, d_model) without a batch, or a nested tensor.
            mask: refused.
            src_key_padding_mask: (B, N) or (N,). True = IGNORED, as in torch.nn; or floating, 0 or -inf.
            is_causal: refused if true.

        Returns:
            As src.

        Raises:
            ValueError, TypeError: as `LinformerAttention.forward`.
        """
        refuse_mask("mask", mask)
        refuse_causal(bool(is_causal))
        taken = takes_part("src_key_padding_mask", src_key_padding_mask)  # once, for all layers
        options: dict[str, Any] = {
            "src_key_padding_mask": None if taken is None else ~taken,
            "projection": self.projection,
        }
        for layer in self.layers:
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                src = checkpoint(on_this_backend(layer), src, use_reentrant=False, **options)
            else:
                src = layer(src, **options)
        return src if self.norm is None else self.norm(src)


def sizes_by_layer(proj_dim: int | Sequence[int] | None, layers: int, sharing: str | None) -> list[Any]:
    """K of each layer, of one number or one a layer; None where a projection brings it."""
    if proj_dim is None:
        return [None] * layers
    wanted = "an integer, or a sequence of one a layer"
    several = isinstance(proj_dim, (Sequence, Tensor)) or hasattr(proj_dim, "__len__")
    each: Any = proj_dim if several else [proj_dim] * layers
    sizes = [integer("proj_dim", size, wanted) for size in each]
    if len(sizes) != layers:
        raise ValueError(f"proj_dim has {len(sizes)} numbers but the model has {layers} layers; wanted: one a layer")
    if sharing == "layerwise" and len(set(sizes)) > 1:
        raise ValueError(
            f'proj_dim is {sizes} but sharing is "layerwise", one matrix for all layers; wanted: one number, or '
            'sharing="key_value"'
        )
    return sizes
