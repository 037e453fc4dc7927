"""The package from outside: import, info, backend choice, broken installs, instruction sets, bench and examples."""

import functools
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from cases import Case, Inputs, Spy

import linformer_kernels as lk
from linformer_kernels import _backends, _library

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
    for word in (lk.__version__, torch.__version__, "cuda", "triton", "cpu", "reference"):
        assert word in text and word in json.dumps(report)
    assert torch.ops.linformer_kernels.cpu_capability() in text


@pytest.mark.parametrize(("architectures", "gpu", "served"), [
    ("80+PTX,86,90+PTX", (8, 0), True),
    ("80+PTX,86,90+PTX", (8, 9), True),  # machine code of 8.6, or PTX of 8.0
    ("80+PTX,86,90+PTX", (12, 0), True),  # PTX of 9.0
    ("90+PTX", (8, 0), False),
    ("86,120+PTX", (8, 9), True),  # machine code of 8.6
    ("86,120+PTX", (9, 0), False),
    ("", (8, 0), False),
])  # fmt: skip
def test_which_gpus_a_build_serves(architectures, gpu, served):
    assert _library.has_code_for(architectures, *gpu) == served


def test_a_build_for_other_gpus_is_refused(monkeypatch):
    """Before a launch fails: another backend takes the call, or the error says what to do."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(_backends, "_ARCHITECTURES", "90+PTX")
    tensor = types.SimpleNamespace(shape=(1, 1, 4, 8))
    call = types.SimpleNamespace(query=tensor, key=tensor, value=tensor, key_proj=None, value_proj=None)
    call.device, call.dtype = torch.device("cuda"), torch.float32
    assert "LINFORMER_CUDA_ARCHS=80" in _backends.BACKENDS["cuda"].limits(call)
    assert _backends.BACKENDS["triton"].limits(call) is None


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
        torch.ops.linformer_kernels.attention(*x.positional(), None, None, None, None, 0.0, 1.0, False)
    names = [event.name for event in profile.events()]
    assert names.count("aten::fill_") >= 3 and names.count("aten::empty") + names.count("aten::new_empty") >= 3, names


@functools.cache
def capability(**environment) -> str:
    code = "import torch, linformer_kernels; print(torch.ops.linformer_kernels.cpu_capability())"
    return succeeded(python("-c", code, **environment)).strip()


LEVELS = ("generic", "avx2", "avx512", "avx512_bf16", "amx")
INSTRUCTION_SETS = """
import sys, torch, cases, test_attention as t
torch.use_deterministic_algorithms(True)
torch.manual_seed(int(sys.argv[1]))
print(torch.ops.linformer_kernels.cpu_capability())
for i, case in enumerate(t.CHOSEN):
    cases.check(cases.dataclasses.replace(case, dtype=t.DTYPES[(i + int(sys.argv[1])) % 3]), "cpu", "cpu")
"""


def test_the_default_instruction_set():
    """The most that the machine runs; but on a processor whose AMX is refused not pairs of bfloat16, slow there."""
    runs = [level for level in LEVELS if capability(LINFORMER_CPU_CAPABILITY=level) == level]
    best = "avx512" if torch.ops.linformer_kernels.cpu_amx_refusal() else runs[-1]
    assert capability() == capability(LINFORMER_CPU_CAPABILITY="avx1024") == best


@pytest.mark.parametrize("level", [*LEVELS, "emulate_avx512_bf16", "emulate_amx"])
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


TINY = ("--op=full", "--seq-len=96", "--heads=2", "--proj-dim=8", "--head-dim=16", "--rivals=eager,sdpa_proj")


def test_bench_dry_run():
    out = succeeded(python("-m", "bench", *TINY, "--dry-run", cwd=ROOT))
    assert "96" in out


def test_bench_refcheck(tmp_path):
    where = tmp_path / "rows.json"
    succeeded(python("-m", "bench", *TINY, "--dtype", "fp32,bf16", "--refcheck", "--json", str(where), cwd=ROOT))
    assert "ours:auto" in where.read_text() and "sdpa_proj" in where.read_text()


def test_bench_rejects_a_wrong_answer(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import options
    from bench.candidates import Candidate, eager, make_inputs
    from bench.check import Checker

    (cell,) = options.cells(options.parse([*TINY, "--device", "cpu"]))
    check = Checker(cell, make_inputs(cell, "cpu"), exact=False)
    assert all(verdict.right for verdict in check(Candidate("right", eager, "ours")))
    wrong = lambda query, *rest: eager(query * 1.001, *rest)  # noqa: E731
    assert not all(verdict.right for verdict in check(Candidate("wrong", wrong, "ours")))


def test_bench_flash_has_the_layout_of_its_package(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import options
    from bench.candidates import candidates, make_inputs
    from bench.check import Checker

    transposed = lambda tensor: tensor.transpose(1, 2)  # noqa: E731
    sdpa = torch.nn.functional.scaled_dot_product_attention
    stub = types.SimpleNamespace(flash_attn_func=lambda *qkv: transposed(sdpa(*map(transposed, qkv))))
    monkeypatch.setitem(sys.modules, "flash_attn", stub)
    settings = options.parse([*TINY, "--device=cpu", "--dtype=bf16", "--rivals=flash"])
    (cell,) = options.cells(settings)
    _, flash = candidates(settings, cell)
    assert all(verdict.right for verdict in Checker(cell, make_inputs(cell, "cpu"), flash.exact)(flash))


def test_bench_percentiles(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.measure import percentiles

    assert percentiles([float(i) for i in range(100, -1, -1)]) == pytest.approx((20.0, 50.0, 80.0))
    assert percentiles([3.0, 3.0, 3.0]) == (3.0, 3.0, 3.0)


@pytest.mark.parametrize("example", ["quickstart", "varlen", "cross_attention_cached"])
def test_example_runs(example):
    succeeded(python(ROOT / "examples" / f"{example}.py"))
