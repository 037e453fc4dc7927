"""Wheels: one without the native library serves every call on PyTorch's parts, and what the library asks of others."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import wheels

from linformer_kernels import _library

ROOT = Path(__file__).parent.parent
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
SERVES = """
import torch, linformer_kernels as lk
print(lk.__file__)
torch.manual_seed(0)
query, key, value = (torch.randn(2, 2, 20, 8, requires_grad=True) for _ in range(3))
proj = torch.randn(5, 20)
out = lk.linformer_attention(query, key, value, proj)
want = lk.linformer_attention(query, key, value, proj, backend="reference")
torch.testing.assert_close(out, want)
torch.testing.assert_close(*(torch.autograd.grad(x.sin().sum(), value)[0] for x in (out, want)))
print(lk.LinformerEncoderLayer(16, 2, batch_first=True, seq_len=9, proj_dim=4)(torch.randn(1, 9, 16)).shape)
try:
    lk.linformer_attention(query, key, value, proj, backend="cpu")
except RuntimeError as error:
    print(error)
"""


def python(*arguments: str, cwd: Path | None = None, **environment: str) -> str:
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("LINFORMER_", "_PYTHON"))} | environment
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=cwd)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def test_a_wheel_without_the_native_library(tmp_path):
    """As on macOS, where nothing is compiled."""
    source, made, installed = tmp_path / "source", tmp_path / "made", tmp_path / "installed"
    for name in ("linformer_kernels", "triton_kernels"):
        skipped = shutil.ignore_patterns("*.so", "__pycache__", "triton_kernels")
        shutil.copytree(ROOT / name, source / name, ignore=skipped if name == "linformer_kernels" else None)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    name = python("-c", BUILD, str(made), cwd=source, LINFORMER_NATIVE="OFF").split()[-1]
    assert name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(made / name) as wheel:
        files = set(wheel.namelist())
        wheel.extractall(installed)
    assert not [file for file in files if file.endswith(".so")]
    for file in ("schemas.inc", "py.typed", "triton_kernels/ops.py", "integrations/peers/__init__.py"):
        assert f"linformer_kernels/{file}" in files

    here = {"cwd": tmp_path, "PYTHONPATH": str(installed)}  # the folder where Python starts comes first
    report = json.loads(python("-m", "linformer_kernels.info", "--json", **here))
    assert report["library"]["path"] is None and "py3-none-any" in report["library"]["reason"]
    states = {name: backend["available"] for name, backend in report["backends"].items()}
    assert states["composed"] and states["reference"] and not states["cpu"] and not states["cuda"]
    where, shape, refusal = python("-W", "error", "-c", SERVES, **here).splitlines()
    assert where.startswith(str(installed))
    assert shape == "torch.Size([1, 9, 16])" and "the native library is missing" in refusal


def test_what_setup_does_not_understand(tmp_path):
    """Before anything is built."""
    for environment, words in (
        ({"LINFORMER_NATIVE": "off"}, ("LINFORMER_NATIVE is 'off'", "AUTO, ON or OFF")),
        ({"LINFORMER_MACHINE": "abacus", "CXX": ""}, ("abacus-linux-gnu-g++", "apt install g++-abacus-linux-gnu")),
    ):
        variables = os.environ | environment
        variables = {k: v for k, v in variables.items() if v}
        variables["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        command = [sys.executable, str(ROOT / "setup.py"), "build_ext", "--build-temp", str(tmp_path / "temp")]
        command += ["--build-lib", str(tmp_path / "lib")]
        done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=ROOT)
        assert done.returncode != 0
        assert all(word in done.stderr for word in words), done.stderr


def test_the_library_asks_torch_for_its_stable_abi_alone():
    """And nothing of Linux that manylinux_2_34 does not promise."""
    library = _library.path()
    if library is None or shutil.which("readelf") is None:
        pytest.skip("the native library is missing" if library is None else "there is no readelf (binutils)")
    result = wheels.audit(library)
    assert result.problems() == []
    defined = subprocess.run(
        ["readelf", "-W", "--dyn-syms", str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in result.torch:
        assert f" {name}\n" in defined, name


def test_the_audit_finds_what_changes_from_version_to_version():
    """Of torch's own library for Python, which refers to all of it."""
    if shutil.which("readelf") is None:
        pytest.skip("there is no readelf (binutils)")
    result = wheels.audit(Path(torch.__file__).parent / "lib" / "libtorch_python.so")
    assert any("3c10" in name for name in result.foreign) and any(name.startswith("Py") for name in result.foreign)
    assert any("libtorch.so" in problem or "libc10.so" in problem for problem in result.problems())
