"""Checkpoints of RoBERTa with Linformer attention, from elsewhere, as models of Hugging Face transformers.

`roberta_from_fairseq`: of the paper's authors, examples/linformer of fairseq (0.10 to 0.12).
`roberta_from_cald`: of "Joint Fine-tuning and Conversion ..." (He, Garner 2025, arXiv:2410.06846), whose code puts
`LinformerSelfAttention` into a RoBERTa of transformers.

The results are models as `linformerize` makes them: E and F are `model.base_model.linformer`, and `save_pretrained` and
`linformer_kernels.integrations.transformers.load` work.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, RobertaConfig, RobertaForMaskedLM, RobertaForSequenceClassification

from .transformers import linformerize
from .transformers.interface import NAME

# fairseq's names to those of transformers, within the encoder and within its layers; None: not used there either.
_ENCODER = {
    "embed_tokens": "embeddings.word_embeddings",
    "embed_positions": "embeddings.position_embeddings",
    "emb_layer_norm": "embeddings.LayerNorm",
    "layernorm_embedding": "embeddings.LayerNorm",
    "compress_layer": None,
    "version": None,
}
_LAYER = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "output.LayerNorm",
    "self_attn.compress_k": None,  # E is taken before; its bias, which it has where layers share it, has no use
    "self_attn.compress_v": None,
    "shared_compress_layer": None,
    "version": None,
}
_MOVED = "[.]self[.](key|value)[.]bias$"
# Copies that layers of 0.12 keep for a fast path of exact attention: in_proj_weight, fc1_bias, ...
_COPIES = re.compile(r"(in_proj|out_proj|fc1|fc2)_(weight|bias)")


def roberta_from_fairseq(checkpoint: Mapping[str, Any], head: str | None = None) -> PreTrainedModel:
    """A checkpoint of fairseq's `linformer_roberta` as a model of transformers, in evaluation mode.

    Layers share E and F as the weights do, whatever the checkpoint's options say: fairseq 0.10 gives each layer a
    matrix of its own even with --shared-layer-kv-compressed. With --freeze-compress they are of kind "fixed".

    fairseq compresses before the linear layers of keys and values, and so E does not reach their biases: in
    K' = E X W^T + 1 b^T that of keys adds the same to all scores of a query, which softmax does not see, and that of
    values adds itself to each output. Here both are zero and frozen, and the output layer's bias has what the latter
    adds.

    fairseq's attention knows no padding: E takes padded positions in, so that there a text has another output in a
    longer batch. The result ignores them and gives for each text what it gives alone, there and here.

    Args:
        checkpoint: what fairseq saved: a mapping with "model", the weights, and "args" or "cfg", the options.
        head: None: RobertaForMaskedLM. Else the name of a classification head in the checkpoint:
            RobertaForSequenceClassification. The rest of the checkpoint's heads is left out.

    Raises:
        TypeError: checkpoint is no mapping.
        ValueError: a checkpoint of another shape, or without that head.
        NotImplementedError: another activation than "gelu", another than "tanh" of the head, norms before the layers.
    """
    weights, options = _parts_of_fairseq(checkpoint)
    for name, wanted in (("activation_fn", "gelu"), *([] if head is None else [("pooler_activation_fn", "tanh")])):
        if (came := _option(options, name, wanted)) != wanted:
            raise NotImplementedError(
                f'checkpoint has {name}="{came}"; wanted: "{wanted}", as RoBERTa of transformers has no other'
            )
    found, keys, values = _renamed(weights, head)
    embeddings = [f"roberta.embeddings.{name}_embeddings.weight" for name in ("word", "position")]
    feed_forward = "roberta.encoder.layer.0.intermediate.dense.weight"
    last = ["lm_head.decoder.weight", "lm_head.bias"] if head is None else ["classifier.out_proj.weight"] * 2
    needed = [*embeddings, feed_forward, *last]
    if lacking := sorted({name for name in needed if name not in found}):
        raise ValueError(
            f"checkpoint lacks what transformers calls {', '.join(lacking)}; wanted: all weights of a model"
        )
    words, places, inner, decoder, bias = (found[name] for name in needed)
    if head is None:
        found["lm_head.decoder.bias"] = bias
    config = RobertaConfig(
        vocab_size=words.size(0),
        hidden_size=words.size(1),
        num_hidden_layers=len(keys),
        num_attention_heads=_option(options, "encoder_attention_heads", 12),
        intermediate_size=inner.size(0),
        max_position_embeddings=places.size(0),
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        hidden_dropout_prob=_option(options, "dropout", 0.1),
        attention_probs_dropout_prob=_option(options, "attention_dropout", 0.1),
        classifier_dropout=_option(options, "pooler_dropout", 0.0),
        tie_word_embeddings=head is not None or decoder.equal(words),
    )
    if head is not None:
        config.num_labels = decoder.size(0)
    _move_biases(found)
    found["roberta.embeddings.token_type_embeddings.weight"] = words.new_zeros(1, words.size(1))  # it has no types
    frozen = int(_option(options, "freeze_compress", 0)) == 1
    model = (RobertaForMaskedLM if head is None else RobertaForSequenceClassification)(config)
    _with_matrices(model, found, keys, values, projection="fixed" if frozen else "learned")
    for name, parameter in model.named_parameters():
        if re.search(_MOVED, name):
            parameter.requires_grad_(False)
    return model


def roberta_from_cald(
    model_class: type[PreTrainedModel], config: RobertaConfig, weights: Mapping[str, Tensor]
) -> PreTrainedModel:
    """A checkpoint of CALD's Linformers as a model of transformers, in evaluation mode.

    CALD divides K' and V' by the root of a text's length, which is `length_norm=True` here.

    Args:
        model_class: RobertaForSequenceClassification, or what else the checkpoint is of.
        config: of RoBERTa, as in the folder of the checkpoint. `max_position_embeddings` is the length of E.
        weights: the state_dict: names as in transformers, and `...attention.self.proj_k` and `proj_v`,
            (max_position_embeddings, K). One that a file left out because it is shared is taken from where it is.

    Raises:
        TypeError: model_class is no class of models, config no RobertaConfig, weights no mapping.
        ValueError: a checkpoint of another shape.
    """
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise TypeError(f"model_class is {model_class!r}; wanted: a class of transformers, as RobertaForMaskedLM")
    if not isinstance(config, RobertaConfig):
        raise TypeError(
            f"config is a {type(config).__name__}; wanted: a RobertaConfig, as RobertaConfig.from_pretrained"
        )
    _check_weights("weights", weights)
    matrices = {name: weight for name, weight in weights.items() if re.search(r"[.]self[.]proj_[kv]$", name)}
    if not matrices:
        raise ValueError(
            "weights hold no ...attention.self.proj_k; wanted: the state_dict of a model after CALD's "
            "substitute_layer; for a RoBERTa: linformerize"
        )
    if flat := sorted(name for name, matrix in matrices.items() if matrix.dim() != 2):
        raise ValueError(f"weights hold {', '.join(flat)} of other than two dimensions; wanted: (N, K)")
    anywhere = next(iter(matrices.values()))
    scale = anywhere.size(0) ** -0.5
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for index in range(config.num_hidden_layers):
        pair = [_ending(matrices, f"layer.{index}.attention.self.proj_{which}") for which in "kv"]
        for which, other, made in ((pair[0], pair[1], keys), (pair[1], pair[0], values)):
            matrix = which if which is not None else other if other is not None else anywhere
            made.append(matrix.T * scale)
    rest = {name: weight for name, weight in weights.items() if name not in matrices}
    rest = {name: weight for name, weight in rest.items() if not name.endswith("embeddings.position_ids")}
    return _with_matrices(model_class(config), rest, keys, values, length_norm=True)


def _parts_of_fairseq(checkpoint: Mapping[str, Any]) -> tuple[Mapping[str, Tensor], Any]:
    """The weights and the options of the model."""
    if not isinstance(checkpoint, Mapping):
        raise TypeError(f"checkpoint is a {type(checkpoint).__name__}; wanted: a mapping, as torch.load gives it")
    options = checkpoint.get("args")
    if options is None and checkpoint.get("cfg") is not None:
        options = _option(checkpoint["cfg"], "model", None)
    if "model" not in checkpoint or options is None:
        raise ValueError(
            f'checkpoint holds {sorted(checkpoint)}; wanted: "model" and "args" or "cfg", as fairseq saves them'
        )
    _check_weights('checkpoint["model"]', checkpoint["model"])
    return checkpoint["model"], options


def _check_weights(name: str, weights: object) -> None:
    if not isinstance(weights, Mapping):
        raise TypeError(f"{name} is a {type(weights).__name__}; wanted: a state_dict, tensors by name")


def _option(options: Any, name: str, default: Any) -> Any:
    """Of a mapping or a namespace. None means what its absence means."""
    value = options.get(name) if isinstance(options, Mapping) else getattr(options, name, None)
    return default if value is None else value


def _renamed(weights: Mapping[str, Tensor], head: str | None) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
    """fairseq's weights as transformers calls them, and E and F of each layer."""
    weights = {re.sub("^decoder[.]", "encoder.", name): weight for name, weight in weights.items()}  # of old versions
    found: dict[str, Tensor] = {}
    matrices: dict[int, tuple[Tensor, Tensor]] = {}
    heads = set()
    for name, weight in weights.items():
        if match := re.fullmatch(r"encoder[.]sentence_encoder[.]layers[.](\d+)[.](.*)", name):
            index, inner = match.groups()
            if inner == "self_attn.compress_k.weight":
                matrices[int(index)] = weight, weights.get(name.replace("compress_k", "compress_v"), weight)
            elif not _COPIES.fullmatch(inner):
                _rename(found, _LAYER, name, inner, f"roberta.encoder.layer.{index}.", weight)
        elif match := re.fullmatch(r"encoder[.]sentence_encoder[.](.*)", name):
            _rename(found, _ENCODER, name, match[1], "roberta.", weight)
        elif match := re.fullmatch(r"encoder[.]lm_head[.](.*)", name):
            if head is None:
                found[f"lm_head.{'decoder.weight' if match[1] == 'weight' else match[1]}"] = weight
        elif match := re.fullmatch(r"classification_heads[.]([^.]+)[.](.*)", name):
            heads.add(match[1])
            if match[1] == head:
                found[f"classifier.{match[2]}"] = weight
        elif name != "encoder.version":
            raise ValueError(f'checkpoint holds {name!r}; wanted: a checkpoint of fairseq\'s "linformer_roberta"')
    if not matrices:
        raise ValueError(
            "checkpoint holds no encoder.sentence_encoder.layers.*.self_attn.compress_k.weight; wanted: one of "
            'fairseq\'s "linformer_roberta"; for a RoBERTa: linformerize of the model that transformers makes of it'
        )
    if head is not None and head not in heads:
        raise ValueError(f"head is {head!r} but checkpoint has {sorted(heads) or 'none'}; wanted: one that it has")
    keys, values = zip(*(matrices[index] for index in sorted(matrices)), strict=True)
    return found, list(keys), list(values)


def _rename(
    found: dict[str, Tensor], names: Mapping[str, str | None], name: str, inner: str, prefix: str, weight: Tensor
) -> None:
    """Put the weight into `found` as transformers calls it, if that has it."""
    module, _, kind = inner.rpartition(".")
    known = inner if inner in names else module  # a buffer of the module itself, or a parameter of one within
    if known not in names:
        if inner.startswith("layer_norm."):
            raise NotImplementedError(
                f"checkpoint holds {name!r}, of norms before the layers; wanted: --encoder-normalize-before not set"
            )
        raise ValueError(f'checkpoint holds {name!r}; wanted: a checkpoint of fairseq\'s "linformer_roberta"')
    if names[known] is not None:
        found[f"{prefix}{names[known]}.{kind}"] = weight


def _move_biases(found: dict[str, Tensor]) -> None:
    """From keys, where they have no effect, and from values to the output layer."""
    for name in [name for name in found if re.search(_MOVED, name)]:
        bias, place = found[name], name.split(".self.")[0]
        output = f"{place}.output.dense"
        if name.endswith("value.bias") and f"{output}.bias" in found and f"{output}.weight" in found:
            shift = found[f"{output}.weight"].double() @ bias.double()
            found[f"{output}.bias"] = (found[f"{output}.bias"].double() + shift).to(bias.dtype)
        found[name] = bias.new_zeros(bias.shape)


def _ending(weights: Mapping[str, Tensor], end: str) -> Tensor | None:
    return next((weight for name, weight in weights.items() if name.endswith(f".{end}")), None)


def _with_matrices(
    model: PreTrainedModel, weights: Mapping[str, Tensor], keys: Sequence[Tensor], values: Sequence[Tensor], **kind: Any
) -> PreTrainedModel:
    """The model with these weights, and with E and F (K, N) of each layer, shared as widely as they are equal."""
    alike = all(key.shape == value.shape == keys[0].shape for key, value in zip(keys, values, strict=True))
    if not alike or len(keys) != model.config.num_hidden_layers:
        shapes = sorted({tuple(matrix.shape) for matrix in (*keys, *values)})
        raise ValueError(
            f"checkpoint has matrices E for {len(keys)} layers, of shapes {shapes}; wanted: one of the same shape for "
            f"each of {model.config.num_hidden_layers} layers"
        )
    nn.Module.to(model, keys[0].dtype)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise ValueError(
            f"checkpoint lacks {sorted(missing)} and has {sorted(unexpected)} beyond a {type(model).__name__}; wanted: "
            "all of its weights and no other"
        )
    held = model.state_dict()
    if lost := sorted(name for name, weight in weights.items() if not held[name].equal(weight.to(held[name]))):
        raise ValueError(
            f"checkpoint has other numbers for {', '.join(lost)} than for what config ties it to; wanted: a config "
            "with tie_word_embeddings=False"
        )
    if not all(key.equal(value) for key, value in zip(keys, values, strict=True)):
        sharing = "headwise"
    else:
        sharing = "layerwise" if all(key.equal(keys[0]) for key in keys) else "key_value"
    proj_dim, seq_len = keys[0].shape
    linformerize(model, seq_len, proj_dim, sharing, **kind)
    for matrices, key, value in zip(getattr(model.base_model, NAME), keys, values, strict=False):
        matrices.load_state_dict({"proj_key": key} | ({"proj_value": value} if sharing == "headwise" else {}))
    return model.eval()
