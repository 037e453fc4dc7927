"""The encoders that pretrain_mlm.py and finetune.py train, new ones or those of a checkpoint, and their options.

A checkpoint is the output of pretrain_mlm.py or convert.py, or any encoder of transformers with its tokenizer. It says
itself whether its attention is Linformer or exact.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from training import longest_sequence
from transformers import (
    AttentionInterface,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    set_seed,
)

from linformer_kernels.integrations.transformers import linformerize, load
from linformer_kernels.modules import SHARINGS

SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
CHUNK = 1 << 16  # characters that are tokenized at once

# Options of a new model, with their defaults: a checkpoint has its own.
SHAPE = {
    "attention": "linformer", "layers": 4, "width": 256, "heads": 4, "vocabulary": 8192, "dropout": 0.1,
    "initializer_range": 0.02,
}  # fmt: skip
LINFORMER = {"proj_dim": 128, "sharing": "layerwise", "projection": "learned", "init": "gaussian"}
CHOICES = {
    "attention": ("linformer", "exact", "none"), "sharing": SHARINGS,
    "projection": ("learned", "fixed", "mean", "max", "conv", "adaptive"), "init": ("gaussian", "mean", "identity"),
}  # fmt: skip
MEANING = {"proj_dim": "K; ", "initializer_range": "standard deviation of new weights; "}
SEQ_LEN = 512
SIZES = ("seq_len", "proj_dim", "layers", "width", "heads", "vocabulary")  # options of add_model, more than 0


def add_model(parser: argparse.ArgumentParser) -> Any:
    """Returns a group of options that exclude one another, in which --vocabulary is."""
    parser.add_argument("--checkpoint", type=Path, help="folder of an encoder to start from (default: from scratch)")
    parser.add_argument("--seq-len", type=int, help=f"N; default: the checkpoint's, from scratch {SEQ_LEN}")
    scratch = parser.add_argument_group("from scratch")
    tokens = scratch.add_mutually_exclusive_group()
    for name in SHAPE | LINFORMER:
        _add_option(tokens if name == "vocabulary" else scratch, name)
    return tokens


def add_projection(parser: argparse.ArgumentParser) -> None:
    """N, K and what E and F are, for convert.py, which always makes them."""
    parser.add_argument("--seq-len", type=int, default=SEQ_LEN, help=f"N; default: {SEQ_LEN}")
    for name in ("proj_dim", "sharing", "projection"):
        _add_option(parser, name, default=LINFORMER[name])


def _add_option(group: Any, name: str, **more: Any) -> None:
    usual = (SHAPE | LINFORMER)[name]
    group.add_argument(
        f"--{name.replace('_', '-')}", type=type(usual), choices=CHOICES.get(name),
        help=f"{MEANING.get(name, '')}default: {usual}", **more,
    )  # fmt: skip


def settle_model(options: argparse.Namespace) -> None:
    """Puts what is not given on the command line into the options: from the checkpoint, or the defaults."""
    given = [name for name in SHAPE | LINFORMER if getattr(options, name) is not None]
    if getattr(options, "bytes", False):
        given.append("bytes")
    if options.checkpoint is None:
        other = options.attention not in (None, "linformer")
        if other and (useless := [name for name in given if name in LINFORMER]):
            name = useless[0].replace("_", "-")
            raise ValueError(f"--{name} is of Linformer attention; not for --attention {options.attention}")
        for name, default in (SHAPE if other else SHAPE | LINFORMER).items():
            if name not in given:
                setattr(options, name, default)
        options.seq_len = options.seq_len or SEQ_LEN
        if options.width % options.heads:
            raise ValueError(f"--width {options.width} is not a multiple of --heads {options.heads}")
        return
    if given:
        raise ValueError(f"--{given[0].replace('_', '-')} is for a model from scratch; the checkpoint has its own")
    file = options.checkpoint / "config.json"
    for needed in (file, options.checkpoint / "tokenizer.json"):
        if not needed.is_file():
            raise FileNotFoundError(
                f"--checkpoint: there is no {needed}; wanted: the --output of pretrain_mlm.py or convert.py, or a "
                "folder of an encoder and its tokenizer as save_pretrained writes them"
            )
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(
            f"--checkpoint: {file} is no JSON ({error}); wanted: it as save_pretrained writes it"
        ) from None
    try:
        longest = longest_sequence(config)
    except ValueError as error:
        raise ValueError(f"--checkpoint: {file}: {error}") from None
    settings = config.get("linformer")
    none = config.get("attn_implementation") == "none"
    options.attention = "linformer" if settings is not None else "none" if none else "exact"
    if settings is not None:
        options.proj_dim, options.sharing = settings["proj_dim"], settings["sharing"]
        options.projection = settings["projection"]
    if options.seq_len is not None and options.seq_len > longest:
        raise ValueError(f"--seq-len is {options.seq_len}; wanted: at most the checkpoint's {longest}")
    options.seq_len = options.seq_len or longest


def in_words(options: argparse.Namespace) -> str:
    return f"{options.attention}, " + (f"from {options.checkpoint}" if options.checkpoint else "from scratch")


def train_tokenizer(text: str, vocabulary: int, seq_len: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, as RoBERTa's, of the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = list(SPECIAL.values())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(chunks(text), trainer)
    pair = [(name, tokenizer.token_to_id(name)) for name in ("</s>", "<s>")]
    tokenizer.post_processor = processors.RobertaProcessing(*pair)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=seq_len, cls_token="<s>", sep_token="</s>", **SPECIAL
    )


def chunks(text: str) -> list[str]:
    return [text[start : start + CHUNK] for start in range(0, len(text), CHUNK)]


def no_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """The control: a model in which no position sees another. What it learns, attention did not teach."""
    return value.transpose(1, 2), None


AttentionInterface.register("none", no_attention)


def from_checkpoint(options: argparse.Namespace, auto_class: Any, **more: Any) -> PreTrainedModel:
    """The checkpoint's encoder in a model of this kind, with its attention; what is new in it is drawn by the seed.

    In fp32, whatever it was saved in: --precision is that of the steps.
    """
    set_seed(options.seed)
    if options.attention == "linformer":
        model: PreTrainedModel = load(auto_class, str(options.checkpoint), dtype=torch.float32, **more)
        return model
    if options.attention == "none":
        more["attn_implementation"] = "none"
    return auto_class.from_pretrained(str(options.checkpoint), dtype=torch.float32, **more)


def from_scratch(
    options: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, model_class: Any, **more: Any
) -> PreTrainedModel:
    """A new RoBERTa of the shape in the options, with their attention; `more` is for its config."""
    set_seed(options.seed)
    pad = tokenizer.pad_token_id
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=options.width, num_hidden_layers=options.layers,
        num_attention_heads=options.heads, intermediate_size=4 * options.width, type_vocab_size=1,
        max_position_embeddings=options.seq_len + pad + 1, pad_token_id=pad, bos_token_id=0, eos_token_id=2,
        hidden_dropout_prob=options.dropout, attention_probs_dropout_prob=options.dropout,
        initializer_range=options.initializer_range, **more,
    )  # fmt: skip
    model = model_class(config)
    if options.attention != "linformer":
        model.set_attn_implementation("sdpa" if options.attention == "exact" else "none")
        if options.attention == "none":
            model.config.attn_implementation = "none"  # in config.json: its weights fit no other attention
        return model
    return linformerize(
        model, options.seq_len, options.proj_dim, options.sharing, init=options.init, projection=options.projection
    )
