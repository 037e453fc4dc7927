"""Text for the training example: the standard library of the running Python, or the user's own files, as bytes.

A part is held out for validation. The same Python and the same files always give the same split.
"""

from __future__ import annotations

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

STDLIB_BYTES = 4 * 2**20  # more than a short run reads; parsing all of the library would take longer than it is worth
DATA_BYTES = 64 * 2**20
LEAST_BYTES = 10_000


class Corpus(NamedTuple):
    name: str
    train: Tensor  # uint8, one element a byte
    held_out: Tensor

    def texts(self) -> tuple[str, str]:
        """To train on and held out; what is not UTF-8 is replaced."""
        train, held_out = (
            bytes(part.numpy()).decode("utf-8", errors="replace") for part in (self.train, self.held_out)
        )
        return train, held_out


def read_corpus(data: Path | None = None) -> Corpus:
    """Reads the text and holds out a tenth: every tenth document, or, with fewer than ten, the end of the text."""
    if data is None:
        name = f"standard library of Python {sys.version_info.major}.{sys.version_info.minor}"
        documents = list(_stdlib_documents(STDLIB_BYTES))
    else:
        name = str(data)
        documents = list(_files_documents(data, DATA_BYTES))
    if len(documents) >= 10:
        train = b"\n".join(document for index, document in enumerate(documents) if index % 10 != 9)
        held_out = b"\n".join(documents[9::10])
    else:
        text = b"\n".join(documents)
        cut = len(text) * 9 // 10
        train, held_out = text[:cut], text[cut:]
    size = len(train) + len(held_out)
    if size < LEAST_BYTES:
        raise ValueError(
            f"{name}: {size:,} bytes of text are too few to learn from; at least {LEAST_BYTES:,} are needed"
        )
    if min(len(train), len(held_out)) < LEAST_BYTES // 20:
        raise ValueError(f"{name}: every tenth file is held out, but almost all text is on one side of that split")
    return Corpus(name, _as_tensor(train), _as_tensor(held_out))


def unigram_bits(corpus: Corpus) -> float:
    """Bits for each held-out byte if it is guessed from the frequencies of bytes in the training text alone."""
    counts = torch.bincount(corpus.train.long(), minlength=256).double() + 1
    bits = -(counts / counts.sum()).log2()
    return bits[corpus.held_out.long()].mean().item()


def _as_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _files_documents(path: Path, limit: int) -> Iterator[bytes]:
    """The file `path`, or all text files below the folder `path` in the order of their names, hidden ones left out."""
    if path.is_dir():
        names = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
        files = [path / name for name in names if not any(part.startswith(".") for part in name.parts)]
    elif path.exists():
        files = [path]
    else:
        raise FileNotFoundError(f"no file or folder named {path}")
    for file in files:
        with file.open("rb") as stream:
            document = stream.read(limit)
        if b"\0" in document[:4096]:  # binary
            continue
        limit -= len(document)
        yield document
        if limit == 0:
            return


def _stdlib_documents(limit: int) -> Iterator[bytes]:
    """Files of the standard library, `limit` bytes or a little more: of each its docstrings, then the rest."""
    root = Path(sysconfig.get_paths()["stdlib"])
    # Distributions differ in which tests they install; the encodings are tables, not text.
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
    names = [file.relative_to(root) for file in root.rglob("*.py")]
    names = [name for name in names if not skipped.intersection(name.parts)]
    names.sort(key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())  # mixed, yet always the same
    for name in names:
        if limit <= 0:
            return
        try:
            document = _docstrings_first((root / name).read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # templates, and sources in another encoding
            continue
        limit -= len(document)
        yield document


def _docstrings_first(source: str) -> bytes:
    lines = source.splitlines()
    kept = [True] * len(lines)
    docstrings = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring:
                docstrings.append(docstring)
                statement = node.body[0]
                for line in range(statement.lineno, (statement.end_lineno or statement.lineno) + 1):
                    kept[line - 1] = False
    code = "\n".join(line for line, keep in zip(lines, kept, strict=True) if keep)
    return "\n\n".join([*docstrings, code]).encode("utf-8", errors="replace")
