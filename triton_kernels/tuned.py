"""Where what `linformer_kernels.tune` has found is kept, and looked up: a file, and tables in memory.

Tiles, and which backend was the fastest. Needs no Triton.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .config import Backward, Config, Device, Forward, ProjectBackward, Shape, config_for

ENVIRONMENT_VARIABLE = "LINFORMER_TUNED"
_PARTS = {"forward": Forward, "backward": Backward, "project_backward": ProjectBackward}


def path() -> Path:
    """Where tuned tiles are kept: the environment variable, else a file in the user's cache."""
    if chosen := os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "linformer_kernels" / "tuned.json"


@dataclass(frozen=True)
class Fastest:
    """The backend that was the fastest for a shape on a GPU, by its name."""

    backend: str
    device: str
    shape: Shape


@functools.cache
def _read() -> tuple[dict[str, Config], dict[str, Fastest], str | None]:
    try:
        entries = json.loads(path().read_text())
        tiles = {key: _config(entry) for key, entry in entries.items()}
        return tiles, {key: _fastest(entry["fastest"]) for key, entry in entries.items() if "fastest" in entry}, None
    except FileNotFoundError:
        return {}, {}, None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return {}, {}, f"{type(error).__name__}: {error}"


def table() -> dict[str, Config]:
    """The tiles that the file holds, and that were found since."""
    return _read()[0]


def fastest() -> dict[str, Fastest]:
    """The backends that were found the fastest, in the same way."""
    return _read()[1]


def problem() -> str | None:
    """Why nothing of the file is used, else None."""
    return _read()[2]


def _fastest(entry: dict[str, Any]) -> Fastest:
    found = Fastest(entry["backend"], entry["device"], Shape(**entry["shape"]))
    if not isinstance(found.backend, str):
        raise ValueError(f"a backend has a name: {found.backend!r}")
    return found


def _config(entry: dict[str, dict[str, int]]) -> Config:
    parts = {}
    for name, kind in _PARTS.items():
        values = {field.name: entry[name][field.name] for field in fields(kind)}
        if not all(isinstance(value, int) for value in values.values()):
            raise ValueError(f"tiles are integers: {values}")
        parts[name] = kind(**values)
    return Config(**parts)


def key_of(shape: Shape, device: Device) -> str:
    """What tiles are tuned for. Batch, heads and lengths are no part of it."""
    of = asdict(shape)
    return ", ".join([device.name, *(f"{name} {value}" for name, value in of.items())])


def config_of(shape: Shape, device: Device) -> Config:
    """The tuned tiles if there are any, else those of the rule."""
    return table().get(key_of(shape, device)) or config_for(shape, device)


def save() -> None:
    """Write the tables to the file."""
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    found = fastest()
    entries = {
        key: asdict(config) | ({"fastest": asdict(found[key])} if key in found else {})
        for key, config in table().items()
    }
    part.write_text(json.dumps(entries, indent=1))
    part.replace(file)
