"""Masked bytes where attention matters: the model of examples/train_mlm.py on windows that hold one text several times.

    python docs/results/copies.py --attention linformer --seq-len 512 --proj-dim 128 --record FILE

A window is a stretch of PERIOD bytes again and again, each time from another byte of it on, and the masks differ from
copy to copy. So a masked byte stands elsewhere in the window, most often unmasked, and attention can find it by its
neighbors. On plain text this model learns from its convolution alone for far longer than these runs last: one without
attention is as good. Its text is the standard library of the running Python. plan.py runs it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import train_mlm
from corpus import read_corpus, unigram_bits
from recording import arguments, machine

PERIOD = 128
TOKENS = 2048  # of a step
EVALUATE_EVERY = 50
HELD_OUT_TOKENS = 32_768


def windows(text: Tensor, starts: Tensor, seq_len: int, generator: torch.Generator) -> train_mlm.Batch:
    """Of the stretches of text that begin there."""
    stretch = train_mlm.windows_at(text, starts, PERIOD)
    turn = torch.randint(0, PERIOD, (len(starts), seq_len // PERIOD, 1), generator=generator)
    index = ((torch.arange(PERIOD) + turn) % PERIOD).flatten(1)
    return train_mlm.mask_windows(stretch.gather(1, index), generator)


def parse_arguments(command_line: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains one model on windows that hold a text several times.")
    parser.add_argument("--attention", choices=["linformer", "exact", "none"], default="linformer")
    for name, default in (("seq_len", 512), ("proj_dim", 128), ("steps", 500), ("seed", 0)):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--output", type=Path, help="not used: a run of a minute keeps no checkpoint")
    parser.add_argument("--record", type=Path)
    options = parser.parse_args(command_line)
    if options.seq_len % PERIOD or TOKENS % options.seq_len:
        parser.error(f"--seq-len is {options.seq_len}; wanted: a multiple of {PERIOD} that divides {TOKENS}")
    return options


def train(options: argparse.Namespace) -> dict[str, Any]:
    corpus = read_corpus(None)
    settings = train_mlm.Settings(
        options.seq_len, options.proj_dim, "layerwise", layers=2, width=64, heads=4,
        batch=TOKENS // options.seq_len, lr=options.lr, seed=options.seed,
    )  # fmt: skip
    run = train_mlm.new_run(options.attention, settings)
    fixed = torch.Generator().manual_seed(0)  # every run is held against the same windows and masks of its N
    starts = torch.linspace(0, len(corpus.held_out) - PERIOD, HELD_OUT_TOKENS // options.seq_len).long()
    held_out = [windows(corpus.held_out, some, options.seq_len, fixed) for some in starts.split(settings.batch)]
    record: dict[str, Any] = {
        "arguments": arguments(options), "text": corpus.name, "unigram_bits": unigram_bits(corpus),
        "weights": sum(parameter.numel() for parameter in run.model.parameters()), "machine": machine(), "held_out": [],
    }  # fmt: skip
    cpu_seconds = 0.0
    while run.step < options.steps:
        starts = torch.randint(0, len(corpus.train) - PERIOD + 1, (settings.batch,), generator=run.generator)
        batch = windows(corpus.train, starts, options.seq_len, run.generator)
        started = time.process_time()
        train_mlm.train_step(run, batch, options.lr)
        cpu_seconds += time.process_time() - started
        if run.step % EVALUATE_EVERY == 0 or run.step == options.steps:
            train_mlm.evaluate(run, held_out)
            point = run.held_out[-1]
            seconds = {"seconds": round(run.seconds, 2), "cpu_seconds": round(cpu_seconds, 2)}
            record["held_out"].append({"step": run.step, **seconds, "bits": point.bits})
            print(record["held_out"][-1], flush=True)
    return record


def main(command_line: list[str] | None = None) -> dict[str, Any]:
    options = parse_arguments(command_line)
    record = train(options)
    if options.record:
        options.record.write_text(json.dumps(record, indent=1) + "\n")
    return record


if __name__ == "__main__":
    main()
