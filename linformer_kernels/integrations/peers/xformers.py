"""Linformer attention of xformers, whose `components` its versions up to 0.0.28 have.

It takes no mask. Shorter sequences it pads with zeros, behind the linear layers of keys and values, which is what the
first columns of E do without the zeros.
"""

from __future__ import annotations

import torch
from torch import nn

from ...modules import LinformerAttention
from ...projections import LinformerProjection
from ._common import LinearWithDropout, checked, made_like, make_attention, take


@torch.enable_grad()  # to tell which weights are trained
def projection_from_xformers(peer: nn.Module) -> LinformerProjection:
    """E and F of a `xformers.components.attention.LinformerAttention`: all the weights it has.

    Returns:
        `new` with which `new(key, value, query=query)` of tensors (B, H, N, D) is peer's output of the same as
        (B * H, N, D).

    Raises:
        TypeError: peer is something else.
    """
    wanted = "a LinformerAttention of xformers; for a MultiHeadDispatch: attention_from_xformers"
    theirs = checked(peer, wanted, "E", "F", "seq_len", "attn_drop")
    projection = LinformerProjection(theirs.seq_len, theirs.E.out_features, **made_like(theirs.E.weight))
    take(projection, {"proj_key": theirs.E.weight, "proj_value": theirs.F.weight})
    return projection.train(peer.training)


@torch.enable_grad()  # to tell which weights are trained
def attention_from_xformers(peer: nn.Module) -> LinformerAttention:
    """`xformers.components.MultiHeadDispatch` with Linformer attention as LinformerAttention.

    Args:
        peer: of any bias. With use_separate_proj_weight=False the three linear layers of the result share one weight.

    Returns:
        A module whose `new(query, key, value)[0]` is `peer(query, key, value)`. In training its out_proj drops elements
        of its input and of its output, as peer does.

    Raises:
        TypeError: peer is something else, or has another attention than Linformer's.
        NotImplementedError: rotary embeddings, keys of another width than values, an out_proj that is no nn.Linear.
    """
    wanted = "a MultiHeadDispatch of xformers; for its attention alone: projection_from_xformers"
    theirs = checked(peer, wanted, "attention", "in_proj_container", "proj", "resid_drop")
    projection = projection_from_xformers(theirs.attention)
    if theirs.rotary_embeddings is not None:
        raise NotImplementedError(
            "peer has use_rotary_embeddings=True, which turns keys between their linear layer and E; wanted: False"
        )
    if theirs.dim_key_head != theirs.dim_value_head:
        raise NotImplementedError(
            f"heads of peer are {theirs.dim_key_head} wide for keys and {theirs.dim_value_head} for values; wanted: "
            "dim_key = dim_value"
        )
    if type(theirs.proj) is not nn.Linear:
        raise NotImplementedError(f"out_proj of peer is a {type(theirs.proj).__name__}; wanted: a torch.nn.Linear")
    made = theirs.in_proj_container
    linears = made.q_proj, made.k_proj, made.v_proj
    weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
    dropout = theirs.attention.attn_drop.p
    q, k, v = weights
    attention = make_attention(theirs.num_heads, projection, q, k, v, theirs.proj, dropout, biases)
    for ours, weight in ((attention.k_proj, k), (attention.v_proj, v)):
        if weight is q:
            ours.weight = attention.q_proj.weight
    if dropout > 0 or theirs.resid_drop.p > 0:
        attention.out_proj = LinearWithDropout(attention.out_proj, theirs.resid_drop.p, before=dropout)
    return attention.train(peer.training)
