"""Masked language modelling from your own text: RoBERTa with Linformer attention, or with its own for comparison.

    python examples/pretrain_mlm.py --data PATH --seq-len 512 --proj-dim 128 --steps 2000 --output runs/wiki
    python examples/pretrain_mlm.py --data PATH --checkpoint runs/converted --output runs/adapted   # goes on from it
    torchrun --nproc-per-node 2 examples/pretrain_mlm.py ...          # on several GPUs, or on several CPU processes
    python examples/pretrain_mlm.py --output runs/wiki --resume ...   # go on from its last whole checkpoint

PATH is a text file or a folder of them; the default is the text of Python's standard library. A tenth of it is held
out, and transformers' Trainer does the rest. A new model comes with a tokenizer trained on the text; a checkpoint (see
encoder.py) has its own, and its own attention. The output loads with
`linformer_kernels.integrations.transformers.load` (Linformer) or from_pretrained (exact), and examples/finetune.py
takes it. `--record FILE` writes what was run and measured as JSON.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from checkpoints import WholeCheckpoints
from corpus import read_corpus
from encoder import SIZES, add_model, chunks, from_checkpoint, from_scratch, in_words, settle_model, train_tokenizer
from recording import Recorder, arguments, machine
from torch import Tensor
from torch.utils.data import Dataset
from training import (
    MAIN_PROCESS,
    add_options,
    add_resume,
    check_options,
    check_resumed,
    count_in_words,
    count_weights,
    refusals,
    run,
    train,
    trainer_arguments,
)
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    RobertaForMaskedLM,
    set_seed,
)


class Blocks(Dataset):
    """Text cut into sequences of one length, each between the special tokens `before` and `after`."""

    def __init__(
        self, text: str, tokenizer: PreTrainedTokenizerFast, seq_len: int, before: list[int], after: list[int]
    ) -> None:
        inner = seq_len - len(before) - len(after)
        if inner < 1:
            raise ValueError(f"--seq-len is {seq_len}, of which special tokens take {seq_len - inner}; wanted: more")
        # "[MASK]" in a text is text. Where it has "<unk>" alone, as WikiText, that is meant.
        special = set(tokenizer.all_special_tokens) - {tokenizer.unk_token}
        tokenizer.backend_tokenizer.encode_special_tokens = any(token in text for token in special)
        encoded = tokenizer.backend_tokenizer.encode_batch(chunks(text), add_special_tokens=False)
        tokenizer.backend_tokenizer.encode_special_tokens = False
        ids = torch.cat([torch.tensor(part.ids) for part in encoded])
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


def parse_arguments(command_line: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains a masked language model on your text.")
    parser.add_argument("--data", type=Path, help="a text file or a folder (default: Python's standard library)")
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints and the final model")
    add_model(parser)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--evaluation-sequences", type=int, default=64)
    add_options(parser, batch=8, lr=1e-3, warmup="a twentieth", every="a twentieth")
    add_resume(parser)
    options = parser.parse_args(command_line)
    check_options(parser, options, "steps", "evaluation_sequences", *SIZES)
    try:
        settle_model(options)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    try:
        options.corpus = read_corpus(options.data)
    except (OSError, ValueError) as error:
        parser.error(f"--data: {error}")
    check_resumed(parser, options, arguments(options, "corpus"))
    return options


def read(options: argparse.Namespace) -> tuple[PreTrainedTokenizerFast, Blocks, MaskedBlocks, MaskOnce]:
    """A tokenizer, what to train on and to evaluate, and what masks it."""
    texts = options.corpus.texts()
    if options.checkpoint:
        tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
        before, *after = tokenizer("")["input_ids"]  # [CLS] and [SEP], or what the model has for them
    else:
        tokenizer = train_tokenizer(texts[0], options.vocabulary, options.seq_len)
        before, after = tokenizer.bos_token_id, []
    train, held_out = (Blocks(text, tokenizer, options.seq_len, [before], after) for text in texts)
    collator = MaskOnce(tokenizer, mlm_probability=0.15)
    return tokenizer, train, MaskedBlocks(held_out, options.evaluation_sequences, collator), collator


def main(command_line: list[str] | None = None) -> dict[str, Any]:
    options = parse_arguments(command_line)
    set_seed(options.seed)
    with refusals():
        tokenizer, blocks, evaluation, collator = read(options)
        if options.checkpoint:
            model = from_checkpoint(options, AutoModelForMaskedLM)
        else:
            model = from_scratch(options, tokenizer, RobertaForMaskedLM)
    weights = count_weights(model)
    if MAIN_PROCESS:
        print(f"Text: {options.corpus.name}, {blocks.ids.numel():,} tokens to train on")
        print(f"Model: {in_words(options)}, {count_in_words(weights)}")
    record = {
        "arguments": arguments(options, "corpus"), "tokens": blocks.ids.numel(), **weights, "machine": machine(),
    }  # fmt: skip
    recorder = Recorder(record, options.record)
    trainer = WholeCheckpoints(
        model=model,
        args=trainer_arguments(
            options,
            every=max(1, options.steps // 20),
            warmup=options.steps // 20,
            max_steps=options.steps,
            eval_on_start=True,
        ),
        data_collator=collator,
        train_dataset=blocks,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        callbacks=[recorder],
    )
    train(trainer, options)
    if MAIN_PROCESS:
        loss = record["held_out"][-1]["loss"]
        print(
            f"Held out: loss {loss:.3f}, perplexity {math.exp(loss):.1f}; {recorder.seconds / 60:.1f} minutes of steps"
        )
        print(f"Saved: {options.output}")
    return record


if __name__ == "__main__":
    run(main)
