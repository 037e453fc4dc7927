"""Finds and loads the native library, which defines the ops, and remembers why it could not."""

from __future__ import annotations

import ast
import ctypes
import functools
import re
from pathlib import Path

import torch

_PATH = Path(__file__).with_name("_native.so")


def path() -> Path | None:
    """The native library's file, or None where the package was installed without one."""
    return _PATH if _PATH.exists() else None


@functools.cache
def schemas() -> dict[str, str]:
    """What each op takes and returns, by name, "(...) -> ...": read from the file that the native library includes."""
    text = _PATH.with_name("schemas.inc").read_text(encoding="utf-8")
    literals: tuple[str, ...] = ast.literal_eval(f"({re.sub('(?m)^//.*$', '', text)})")
    return {name: f"({rest}" for name, rest in (schema.split("(", 1) for schema in literals)}


def _defined(namespace: str) -> set[str]:
    """The ops that somebody has defined there."""
    return {op for op in torch._C._dispatch_get_all_op_names() if op.startswith(f"{namespace}::")}


def _ours(namespace: str) -> bool:
    """Whether the ops there are those of `schemas`."""
    return all(
        torch._C.parse_schema(f"{namespace}::{name}{rest}")
        in torch._C._jit_get_schemas_for_operator(f"{namespace}::{name}")
        for name, rest in schemas().items()
    )


@functools.cache
def _loaded() -> tuple[str, str | None]:
    """The namespace of the ops, and why the native library has not defined them there, else None; never raises."""
    usual = __name__.partition(".")[0]  # within a kernel of the Hugging Face Hub: its id, another for each version
    if not _PATH.exists():
        reason = (
            f"the native library is missing ({_PATH.name} is not beside the package), as in a py3-none-any wheel; "
            "reinstall linformer_kernels from a wheel for this platform, or from source, on Linux with a C++ compiler"
        )
    else:
        try:
            torch.ops.load_library(str(_PATH))
            library = ctypes.CDLL(str(_PATH))
            library.linformer_namespace.restype = ctypes.c_char_p
            usual = library.linformer_namespace().decode()
            if _ours(usual):
                return usual, None
            reason = _of_another_version(usual)
        except AttributeError:  # the library lacks what every library of this version has
            reason = _of_another_version(usual)
        except OSError as error:
            reason = f"the native library did not load in torch {torch.__version__}: {error.__cause__ or error}"
    # Where another version's ops are, those of Python stand apart.
    return f"{usual}_python" if _defined(usual) else usual, reason


def _of_another_version(namespace: str) -> str:
    return (
        f"the operators {namespace}::* are not those of this package but of another version: {_PATH} is older or "
        "newer, or another library was loaded before; load one version in a process, or reinstall linformer_kernels"
    )


def namespace() -> str:
    """torch.ops.<namespace> has the ops."""
    return _loaded()[0]


def load() -> str | None:
    """Load the native library once. Returns None when it is loaded, else the reason why not; never raises."""
    return _loaded()[1]


@functools.cache
def ops() -> torch._ops._OpNamespace:
    """The ops."""
    return getattr(torch.ops, namespace())


def cuda_architectures() -> str:
    """The CUDA architectures in the native library, e.g. "80+PTX,86"; empty where it has none or did not load."""
    return ops().cuda_architectures() if load() is None else ""


@functools.cache
def driver_problem(ptx: bool) -> str:
    """Why the driver cannot run the CUDA runtime in the native library, else an empty string; with `ptx`, for a GPU
    that the library has only PTX for. For a process that uses CUDA already: asking may load the driver."""
    return ops().cuda_driver_problem(ptx)


def code_for(architectures: str, major: int, minor: int) -> str | None:
    """What serves a GPU of this compute capability: "machine code" for its major version, no newer than the GPU; "PTX",
    which the driver compiles for every newer GPU; or nothing."""
    capability = 10 * major + minor
    found = None
    for name in filter(None, architectures.split(",")):
        number, _, ptx = name.partition("+")
        if number.isdecimal() and int(number) <= capability:  # 90a has some kernels more for 9.0, beside those of 90
            if int(number) // 10 == major:
                return "machine code"
            found = "PTX" if ptx else found
    return found
