"""What the scripts that train with transformers' Trainer share: options, their checks, and the Trainer's arguments."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from checkpoints import Unreadable, WholeCheckpoints, last_checkpoint, read_record
from recording import KEPT
from safetensors import SafetensorError
from torch import distributed
from transformers import PreTrainedModel, TrainingArguments

# They count positions from the number of the padding token on.
POSITIONS_AFTER_PADDING = (
    "roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "data2vec-text", "esm", "mpnet",
)  # fmt: skip
MAIN_PROCESS = int(os.environ.get("RANK", "0")) == 0  # of those that torchrun started


def run(main: Callable[[], object]) -> None:
    """`main`, then the processes of torchrun part; without that, a thread of gloo's may abort one as Python ends."""
    main()
    if distributed.is_initialized():
        distributed.destroy_process_group()


REFUSED = (OSError, ValueError, NotImplementedError, SafetensorError)  # in words, by what reads and makes models


@contextmanager
def refusals() -> Iterator[None]:
    """What cannot be read, or does not fit together, ends the script with its own sentence and no traceback."""
    try:
        yield
    except REFUSED as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def add_options(parser: argparse.ArgumentParser, batch: int, lr: float, warmup: str, every: str) -> None:
    """Options of every training with their defaults; `warmup` and `every` say which share of all steps."""
    parser.add_argument("--batch", type=int, default=batch, help="sequences a step and process")
    parser.add_argument("--accumulate", type=int, default=1, help="steps whose gradients are summed")
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--warmup", type=int, help=f"steps; default: {warmup} of all")
    parser.add_argument("--evaluate-every", type=int, help=f"steps; default: {every} of all")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="write what was run and measured to this JSON file")


def add_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resume", action="store_true", help="go on from the last whole checkpoint in --output")
    parser.add_argument(
        "--incomplete", action="store_true",
        help="with --resume: also from a checkpoint that lacks the state of optimizer, schedule or random numbers, or "
        "the record, which begin anew",
    )  # fmt: skip


_POSITIVE = "more than 0", lambda value: 0 < value < math.inf
_RANGES = {
    "lr": _POSITIVE, "epochs": _POSITIVE, "initializer_range": _POSITIVE,
    "warmup": ("0 or more", lambda value: value >= 0),
    "seed": ("from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32),
    "dropout": ("from 0 to less than 1", lambda value: 0 <= value < 1),
}  # fmt: skip


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace, *positive: str) -> None:
    """Refuses what cannot work before anything is read; `positive`: further options that must be more than 0."""
    ranges = dict.fromkeys(("batch", "accumulate", "evaluate_every", *positive), _POSITIVE) | _RANGES
    for name, (wanted, fits) in ranges.items():
        value = getattr(options, name, None)
        if value is not None and not fits(value):
            parser.error(f"--{name.replace('_', '-')} is {value}; wanted: {wanted}")
    if options.record and not options.record.parent.is_dir():
        parser.error(f"--record: there is no folder {options.record.parent}")
    if options.record and options.record.is_dir():
        parser.error(f"--record: {options.record} is a folder; wanted: a file")
    if options.output.exists() and not options.output.is_dir():
        parser.error(f"--output: {options.output} is a file; wanted: a folder")
    if not hasattr(options, "resume"):
        return
    found = any(options.output.glob("checkpoint-*"))
    if options.incomplete and not options.resume:
        parser.error("--incomplete is of --resume")
    if options.resume:
        last, said = last_checkpoint(options.output, options.incomplete)
        if last is None:
            why = "; ".join(["", *said]) + ("; --incomplete goes on without" if "it has no " in "".join(said) else "")
            parser.error(f"--resume: there is no checkpoint in {options.output} to go on from{why}")
    if found and not options.resume:  # of two runs' checkpoints the one with most steps would be kept and resumed
        parser.error(f"--output: {options.output} has checkpoints of another run; wanted: --resume, or a new folder")


def check_resumed(parser: argparse.ArgumentParser, options: argparse.Namespace, arguments: dict[str, Any]) -> None:
    """A run goes on with the arguments that it was begun with; it may become longer."""
    if not options.resume:
        return
    last, _ = last_checkpoint(options.output, options.incomplete)
    assert last is not None  # check_options has refused it
    done = int(last.name.split("-")[1])
    if options.steps < done:
        parser.error(f"--steps is {options.steps}, but {last} has {done} already; wanted: no fewer")
    if not (last / KEPT).is_file():
        return
    for name, value in read_record(last / KEPT)["arguments"].items():
        if name not in ("steps", "evaluate_every", "resume", "incomplete") and arguments.get(name) != value:
            parser.error(
                f"--{name.replace('_', '-')} is {arguments.get(name)}, but the run in {options.output} was begun with "
                f"{value}; wanted: the same, or another --output without --resume"
            )


def train(trainer: WholeCheckpoints, options: argparse.Namespace) -> None:
    """From the beginning, or with --resume from the last whole checkpoint; and the final model."""
    last = None
    if options.resume:
        last, said = last_checkpoint(options.output, options.incomplete)
        for line in [*said, f"Going on from {last}"] if MAIN_PROCESS else []:
            print(line, flush=True)
    try:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    except Unreadable as error:
        print(f"{Path(sys.argv[0]).name}: error: --resume: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    trainer.save_whole_model()


def trainer_arguments(options: argparse.Namespace, every: float, warmup: float, **more: Any) -> TrainingArguments:
    """`every` and `warmup`: in steps, or a fraction of all, where the options do not say."""
    every = options.evaluate_every or every
    return TrainingArguments(
        output_dir=str(options.output),
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.lr,
        warmup_steps=warmup if options.warmup is None else options.warmup,
        lr_scheduler_type="linear",
        adam_beta2=0.98,
        eval_strategy="steps",
        eval_steps=every,
        logging_steps=every,
        bf16=options.precision == "bf16",
        fp16=options.precision == "fp16",
        use_cpu=not torch.cuda.is_available(),
        ddp_backend="gloo" if "RANK" in os.environ and not torch.cuda.is_available() else None,
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
        seed=options.seed,
        **({"save_steps": every, "save_total_limit": 1} if hasattr(options, "resume") else {"save_strategy": "no"}),
        **({"weight_decay": 0.01} | more),
    )


def count_weights(model: PreTrainedModel) -> dict[str, int]:
    """All, and those of E and F."""
    named = [(name, parameter.numel()) for name, parameter in model.named_parameters()]
    return {
        "weights": sum(count for _, count in named),
        "projection_weights": sum(count for name, count in named if ".linformer." in f".{name}"),
    }


def count_in_words(weights: dict[str, int]) -> str:
    return f"{weights['weights']:,} weights, {weights['projection_weights']:,} of them in E and F"


def longest_sequence(config: dict[str, Any]) -> int:
    """Of an encoder, by its config.json: what its embeddings of positions allow, and E and F where it has them."""
    positions, padding = config.get("max_position_embeddings"), config.get("pad_token_id")
    if positions is None or padding is None:
        raise ValueError("its config has no max_position_embeddings or no pad_token_id; wanted: an encoder of text")
    longest = positions - padding - 1 if config.get("model_type") in POSITIONS_AFTER_PADDING else positions
    return min(longest, (config.get("linformer") or {}).get("seq_len") or longest)  # None: any length
