"""`load`: the model that `save_pretrained` wrote after `linformerize`."""

from __future__ import annotations

import os
import re
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from .convert import SETTINGS, install, own_configs
from .interface import NAME
from .models import attention_layers

# Options of from_pretrained that say where a file is: for the config and for the weights.
_WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def load(model_class: Any, path: str, **options: Any) -> Any:
    """The model that `model.save_pretrained(path)` wrote after `linformerize`: `model_class.from_pretrained` with E, F.

    Args:
        model_class: the class to make, e.g. RobertaForMaskedLM, or an Auto class. It may differ from the one saved
            (a masked language model becomes a classifier): what is new in it starts anew, as in from_pretrained.
        path: a folder, or anything that from_pretrained takes.
        options: for from_pretrained. attn_implementation="sdpa" gives the model switched to exact attention, with E and
            F in it; without it the model is set to "linformer", whatever it was set to when it was saved.

    Raises:
        TypeError: model_class is no class of models, path no path.
        ValueError: the checkpoint has no settings of `linformerize` or not all of them, lacks weights of E or F, or has
            them for layers that it does not have; model_class has no model for it.
    """
    if not isinstance(model_class, type):
        raise TypeError(
            f"model_class is a {type(model_class).__name__}; wanted: a class, as in load(RobertaForMaskedLM, path)"
        )
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path is a {type(path).__name__}; wanted: a folder, or a name that from_pretrained takes")
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
    if not issubclass(plain, PreTrainedModel):
        raise TypeError(
            f"model_class is {model_class.__name__}; wanted: a class of transformers' models, as RobertaForMaskedLM or "
            "AutoModel"
        )

    class WithProjections(plain):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any, *arguments: Any, **keywords: Any) -> None:
            super().__init__(config, *arguments, **keywords)
            own_configs(self)
            install(self, attention_layers(self), settings)

    WithProjections.__name__, WithProjections.__module__ = plain.__name__, plain.__module__
    model, info = WithProjections.from_pretrained(path, config=config, output_loading_info=True, **options)
    model.__class__ = plain
    if chosen not in (None, NAME):
        model.set_attn_implementation(chosen)
    lost = [key for key in info["missing_keys"] if f"{NAME}." in key]
    if lost:
        raise ValueError(f"path is {str(path)!r}, whose weights lack {', '.join(sorted(lost))}; wanted: all of E and F")
    if beyond := _of_no_layer(info["unexpected_keys"], settings, len(attention_layers(model))):
        raise ValueError(
            f"path is {str(path)!r}, which has E and F or K for layers {', '.join(beyond)}, but no such layers, and "
            "nobody can tell which were taken out; wanted: layers taken out before linformerize, or, before "
            "save_pretrained, del model.base_model.linformer[i], too, for layer i, and its number out of "
            "model.config.linformer"
        )
    return (model, info) if with_info else model


def _of_no_layer(unexpected: list[str], settings: dict[str, Any], layers: int) -> list[str]:
    """Numbers of E and F, or of K, beyond the model's layers, that are not of layers which the caller left out, as by
    num_hidden_layers=: of those all weights are left over."""
    numbers = {found[1] for key in unexpected if (found := re.search(rf"\b{NAME}[.](\d+)[.]", key))}
    if isinstance(settings["proj_dim"], list):
        numbers |= {str(index) for index in range(layers, len(settings["proj_dim"]))}
    return sorted(numbers - {part for key in unexpected if f"{NAME}." not in key for part in key.split(".")}, key=int)


def _config(path: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The config, and the options that are left for from_pretrained."""
    config = options.pop("config", None)
    config = path if config is None else config
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
    if type(config) not in mapping:
        raise ValueError(
            f"model_class is {model_class.__name__}, which has no model for a {type(config).__name__}, that of the "
            "checkpoint; wanted: another class, as AutoModel"
        )
    found = mapping[type(config)]
    return found[0] if isinstance(found, (tuple, list)) else found
