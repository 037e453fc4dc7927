"""Data sets for fine-tuning, read as they are distributed: IMDB's aclImdb and the tsv files of GLUE.

`read_task(name, path)` gives the examples in an order that depends on the data alone. What is wrong with the data is a
FileNotFoundError or a ValueError that names the file, the line, what is there and what is wanted.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Example(NamedTuple):
    text: str
    pair: str | None
    label: int  # an index of Task.labels


class Task(NamedTuple):
    train: list[Example]
    evaluation: list[Example]
    labels: tuple[str, ...]
    notes: list[str]  # what the user should know of how the data was read


class Layout(NamedTuple):
    """Columns of a task's tsv files by their names, of which a text column may have several."""

    texts: tuple[tuple[str, ...], ...]
    label: str
    labels: tuple[str, ...]


GLUE = {
    "sst2": Layout((("sentence", "content"),), "label", ("0", "1")),
    "qnli": Layout((("question",), ("sentence",)), "label", ("entailment", "not_entailment")),
    "qqp": Layout((("question1",), ("question2",)), "is_duplicate", ("0", "1")),
}
SIZES = {"imdb": (25_000, 25_000), "sst2": (67_349, 872), "qnli": (104_743, 5_463), "qqp": (363_846, 40_430)}
TASKS = tuple(SIZES)
SENTIMENTS = ("neg", "pos")
MOST_BROKEN = 100  # lines of QQP; GLUE's train.tsv has about 20


def read_task(name: str, path: Path) -> Task:
    """Reads "imdb" from the folder aclImdb, the folder around it or its tar.gz; the others from a folder of tsv."""
    if name not in TASKS:
        raise ValueError(f"task is {name!r}; wanted: one of {', '.join(TASKS)}")
    if not path.exists():
        raise FileNotFoundError(f"no file or folder named {path}")
    task = _read_imdb(path) if name == "imdb" else _read_glue(path, name)
    for part, examples in (("train", task.train), ("evaluation", task.evaluation)):
        if missing := set(range(len(task.labels))) - {example.label for example in examples}:
            names = ", ".join(task.labels[label] for label in sorted(missing))
            raise ValueError(f"{path}: no example for {part} has the label {names}; wanted: examples of each label")
    return task


def _read_glue(path: Path, name: str) -> Task:
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is a file; wanted: a folder with train.tsv and dev.tsv")
    train, dev = path / "train.tsv", path / "dev.tsv"
    if not dev.is_file():
        raise FileNotFoundError(f"{path} has no dev.tsv; wanted: train.tsv and dev.tsv; found: {_listing(path)}")
    notes: list[str] = []
    layout, (train_size, dev_size) = GLUE[name], SIZES[name]
    evaluation = _read_tsv(dev, layout, dev_size, notes)
    if train.is_file():
        return Task(_read_tsv(train, layout, train_size, notes), evaluation, layout.labels, notes)
    notes.append("no train.tsv: a fifth of dev.tsv, chosen by a hash of the text, is for evaluation, the rest to train")
    chosen = [_in_a_fifth(example.text) for example in evaluation]
    parts = [[e for e, is_chosen in zip(evaluation, chosen, strict=True) if is_chosen == k] for k in (False, True)]
    return Task(*parts, layout.labels, notes)


def _in_a_fifth(text: str) -> bool:
    """By the first text alone: QNLI asks a question of several sentences, and all of them must stay on one side."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 5 == 0


def _read_tsv(file: Path, layout: Layout, size: int, notes: list[str]) -> list[Example]:
    # Neither splitlines, which splits at characters that occur within sentences, nor csv: quotes are literal.
    lines = file.read_bytes().split(b"\n")
    whole_last_line = lines[-1] == b""
    if whole_last_line:
        lines.pop()
    if not any(line.strip() for line in lines):
        raise ValueError(f"{file} is empty; wanted: a line of column names, then examples")
    header = _fields(file, 1, lines[0].removeprefix(b"\xef\xbb\xbf"))
    texts = [_column(file, header, names) for names in layout.texts]
    label = _column(file, header, (layout.label,))
    examples: list[Example] = []
    broken = 0
    for number, line in enumerate(lines[1:], 2):
        fields = _fields(file, number, line)
        if len(fields) != len(header):
            last = number == len(lines)
            if layout is GLUE["qqp"] and broken < MOST_BROKEN and _is_piece(fields, last):
                broken += 1
                continue
            reason = "; as it is the last line, the file is probably truncated" if last else ""
            raise ValueError(
                f"{file}, line {number}: {len(fields)} columns; wanted: {len(header)} ({', '.join(header)}){reason}"
            )
        if fields[label] not in layout.labels:
            raise ValueError(
                f"{file}, line {number}: {header[label]} is {fields[label]!r}; wanted: {' or '.join(layout.labels)}"
            )
        parts = [fields[column] for column in texts]
        if not any(part.strip() for part in parts):
            raise ValueError(f"{file}, line {number}: no text; wanted: {' and '.join(header[c] for c in texts)}")
        pair = parts[1] if len(parts) > 1 else None
        examples.append(Example(parts[0], pair, layout.labels.index(fields[label])))
    if not examples:
        raise ValueError(f"{file} has column names and no example; wanted: examples")
    if broken:
        notes.append(f"{file.name}: {broken} lines left out, pieces of questions with a line break in them")
    if not whole_last_line and label != len(header) - 1:
        notes.append(f"{file.name}: the last line has no end; the file may be truncated")
    notes += _fewer(file.name, len(examples), size)
    return examples


def _is_piece(fields: list[str], last: bool) -> bool:
    """Whether the line is a piece of a QQP record whose quoted question has a line break: three numbers and an open
    quotation mark at its end, or one that closes and a label at its end. A first piece must have another after it."""
    starts = 4 <= len(fields) <= 5 and all(part.isdigit() for part in fields[:3]) and fields[-1].startswith('"')
    ends = 2 <= len(fields) <= 3 and fields[0].endswith('"') and fields[-1] in GLUE["qqp"].labels
    return ends or (starts and not last)


def _fields(file: Path, number: int, line: bytes) -> list[str]:
    try:
        return line.removesuffix(b"\r").decode("utf-8").split("\t")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}, line {number}: {error}; wanted: UTF-8 text") from None


def _column(file: Path, header: list[str], names: tuple[str, ...]) -> int:
    for name in names:
        if name in header:
            return header.index(name)
    shown = ", ".join(header)
    shown = shown if len(shown) <= 200 else shown[:200] + "..."
    raise ValueError(f"{file}, line 1: no column named {' or '.join(names)}; found: {shown}")


def _fewer(name: str, count: int, size: int) -> list[str]:
    """What is cut between two examples looks whole, but for its size."""
    return [f"{name}: {count:,} examples; the published data has {size:,}"] if count < size else []


def _listing(path: Path) -> str:
    names = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
    return ", ".join(names[:10] + ["..."] * (len(names) > 10)) or "nothing"


def _read_imdb(path: Path) -> Task:
    reviews: dict[tuple[str, str], list[tuple[int, str]]] = {
        (split, sentiment): [] for split in ("train", "test") for sentiment in SENTIMENTS
    }
    for split, sentiment, name, data in _files_of_folder(path) if path.is_dir() else _files_of_archive(path):
        where = f"{path}: {split}/{sentiment}/{name}"
        named = re.fullmatch(r"(\d+)_(\d+)\.txt", name)
        if not named:
            raise ValueError(f"{where} is not named like a review; wanted: ID_STARS.txt")
        number, stars = map(int, named.groups())
        if not (1 <= stars <= 4 if sentiment == "neg" else 7 <= stars <= 10):
            wanted = "1 to 4" if sentiment == "neg" else "7 to 10"
            raise ValueError(f"{where} has {stars} stars by its name; wanted: {wanted} in {sentiment}/")
        if not data.strip():
            raise ValueError(f"{where} is empty; wanted: a review")
        try:
            reviews[split, sentiment].append((number, data.decode("utf-8")))
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: {error}; wanted: UTF-8 text") from None
    parts: dict[str, list[Example]] = {"train": [], "test": []}
    for (split, sentiment), numbered in reviews.items():
        if not numbered:
            raise FileNotFoundError(
                f"{path} has no reviews in {split}/{sentiment}/; wanted: aclImdb/ with train/ and test/, each with "
                "pos/ and neg/ of files ID_STARS.txt"
            )
        parts[split] += [Example(text, None, SENTIMENTS.index(sentiment)) for _, text in sorted(numbered)]
    notes = [
        note
        for split, size in zip(parts, SIZES["imdb"], strict=True)
        for note in _fewer(split, len(parts[split]), size)
    ]
    return Task(parts["train"], parts["test"], SENTIMENTS, notes)


def _files_of_folder(path: Path) -> Iterator[tuple[str, str, str, bytes]]:
    root = path / "aclImdb" if (path / "aclImdb").is_dir() else path
    for split in ("train", "test"):
        for sentiment in SENTIMENTS:
            folder = root / split / sentiment
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"{root} has no folder {split}/{sentiment}; wanted: aclImdb/ with train/ and test/, each with pos/ "
                    f"and neg/; found: {_listing(folder.parent if folder.parent.is_dir() else root)}"
                )
            for file in folder.iterdir():
                if not file.name.startswith("."):
                    yield split, sentiment, file.name, file.read_bytes()


def _files_of_archive(path: Path) -> Iterator[tuple[str, str, str, bytes]]:
    # gzip opens it and not tarfile, which takes the end of a truncated stream for the end of the archive.
    try:
        with gzip.open(path) as stream:
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    parts = member.name.split("/")[-3:]
                    if member.isfile() and len(parts) == 3 and parts[0] in ("train", "test") and parts[1] in SENTIMENTS:
                        file = archive.extractfile(member)
                        if file is not None and not parts[2].startswith("."):
                            yield parts[0], parts[1], parts[2], file.read()
            while stream.read(1 << 20):  # to the checksum at the end
                pass
    except (EOFError, gzip.BadGzipFile, tarfile.TarError, zlib.error) as error:
        raise ValueError(
            f"{path} is truncated or no tar.gz ({error}); wanted: the whole aclImdb archive, or its folder"
        ) from None
