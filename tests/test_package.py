"""The package from outside: import, info, backend choice, broken installs, instruction sets and examples."""

import dataclasses
import functools
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import matrix
import pytest
import torch
from cases import Case, Inputs, Spy

import linformer_kernels as lk
from linformer_kernels import _backends, _library, info

ROOT = Path(__file__).parent.parent


def python(*arguments, cwd=None, **environment) -> subprocess.CompletedProcess:
    """With the package under test on the path, and no LINFORMER_ variable but the given ones."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("LINFORMER_")}
    variables |= {"PYTHONPATH": str(Path(lk.__file__).parent.parent)} | environment
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=variables, cwd=cwd)


def succeeded(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_import_prints_nothing():
    done = python("-W", "error", "-c", "import linformer_kernels")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_info():
    report = json.loads(succeeded(python("-m", "linformer_kernels.info", "--json")))
    text = succeeded(python("-m", "linformer_kernels.info"))
    for word in (lk.__version__, torch.__version__, "cuda", "triton", "cpu", "composed", "reference"):
        assert word in text and word in json.dumps(report)
    assert torch.ops.linformer_kernels.cpu_capability() in text


@pytest.mark.parametrize(("architectures", "gpu", "code"), [
    ("80+PTX,86,90+PTX", (8, 0), "machine code"),
    ("80+PTX,86,90+PTX", (8, 9), "machine code"),  # of 8.6
    ("80+PTX,86,90+PTX", (12, 0), "PTX"),  # of 9.0
    ("90+PTX", (8, 0), None),
    ("86,120+PTX", (8, 9), "machine code"),
    ("86,120+PTX", (9, 0), None),
    ("80,90+PTX,90a", (9, 0), "machine code"),
    ("80,90+PTX,90a", (10, 0), "PTX"),
    ("80,90a", (9, 0), None),  # a few kernels are no backend
    ("", (8, 0), None),
])  # fmt: skip
def test_which_gpus_a_build_serves(architectures, gpu, code):
    assert _library.code_for(architectures, *gpu) == code


def test_a_build_for_other_gpus_is_refused(monkeypatch):
    """Before a launch fails: another backend takes the call, or the error says what to do."""
    monkeypatch.setattr(_backends, "_capability", lambda device: (8, 0))
    monkeypatch.setattr(_backends, "_ARCHITECTURES", "90+PTX")
    tensor = types.SimpleNamespace(shape=(1, 1, 4, 8))
    call = types.SimpleNamespace(query=tensor, key=tensor, value=tensor, key_proj=None, value_proj=None)
    call.device, call.device_type, call.dtype = torch.device("cuda"), "cuda", torch.float32
    assert "LINFORMER_CUDA_ARCHS=80" in _backends.BACKENDS["cuda"].limits(call)
    assert _backends.BACKENDS["triton"].limits(call) is None


def order(device="cuda", dtype=torch.bfloat16) -> list[str]:
    call = types.SimpleNamespace(device=torch.device(device), device_type=device, dtype=dtype)
    names = [backend.name for backend in _backends._in_order(call)]
    assert sorted(names) == sorted(_backends.BACKENDS) and names[-1] == "reference"
    return [name for name in names if name in ("cuda", "triton", "composed")]


@pytest.mark.parametrize(("major", "dtype", "version", "wanted"), [
    (8, torch.bfloat16, "3.6.0", "cuda triton composed"),
    (9, torch.bfloat16, "3.6.0", "cuda composed triton"),
    (9, torch.float32, "3.7.0+git1a2b", "cuda composed triton"),
    (10, torch.float16, "3.7.0", "cuda composed triton"),
    (12, torch.float16, "3.6.0", "triton cuda composed"),
    (9, torch.bfloat16, "3.7.1", "triton cuda composed"),
    (9, torch.float32, "3.7.1", "cuda triton composed"),
    (10, torch.float16, "3.10.0", "triton cuda composed"),
    (9, torch.float16, None, "triton cuda composed"),
])  # fmt: skip
def test_order_on_a_gpu(major, dtype, version, wanted, monkeypatch):
    """Triton's older versions were preferred on 9.x, where they leave out the fence between cp.async and wgmma."""
    monkeypatch.setattr(_backends, "UNFENCED_TRITON", note := _backends.unfenced_triton(version))
    monkeypatch.setattr(_backends, "_capability", lambda device: (major, 0))
    assert order(dtype=dtype) == wanted.split()
    shown = info.collect()["backends"]["triton"]["note"]
    assert shown == note and (note is None or f"Triton {version}" in note)


def test_order_on_other_gpus(monkeypatch):
    assert order("xpu") == ["cuda", "composed", "triton"]
    monkeypatch.setattr(torch.version, "hip", "7.1")
    assert order() == ["cuda", "composed", "triton"]


def test_rocm_has_no_cuda_kernels(monkeypatch):
    """ROCm's torch says that it was built with CUDA; a library with CUDA kernels was offered to it."""
    monkeypatch.setattr(_backends, "_LIBRARY_MISSING", None)
    monkeypatch.setattr(_backends, "_ARCHITECTURES", "90+PTX")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in _backends._cuda_missing()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert _backends._cuda_missing() is None


def test_info_says_what_this_gpu_lacks(monkeypatch):
    """It said that a library without code for the GPU was available."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_backends, "_capability", lambda device: (8, 0))
    monkeypatch.setattr(_backends, "_ARCHITECTURES", "90+PTX")
    for name in ("cuda", "triton"):
        there = dataclasses.replace(_backends.BACKENDS[name], missing=None)
        reason = info._reason(there)
        assert (
            (reason and "LINFORMER_CUDA_ARCHS=80" in reason) if name == "cuda" else "capability" not in (reason or "")
        )


def test_a_driver_too_old_for_the_library_is_refused(monkeypatch):
    """It was an error in the middle of the first call; Triton needs no runtime."""
    monkeypatch.setattr(_backends, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(_backends, "_ARCHITECTURES", "90")
    tensor = types.SimpleNamespace(shape=(1, 1, 4, 8))
    call = types.SimpleNamespace(query=tensor, key=tensor, value=tensor, key_proj=None, value_proj=None)
    call.device, call.device_type, call.dtype = torch.device("cuda"), "cuda", torch.float32
    for problem in ("this driver is for CUDA 12.8", ""):
        monkeypatch.setattr(_library, "driver_problem", lambda ptx, problem=problem: problem)
        assert _backends.BACKENDS["cuda"].limits(call) == (problem or None)
        assert _backends.BACKENDS["triton"].limits(call) is None
    # One of the same major version runs machine code, and cannot compile newer PTX.
    monkeypatch.setattr(_library, "driver_problem", lambda ptx: "newer PTX" if ptx else "")
    assert _backends.BACKENDS["cuda"].limits(call) is None
    monkeypatch.setattr(_backends, "_ARCHITECTURES", "80+PTX")
    assert _backends.BACKENDS["cuda"].limits(call) == "newer PTX"


def test_without_a_driver():
    """Asking the library is no error, and without CUDA in it there is nothing to say."""
    problem, of_ptx = (torch.ops.linformer_kernels.cuda_driver_problem(ptx) for ptx in (False, True))
    if not _library.cuda_architectures():
        assert problem == of_ptx == ""
    elif not torch.cuda.is_available():
        assert re.match(r"the native library was built with CUDA \d+\.\d+, and this driver is for CUDA 0\.0", problem)
        assert "PTX" in of_ptx and "PTX" not in problem


DAMAGED = """
import json, linformer_kernels as lk, torch
from linformer_kernels.info import collect
x = torch.ones(1, 1, 4, 8)
print(lk.__file__)
print(lk.linformer_attention(x, x, x, torch.ones(2, 4)).shape)
try:
    lk.linformer_attention(x, x, x, torch.ones(2, 4), backend="cpu")
except RuntimeError as error:
    print(repr(error))
print(json.dumps(collect()))
"""


@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_a_damaged_install_imports_and_says_why(damage, tmp_path):
    package = shutil.copytree(Path(lk.__file__).parent, tmp_path / "linformer_kernels")
    library = package / _library.path().name
    library.unlink()
    if damage == "broken":
        library.write_bytes(b"not a library")
    done = python("-c", DAMAGED, PYTHONPATH=str(tmp_path), cwd=tmp_path)
    where, shape, forced, report = succeeded(done).splitlines()
    assert done.stderr == "" and where == str(package / "__init__.py") and shape == "torch.Size([1, 1, 4, 8])"
    assert library.stem in forced and library.stem in json.loads(report)["backends"]["cpu"]["reason"]


def chosen_native(x: Inputs, backend=None) -> bool:
    with Spy() as spy:
        lk.linformer_attention(*x.positional(), backend=backend)
    return bool(spy.calls)


def test_argument_wins_over_context_wins_over_environment(device, native, monkeypatch):
    x = Inputs(Case(), device)
    monkeypatch.delenv("LINFORMER_BACKEND", raising=False)
    assert chosen_native(x) and not chosen_native(x, "reference")
    monkeypatch.setenv("LINFORMER_BACKEND", "reference")
    assert not chosen_native(x) and chosen_native(x, native or "cpu")
    with lk.use_backend(native or "cpu"):
        assert chosen_native(x) and not chosen_native(x, "reference")
        with lk.use_backend("reference"):
            assert not chosen_native(x)
        assert chosen_native(x)
    with pytest.raises(KeyError), lk.use_backend(native or "cpu"):
        raise KeyError
    assert not chosen_native(x)
    monkeypatch.setenv("LINFORMER_BACKEND", "cudnn")
    with pytest.raises(ValueError, match=r"LINFORMER_BACKEND.*cudnn"):
        chosen_native(x)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_forced_backend_says_why_it_refuses(backend, device):
    x = Inputs(Case(), device)
    with pytest.raises((NotImplementedError, RuntimeError), match=f"{backend}.{{10,}}"):
        lk.linformer_attention(*x.positional(), backend=backend)


def test_float64_goes_to_the_reference(device, native):
    x = Inputs(Case(dtype=torch.float64), device)
    assert not chosen_native(x)
    with pytest.raises((NotImplementedError, RuntimeError), match="float64"):
        chosen_native(x, native)


def test_results_of_the_ops_are_poisoned(device, native):
    """The poison of conftest.py reaches what C++ allocates: every result is filled before the kernel writes."""
    x = Inputs(Case(), device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ops.linformer_kernels.attention(*x.positional(), None, None, None, None, None, 0.0, 1.0, False)
    names = [event.name for event in profile.events()]
    assert names.count("aten::fill_") >= 3 and names.count("aten::empty") + names.count("aten::new_empty") >= 3, names


@functools.cache
def capability(**environment) -> str:
    code = "import torch, linformer_kernels; print(torch.ops.linformer_kernels.cpu_capability())"
    return succeeded(python("-c", code, **environment)).strip()


LEVELS = ("generic", "avx2", "avx512", "avx512_bf16", "amx")
if platform.machine() == "aarch64":
    LEVELS = ("generic", "neon", "neon_bf16")
INSTRUCTION_SETS = """
import sys, torch, cases, test_attention as t
torch.use_deterministic_algorithms(True)
torch.manual_seed(int(sys.argv[1]))
print(torch.ops.linformer_kernels.cpu_capability())
for i, case in enumerate(t.CHOSEN):
    cases.check(cases.dataclasses.replace(case, dtype=t.DTYPES[(i + int(sys.argv[1])) % 3]), "cpu", "cpu")
"""


def test_the_default_instruction_set():
    """The most that the machine runs; but no pairs of bfloat16 on Intel's, where they are slow: they were taken where
    a virtual machine hides AMX."""
    runs = [level for level in LEVELS if capability(LINFORMER_CPU_CAPABILITY=level) == level]
    processor = Path("/proc/cpuinfo")
    intel = processor.exists() and "GenuineIntel" in processor.read_text()
    slow = torch.ops.linformer_kernels.cpu_amx_refusal() or (intel and runs[-1] == "avx512_bf16")
    assert capability() == ("avx512" if slow else runs[-1])


@pytest.mark.parametrize("level", [*LEVELS, "emulate_avx512_bf16", "emulate_amx", "emulate_neon_bf16"])
def test_instruction_set(level, seed):
    """Each path that this machine can run, every case in one type, with memory from malloc filled with rubbish (glibc's
    MALLOC_PERTURB_). A level beyond the machine gives what the machine has."""
    if level in LEVELS and capability(LINFORMER_CPU_CAPABILITY=level) != level:
        assert capability(LINFORMER_CPU_CAPABILITY=level) == capability()
        later = LEVELS[LEVELS.index(level) :]
        assert not any(capability(LINFORMER_CPU_CAPABILITY=one) == one for one in later)
        return
    environment = {"LINFORMER_CPU_CAPABILITY": level, "MALLOC_PERTURB_": "1"}
    done = python("-c", INSTRUCTION_SETS, str(seed), cwd=ROOT / "tests", **environment)
    assert succeeded(done).strip() == level


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("proj_dim", [128, 256])
def test_plan_fills_many_cores(proj_dim, shared, backward):
    """One sequence of 4,096 with 8 heads on 64 threads: in no phase do equal tasks leave a fifth of the threads' time
    idle. The phases between the large ones had 8 tasks, one a head, and the projection 16."""
    threads = 64
    phases = torch.ops.linformer_kernels.cpu_plan(1, 8, 4096, proj_dim, 64, shared, backward, threads)
    assert len(phases) == (4 if backward else 3)
    for tasks in phases:
        assert tasks / threads > 0.8 * math.ceil(tasks / threads), phases


SETUP = """
import runpy, sys, sysconfig
from types import SimpleNamespace
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "torch" else find(name)  # hidden, as in an isolated build
sysconfig.get_path = lambda scheme: "/nowhere"
command = SimpleNamespace(bdist_wheel=object, build_ext=object)
for name in ("setuptools", "setuptools.command", "setuptools.command.bdist_wheel", "setuptools.command.build_ext"):
    sys.modules[name] = command
command.Extension, command.setup = (lambda *args, **more: None), (lambda **given: print(given["setup_requires"]))
runpy.run_path(sys.argv[1])["torch_dir"]
"""


@pytest.mark.parametrize("active", ["PATH", "VIRTUAL_ENV", None])
def test_an_isolated_build_finds_the_torch_of_the_active_environment(active, tmp_path):
    """uv hides where packages are installed: it downloaded a second torch of gigabytes for a few headers."""
    header = tmp_path / "lib/python3.11/site-packages/torch/include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (tmp_path / "bin").mkdir()
    (tmp_path / "setup.py").write_text((ROOT / "setup.py").read_text())
    environment = {"PATH": "/usr/bin", "VIRTUAL_ENV": "", "CONDA_PREFIX": ""}
    if active:
        environment[active] = f"{tmp_path / 'bin'}:/usr/bin" if active == "PATH" else str(tmp_path)
    done = python("-c", SETUP, str(tmp_path / "setup.py"), **environment)
    assert succeeded(done).strip() == ("[]" if active else "['torch>=2.10']")


def test_matrix_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(matrix, "RESULTS", tmp_path / "matrix.json")
    tried = []

    def try_version(package, version, tests, index):
        tried.append(f"{package} {version}")
        if tried == ["torch 2.10.0", "torch 2.11.0"]:
            raise KeyboardInterrupt
        counts = {"outcome": "passed", "counts": {"passed": 7, "skipped": 1}, "version": version, "torch": version}
        return counts | {"date": "2026-11-29", "tests": tests, "python": "3.11.7"}

    monkeypatch.setattr(matrix, "try_version", try_version)
    monkeypatch.setattr(sys, "argv", ["matrix.py", "--tests", "tests/test_errors.py"])
    with pytest.raises(KeyboardInterrupt):
        matrix.main()
    monkeypatch.setattr(sys, "argv", ["matrix.py", "--only", "torch 2.10.0, torch 2.11.0"])
    assert matrix.main() == 0
    assert tried == ["torch 2.10.0", "torch 2.11.0", "torch 2.11.0"]
    said = capsys.readouterr().out
    assert "| torch 2.10.0 | 2.10.0 | 3.11.7 | `errors` | 7 passed, 1 skipped | 2026-11-29 |" in said
    assert "| transformers newest | | | | not run | |" in said


@pytest.mark.parametrize("example", ["quickstart", "varlen", "cross_attention_cached"])
def test_example_runs(example):
    succeeded(python(ROOT / "examples" / f"{example}.py"))
