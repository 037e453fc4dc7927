"""Builds the C++ core with CMake on first use, into build/emulator of the repository, and loads it."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from emulator.errors import PtxError

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "emulator" / sys.implementation.cache_tag  # CMake remembers the Python of a folder
NAME = "emulator_core"


@cache
def core() -> ModuleType:
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:  # one process builds, others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        _build_if_changed()
        module = _load()
    module.raise_as(PtxError)
    return module


def _library() -> Path:
    return BUILD / (NAME + importlib.machinery.EXTENSION_SUFFIXES[0])


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, _library())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build_if_changed() -> None:
    stamp = BUILD / "built"
    wanted = _fingerprint()
    if _library().exists() and stamp.exists() and stamp.read_text() == wanted:
        return
    stamp.unlink(missing_ok=True)
    cmake = _tool("cmake")
    if cmake is None:
        raise RuntimeError("the PTX emulator needs cmake to be built: pip install cmake")
    if importlib.util.find_spec("pybind11") is None:
        raise RuntimeError("the PTX emulator needs pybind11 to be built: pip install pybind11")
    ninja = _tool("ninja")
    configure = [cmake, "-S", str(HERE), "-B", str(BUILD), f"-DPython_EXECUTABLE={sys.executable}"]
    configure.append(f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={BUILD}")
    if ninja and not (BUILD / "Makefile").exists():
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    if not (BUILD / "build.ninja").exists() and not (BUILD / "Makefile").exists():
        (BUILD / "CMakeCache.txt").unlink(missing_ok=True)  # left by an attempt that failed
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
    for command in (configure, [cmake, "--build", str(BUILD), "--parallel", jobs]):
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            output = (result.stdout + result.stderr)[-6000:]
            raise RuntimeError(f"building the PTX emulator failed: {' '.join(command)}\n{output}")
    stamp.write_text(wanted)


def _tool(name: str) -> str | None:
    """A program on PATH, or next to this Python, where pip puts them."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def _fingerprint() -> str:
    """Changes with the sources, with this Python, and with the CPU, for whose instructions the core is compiled."""
    digest = hashlib.sha256()
    for path in [HERE / "CMakeLists.txt", *sorted((HERE / "core").iterdir())]:
        digest.update(path.name.encode() + path.read_bytes())
    digest.update(f"{sys.executable} {sys.version} {platform.machine()}".encode())
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    features = [line for line in lines if line.lower().startswith(("flags", "features"))]
    digest.update(" ".join(features[:1]).encode())
    return digest.hexdigest()
