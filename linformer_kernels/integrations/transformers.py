"""Encoders of Hugging Face transformers with Linformer attention in place of their own: `linformerize` and `load`.

transformers (5.0 and later) sends every model's attention through a table of functions. `linformerize` hangs E and F
into the model, as `<base model>.linformer`, and chooses the function registered here, which hands a layer's query, key
and value, its padding mask, dropout and scale to `linformer_attention`. Weights of the model itself stay as they are.
What it takes to make the same model again is in `model.config.linformer`; `load` reads it back.
"""

from __future__ import annotations

import copy
import inspect
import os
import re
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from .._validation import integer, refuse_causal
from ..functional import linformer_attention, projected_attention
from ..modules import SHARINGS, LinformerProjection, compress_first

NAME = "linformer"
_MOMENTS = "linformer_moments"
INITS = ("gaussian", "mean", "identity", "svd")
SETTINGS = ("seq_len", "proj_dim", "sharing", "projection", "rows_may_be_empty", "defer")  # of config.linformer
KEY_LAYERS, VALUE_LAYERS = ("key", "k_lin", "k_proj"), ("value", "v_lin", "v_proj")
# In the source of a layer's forward: keys or values are more than seen in another shape, by rotary positions, a norm, a
# copy.
_CHANGED = re.compile(r"\b[kv]\w* = .*(rotary|rope|norm|contiguous|self\._shape)")
# An empty row of K' gets this for a score before scaling; float16 holds it, and exp of it is 0 for any usual scale.
_EMPTY = -3e4
# Options of from_pretrained that say where a file is: for the config and for the weights.
_WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def linformerize(
    model: PreTrainedModel,
    seq_len: int = 512,
    proj_dim: int | Sequence[int] = 128,
    sharing: str = "layerwise",
    *,
    init: str = "gaussian",
    projection: str = "learned",
    calibration: Iterable[dict[str, Tensor]] | None = None,
    defer: bool = True,
) -> PreTrainedModel:
    """Replace the attention of an encoder of transformers by Linformer attention, in place.

    Takes every encoder whose attention goes through transformers' attention interface: BERT, RoBERTa, XLM-R,
    DistilBERT, ViT and their like, with any head on top, and `model.get_encoder()` of an encoder-decoder model, as BART
    or Whisper. Its weights are kept; E and F are added as
    `model.base_model.linformer`, a list of `LinformerProjection`, one of them for each layer or, shared layerwise, one
    in all: a single parameter, in `parameters()`, in an optimizer and in a checkpoint once. Pass the whole model, head
    included: of `model.bert` alone, `model.save_pretrained` would not write that it was converted.

    Args:
        model: on any device, in any dtype; E and F are made like its weights.
        seq_len: N_max, the longest sequence in tokens (for ViT: patches and the class token). Shorter ones use the
            first columns of E. Longer ones raise ValueError when the model is called.
        proj_dim: K, for all layers or one number a layer.
        sharing: section 4 of the paper. "layerwise": one matrix for all heads, keys, values and layers. "key_value":
            one matrix a layer, E = F. "headwise": one E and one F a layer. "none": an E and an F a head.
        init: how learned and fixed matrices start.
            "gaussian": N(0, 1 / seq_len): for training, or further training, of E with the model.
            "mean": means over K windows of neighbouring positions.
            "identity": row k picks the first position of window k; with proj_dim = seq_len attention is exact.
            "svd": the rows of "identity", projected onto the K strongest singular directions (over positions) of the
            model's keys and values on the calibration data: what a position shares with its neighbours goes with it.
            Rows of positions that no calibration data reaches stay as those of "identity".
        projection: kind of the projection, see LinformerProjection: "learned", "fixed", "mean", "max" or "conv".
        calibration: for init="svd": batches of the model's inputs, as dict of tensors; the model sees each once.
        defer: whether keys and values are compressed before their linear layers, which then work on K rows instead of
            N: the same numbers for less, done where E is the same for all heads, the layers are plain nn.Linear and
            nothing (rotary positions, a norm) changes keys after them. False for adapters (LoRA) on those layers: with
            True they raise ValueError.

    Returns:
        The model itself.

    Raises:
        TypeError: model is no PreTrainedModel, a size no integer.
        NotImplementedError: decoders and causal models (every row of K' mixes the whole sequence), cross-attention,
            windowed attention, models that do not use the attention interface. What a model does not say of itself, as
            a bias for pairs of positions, raises when the model is called.
        ValueError: arguments that do not fit each other or the model.
    """
    layers = _attention_layers(model)
    settings = _check(len(layers), seq_len, proj_dim, sharing, init, projection, calibration) | {"defer": defer}
    if getattr(model.config, "output_attentions", False):
        raise NotImplementedError(
            "model.config.output_attentions is True, but Linformer has no attention over positions to return; wanted: "
            "False"
        )
    seq_len = settings["seq_len"]
    _own_configs(model)
    moments = None if calibration is None else _position_moments(model, layers, seq_len, calibration)
    made = _install(model, layers, settings)
    if init != "gaussian":
        for index, matrices in enumerate(made):
            _start(matrices, init, None if moments is None else _of_projection(moments, index, len(made)))
    return model


def load(model_class: Any, path: str, **options: Any) -> Any:
    """The model that `model.save_pretrained(path)` wrote after `linformerize`: `model_class.from_pretrained` with E, F.

    Args:
        model_class: the class to make, e.g. RobertaForMaskedLM, or an Auto class. It may differ from the one saved
            (a masked language model becomes a classifier): what is new in it starts anew, as in from_pretrained.
        path: a folder, or anything that from_pretrained takes.
        options: for from_pretrained.

    Raises:
        ValueError: the checkpoint has no settings of `linformerize` or not all of them, or lacks weights of E or F.
    """
    with_info = options.pop("output_loading_info", False)
    config, options = _config(path, options)
    settings: Any = getattr(config, NAME, None)
    if not isinstance(settings, dict):
        raise ValueError(
            f"path is {str(path)!r}, whose config.json has no entry {NAME!r}; wanted: a checkpoint saved after "
            "linformerize. For one saved before: linformerize(model_class.from_pretrained(path), ...)"
        )
    if absent := [name for name in SETTINGS if name not in settings]:
        raise ValueError(
            f"path is {str(path)!r}, whose config.json lacks {', '.join(absent)} in its entry {NAME!r}; wanted: what "
            "linformerize wrote there"
        )
    plain = _concrete_class(model_class, config)

    class WithProjections(plain):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any, *arguments: Any, **keywords: Any) -> None:
            super().__init__(config, *arguments, **keywords)
            _own_configs(self)
            _install(self, _attention_layers(self), settings)

    WithProjections.__name__, WithProjections.__module__ = plain.__name__, plain.__module__
    model, info = WithProjections.from_pretrained(path, config=config, output_loading_info=True, **options)
    model.__class__ = plain
    lost = [key for key in info["missing_keys"] if f"{NAME}." in key]
    if lost:
        raise ValueError(f"path is {str(path)!r}, whose weights lack {', '.join(sorted(lost))}; wanted: all of E and F")
    for matrices in model.base_model.linformer:
        matrices.reset_windows()  # computed, not saved: from_pretrained leaves such buffers empty
    return (model, info) if with_info else model


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers' attention interface calls for each layer: (B, H, N, D) tensors to a (B, N, H, D) output."""
    refuse_causal(bool(is_causal))
    for name in ("position_bias", "softcap", "sliding_window", "output_attentions", "s_aux"):
        if options.get(name) is not None and options[name] is not False:
            raise NotImplementedError(
                f"{name} came to Linformer attention, whose scores are over K compressed rows and not over positions; "
                f"wanted: a model and a call without {name}"
            )
    if query.size(2) != key.size(2):
        raise NotImplementedError(
            f"query has {query.size(2)} positions and key {key.size(2)}; wanted: self-attention over one sequence"
        )
    attention_mask = _of_keys(attention_mask)
    matrices: LinformerProjection | None = module.__dict__.get(NAME)
    if matrices is None:
        raise ValueError(
            f'attn_implementation is "{NAME}" but this model has no E and F; wanted: linformerize(model, ...), or '
            "linformer_kernels.integrations.transformers.load for a saved one"
        )
    whole = attention_mask is None and key.size(2) == matrices.seq_len
    full = whole or not module.__dict__["linformer_rows_may_be_empty"]
    deferred = module.__dict__.get("linformer_deferred")
    if deferred is None and matrices.is_matrix and full:
        out = linformer_attention(
            query, key, value, *matrices.matrices(), key_padding_mask=attention_mask, dropout_p=dropout, scale=scaling
        )
    else:
        scale = query.size(-1) ** -0.5 if scaling is None else scaling
        if deferred is None:
            keys, values = matrices(key, value, attention_mask)
        else:
            linear, other = deferred
            rows = compress_first(matrices, linear.taken(key), other.taken(value), linear, other, attention_mask)
            keys, values = (x.unflatten(-1, (key.size(1), -1)).transpose(1, 2) for x in rows)
        if not full:
            occupied = _occupied(matrices, key.size(2), attention_mask, key.device)
            query, keys = _without_empty_rows(query, keys, occupied)
        out = projected_attention(query, keys, values, dropout_p=dropout, scale=scale)
    return out.transpose(1, 2), None


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = bidirectional_mask_function,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor | None:
    """What transformers' mask interface calls once a forward pass: the (B, N) padding mask, as it is."""
    if mask_function is not bidirectional_mask_function:
        raise NotImplementedError(
            "this model masks pairs of positions (causally, by windows, or by packed sequences); wanted: an encoder in "
            "which every position sees every other, as each row of K' mixes the whole sequence"
        )
    return attention_mask


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, padding_mask)


def _of_keys(mask: Tensor | None) -> Tensor | None:
    """The (B, N) padding mask, True where a key takes part, of that or of what some models (LayoutLM) make of it:
    (B, 1, 1, N), added to the scores."""
    if mask is None or (mask.dim() == 2 and mask.dtype == torch.bool):
        return mask
    if mask.dim() != 4 or mask.shape[1:3] != (1, 1):
        raise NotImplementedError(
            f"attention_mask is {mask.dtype} of shape {tuple(mask.shape)}; wanted: the tokenizer's padding mask "
            "(B, N), as a mask between pairs of positions has no meaning in Linformer"
        )
    mask = mask[:, 0, 0]
    if mask.dtype == torch.bool:
        return mask
    takes_part = mask == 0
    if not torch.compiler.is_compiling() and not (takes_part | (mask <= -1e4)).all():
        raise NotImplementedError(
            "attention_mask adds other numbers to scores than 0 and -10,000 or less; wanted: a padding mask, 0 where a "
            "key takes part and the lowest number of its type elsewhere"
        )
    return takes_part


_THREAD = threading.local()


def _kept() -> dict[int, Tensor]:
    """What each DeferredLinear keeps in this thread: one model may serve several."""
    if not hasattr(_THREAD, "kept"):
        _THREAD.kept = {}
    kept: dict[int, Tensor] = _THREAD.kept
    return kept


class DeferredLinear(nn.Linear):
    """The linear layer of keys or values, left to `attention_forward`, which applies it to K rows instead of N.

    E (X W^T + 1 b^T) = (E X) W^T + (E 1) b^T. Called, it keeps X, for the calling thread, and returns a tensor of the
    right shape that takes no memory: NaN everywhere, so that nobody else takes it for keys. A layer becomes one by a
    change of class: its weights and their names stay.
    """

    def forward(self, x: Tensor) -> Tensor:
        _kept()[id(self)] = x
        return x.new_full((), torch.nan).expand(*x.shape[:-1], self.out_features)

    def taken(self, rows: Tensor) -> Tensor:
        """X, if `rows` (B, H, N, D) is still what was returned for it."""
        x = _kept().pop(id(self), None)
        if x is None or any(rows.stride()) or x.shape[:2] != (rows.size(0), rows.size(2)):
            raise ValueError(
                "keys or values were changed between their linear layer and the attention, by an adapter or a hook; "
                "wanted: linformerize(..., defer=False), which computes them for all positions"
            )
        return x


def _attention_layers(model: PreTrainedModel) -> list[nn.Module]:
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


def _check(
    layers: int, seq_len: int, proj_dim: int | Sequence[int], sharing: str, init: str, kind: str, calibration: object
) -> dict[str, Any]:
    """The settings as `model.config.linformer` holds them. What LinformerProjection checks itself is left to it."""
    for name, value, known in (("sharing", sharing, SHARINGS), ("init", init, INITS)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; wanted: one of {', '.join(known)}")
    seq_len, wanted = integer("seq_len", seq_len), "an integer, or a sequence of one a layer"
    each = proj_dim if isinstance(proj_dim, Iterable) else [proj_dim] * layers
    sizes = [integer("proj_dim", size, wanted) for size in each]
    if len(sizes) != layers:
        raise ValueError(f"proj_dim has {len(sizes)} numbers but the model has {layers} layers; wanted: one a layer")
    if sharing == "layerwise" and len(set(sizes)) > 1:
        raise ValueError(
            f'proj_dim is {sizes} but sharing is "layerwise", one matrix for all layers; wanted: one number, or '
            'sharing="key_value"'
        )
    if init != "gaussian" and kind not in ("learned", "fixed"):
        raise ValueError(
            f'init is {init!r} but projection is {kind!r}, which has a start of its own; wanted: "gaussian"'
        )
    if init != "gaussian" and max(sizes) > seq_len:
        raise ValueError(f"proj_dim is {max(sizes)} but seq_len {seq_len}; wanted: a position for each row of E")
    if (init == "svd") != (calibration is not None):
        raise ValueError(
            f"init is {init!r} and calibration is {'missing' if calibration is None else 'given'}; wanted: calibration "
            'for init="svd" and for it alone'
        )
    return {
        "seq_len": seq_len,
        "proj_dim": sizes[0] if len(set(sizes)) == 1 else sizes,
        "sharing": sharing,
        "projection": kind,
        "rows_may_be_empty": init != "gaussian" or kind in ("mean", "max", "conv"),
    }


def _install(model: PreTrainedModel, layers: list[nn.Module], settings: dict[str, Any]) -> list[LinformerProjection]:
    """Hang new projections into the model, tell each layer which is its own, and choose our attention function."""
    if hasattr(model.base_model, NAME):
        raise ValueError("model has E and F already; wanted: a model that was not linformerized before")
    widths = sorted({_shape_of_heads(layer)[1] for layer in layers})
    if settings["projection"] == "conv" and settings["sharing"] == "layerwise" and len(widths) > 1:
        raise ValueError(
            f'projection is "conv" and sharing "layerwise", but the layers have heads of widths {widths}; wanted: '
            'sharing="key_value"'
        )
    like = next(model.parameters())
    sizes = settings["proj_dim"] if isinstance(settings["proj_dim"], list) else [settings["proj_dim"]] * len(layers)
    count = 1 if settings["sharing"] == "layerwise" else len(layers)
    made = []
    for layer, size in zip(layers[:count], sizes, strict=False):
        heads, head_dim = _shape_of_heads(layer)
        made.append(
            LinformerProjection(
                settings["seq_len"],
                size,
                num_heads=heads if settings["sharing"] == "none" else None,
                kind=settings["projection"],
                share_kv=settings["sharing"] in ("key_value", "layerwise"),
                head_dim=head_dim if settings["projection"] == "conv" else None,
                device=like.device,
                dtype=like.dtype,
            )
        )
    setattr(model.base_model, NAME, nn.ModuleList(made))
    for index, layer in enumerate(layers):
        # In __dict__, past nn.Module: the layer refers to a projection and does not own it, or a shared one would be
        # in state_dict once for each layer.
        layer.__dict__[NAME] = made[min(index, count - 1)]
        layer.__dict__["linformer_rows_may_be_empty"] = settings["rows_may_be_empty"]
        if settings["defer"] and made[0].is_matrix and made[0].num_heads is None:
            _defer(layer)
    setattr(model.config, NAME, settings)
    # In config.json too: plain from_pretrained gives a model that says what it lacks.
    model.config.attn_implementation = NAME
    _set_attention(model, layers, NAME)
    return made


def _own_configs(model: PreTrainedModel) -> None:
    """Give the modules configs of this model alone, the same to those that shared one: the caller's may serve to make
    other models."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if isinstance(config, PreTrainedConfig):
            module.__dict__["config"] = copy.deepcopy(config, copies)


def _set_attention(model: PreTrainedModel, layers: list[nn.Module], name: str) -> None:
    model.set_attn_implementation(name)
    for layer in layers:  # their config may be none that the model knows of, as in encoders out of a larger model
        config: Any = layer.config
        if config._attn_implementation != name:
            config._attn_implementation = name


def _defer(layer: nn.Module) -> None:
    try:
        source = inspect.getsource(_forward(layer))
    except OSError:  # there is no file
        return
    if _CHANGED.search(source):
        return
    found = [
        linear
        for names in (KEY_LAYERS, VALUE_LAYERS)
        for name in names
        if type(linear := getattr(layer, name, None)) is nn.Linear
    ]
    if len(found) == 2:
        for linear in found:
            linear.__class__ = DeferredLinear
        layer.__dict__["linformer_deferred"] = found


def _shape_of_heads(layer: nn.Module) -> tuple[int, int]:
    """Key heads and their width."""
    config: Any = layer.config
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return getattr(config, "num_key_value_heads", None) or heads, head_dim


def _occupied(matrices: LinformerProjection, length: int, mask: Tensor | None, device: torch.device) -> Tensor:
    """Whether window k, of the K that divide seq_len, has a position that takes part: (B or 1, K) bool."""
    edges = torch.arange(matrices.proj_dim + 1, device=device) * matrices.seq_len // matrices.proj_dim
    edges = edges.clamp(max=length)
    if mask is None:
        return (edges[1:] > edges[:-1])[None]
    before = nn.functional.pad(mask.cumsum(1), (1, 0))[:, edges]
    return before[:, 1:] > before[:, :-1]


def _without_empty_rows(query: Tensor, keys: Tensor, occupied: Tensor) -> tuple[Tensor, Tensor]:
    """Take rows of K' whose window has no position out of the softmax: one more feature, 1 in every query and very
    negative in those rows. As zeros in K' alone they would still have the score 0."""
    extra = torch.where(occupied, 0.0, _EMPTY).to(keys.dtype)[:, None, :, None]
    extra = extra.expand(*keys.shape[:-1], 1)
    return torch.cat((query, query.new_ones(*query.shape[:-1], 1)), -1), torch.cat((keys, extra), -1)


def _position_moments(
    model: PreTrainedModel, layers: list[nn.Module], seq_len: int, calibration: Iterable[dict[str, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """For each layer sum(X X^T) over the calibration data, for X the keys and the values of one head:
    (H, seq_len, seq_len) in float64, of the model with its own attention, each scaled to the trace 1."""
    own, batches = model.config._attn_implementation, 0
    training = {module: module.training for module in model.modules()}
    for layer in layers:
        heads, _ = _shape_of_heads(layer)
        shape = (heads, seq_len, seq_len)
        layer.__dict__[_MOMENTS] = tuple(torch.zeros(shape, dtype=torch.float64, device=model.device) for _ in range(2))
    _set_attention(model, layers, _MOMENTS)
    model.eval()
    try:
        with torch.no_grad():
            for batch in calibration:
                model(**batch)
                batches += 1
    finally:
        _set_attention(model, layers, own)
        for module, mode in training.items():
            module.training = mode
        sums = [layer.__dict__.pop(_MOMENTS) for layer in layers]
    if batches == 0:
        raise ValueError("calibration is empty; wanted: at least one batch")
    trace = lambda total: total.diagonal(dim1=-2, dim2=-1).sum()  # noqa: E731
    if not all(trace(total) > 0 for pair in sums for total in pair):
        raise ValueError("calibration has no position that takes part; wanted: text, and its own padding mask")
    return [(keys / trace(keys), values / trace(values)) for keys, values in sums]


def _record_moments(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> Any:
    """The model's own attention, which also adds to the sums that `_position_moments` has hung into the layer."""
    mask = _of_keys(mask)
    for total, rows in zip(module.__dict__[_MOMENTS], (key, value), strict=True):
        length = rows.size(2)
        if length > total.size(-1):
            raise ValueError(f"calibration has {length} positions but seq_len is {total.size(-1)}; wanted: no more")
        rows = rows.double() if mask is None else rows.double() * mask[:, None, :, None]
        total[:, :length, :length] += torch.einsum("bhnd,bhmd->hnm", rows, rows)
    mask = None if mask is None else mask[:, None, None, :]
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **options)


AttentionInterface.register(_MOMENTS, _record_moments)
AttentionMaskInterface.register(_MOMENTS, padding_mask)


def _of_projection(moments: list[tuple[Tensor, Tensor]], index: int, count: int) -> tuple[Tensor, Tensor]:
    """Moments of keys and of values of the layers that one projection serves."""
    if count == len(moments):
        return moments[index]
    keys, values = (torch.stack([pair[which] for pair in moments]).sum(0) for which in (0, 1))
    return keys, values


def _start(matrices: LinformerProjection, init: str, moments: tuple[Tensor, Tensor] | None) -> None:
    windows = matrices.window_means().double()
    nonzero = windows.ne(0)
    first = (nonzero & nonzero.cumsum(1).eq(1)).double()
    for which, weight in enumerate((matrices.proj_key, matrices.proj_value)):
        if weight is None:
            continue
        start = windows if init == "mean" else first
        if moments is not None:
            total = moments[0] + moments[1] if matrices.share_kv else moments[which]
            start = _in_strongest_directions(start, total if matrices.num_heads is not None else total.sum(0))
        with torch.no_grad():
            weight.copy_(start.to(weight).expand_as(weight))


def _in_strongest_directions(rows: Tensor, moments: Tensor) -> Tensor:
    """The rows (K, N), each of one position, projected onto the K strongest eigenvectors of the moments (..., N, N).
    Positions without moments are left; what is left of rounding is cleared, so that with K = N rows come out as they
    were."""
    strongest = torch.linalg.eigh(moments).eigenvectors[..., -rows.size(0) :]  # (..., N, K), ascending
    rows = rows.to(strongest)
    inside = rows @ strongest @ strongest.transpose(-1, -2)
    reached = rows @ moments.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) > 0
    return torch.where(reached, torch.where(inside.abs() < 1e-6, 0.0, inside), rows)


def _config(path: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The config, and the options that are left for from_pretrained."""
    config = options.pop("config", path)
    if not isinstance(config, (str, os.PathLike)):
        return config, options
    where = {name: options[name] for name in _WHERE if name in options}
    dtype = {name: options.pop(name) for name in ("dtype", "torch_dtype") if name in options}
    config, options = AutoConfig.from_pretrained(config, return_unused_kwargs=True, **options)
    return config, options | where | dtype


def _concrete_class(model_class: Any, config: Any) -> Any:
    mapping = getattr(model_class, "_model_mapping", None)
    if mapping is None:
        return model_class
    found = mapping[type(config)]
    return found[0] if isinstance(found, (tuple, list)) else found
