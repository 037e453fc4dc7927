"""`python -m linformer_kernels.info [--json]`: what this installation can do, and why not what it cannot."""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from . import __version__, _backends, _library
from ._backends import BACKENDS, Backend


def collect() -> dict[str, Any]:
    """Everything that the command prints, as plain data."""
    not_loaded = _library.load()
    library = _library.path()
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "versions": {
            "linformer_kernels": __version__,
            "torch": torch.__version__,
            "triton": triton,
            "python": platform.python_version(),
        },
        "backends": {
            name: {"available": reason is None, "reason": reason, "note": _note(name)}
            for name, reason in ((name, _reason(backend)) for name, backend in BACKENDS.items())
        },
        "library": {
            "path": None if library is None else str(library),
            "loaded": not_loaded is None,
            "reason": not_loaded,
            "cuda_architectures": _library.cuda_architectures().split(",") if _library.cuda_architectures() else [],
        },
        "tuned": _tuned(),
        "cpu": {
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "kernels": None if not_loaded is not None else _cpu_kernels()[0],
            "amx_refused": (_library.ops().cpu_amx_refusal() or None) if not_loaded is None else None,
            "torch": torch.backends.cpu.get_cpu_capability(),
        },
    }


def _cpu_kernels() -> tuple[str | None, str | None]:
    """The build of the CPU kernels that runs here, or why none does: LINFORMER_CPU_CAPABILITY is nonsense."""
    try:
        return _library.ops().cpu_capability(), None
    except RuntimeError as error:
        return None, str(error)


def _tuned() -> dict[str, Any]:
    """What `linformer_kernels.tune` has left."""
    if _backends.triton_problem() is not None:
        return {"path": None, "for": [], "fastest": {}, "problem": None}
    from .triton_kernels import tuned

    fastest = {key: found.backend for key, found in tuned.fastest().items()}
    return {"path": str(tuned.path()), "for": sorted(tuned.table()), "fastest": fastest, "problem": tuned.problem()}


def _reason(backend: Backend) -> str | None:
    """Why no call can run on the backend here, in this process."""
    if backend.name == "triton" and (problem := _backends.triton_problem()) is not None:
        return problem
    gpu = torch.cuda.is_available() or (backend.name == "triton" and torch.xpu.is_available())
    if backend.missing is None and backend.name in ("cuda", "triton") and not gpu and not _backends.interpreting():
        return f"torch {torch.__version__} sees no GPU"
    if backend.missing is None and backend.name in ("cuda", "triton") and torch.cuda.is_available():
        return _backends.gpu_problem(torch.device("cuda"), backend.name)
    if backend.missing is None and backend.name == "cpu":
        return _cpu_kernels()[1]
    return backend.missing


def _note(name: str) -> str | None:
    """What is to be known of a backend that is there."""
    return _backends.UNFENCED_TRITON if name == "triton" else None


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(prog="python -m linformer_kernels.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    data = collect()
    if parser.parse_args().json:
        print(json.dumps(data, indent=2))
        return
    lines = {name: text or "not installed" for name, text in data["versions"].items()}
    library, cpu = data["library"], data["cpu"]
    lines["native library"] = library["path"] if library["loaded"] else f"not loaded: {library['reason']}"
    lines["CPU"] = (
        f"{cpu['machine']}, {cpu['threads']} threads; kernels use {cpu['kernels'] or 'none'}, torch uses {cpu['torch']}"
    )
    if cpu["amx_refused"]:
        lines["CPU"] += f"; AMX is there, but the system does not let this process use it: {cpu['amx_refused']}"
    lines["CUDA kernels for"] = ", ".join(f"sm_{arch}" for arch in library["cuda_architectures"]) or "none"
    for name, backend in data["backends"].items():
        available = "available" if backend["note"] is None else f"available; {backend['note']}"
        lines[f"backend {name}"] = available if backend["available"] else f"not available: {backend['reason']}"
    tuned = data["tuned"]
    if tuned["for"] or tuned["problem"]:
        found = "; ".join(f"{key}: {tuned['fastest'].get(key, 'tiles')}" for key in tuned["for"])
        lines["tuned"] = f"{tuned['path']}: {tuned['problem'] or found}"
    for label, text in lines.items():
        print(f"{label:18} {text}")


if __name__ == "__main__":
    main()
