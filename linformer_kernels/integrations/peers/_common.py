"""What the importers of all packages share: modules of ours made of a peer's parts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...encoders import LinformerEncoderLayer
from ...modules import LinformerAttention
from ...projections import LinformerProjection
from ..torch_nn import refuse_hooks


class LinearWithDropout(nn.Linear):
    """A linear layer with dropout after it and, if asked for, before it. Its state_dict is that of the linear layer."""

    def __init__(self, linear: nn.Linear, p: float, before: float = 0.0) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.before, self.dropout = nn.Dropout(before), nn.Dropout(p)

    def forward(self, rows: Tensor) -> Tensor:
        return self.dropout(super().forward(self.before(rows)))


def make_attention(
    num_heads: int,
    projection: LinformerProjection,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: nn.Linear,
    dropout: float,
    biases: Sequence[Tensor | None] = (None, None, None),
) -> LinformerAttention:
    """Of weights q (H * D, width), k and v (H_kv * D, width). A bias that the peer lacks is zero and frozen, and so the
    state_dict is the usual one."""
    head_dim = q.size(0) // num_heads
    attention = LinformerAttention(
        q.size(1),
        num_heads,
        projection=projection,
        dropout=dropout,
        batch_first=True,
        num_kv_heads=k.size(0) // head_dim,
        head_dim=head_dim,
        **made_like(q),
    )
    linears = attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj
    for linear, weight, bias in zip(linears, (q, k, v, out.weight), (*biases, out.bias), strict=True):
        take(linear, {"weight": weight, "bias": torch.zeros_like(linear.bias) if bias is None else bias})
    return attention


def take(ours: nn.Module, weights: dict[str, Tensor]) -> None:
    """The peer's weights, and which of them are trained."""
    ours.load_state_dict(weights)
    for name, parameter in ours.named_parameters():
        parameter.requires_grad_(weights[name].requires_grad)


def make_layer(
    attention: LinformerAttention,
    linear1: nn.Linear,
    linear2: nn.Linear,
    norm1: nn.LayerNorm,
    norm2: nn.LayerNorm,
    *,
    activation: Any,
    norm_first: bool,
) -> LinformerEncoderLayer:
    """Without dropout but that of the attention weights."""
    layer = LinformerEncoderLayer(
        attention.embed_dim,
        1,
        linear1.out_features,
        0.0,
        copy.deepcopy(activation),
        norm1.eps,
        batch_first=True,
        norm_first=norm_first,
        sharing="layerwise",
        **made_like(linear1.weight),
    )
    layer.self_attn = attention
    for ours, theirs in (
        (layer.linear1, linear1),
        (layer.linear2, linear2),
        (layer.norm1, norm1),
        (layer.norm2, norm2),
    ):
        take(ours, dict(theirs.named_parameters()))
    return layer


def made_like(like: Tensor) -> dict[str, Any]:
    return {"device": like.device, "dtype": like.dtype}


def checked(peer: nn.Module, wanted: str, *names: str) -> Any:
    missing = [name for name in names if not hasattr(peer, name)]
    if missing:
        raise TypeError(f"peer is a {type(peer).__name__}, without {', '.join(missing)}; wanted: {wanted}")
    for name, module in peer.named_modules():
        refuse_hooks(f"peer.{name}" if name else "peer", module, "the conversion")
    return peer
