"""`from_torch`: modules of torch.nn as their Linformers, with their weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

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
    """The Linformer of a module of torch.nn, with a copy of its weights, and its device, dtype and mode. What stands in
    it several times, a layer, a part of one or a weight, stands several times in the result.

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
    options: dict[str, Any] = {"seq_len": seq_len, "sharing": sharing, "projection": projection, "init": init}
    return _from_torch(module, proj_dim, options, {})


def _from_torch(module: nn.Module, proj_dim: Any, options: dict[str, Any], memo: dict[Any, Any]) -> Any:
    """`memo` is copy.deepcopy's, one for all that is converted; what is made anew is in it, too."""
    for kind in (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder):
        for name in ("forward", "_sa_block", "_ff_block"):
            if isinstance(module, kind) and getattr(type(module), name, None) is not getattr(kind, name, None):
                raise TypeError(
                    f"module is a {type(module).__name__}, with a {name} of its own; wanted: a "
                    f"torch.nn.{kind.__name__}, or from_torch for the modules in it"
                )
    refuse_hooks("module", module, "from_torch")
    made = id(module), str(proj_dim)
    if made not in memo and isinstance(module, nn.MultiheadAttention):
        memo[made] = _attention_from_torch(module, options | {"proj_dim": proj_dim}, memo)
    elif made not in memo and isinstance(module, nn.TransformerEncoderLayer):
        memo[made] = _layer_from_torch(module, proj_dim, options, memo)
    elif isinstance(module, nn.TransformerEncoder):
        memo[made] = _encoder_from_torch(module, proj_dim, options, memo)
    if made in memo:
        return memo[made]
    raise TypeError(
        f"module is a {type(module).__name__}; wanted: a MultiheadAttention, TransformerEncoderLayer or "
        "TransformerEncoder of torch.nn itself, as in model.encoder = from_torch(model.encoder, ...)"
    )


def refuse_hooks(name: str, module: nn.Module, function: str) -> None:
    """Of a module in whose place another comes, which would not have them."""
    hooked = [hooks for hooks in HOOKS if getattr(module, hooks, None)]
    if hooked or is_parametrized(module):
        raise ValueError(
            f"{name} has {hooked[0].strip('_').replace('_', ' ') if hooked else 'parametrizations'} (of its own, or "
            "through torch.nn.utils), which its Linformer would not have; wanted: a module without, and them on what "
            f"{function} returns"
        )


def _attention_from_torch(
    module: nn.MultiheadAttention, options: dict[str, Any], memo: dict[Any, Any]
) -> LinformerAttention:
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
    weights: list[Any] = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    if module._qkv_same_embed_dim:
        weights = [module.in_proj_weight] * 3
    for index, linear in enumerate((attention.q_proj, attention.k_proj, attention.v_proj)):
        for name, source in (("weight", weights[index]), *([("bias", module.in_proj_bias)] if bias else [])):
            joint = name == "bias" or module._qkv_same_embed_dim
            part = source.detach().chunk(3)[index] if joint else source.detach()
            ours = memo.setdefault((id(source), part.storage_offset()), getattr(linear, name))
            ours.data.copy_(part)
            setattr(linear, name, ours.requires_grad_(source.requires_grad))
    attention.out_proj = copy.deepcopy(module.out_proj, memo)
    return attention.train(module.training)


def _layer_from_torch(
    module: nn.TransformerEncoderLayer, proj_dim: Any, options: dict[str, Any], memo: dict[Any, Any]
) -> LinformerEncoderLayer:
    attention = _from_torch(module.self_attn, proj_dim, options, memo)
    layer = LinformerEncoderLayer(attention.embed_dim, attention.num_heads, 1, sharing="layerwise", device="meta")
    for name, child in module._modules.items():  # named_children leaves out what stands there twice
        setattr(layer, name, attention if name == "self_attn" else copy.deepcopy(child, memo))
    for name in ("activation", "activation_relu_or_gelu", "norm_first"):
        setattr(layer, name, copy.deepcopy(getattr(module, name), memo))
    return layer.train(module.training)


def _encoder_from_torch(
    module: nn.TransformerEncoder, proj_dim: Any, options: dict[str, Any], memo: dict[Any, Any]
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
        norm=copy.deepcopy(module.norm, memo),
        device="meta",
        proj_dim=proj_dim,
        **options,
    )
    if shared and projection is None:
        heads = options["seq_len"], sizes[0], "key_value", 1, options["init"]
        encoder.projection = make_projection(*heads, device=weight.device, dtype=weight.dtype)
    if encoder.projection is not None:  # which has the sizes
        options, sizes = {"sharing": "layerwise"}, [None] * len(sizes)
    for index, (layer, size) in enumerate(zip(module.layers, sizes, strict=True)):
        encoder.layers[index] = _from_torch(layer, size, options, memo)
    return encoder.train(module.training)
