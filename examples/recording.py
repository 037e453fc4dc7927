"""What a training run was and what it measured, for the JSON file of --record: arguments, machine, metrics, time."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback

KEPT = "recorded.json"  # in a checkpoint
SPEED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")  # of an evaluation: left out


class Recorder(TrainerCallback):
    """record["held_out"]: metrics against steps and seconds of training without evaluation, by the clock and of
    the processor (the two differ on a busy machine); and the file of the record.

    Each checkpoint keeps what was measured up to it, so that a resumed run records the whole run.
    """

    def __init__(self, record: dict[str, Any], path: Path | None = None) -> None:
        self.record, self.path = record, path
        self.seconds, self.cpu_seconds, self.started = 0.0, 0.0, (0.0, 0.0)
        self.record["held_out"] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        kept = _kept(args, state)
        if state.global_step > 0 and kept.is_file():
            before = json.loads(kept.read_text())
            self.seconds, self.cpu_seconds = before["seconds"], before["cpu_seconds"]
            self.record["held_out"] = before["held_out"]

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # or the optimizer's work would be counted in the next step, or nowhere
        self.seconds += time.perf_counter() - self.started[0]
        self.cpu_seconds += time.process_time() - self.started[1]

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        measured = {name[5:]: value for name, value in metrics.items() if name.startswith("eval_")}
        seconds = {"seconds": round(self.seconds, 1), "cpu_seconds": round(self.cpu_seconds, 1)}
        point = {"step": state.global_step, **seconds}
        point |= {name: value for name, value in measured.items() if name not in SPEED}
        held_out = self.record["held_out"]
        if held_out and held_out[-1]["step"] == state.global_step:  # a resumed run evaluates at its start
            held_out.pop()
        held_out.append(point)
        if self.path is not None and state.is_world_process_zero:
            part = self.path.with_name(self.path.name + ".part")  # a run that is killed leaves the record before
            part.write_text(json.dumps(self.record, indent=1) + "\n")
            part.replace(self.path)

    def keep(self, checkpoint: Path) -> None:
        """Into a checkpoint that is being written."""
        kept = {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
        kept |= {name: self.record[name] for name in ("held_out", "arguments")}
        (checkpoint / KEPT).write_text(json.dumps(kept) + "\n")


def _kept(args: Any, state: Any) -> Path:
    return Path(args.output_dir, f"checkpoint-{state.global_step}", KEPT)


def arguments(options: argparse.Namespace, *left_out: str) -> dict[str, Any]:
    """The options as JSON knows them; of a path its last part, as the rest says more of the machine than of the run."""
    named = {name: value for name, value in vars(options).items() if name not in ("output", "record", *left_out)}
    return {name: value.name if isinstance(value, Path) else value for name, value in named.items()}


def machine() -> dict[str, Any]:
    return {
        "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "processor": processor(), "threads": torch.get_num_threads(),
    }  # fmt: skip


def processor() -> str:
    """As the system names it, with family and number, since machines for rent have names without either."""
    try:
        lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    except OSError:
        return platform.processor()
    first = {name.strip(): value.strip() for name, value in reversed(lines)}
    if "model name" not in first:
        return platform.processor()
    return f"{first['model name']} (family {first['cpu family']}, model {first['model']}), {os.cpu_count()} cores"
