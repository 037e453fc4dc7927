"""The Linformer of fairseq from the files of its wheels, unpacked by `make test` and not installed.

fairseq 0.10 and 0.12 have wheels for Python 3.8 and older alone, do not import with newer ones, and ask for packages
that newer pips refuse. What they have of Linformer is Python, and runs, with stand-ins for what it imports and does not
use, and for what newer Pythons and numpys have dropped.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional

ABSENT = ("omegaconf", "hydra", "bitarray", "iopath")


class _Nothing(type):
    """Any name of an absent package: a class, whose methods do nothing, and whose instances are false."""

    def __getattr__(cls, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments, **options: _nothing(name)()


def _nothing(name: str) -> type:
    methods = {"__init__": lambda self, *arguments, **options: None, "__bool__": lambda self: False}
    get = lambda self, name: getattr(type(self), name)  # noqa: E731
    return _Nothing(name, (), methods | {"__getattr__": get})


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        found = name.split(".")[0] in ABSENT
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if found else None

    def exec_module(self, module):
        module.__getattr__ = lambda name: _nothing(name) if not name.startswith("__") else _raise(name)


def _raise(name: str):
    raise AttributeError(name)


def _dataclass(cls=None, /, **options):
    """Python 3.11 and later refuse a default that has no hash, as fairseq's configurations in configurations."""

    def made(cls):
        hashable = {"unsafe_hash": True} if cls.__module__.startswith("fairseq") else {}
        return original(cls, **hashable | options)

    return made if cls is None else made(cls)


original = dataclasses.dataclass


@contextlib.contextmanager
def _as_in_old_days():
    names = {"bool": bool, "int": int, "float": float}
    with mock.patch.object(dataclasses, "dataclass", _dataclass), contextlib.ExitStack() as stack:
        for name, kind in names.items():
            if name not in vars(numpy):
                stack.enter_context(mock.patch.object(numpy, name, kind, create=True))
        yield


@contextlib.contextmanager
def linformer_roberta(version: str) -> Iterator[types.ModuleType]:
    """fairseq's module of that name, with LinformerModel in it, and then gone; skips where its files are not."""
    folder = Path(sys.prefix) / f"fairseq-{version}" / "fairseq"
    if not folder.exists():
        pytest.skip(f"{folder} is missing, the files of fairseq {version}; `make test` puts them there")
    absent = _Absent()
    sys.meta_path.insert(0, absent)
    try:
        for name, path in (("fairseq", folder), ("linformer_src", folder / "examples" / "linformer" / "linformer_src")):
            package = types.ModuleType(name)  # without what its __init__ imports: all of fairseq
            package.__path__ = [str(path)]
            sys.modules[name] = package
        with _as_in_old_days():
            for name in ("meters", "metrics", "progress_bar"):
                module = importlib.import_module(f"fairseq.logging.{name}")
                sys.modules[f"fairseq.{name}"] = module
                setattr(sys.modules["fairseq"], name, module)
            module = importlib.import_module("linformer_src.models.linformer_roberta")
        # These compute in float32 whatever comes; so that float64 can be compared, in the type that comes. Not torch's
        # gelu itself: knowing that, layers of 0.12 that were loaded and never trained attend exactly, past their E.
        sys.modules["fairseq.utils"].softmax = lambda x, dim, onnx_trace=False: functional.softmax(x, dim)
        sys.modules["fairseq.modules"].gelu = sys.modules["fairseq.utils"].gelu = lambda x: functional.gelu(x)
        yield module
    finally:
        sys.meta_path.remove(absent)
        for name in list(sys.modules):
            if name.split(".")[0] in ("fairseq", "linformer_src", *ABSENT):
                del sys.modules[name]


class Dictionary(list):
    """Of tokens, as far as a model asks."""

    def pad(self) -> int:
        return 1


def build(module: types.ModuleType, tokens: int, **options) -> tuple[nn.Module, argparse.Namespace]:
    """A model with fairseq's own defaults, and its options."""
    args = argparse.Namespace(
        quant_noise_pq=0,
        quant_noise_pq_block_size=8,
        encoder_layerdrop=0,
        spectral_norm_classification_head=False,
        **options,
    )
    task = argparse.Namespace(source_dictionary=Dictionary(range(tokens)))
    return module.LinformerModel.build_model(args, task), args


def drawn(model: nn.Module) -> nn.Module:
    """In evaluation, with weights of which none is as at the start, but for what an embedding has for padding."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.1 * torch.randn_like(parameter)
            if "embed_" in name:
                parameter[1] = 0
    return model.eval()
