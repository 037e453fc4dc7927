"""Which models can have Linformer attention: their layers that attend, and a sentence for those that cannot."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def attention_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The modules of the model that call the attention interface, in order; refuses what Linformer cannot be."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model is a {type(model).__name__}; wanted: a PreTrainedModel of transformers")
    name = type(model).__name__
    if _has_decoder(model):
        raise NotImplementedError(
            f"model is a {name}, which has a decoder; wanted: an encoder, or model.get_encoder(). A decoder must not "
            "see what comes after a position, but every row of K' = E key mixes the whole sequence, so no mask on the "
            "scores can hide it"
        )
    calls = [module for module in model.modules() if _calls_the_interface(module)]
    if not calls:
        raise NotImplementedError(
            f"model is a {name}, whose attention does not go through transformers' attention interface; wanted: an "
            "encoder that takes attn_implementation=, like BERT, RoBERTa, XLM-R, DistilBERT or ViT"
        )
    for module in calls:
        kind = type(module).__name__
        if getattr(module, "is_causal", False) or "Decoder" in kind:
            raise NotImplementedError(
                f"model is a {name}, whose {kind} is causal; wanted: an encoder. Every row of K' = E key mixes the "
                "whole sequence, so no mask on the scores can hide what comes after a position"
            )
        if getattr(module, "sliding_window", None) or getattr(module, "is_cross_attention", False) or "Cross" in kind:
            raise NotImplementedError(
                f"model is a {name}, whose {kind} has windows or looks at another sequence; wanted: self-attention in "
                "which every position sees every other"
            )
        config: Any = getattr(module, "config", None)
        if not all(isinstance(getattr(config, name, None), int) for name in ("num_attention_heads", "hidden_size")):
            raise NotImplementedError(
                f"model is a {name}, whose {kind} has heads or a width of its own (Swin, SegFormer); wanted: layers "
                "alike, over the whole sequence"
            )
    return calls


def _has_decoder(model: PreTrainedModel) -> bool:
    """Of an encoder-decoder model the encoder alone (`model.get_encoder()`) has none, though its config says so."""
    if not getattr(model.config, "is_encoder_decoder", False):
        return bool(getattr(model.config, "is_decoder", False))
    return any("Decoder" in type(module).__name__ or getattr(module, "is_decoder", False) for module in model.modules())


def _calls_the_interface(module: nn.Module) -> bool:
    return "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(_forward(module), "__code__", None), "co_names", ())


def _forward(module: nn.Module) -> Any:
    return inspect.unwrap(type(module).forward)


def device_of(model: nn.Module) -> Any:
    """Where it computes. accelerate's offloading leaves weights on "meta" and says where in its hooks."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    wanted = (getattr(hook, "execution_device", None) for hook in hooks)
    real = (weight.device for weight in model.parameters() if not weight.is_meta)
    return next((device for device in (*real, *wanted) if device is not None), "meta")


def shape_of_heads(layer: nn.Module) -> tuple[int, int]:
    """Key heads and their width."""
    config: Any = layer.config
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return getattr(config, "num_key_value_heads", None) or heads, head_dim
