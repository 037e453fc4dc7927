"""Fine-tuning on IMDB, SST-2, QNLI or QQP, from a pretrained encoder or from scratch; accuracy and F1.

    python examples/finetune.py --task imdb --data aclImdb --checkpoint runs/wiki --output runs/imdb
    python examples/finetune.py --task imdb --data aclImdb_v1.tar.gz --bytes --seq-len 4096 --proj-dim 256 --output ...
    python examples/finetune.py --task sst2 --data SST-2 --attention exact --output ...
    torchrun --nproc-per-node 2 examples/finetune.py ...              # on several GPUs, or on several CPU processes

The data is read as it is distributed, see tasks.py. A checkpoint is the output of pretrain_mlm.py or convert.py or any
encoder of transformers with its tokenizer, see encoder.py. From scratch the options say what the model is, and tokens
are bytes (`--bytes`: the text task of the long range arena) or those of a tokenizer trained on the task's text. Batches
are padded to their longest sequence and the padding takes no part.
`--record FILE` writes what was run and measured as JSON.
"""

from __future__ import annotations

import argparse
import os
import random
from pathlib import Path
from typing import Any

import torch
from checkpoints import WholeCheckpoints
from encoder import SIZES, SPECIAL, add_model, from_checkpoint, from_scratch, in_words, settle_model, train_tokenizer
from recording import Recorder, arguments, machine
from tasks import TASKS, Example, Task, read_task
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from training import (
    MAIN_PROCESS,
    add_options,
    check_options,
    count_in_words,
    count_weights,
    refusals,
    run,
    trainer_arguments,
)
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaForSequenceClassification,
)

BYTES = len(SPECIAL) + 256  # a byte-level vocabulary of this size has room for bytes alone


class Encoded(Dataset):
    """Examples as tokens, cut to seq_len; `segments`: and which text of a pair each token is of, as BERT wants it."""

    def __init__(
        self, examples: list[Example], tokenizer: PreTrainedTokenizerFast, seq_len: int, segments: bool = False
    ) -> None:
        shortest = tokenizer.num_special_tokens_to_add(pair := examples[0].pair is not None) + 1 + pair
        if seq_len < shortest:
            raise ValueError(f"--seq-len is {seq_len}; wanted: at least {shortest}, for special tokens and some text")
        self.labels = [example.label for example in examples]
        self.names = ["input_ids", *["token_type_ids"] * segments]
        self.tokens: list[tuple[Tensor, ...]] = []
        for start in range(0, len(examples), 1024):  # lists of Python's numbers are 8 times as large
            part = examples[start : start + 1024]
            texts = [example.text for example in part]
            pairs = None if part[0].pair is None else [example.pair for example in part]
            encoded = tokenizer(
                texts, pairs, truncation=True, max_length=seq_len, split_special_tokens=True,
                return_token_type_ids=segments,
            )  # fmt: skip
            rows = zip(*(encoded[name] for name in self.names), strict=True)
            self.tokens += [tuple(torch.tensor(ids, dtype=torch.int32) for ids in row) for row in rows]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(zip(self.names, self.tokens[index], strict=True)) | {"labels": self.labels[index]}


class Pad:
    """Makes a batch as long as its longest sequence, with the mask of what is text."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        batch = {
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
            "labels": torch.tensor([example["labels"] for example in examples]),
        }
        for name, padding in (("input_ids", self.pad), ("token_type_ids", 0)):
            if name in examples[0]:
                tokens = [example[name].long() for example in examples]
                batch[name] = pad_sequence(tokens, batch_first=True, padding_value=padding)
        return batch


def accuracy_and_f1(prediction: EvalPrediction) -> dict[str, float]:
    """F1 of the label 1, and 0 where it is neither predicted nor right."""
    predicted, labels = prediction.predictions.argmax(-1), prediction.label_ids
    both = int(((predicted == 1) & (labels == 1)).sum())
    either = int((predicted == 1).sum() + (labels == 1).sum())
    return {"accuracy": float((predicted == labels).mean()), "f1": 2 * both / either if either else 0.0}


def subset(examples: list[Example], count: int | None, seed: int) -> list[Example]:
    if count is None:
        return examples
    return [examples[index] for index in sorted(random.Random(seed).sample(range(len(examples)), count))]


def characters(example: Example) -> int:
    return len(example.text) + len(example.pair or "")


def make_model(options: argparse.Namespace, task: Task) -> tuple[PreTrainedTokenizerFast, PreTrainedModel]:
    names = dict(enumerate(task.labels))
    labels = {"num_labels": len(names), "id2label": names, "label2id": {name: label for label, name in names.items()}}
    if options.checkpoint:
        tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
        return tokenizer, from_checkpoint(options, AutoModelForSequenceClassification, **labels)
    text = "" if options.bytes else "\n".join(f"{example.text}\n{example.pair or ''}" for example in task.train)
    tokenizer = train_tokenizer(text, options.vocabulary, options.seq_len)
    return tokenizer, from_scratch(options, tokenizer, RobertaForSequenceClassification, **labels)


def parse_arguments(command_line: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tunes a classifier and evaluates it.")
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--data", type=Path, required=True, help="aclImdb or its tar.gz; GLUE's folder of tsv files")
    parser.add_argument("--output", type=Path, required=True, help="folder for the final model")
    add_model(parser).add_argument("--bytes", action="store_true", help="tokens are bytes")
    add_options(parser, batch=16, lr=1e-4, warmup="a tenth", every="a fifth")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float, help="default: 3")
    length.add_argument("--steps", type=int, help="instead of --epochs")
    parser.add_argument("--group-by-length", action="store_true", help="sequences of like length share a batch")
    parser.add_argument("--train-examples", type=int, help="train on so many, drawn by the seed (default: all)")
    parser.add_argument("--evaluation-examples", type=int, help="evaluate so many, always the same (default: all)")
    options = parser.parse_args(command_line)
    check_options(parser, options, "steps", "train_examples", "evaluation_examples", *SIZES)
    if options.epochs is None and options.steps is None:
        options.epochs = 3.0
    if options.group_by_length and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parser.error("--group-by-length is for one process; under torchrun each would draw groups of its own")
    try:
        settle_model(options)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if options.bytes:
        options.vocabulary = BYTES
    try:
        task = read_task(options.task, options.data)
    except (OSError, ValueError) as error:
        parser.error(f"--data: {error}")
    for name, examples in (("train", task.train), ("evaluation", task.evaluation)):
        count = getattr(options, f"{name}_examples")
        if count is not None and count > len(examples):
            parser.error(f"--{name}-examples is {count:,}, but {options.data} has {len(examples):,}")
    options.read = task
    return options


def table(rows: list[dict[str, str]]) -> str:
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    lines = [{name: name for name in widths}, *rows]
    return "\n".join("  ".join(line[name].rjust(width) for name, width in widths.items()) for line in lines)


def main(command_line: list[str] | None = None) -> dict[str, Any]:
    options = parse_arguments(command_line)
    task: Task = options.read
    with refusals():
        tokenizer, model = make_model(options, task)
    # The longest sequences last: batches of the evaluation hold little padding.
    evaluation = sorted(subset(task.evaluation, options.evaluation_examples, seed=0), key=characters)
    train = subset(task.train, options.train_examples, options.seed)
    weights = count_weights(model)
    segments = getattr(model.config, "type_vocab_size", 1) > 1
    with refusals():
        encoded = [Encoded(part, tokenizer, options.seq_len, segments) for part in (train, evaluation)]
    if MAIN_PROCESS:
        print(f"Task: {options.task}, {len(train):,} examples to train on, {len(evaluation):,} for evaluation")
        for note in task.notes:
            print(f"Note: {note}")
        print(f"Model: {in_words(options)}, {count_in_words(weights)}")
    record = {
        "arguments": arguments(options, "read"), "train_examples": len(train), "evaluation_examples": len(evaluation),
        "labels": list(task.labels), "notes": task.notes, **weights, "machine": machine(),
    }  # fmt: skip
    recorder = Recorder(record, options.record)
    trainer = WholeCheckpoints(
        model=model,
        args=trainer_arguments(
            options,
            every=0.2,
            warmup=0.1,
            num_train_epochs=options.epochs or 1,  # not used with max_steps
            max_steps=options.steps or -1,
            train_sampling_strategy="group_by_length" if options.group_by_length else "random",
        ),
        data_collator=Pad(tokenizer.pad_token_id),
        train_dataset=encoded[0],
        eval_dataset=encoded[1],
        processing_class=tokenizer,
        compute_metrics=accuracy_and_f1,
        callbacks=[recorder],
    )
    trainer.train()
    trainer.save_whole_model()
    if MAIN_PROCESS:
        last = record["held_out"][-1]
        row = {
            "task": options.task, "attention": options.attention, "N": str(options.seq_len),
            "K": str(options.proj_dim) if options.attention == "linformer" else "-", 
            "weights": f"{weights['weights']:,}",
            "accuracy": f"{last['accuracy']:.4f}", f"F1 of {task.labels[1]}": f"{last['f1']:.4f}",
            "minutes of steps": f"{recorder.seconds / 60:.1f}",
        }  # fmt: skip
        print("\n" + table([row]))
        print(f"Saved: {options.output}")
    return record


if __name__ == "__main__":
    run(main)
