"""Masked language modelling from your own text: RoBERTa with Linformer attention, or with its own for comparison.

    python examples/pretrain_mlm.py --data PATH --seq-len 512 --proj-dim 128 --steps 2000 --output runs/wiki
    torchrun --nproc-per-node 2 examples/pretrain_mlm.py ...          # on several GPUs, or on several CPU processes
    python examples/pretrain_mlm.py --output runs/wiki --resume ...   # go on from the last checkpoint

PATH is a text file or a folder of them; the default is the text of Python's standard library. A tokenizer is trained
on it, a tenth is held out, and transformers' Trainer does the rest. The checkpoint loads with
`linformer_kernels.integrations.transformers.load` (Linformer) or from_pretrained (exact), and examples/finetune.py
takes it. `--record FILE` writes what was run and measured as JSON.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from corpus import read_corpus
from recording import Recorder, arguments, machine
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.utils.data import Dataset
from training import (
    MAIN_PROCESS,
    add_options,
    add_projection,
    add_resume,
    check_options,
    count_in_words,
    count_weights,
    trainer_arguments,
)
from transformers import (
    AttentionInterface,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    Trainer,
    set_seed,
)

from linformer_kernels.integrations.transformers import linformerize

SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
CHUNK = 1 << 16  # characters that are tokenized at once


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


class Blocks(Dataset):
    """Text cut into sequences of one length, each between the special tokens `before` and `after`."""

    def __init__(
        self, text: str, tokenizer: PreTrainedTokenizerFast, seq_len: int, before: list[int], after: list[int]
    ) -> None:
        encoded = tokenizer.backend_tokenizer.encode_batch(chunks(text), add_special_tokens=False)
        ids = torch.cat([torch.tensor(part.ids) for part in encoded])
        inner = seq_len - len(before) - len(after)
        count = len(ids) // inner
        if count == 0:
            raise ValueError(f"{len(ids):,} tokens of text do not fill one sequence of {seq_len}; wanted: more text")
        first, last = (torch.tensor(tokens, dtype=torch.long).expand(count, -1) for tokens in (before, after))
        self.ids = torch.cat((first, ids[: count * inner].view(count, inner), last), 1)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index]}


class MaskedBlocks(Dataset):
    """The first `count` blocks with masks drawn once: the same question for every model and at every evaluation."""

    def __init__(self, blocks: Blocks, count: int, collator: DataCollatorForLanguageModeling) -> None:
        state = torch.get_rng_state()
        torch.manual_seed(0)
        self.batch = collator([blocks[index] for index in range(min(count, len(blocks)))])
        torch.set_rng_state(state)

    def __len__(self) -> int:
        return len(self.batch["input_ids"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[index] for name, tensor in self.batch.items()}


class MaskOnce(DataCollatorForLanguageModeling):
    """Masks 15 % of the tokens as BERT does, unless that has been done."""

    def torch_call(self, examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        if "labels" in examples[0]:
            return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
        return super().torch_call(examples)


def no_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """The control: a model in which no position sees another. What it learns, attention did not teach."""
    return value.transpose(1, 2), None


AttentionInterface.register("none", no_attention)


def build(
    options: argparse.Namespace, vocabulary: int, pad: int, model_class: Any = RobertaForMaskedLM, **more: Any
) -> PreTrainedModel:
    """A new RoBERTa of the shape in the options, with their attention; `more` is for its config."""
    config = RobertaConfig(
        vocab_size=vocabulary, hidden_size=options.width, num_hidden_layers=options.layers,
        num_attention_heads=options.heads, intermediate_size=4 * options.width, type_vocab_size=1,
        max_position_embeddings=options.seq_len + pad + 1, pad_token_id=pad, bos_token_id=0, eos_token_id=2,
        hidden_dropout_prob=options.dropout, attention_probs_dropout_prob=options.dropout,
        initializer_range=options.initializer_range, **more,
    )  # fmt: skip
    model = model_class(config)
    if options.attention != "linformer":
        model.set_attn_implementation("sdpa" if options.attention == "exact" else "none")
        return model
    return linformerize(
        model, options.seq_len, options.proj_dim, options.sharing, init=options.init, projection=options.projection
    )


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains a masked language model on your text.")
    parser.add_argument("--data", type=Path, help="a text file or a folder (default: Python's standard library)")
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints and the final model")
    parser.add_argument("--attention", choices=["linformer", "exact", "none"], default="linformer")
    add_projection(parser)
    parser.add_argument("--init", choices=["gaussian", "mean", "identity"], default="gaussian")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--initializer-range", type=float, default=0.02, help="standard deviation of new weights")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--evaluation-sequences", type=int, default=64)
    add_options(parser, batch=8, lr=1e-3, warmup="a twentieth", every="a twentieth")
    add_resume(parser)
    options = parser.parse_args(arguments)
    if options.width % options.heads:
        parser.error(f"--width {options.width} is not a multiple of --heads {options.heads}")
    check_options(parser, options, "steps", "evaluation_sequences")
    try:
        options.corpus = read_corpus(options.data)
    except (OSError, ValueError) as error:
        parser.error(f"--data: {error}")
    return options


def read(options: argparse.Namespace) -> tuple[PreTrainedTokenizerFast, Blocks, MaskedBlocks, MaskOnce]:
    """A tokenizer of the text, what to train on and to evaluate, and what masks it."""
    texts = options.corpus.texts()
    tokenizer = train_tokenizer(texts[0], options.vocabulary, options.seq_len)
    begin = [tokenizer.bos_token_id]
    train, held_out = (Blocks(text, tokenizer, options.seq_len, begin, []) for text in texts)
    collator = MaskOnce(tokenizer, mlm_probability=0.15)
    return tokenizer, train, MaskedBlocks(held_out, options.evaluation_sequences, collator), collator


def main(command_line: list[str] | None = None) -> dict[str, Any]:
    options = parse_arguments(command_line)
    set_seed(options.seed)
    tokenizer, train, evaluation, collator = read(options)
    set_seed(options.seed)
    model = build(options, len(tokenizer), tokenizer.pad_token_id)
    weights = count_weights(model)
    if MAIN_PROCESS:
        print(f"Text: {options.corpus.name}, {train.ids.numel():,} tokens to train on")
        print(f"Model: {options.attention}, {count_in_words(weights)}")
    record = {
        "arguments": arguments(options, "corpus"), "tokens": train.ids.numel(), **weights, "machine": machine(),
    }  # fmt: skip
    recorder = Recorder(record, options.record)
    trainer = Trainer(
        model=model,
        args=trainer_arguments(
            options,
            every=max(1, options.steps // 20),
            warmup=options.steps // 20,
            max_steps=options.steps,
            eval_on_start=True,
        ),
        data_collator=collator,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        callbacks=[recorder],
    )
    trainer.train(resume_from_checkpoint=options.resume or None)
    trainer.save_model()
    if MAIN_PROCESS:
        loss = record["held_out"][-1]["loss"]
        print(
            f"Held out: loss {loss:.3f}, perplexity {math.exp(loss):.1f}; {recorder.seconds / 60:.1f} minutes of steps"
        )
        print(f"Saved: {options.output}")
    return record


if __name__ == "__main__":
    main()
