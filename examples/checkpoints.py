"""Checkpoints of the scripts that train: written beside and moved into place, so that one is whole or is not there; and
which of them --resume goes on from.

A run may be killed, or the disk be full, at any moment. transformers' Trainer writes a checkpoint file by file into the
folder in which it looks for it later, and deletes the one before.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recording import KEPT, Recorder
from safetensors import safe_open
from torch import distributed
from transformers import Trainer

UNFINISHED = ".unfinished"  # in the folder of a run: what is being written
WEIGHTS, INDEX, STATE = "model.safetensors", "model.safetensors.index.json", "trainer_state.json"


class Unreadable(ValueError):
    """A file of a checkpoint is not what its name says."""


class WholeCheckpoints(Trainer):
    """A Trainer whose checkpoints appear all at once, with the Recorder's file in them."""

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if getattr(self, "_saving", False) else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        with _beside(output, self.args.should_save) as part:
            self._saving = True
            try:
                super()._save_checkpoint(model, trial)  # finds no older checkpoint beside it, so it deletes none
            finally:
                self._saving = False
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, Recorder) and self.args.should_save:
                    callback.keep(part / name)
            _wait()
            if self.args.should_save:
                _move(part / name, output / name)
                self._delete_older(output, name)
        _wait()

    def _delete_older(self, output: Path, name: str) -> None:
        """As save_total_limit says, which is 1 or None here, and only now that the new one is there."""
        if self.args.save_total_limit is not None:
            for older in output.glob("checkpoint-*"):
                if older.name != name and older.is_dir():
                    shutil.rmtree(older)

    def save_whole_model(self) -> None:
        """The final model, into the folder of the run: each file is the old one or the new one, and never a part."""
        output = Path(self.args.output_dir)
        with _beside(output, self.args.should_save) as part:
            self.save_model(str(part))
            _wait()
            if self.args.should_save:
                for file in part.iterdir():
                    _move(file, output / file.name)
        _wait()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        _named(resume_from_checkpoint, WEIGHTS, lambda: super(WholeCheckpoints, self)._load_from_checkpoint(resume_from_checkpoint, model))  # fmt: skip # noqa: E501

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        _named(checkpoint, "optimizer.pt or scheduler.pt", lambda: super(WholeCheckpoints, self)._load_optimizer_and_scheduler(checkpoint))  # fmt: skip # noqa: E501

    def _load_rng_state(self, checkpoint: str | None) -> None:
        _named(checkpoint, _rng_state(), lambda: super(WholeCheckpoints, self)._load_rng_state(checkpoint))


def _named(checkpoint: str | None, file: str, load: Callable[[], None]) -> None:
    try:
        load()
    except Exception as error:  # whatever a file makes a reader of pickles and tensors raise
        raise Unreadable(f"{checkpoint}: {file} cannot be used: {type(error).__name__}: {error}") from error


class _beside:
    """An empty folder in `output`, gone afterwards, also when the disk was full."""

    def __init__(self, output: Path, mine: bool):
        self.folder, self.mine = output / UNFINISHED, mine  # mine: this process makes and deletes it

    def __enter__(self) -> Path:
        if self.mine:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
        _wait()
        return self.folder

    def __exit__(self, *_: object) -> None:
        if self.mine:
            shutil.rmtree(self.folder, ignore_errors=True)


def _wait() -> None:
    """For the other processes of torchrun."""
    if distributed.is_initialized():
        distributed.barrier()


def _move(source: Path, target: Path) -> None:
    """In place of what is there, which is no other checkpoint's only copy: a folder cannot be replaced at once."""
    for file in [source, *source.rglob("*")]:  # on the disk, not only in its cache
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    if target.is_dir():
        os.replace(target, source.parent / "replaced")
    os.replace(source, target)


def _rng_state() -> str:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return "rng_state.pth" if world == 1 else f"rng_state_{os.environ.get('RANK', '0')}.pth"


def last_checkpoint(output: Path, incomplete: bool = False) -> tuple[Path | None, list[str]]:
    """The whole checkpoint with most steps, and what is to be said of those that were passed over, or that lack
    something: `incomplete` lets them lack the state of optimizer, schedule and random numbers, and the record."""
    said: list[str] = []
    for checkpoint in sorted(_checkpoints(output), key=_steps, reverse=True):
        problem, lacks = _look_at(checkpoint)
        if problem is None and (incomplete or not lacks):
            return checkpoint, [*said, *([f"{checkpoint} has no {_list(lacks)}: begun anew"] if lacks else [])]
        said.append(f"{checkpoint} is not whole: {problem or f'it has no {_list(lacks)}'}")
    return None, said


def _checkpoints(output: Path) -> list[Path]:
    return [path for path in output.glob("checkpoint-*") if path.is_dir() and path.name[11:].isdecimal()]


def _steps(checkpoint: Path) -> int:
    return int(checkpoint.name[11:])


def _list(names: list[str]) -> str:
    return " and no ".join(names)


def _look_at(checkpoint: Path) -> tuple[str | None, list[str]]:
    """What makes it useless, else None; and what it lacks of that without which it can be gone on from, but not as if
    nothing had been. Sizes and tables of contents are looked at, and not all bytes."""
    try:
        for name in _weights(checkpoint):
            _read(checkpoint / name, lambda path: safe_open(path, "pt").keys())
        state = _read(checkpoint / STATE, _json_object)
        if state.get("global_step") != _steps(checkpoint):
            return f"{STATE} says that it has {state.get('global_step')} steps", []
        lacks = [name for name in (*_TORCH, _rng_state(), KEPT) if not (checkpoint / name).exists()]
        for name in (*_TORCH, _rng_state(), KEPT):
            if name not in lacks:
                _read(checkpoint / name, read_record if name == KEPT else _zip)
    except Unreadable as error:
        return str(error), []
    return None, lacks


_TORCH = ("optimizer.pt", "scheduler.pt")


def _weights(checkpoint: Path) -> list[str]:
    if not (checkpoint / INDEX).exists():
        return [WEIGHTS]
    parts = _read(checkpoint / INDEX, _json_object).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(part, str) and Path(part).name == part for part in parts.values()):  # fmt: skip # noqa: E501
        raise Unreadable(f"{INDEX} has no weight_map of names of files")
    return sorted(set(parts.values()))


def _read(path: Path, reader: Callable[[Path], Any]) -> Any:
    if not path.is_file():
        raise Unreadable(f"it has no {path.name}")
    try:
        return reader(path)
    except Exception as error:  # of a truncated or a hostile file, anything
        raise Unreadable(f"{path.name} cannot be read: {error}") from error


def _json_object(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_bytes())
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    return value


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path):  # opens with the table of contents, which stands at the end
        pass


def read_record(path: Path) -> dict[str, Any]:
    """What a Recorder kept in a checkpoint."""
    record = _json_object(path)
    wanted = {"seconds": (int, float), "cpu_seconds": (int, float), "held_out": list, "arguments": dict}
    for name, kind in wanted.items():
        if not isinstance(record.get(name), kind):
            raise ValueError(f"its {name} is {record.get(name)!r}")
    if not all(isinstance(point, dict) and "step" in point for point in record["held_out"]):
        raise ValueError("its held_out is no list of measurements")
    return record
