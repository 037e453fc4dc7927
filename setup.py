"""Builds the native library with CMake and puts it into the package. Everything else stands in pyproject.toml.

Environment variables, as docs/installing.md describes them:
    LINFORMER_NATIVE   AUTO, ON or OFF: whether there is a native library
    LINFORMER_MACHINE  build for this processor by a cross compiler, e.g. aarch64
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
NATIVE = os.environ.get("LINFORMER_NATIVE") or "AUTO"
if NATIVE not in ("AUTO", "ON", "OFF"):
    sys.exit(f"linformer_kernels: environment variable LINFORMER_NATIVE is {NATIVE!r}; wanted: AUTO, ON or OFF")
WITHOUT = "to install without the native library, slower: LINFORMER_NATIVE=OFF"
HERE = platform.machine()
MACHINE = os.environ.get("LINFORMER_MACHINE") or HERE
if MACHINE != HERE:
    # What a wheel's name and the folders below build/ are made of.
    os.environ["_PYTHON_HOST_PLATFORM"] = f"linux-{MACHINE}"


def environments() -> Iterator[Path]:
    """Where Python packages may be installed: this interpreter's place, then the environments that are active or near.

    pip's isolated build environment hides the installed packages, but not where they lie. uv's hides that too; but an
    environment that is active is on PATH, and one that uv found by itself is called .venv.
    """
    for scheme in ("purelib", "platlib"):
        yield Path(sysconfig.get_path(scheme))
    near = [os.environ.get(name) for name in ("VIRTUAL_ENV", "CONDA_PREFIX")]
    near += [
        str(Path(entry).parent) for entry in os.environ.get("PATH", "").split(os.pathsep) if Path(entry).name == "bin"
    ]
    for root in [*filter(None, near), str(ROOT / ".venv")]:
        yield from sorted(Path(root).glob("lib/python3*/site-packages"), reverse=True)


def torch_dir() -> Path | None:
    """Where torch is installed, found without importing it.

    An installed torch is used from there, and only where there is none does an isolated build environment get one of
    its own, gigabytes for a few headers. Which it is does not matter: the library serves every torch from 2.10 on.
    """
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0])
    for packages in environments():
        if (packages / "torch" / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
            return packages / "torch"
    return None


def cross() -> list[str]:
    """Options of CMake for LINFORMER_MACHINE. Torch's headers are the same for every processor."""
    compiler = os.environ.get("CXX") or f"{MACHINE}-linux-gnu-g++"
    if "CXX" not in os.environ and shutil.which(compiler) is None:
        package = f"g++-{MACHINE.replace('_', '-')}-linux-gnu"
        sys.exit(
            f"linformer_kernels: LINFORMER_MACHINE is {MACHINE}, and there is no compiler {compiler}; install one "
            f"(Debian, Ubuntu: apt install {package}) or name it in CXX"
        )
    options = {"CXX_COMPILER": compiler, "SYSTEM_NAME": "Linux", "SYSTEM_PROCESSOR": MACHINE}
    return ["-DLINFORMER_CUDA=OFF", *(f"-DCMAKE_{name}={value}" for name, value in options.items())]


class CMakeBuild(build_ext):
    """Drives CMakeLists.txt; ninja is used where it is installed."""

    def build_extension(self, ext: Extension) -> None:
        cmake = shutil.which("cmake")
        if cmake is None:
            sys.exit(f"linformer_kernels: cmake was not found; install it with: pip install cmake; {WITHOUT}")
        torch = torch_dir()
        if torch is None:
            sys.exit("linformer_kernels: torch is not installed; install torch, then linformer_kernels")
        if MACHINE == HERE and not any(map(shutil.which, ("c++", "g++", "clang++"))) and "CXX" not in os.environ:
            sys.exit(f"linformer_kernels: there is no C++ compiler (c++, g++, clang++ or $CXX); install one; {WITHOUT}")
        build = Path(self.build_temp).resolve()
        configure = [cmake, "-S", str(ROOT), "-B", str(build), f"-DTORCH_DIR={torch}", "-DCMAKE_BUILD_TYPE=Release"]
        for name in ("LINFORMER_CUDA", "LINFORMER_CUDA_ARCHS", "LINFORMER_NAMESPACE"):
            if name in os.environ:
                configure.append(f"-D{name}={os.environ[name]}")
        if MACHINE != HERE:
            configure += cross()
        if shutil.which("ninja") and not (build / "CMakeCache.txt").exists():
            configure += ["-G", "Ninja"]
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run([cmake, "--build", str(build), "--parallel", jobs], check=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a process that has the old library loaded keeps it
        shutil.copy2(build / "_native.so", target)

    def get_ext_filename(self, ext_name: str) -> str:
        # One name on every Python: the library does not use Python's ABI, only torch's stable one.
        return str(Path(*ext_name.split("."))) + ".so"


class PlatformWheel(bdist_wheel):
    """The wheel depends on the platform, but on no Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if NATIVE == "ON" or (NATIVE == "AUTO" and sys.platform == "linux"):
    setup(
        setup_requires=[] if torch_dir() else ["torch>=2.10"],
        ext_modules=[Extension("linformer_kernels._native", sources=[])],
        cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
    )
else:
    setup()  # a wheel for any platform: PyTorch's own kernels serve its calls
