"""`from_torch`: modules of torch.nn as their Linformers, with their weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..encoders import LinformerEncoder, LinformerEncoderLayer, sizes_by_layer
from ..modules import LinformerAttention, make_projection
from ..projections import LinformerProjection

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def from_torch(
    module: nn.Module,
    *,
    seq_len: int | None = None,
    proj_dim: int | Sequence[int] | None = None,
    sharing: str | None = None,
    projection: LinformerProjection | None = None,
    init: str | None = None,
) -> Any:
    """The Linformer of a module of torch.nn, with a copy of its weights, and its device, dtype and mode.

    E and F have no counterpart there. With `init="identity"` and proj_dim = seq_len the result computes what the module
    does. With proj_dim < seq_len it is another model, to be trained further; `init="mean"` is the start for that.

    Args:
        module: a torch.nn.MultiheadAttention, TransformerEncoderLayer or TransformerEncoder.
        seq_len, proj_dim, sharing, projection, init: as in `LinformerAttention` and `LinformerEncoder`.

    Returns:
        A LinformerAttention, LinformerEncoderLayer or LinformerEncoder. An encoder's final norm comes along.

    Raises:
        TypeError: module is something else, or of a subclass with a forward or a block of its own.
        ValueError: module, or one that is replaced within it, has hooks or parametrizations, which would be lost.
        NotImplementedError: add_bias_kv, add_zero_attn.
        ValueError: the other arguments do not fit.
    """
    for kind in (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder):
        for name in ("forward", "_sa_block", "_ff_block"):
            if isinstance(module, kind) and getattr(type(module), name, None) is not getattr(kind, name, None):
                raise TypeError(
                    f"module is a {type(module).__name__}, with a {name} of its own; wanted: a "
                    f"torch.nn.{kind.__name__}, or from_torch for the modules in it"
                )
    hooked = [name for name in HOOKS if getattr(module, name, None)]
    if hooked or is_parametrized(module):
        raise ValueError(
            f"module has {hooked[0].strip('_').replace('_', ' ') if hooked else 'parametrizations'} (of its own, or "
            "through torch.nn.utils), which its Linformer would not have; wanted: a module without, and them on what "
            "from_torch returns"
        )
    options: dict[str, Any] = {"seq_len": seq_len, "sharing": sharing, "projection": projection, "init": init}
    if isinstance(module, nn.MultiheadAttention):
        return _attention_from_torch(module, options | {"proj_dim": proj_dim})
    if isinstance(module, nn.TransformerEncoderLayer):
        return _layer_from_torch(module, options | {"proj_dim": proj_dim})
    if isinstance(module, nn.TransformerEncoder):
        return _encoder_from_torch(module, proj_dim, options)
    raise TypeError(
        f"module is a {type(module).__name__}; wanted: a MultiheadAttention, TransformerEncoderLayer or "
        "TransformerEncoder of torch.nn itself, as in model.encoder = from_torch(model.encoder, ...)"
    )


def _attention_from_torch(module: nn.MultiheadAttention, options: dict[str, Any]) -> LinformerAttention:
    bias = module.in_proj_bias is not None
    attention = LinformerAttention(
        module.embed_dim,
        module.num_heads,
        module.dropout,
        bias,
        module.bias_k is not None,
        module.add_zero_attn,
        module.kdim,
        module.vdim,
        module.batch_first,
        module.out_proj.weight.device,
        module.out_proj.weight.dtype,
        **options,
    )
    if module._qkv_same_embed_dim:
        source = module.in_proj_weight
        weights = list(source.detach().chunk(3))
        trained = [source.requires_grad] * 3
    else:
        sources = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
        weights, trained = list(sources), [source.requires_grad for source in sources]
    linears = attention.q_proj, attention.k_proj, attention.v_proj
    with torch.no_grad():
        for index, linear in enumerate(linears):
            linear.weight.copy_(weights[index]).requires_grad_(trained[index])
            if bias:
                linear.bias.copy_(module.in_proj_bias.chunk(3)[index])
                linear.bias.requires_grad_(module.in_proj_bias.requires_grad)
    attention.out_proj = copy.deepcopy(module.out_proj)
    return attention.train(module.training)


def _layer_from_torch(module: nn.TransformerEncoderLayer, options: dict[str, Any]) -> LinformerEncoderLayer:
    attention = from_torch(module.self_attn, **options)
    layer = LinformerEncoderLayer(attention.embed_dim, attention.num_heads, 1, sharing="layerwise", device="meta")
    for name, child in module.named_children():
        setattr(layer, name, attention if name == "self_attn" else copy.deepcopy(child))
    for name in ("activation", "activation_relu_or_gelu", "norm_first"):
        setattr(layer, name, copy.deepcopy(getattr(module, name)))
    return layer.train(module.training)


def _encoder_from_torch(
    module: nn.TransformerEncoder, proj_dim: int | Sequence[int] | None, options: dict[str, Any]
) -> LinformerEncoder:
    for index, of_one in enumerate(module.layers):
        if not isinstance(of_one, nn.TransformerEncoderLayer):
            raise TypeError(
                f"layer {index} is a {type(of_one).__name__}; wanted: torch.nn.TransformerEncoderLayer in all places, "
                "without what is wrapped around it"
            )
    if not len(module.layers):
        raise ValueError("the encoder has no layers; wanted: at least one")
    first: Any = module.layers[0]
    projection, shared = options["projection"], options["sharing"] == "layerwise"
    sizes = sizes_by_layer(proj_dim, len(module.layers), options["sharing"] if projection is None else "layerwise")
    weight = first.self_attn.out_proj.weight
    encoder = LinformerEncoder(
        first.self_attn.embed_dim,
        first.self_attn.num_heads,
        1,
        num_layers=len(module.layers),
        norm=copy.deepcopy(module.norm),
        device="meta",
        proj_dim=proj_dim,
        **options,
    )
    if shared and projection is None:
        heads = options["seq_len"], sizes[0], "key_value", 1, options["init"]
        encoder.projection = make_projection(*heads, device=weight.device, dtype=weight.dtype)
    if encoder.projection is not None:  # which has the sizes
        options, sizes = {"sharing": "layerwise"}, [None] * len(sizes)
    made: dict[Any, Any] = {}  # a layer that stands there several times stays one
    for index, of_one in enumerate(zip(module.layers, sizes, strict=True)):
        if of_one not in made:
            made[of_one] = from_torch(of_one[0], **options, proj_dim=of_one[1])
        encoder.layers[index] = made[of_one]
    return encoder.train(module.training)
