"""Modules of the package `linformer` (0.2.3) and of `vision-xformer` (0.2.0), whose attention is a copy of it."""

from __future__ import annotations

import torch
from torch import nn

from ...modules import LinformerAttention
from ...projections import LinformerProjection
from ._common import checked, made_like, make_attention, make_layer, take


@torch.enable_grad()  # to tell which weights are trained
def attention_from_linformer(peer: nn.Module) -> LinformerAttention:
    """`linformer.LinformerSelfAttention`, or that of vision_xformer, as LinformerAttention.

    Args:
        peer: with any of its options. With share_kv, k_proj and v_proj of the result are one module.

    Returns:
        A module whose `new(x)[0]` is `peer(x)`, and `new(x, context)[0]` is `peer(x, context=context)`.

    Raises:
        TypeError: peer is something else.
    """
    wanted = "a LinformerSelfAttention of linformer; for a Linformer: encoder_from_linformer"
    theirs = checked(peer, wanted, "to_q", "to_k", "to_out", "proj_k", "share_kv", "heads")
    seq_len, proj_dim = theirs.proj_k.shape
    projection = LinformerProjection(seq_len, proj_dim, share_kv=theirs.share_kv, **made_like(theirs.proj_k))
    matrices = {"proj_key": theirs.proj_k.T} | ({} if theirs.share_kv else {"proj_value": theirs.proj_v.T})
    take(projection, matrices)
    to_v = theirs.to_k if theirs.share_kv else theirs.to_v
    weights = theirs.to_q.weight, theirs.to_k.weight, to_v.weight
    attention = make_attention(theirs.heads, projection, *weights, theirs.to_out, theirs.dropout.p)
    if theirs.share_kv:
        attention.v_proj = attention.k_proj
    return attention.train(peer.training)


@torch.enable_grad()  # to tell which weights are trained
def encoder_from_linformer(peer: nn.Module) -> nn.Sequential:
    """`linformer.Linformer` as a sequence of LinformerEncoderLayer.

    Args:
        peer: with any of its options but reversible.

    Raises:
        TypeError: peer is something else.
        NotImplementedError: reversible=True.
    """
    theirs = checked(peer, "a Linformer of linformer; of a LinformerLM: its .linformer", "net")
    if not hasattr(theirs.net, "layers"):
        raise NotImplementedError(
            "peer has reversible=True, whose layers compute with two streams; wanted: reversible=False, or "
            "attention_from_linformer for each block.f.net.fn of peer.net.blocks"
        )
    layers = []
    for attend, feed_forward in theirs.net.layers:
        ff = feed_forward.fn
        if ff.glu:
            raise NotImplementedError("peer has a feed-forward network with glu=True; wanted: glu=False")
        parts = ff.w1, ff.w2, attend.norm, feed_forward.norm
        layer = make_layer(attention_from_linformer(attend.fn), *parts, activation=ff.act, norm_first=True)
        layer.dropout.p = ff.dropout.p
        layers.append(layer)
    return nn.Sequential(*layers).train(peer.training)


@torch.enable_grad()  # to tell which weights are trained
def encoder_from_vision_xformer(peer: nn.Module) -> nn.Sequential:
    """`vision_xformer.vision_linformer.Transformer` as a sequence of LinformerEncoderLayer.

    Of a `vision_xformer.ViL` it is `.transformer`, and the result takes its place:
    `model.transformer = encoder_from_vision_xformer(model.transformer)`.

    Args:
        peer: with any of its options.

    Raises:
        TypeError: peer is something else.
    """
    theirs = checked(peer, "a Transformer of vision_xformer; of a ViL: its .transformer", "layers")
    layers = []
    for attend, feed_forward in theirs.layers:
        linear1, activation, dropout, linear2, dropout2 = feed_forward.fn.net
        parts = linear1, linear2, attend.norm, feed_forward.norm
        layer = make_layer(attention_from_linformer(attend.fn), *parts, activation=activation, norm_first=True)
        layer.dropout.p, layer.dropout2.p = dropout.p, dropout2.p
        layers.append(layer)
    return nn.Sequential(*layers).train(peer.training)
