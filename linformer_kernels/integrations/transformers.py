"""Encoders of Hugging Face transformers with Linformer attention in place of their own: `linformerize` and `load`.

transformers (5.4 and later) sends every model's attention through a table of functions. `linformerize` gives the model
E and F, as `<base model>.linformer`, and chooses the function registered here, which calls that module with a layer's
query, key and value, padding mask, dropout and scale. Weights and layers of the model itself stay as they are, so that
`model.set_attn_implementation("sdpa")` is the way back. What it takes to make the same model again is in
`model.config.linformer`; `load` reads it back.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

OLDEST = (5, 4)
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST:
    raise ImportError(
        f"transformers is {transformers.__version__}; wanted: {OLDEST[0]}.{OLDEST[1]} or later, as by: pip install "
        f'"transformers>={OLDEST[0]}.{OLDEST[1]}"'
    )

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel  # noqa: E402
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface  # noqa: E402

from .._masks import of_scores  # noqa: E402
from .._validation import integer, refuse_causal  # noqa: E402
from ..encoders import sizes_by_layer  # noqa: E402
from ..modules import SHARINGS  # noqa: E402
from ..projections import KINDS, SINGLES, WEIGHTLESS, LinformerProjection, check_sizes, from_the_first  # noqa: E402

NAME = "linformer"
PLACE = "linformer_place"
_MOMENTS = "linformer_moments"
INITS = ("gaussian", "mean", "identity", "svd")
SETTINGS = ("seq_len", "proj_dim", "sharing", "projection", "init")  # of config.linformer
# There too, since it has kinds of projections with them; as in LinformerProjection where they are missing.
MORE_SETTINGS = ("windows", "keep", "singles", "length_norm")
# Inputs of models whose sequence has no special token at its end: patches behind a class token; spectra.
_KEEP = {"pixel_values": (1, 0), "input_features": (0, 0), "input_values": (0, 0)}
# Options that transformers hands to attention functions and that mean nothing to one without weights and cache.
HARMLESS = {
    "position_ids", "max_length_q", "max_length_k", "num_items_in_batch", "output_hidden_states",
    "output_router_logits", "return_dict", "use_cache", "cache_position", "deterministic",
}  # fmt: skip
# Options of from_pretrained that say where a file is: for the config and for the weights.
_WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def linformerize(
    model: PreTrainedModel,
    seq_len: int | None = None,
    proj_dim: int | Sequence[int] = 128,
    sharing: str = "layerwise",
    *,
    init: str = "gaussian",
    projection: str = "learned",
    windows: str = "seq_len",
    keep: tuple[int, int] | None = None,
    singles: float = SINGLES,
    length_norm: bool = False,
    calibration: Iterable[dict[str, Tensor]] | None = None,
) -> PreTrainedModel:
    """Replace the attention of an encoder of transformers by Linformer attention, in place.

    `linformerize(model, proj_dim=128, projection="adaptive")` converts a trained model without data: its rows of K'
    follow each sequence, and keep most of what the model knows (docs/results.md). The default, a learned E, is for
    training from scratch, or further.

    Takes every encoder whose attention goes through transformers' attention interface: BERT, RoBERTa, XLM-R,
    DistilBERT, ViT and their like, with any head on top, and `model.get_encoder()` of an encoder-decoder model, as BART
    or Whisper. Its weights are kept; E and F are added as
    `model.base_model.linformer`, a list of `LinformerProjection`, one of them for each layer or, shared layerwise, one
    in all: a single parameter, in `parameters()`, in an optimizer and in a checkpoint once. Pass the whole model, head
    included: of `model.bert` alone, `model.save_pretrained` would not write that it was converted.

    Args:
        model: on any device, in any dtype; E and F are made like its weights.
        seq_len: N_max, the longest sequence in tokens (for ViT: patches and the class token). Shorter ones use the
            first columns of E. Longer ones raise ValueError when the model is called. None: 512, and any length for
            projections that are made for none ("adaptive", and windows="valid").
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
        projection: kind of the projection, see LinformerProjection: "learned", "fixed", "mean", "max", "conv" or
            "adaptive".
        windows, singles, length_norm: see LinformerProjection.
        keep: the same. None: the first and the last token of a text, the class token of an image.
        calibration: for init="svd": batches of the model's inputs, as dict of tensors; the model sees each once.
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
    settings = _check(len(layers), seq_len, proj_dim, sharing, init, projection, windows, calibration)
    if keep is None and projection == "adaptive":
        keep = _KEEP.get(model.main_input_name, (1, 1))
        keep = keep if max(sum(keep), 1) < min(sizes_of(settings, len(layers))) else (0, 0)
    if isinstance(keep, (tuple, list)):  # as in JSON
        keep = [integer(f"keep[{i}]", number) for i, number in enumerate(keep)]  # type: ignore[assignment]
    settings |= {"windows": windows, "keep": keep, "singles": singles, "length_norm": bool(length_norm)}
    if getattr(model.config, "output_attentions", False):
        raise NotImplementedError(
            "model.config.output_attentions is True, but Linformer has no attention over positions to return; wanted: "
            "False"
        )
    _own_configs(model)
    moments = None if calibration is None else _position_moments(model, layers, settings["seq_len"], calibration)
    made = _install(model, layers, settings)
    if moments is not None:
        for index, matrices in enumerate(made):
            _start(matrices, _of_projection(moments, index, len(made)))
    return model


def load(model_class: Any, path: str, **options: Any) -> Any:
    """The model that `model.save_pretrained(path)` wrote after `linformerize`: `model_class.from_pretrained` with E, F.

    Args:
        model_class: the class to make, e.g. RobertaForMaskedLM, or an Auto class. It may differ from the one saved
            (a masked language model becomes a classifier): what is new in it starts anew, as in from_pretrained.
        path: a folder, or anything that from_pretrained takes.
        options: for from_pretrained. attn_implementation="sdpa" gives the model switched to exact attention, with E and
            F in it; without it the model is set to "linformer", whatever it was set to when it was saved.

    Raises:
        TypeError: model_class is no class.
        ValueError: the checkpoint has no settings of `linformerize` or not all of them, or lacks weights of E or F.
    """
    if not isinstance(model_class, type):
        raise TypeError(
            f"model_class is a {type(model_class).__name__}; wanted: a class, as in load(RobertaForMaskedLM, path)"
        )
    with_info = options.pop("output_loading_info", False)
    config, options = _config(path, options)
    chosen = options.pop("attn_implementation", None) or config._attn_implementation
    settings: Any = getattr(config, NAME, None)
    if not isinstance(settings, dict):
        raise ValueError(
            f"path is {str(path)!r}, whose config.json has no entry {NAME!r}; wanted: a checkpoint saved after "
            "linformerize of the whole model. For one from before: linformerize(model_class.from_pretrained(path), ...)"
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
    if chosen not in (None, NAME):
        model.set_attn_implementation(chosen)
    lost = [key for key in info["missing_keys"] if f"{NAME}." in key]
    if lost:
        raise ValueError(f"path is {str(path)!r}, whose weights lack {', '.join(sorted(lost))}; wanted: all of E and F")
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
    packed = {f"cu_seqlens_{side}": options.pop(f"cu_seq_lens_{side}", None) for side in "qk"}
    if packed["cu_seqlens_q"] is not None and "seq_idx" in options:
        del options["seq_idx"]  # says the same
    for name, given in options.items():
        if given is not None and given is not False and name not in HARMLESS:
            raise NotImplementedError(
                f"{name} came to Linformer attention, which has none; wanted: a model and a call without {name}"
            )
    if query.size(2) != key.size(2):
        raise NotImplementedError(
            f"query has {query.size(2)} positions and key {key.size(2)}; wanted: self-attention over one sequence"
        )
    place: _Place | None = getattr(module, PLACE, None)
    if place is None:
        raise ValueError(
            f'attn_implementation is "{NAME}" but this model has no E and F; wanted: linformerize(model, ...), or '
            "linformer_kernels.integrations.transformers.load for a saved one"
        )
    projections, mask = getattr(place.owner, NAME), _of_keys(attention_mask)
    if packed["cu_seqlens_q"] is None and packed["cu_seqlens_k"] is None:
        out = projections(place.index, key, value, mask, query=query, dropout_p=dropout, scale=scaling)
        return out.transpose(1, 2), None
    if any(ends is None for ends in packed.values()) or (mask is not None and not mask.all()):  # LayoutLM makes one
        raise ValueError(
            "cu_seq_lens_q or cu_seq_lens_k came by itself or with an attention_mask; wanted: the two of them without "
            "a mask, as DataCollatorWithFlattening(return_flash_attn_kwargs=True) makes them"
        )
    rows = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (key, value, query))
    key, value, packed["query"] = rows
    out = projections(place.index, key, value, dropout_p=dropout, scale=scaling, **packed)
    return out.unflatten(0, (query.size(0), query.size(2))), None


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
    return mask if mask.dtype == torch.bool else of_scores("attention_mask", mask)


class Projections(nn.Sequential):
    """The projections of a model, one for each layer or one in all. Called, with the number of one, it calls that.

    A list to look at; no nn.ModuleList, which PEFT puts no wrapper around.
    """

    def forward(self, index: int, *arguments: Any, **options: Any) -> Any:  # type: ignore[override]
        return self[index](*arguments, **options)


class _Place:
    """Where a layer's projection stands: under `owner.linformer`, looked up in every call, whatever stands there then.

    The layer does not own it: one that all layers share is in the model once, with one name.
    """

    def __init__(self, owner: nn.Module, index: int) -> None:
        self._owner, self.index, self._copies = owner, index, {}  # type: ignore[var-annotated]

    @property
    def owner(self) -> nn.Module:
        if self._copies:
            self._owner, self._copies = self._copies.get(id(self._owner), self._owner), {}
        return self._owner

    def __deepcopy__(self, memo: dict[int, Any]) -> _Place:
        # Of a layer alone the copy belongs to the same model, and not to a hidden copy of it. Which of the two it is
        # may be known only when all is copied.
        place = _Place(memo.get(id(self.owner), self.owner), self.index)
        place._copies = {} if place.owner is not self.owner else memo
        return place

    def __reduce__(self) -> Any:
        return _Place, (self.owner, self.index)


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
    layers: int,
    seq_len: int | None,
    proj_dim: int | Sequence[int],
    sharing: str,
    init: str,
    kind: str,
    windows: str,
    calibration: object,
) -> dict[str, Any]:
    """The settings as `model.config.linformer` holds them. What LinformerProjection checks itself is left to it."""
    for name, value, known in (("sharing", sharing, SHARINGS), ("init", init, INITS)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; wanted: one of {', '.join(known)}")
    if not isinstance(kind, str):
        raise TypeError(f'projection is a {type(kind).__name__}; wanted: the name of a kind, as "learned" or "mean"')
    if kind not in KINDS:
        raise ValueError(f"projection is {kind!r}; wanted: one of {', '.join(KINDS)}")
    if sharing == "none" and kind in WEIGHTLESS:
        raise ValueError(
            f'sharing is "none" but projection is "{kind}", which has no weights that heads could have of their own; '
            'wanted: another sharing, as "layerwise"'
        )
    # What has no weights is shared in any case, and may yet have a size a layer.
    one_size = sharing if kind not in WEIGHTLESS or isinstance(proj_dim, int) else "key_value"
    sizes = sizes_by_layer(proj_dim, layers, one_size)
    if seq_len is None and kind != "adaptive" and windows != "valid":
        seq_len = 512
    seq_len = None if seq_len is None else integer("seq_len", seq_len)
    if init != "gaussian" and kind not in ("learned", "fixed"):
        raise ValueError(
            f'init is {init!r} but projection is {kind!r}, which has a start of its own; wanted: "gaussian"'
        )
    if seq_len is not None and kind != "adaptive" and windows != "valid":
        check_sizes(seq_len, max(sizes))
    if (init == "svd") != (calibration is not None):
        raise ValueError(
            f"init is {init!r} and calibration is {'missing' if calibration is None else 'given'}; wanted: calibration "
            'for init="svd" and for it alone'
        )
    return {
        "seq_len": seq_len,
        "proj_dim": sizes[0] if len(set(sizes)) == 1 else sizes,
        "sharing": one_size if len(set(sizes)) > 1 else sharing,
        "projection": kind,
        "init": "identity" if init == "svd" else init,  # of which it is a projection, row by row
    }


def sizes_of(settings: dict[str, Any], layers: int) -> list[int]:
    """K of each layer."""
    size: int | list[int] = settings["proj_dim"]
    return size if isinstance(size, list) else [size] * layers


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
    like, device = next(model.parameters()), _device(model)
    sizes = sizes_of(settings, len(layers))
    more = {name: settings[name] for name in MORE_SETTINGS if settings.get(name) is not None}
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
                **more,
                head_dim=head_dim if settings["projection"] == "conv" else None,
                init=settings["init"],
                device=device,
                dtype=like.dtype,
            )
        )
    setattr(model.base_model, NAME, Projections(*made))
    model.base_model.register_forward_pre_hook(_unpack_positions, with_kwargs=True)
    for index, layer in enumerate(layers):
        setattr(layer, PLACE, _Place(model.base_model, min(index, count - 1)))
    setattr(model.config, NAME, settings)
    # In config.json too: plain from_pretrained gives a model that says what it lacks.
    model.config.attn_implementation = NAME
    model.set_attn_implementation(NAME)
    return made


def _device(model: nn.Module) -> Any:
    """Where it computes. accelerate's offloading leaves weights on "meta" and says where in its hooks."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    wanted = (getattr(hook, "execution_device", None) for hook in hooks)
    real = (weight.device for weight in model.parameters() if not weight.is_meta)
    return next((device for device in (*real, *wanted) if device is not None), "meta")


def _unpack_positions(model: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """A hook: says where texts start in a row of several, if it is `position_ids` alone that tell, by starting anew."""
    config: Any = model.config
    given = options
    if len(arguments) > 1:
        given = dict(zip(inspect.signature(model.forward).parameters, arguments, strict=False)) | options
    position_ids = given.get("position_ids")
    if config._attn_implementation != NAME or position_ids is None or position_ids.dim() != 2:
        return None
    if given.get("attention_mask") is not None or given.get("cu_seq_lens_q") is not None:
        return None
    if torch.compiler.is_exporting():
        raise ValueError(
            "position_ids came without an attention_mask within torch.export; wanted: an attention_mask, too, all ones "
            "without padding, as a program cannot look whether positions start again, where another text would begin"
        )
    inputs = *arguments[:1], given.get("input_ids"), given.get("inputs_embeds"), position_ids
    rows = next(tensor for tensor in inputs if tensor is not None)
    position_ids = position_ids.expand(rows.size(0), -1)  # one row of them may be for all
    starts = position_ids == position_ids[:, :1]
    in_order = starts[:, 1:] | (position_ids.diff(dim=1) == 1)
    if not in_order.all() or not starts[:, 1:].any() or starts.all():
        return None  # in order, or of another meaning
    where = starts.flatten().nonzero().flatten()
    ends = nn.functional.pad(where, (0, 1), value=starts.numel())
    return arguments, options | {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}


def _own_configs(model: PreTrainedModel) -> None:
    """Give the modules configs of this model alone: the caller's may serve to make other models. And to modules whose
    config no model in it knows, as in an encoder out of a larger model, that of the model around them, or
    `set_attn_implementation` would not reach them."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if isinstance(config, PreTrainedConfig):
            module.__dict__["config"] = copy.deepcopy(config, copies)
    for around in model.modules():
        if isinstance(around, PreTrainedModel):
            for module in around.modules():
                if type(module.__dict__.get("config")) is type(around.config):
                    module.__dict__["config"] = around.config


def _shape_of_heads(layer: nn.Module) -> tuple[int, int]:
    """Key heads and their width."""
    config: Any = layer.config
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return getattr(config, "num_key_value_heads", None) or heads, head_dim


def _position_moments(
    model: PreTrainedModel, layers: list[nn.Module], seq_len: int, calibration: Iterable[dict[str, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    """For each layer sum(X X^T) over the calibration data, for X the keys and the values of one head:
    (H, seq_len, seq_len) in float64, of the model with its own attention, each scaled to the trace 1."""
    own, batches, device = model.config._attn_implementation, 0, _device(model)
    training = {module: module.training for module in model.modules()}
    for layer in layers:
        heads, _ = _shape_of_heads(layer)
        shape = (heads, seq_len, seq_len)
        layer.__dict__[_MOMENTS] = tuple(torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(2))
    model.set_attn_implementation(_MOMENTS)
    model.eval()
    try:
        with torch.no_grad():
            for batch in calibration:
                if not isinstance(batch, Mapping):
                    raise TypeError(
                        f"calibration holds a {type(batch).__name__}; wanted: batches of the model's inputs by name, "
                        'as [{"input_ids": ..., "attention_mask": ...}]'
                    )
                model(**batch)
                batches += 1
    finally:
        model.set_attn_implementation(own)
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
    *turned, taken = from_the_first(key, value, mask)
    for total, rows in zip(module.__dict__[_MOMENTS], turned, strict=True):
        length = rows.size(2)
        if length > total.size(-1):
            raise ValueError(f"calibration has {length} positions but seq_len is {total.size(-1)}; wanted: no more")
        rows = rows.double() if taken is None else rows.double() * taken[:, None, :, None]
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


def _start(matrices: LinformerProjection, moments: tuple[Tensor, Tensor]) -> None:
    """The start "svd", of the rows of "identity"."""
    for which, weight in enumerate((matrices.proj_key, matrices.proj_value)):
        if weight is None:
            continue
        total = moments[0] + moments[1] if matrices.share_kv else moments[which]
        total = total if matrices.num_heads is not None else total.sum(0)
        with torch.no_grad():
            weight.copy_(_in_strongest_directions(matrices.window_rows(mean=False), total).expand_as(weight))


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
