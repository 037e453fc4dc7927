"""`linformerize`: settings checked, E and F hung into the model, its layers told where."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..._validation import integer
from ...encoders import sizes_by_layer
from ...modules import SHARINGS
from ...projections import KINDS, SINGLES, WEIGHTLESS, LinformerProjection, check_sizes
from .interface import NAME, PLACE, Place, Projections
from .models import attention_layers, device_of, shape_of_heads
from .svd import of_projection, position_moments, start

INITS = ("gaussian", "mean", "identity", "svd")
SETTINGS = ("seq_len", "proj_dim", "sharing", "projection", "init")  # of config.linformer
# There too, since it has kinds of projections with them; as in LinformerProjection where they are missing.
MORE_SETTINGS = ("windows", "keep", "singles", "length_norm")
# Inputs of models whose sequence has no special token at its end: patches behind a class token; spectra.
_KEEP = {"pixel_values": (1, 0), "input_features": (0, 0), "input_values": (0, 0)}


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
    layers = attention_layers(model)
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
    own_configs(model)
    moments = None if calibration is None else position_moments(model, layers, settings["seq_len"], calibration)
    made = install(model, layers, settings)
    if moments is not None:
        for index, matrices in enumerate(made):
            start(matrices, of_projection(moments, index, len(made)))
    return model


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
    if proj_dim is None:
        raise TypeError("proj_dim is None; wanted: an integer, or a sequence of one a layer")
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
    if calibration is not None and not (hasattr(calibration, "__iter__") or hasattr(calibration, "__getitem__")):
        raise TypeError(f"calibration is a {type(calibration).__name__}; wanted: batches, as a list or a DataLoader")
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


def install(model: PreTrainedModel, layers: list[nn.Module], settings: dict[str, Any]) -> list[LinformerProjection]:
    """Hang new projections into the model, tell each layer which is its own, and choose our attention function."""
    if hasattr(model.base_model, NAME):
        raise ValueError("model has E and F already; wanted: a model that was not linformerized before")
    widths = sorted({shape_of_heads(layer)[1] for layer in layers})
    if settings["projection"] == "conv" and settings["sharing"] == "layerwise" and len(widths) > 1:
        raise ValueError(
            f'projection is "conv" and sharing "layerwise", but the layers have heads of widths {widths}; wanted: '
            'sharing="key_value"'
        )
    like, device = next(model.parameters()), device_of(model)
    sizes = sizes_of(settings, len(layers))
    more = {name: settings[name] for name in MORE_SETTINGS if settings.get(name) is not None}
    count = 1 if settings["sharing"] == "layerwise" else len(layers)
    made = []
    for layer, size in zip(layers[:count], sizes, strict=False):
        heads, head_dim = shape_of_heads(layer)
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
    model.base_model.register_forward_pre_hook(_own_places)
    model.base_model.register_forward_pre_hook(_unpack_positions, with_kwargs=True)
    for index, layer in enumerate(layers):
        setattr(layer, PLACE, Place(model.base_model, min(index, count - 1)))
    setattr(model.config, NAME, settings)
    # In config.json too: plain from_pretrained gives a model that says what it lacks.
    model.config.attn_implementation = NAME
    model.set_attn_implementation(NAME)
    return made


def _own_places(model: nn.Module, _: tuple[Any, ...]) -> None:
    """A hook: no layer of this model looks for its projection in another one."""
    config: Any = model.config
    if config._attn_implementation != NAME or torch.compiler.is_compiling():
        return
    for name, layer in model.named_modules():
        place: Place | None = getattr(layer, PLACE, None)
        if place is None or getattr(place.owner, NAME, None) is getattr(model, NAME, None):  # itself, or a shallow copy
            continue
        if getattr(model, "_is_replica", False):  # nn.DataParallel makes them anew in every call
            layer.__dict__[PLACE] = Place(model, place.index)
        elif model not in place.owner.modules() and place.owner not in model.modules():
            raise ValueError(
                f"{name} came out of another linformerized model, whose E and F it goes on using; wanted: layers put "
                "together first, and linformerize after that"
            )


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


def own_configs(model: PreTrainedModel) -> None:
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
