"""Other versions of Triton beside the installed one, for tests that run under them in processes of their own."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import triton
from test_package import ROOT, python, succeeded

BUILD = ROOT / "build" / "triton"
OTHERS = ("3.6.0", "3.8.0")  # that releases of torch bring: 2.10 and 2.11, and 2.14
VERSIONS = (*OTHERS, triton.__version__)


@functools.cache
def why_not(version: str) -> str | None:
    """Why this version is not here and cannot be had, else None. Installs it at first use, and keeps it in build/."""
    if version == triton.__version__ or (BUILD / version).exists():
        return None
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:  # one process installs, others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (BUILD / version).exists():
            return None
        part = BUILD / f"{version}.part"
        shutil.rmtree(part, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
        done = subprocess.run([*pip, "--target", str(part), f"triton=={version}"], capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            return f"triton {version} is not installed beside triton {triton.__version__}: pip says: {said}"
        part.rename(BUILD / version)
    return None


def run(version: str, script: str, *arguments: str) -> str:
    """What a script of this folder prints under the version. Raises if it fails."""
    paths = [str(Path(__file__).parent), str(ROOT)]
    if version != triton.__version__:
        paths.insert(0, str(BUILD / version))
    # Each version keeps what it compiles apart from that of others.
    return succeeded(python(str(Path(__file__).parent / script), *arguments, PYTHONPATH=os.pathsep.join(paths)))
