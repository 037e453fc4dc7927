"""The native library without Python, and with another library of the same operators in the process."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from test_docs import program
from test_package import ROOT, python, succeeded

import linformer_kernels as lk
from linformer_kernels import _library

ops = _library.ops()
LIBRARY = _library.path()
TRY = """
import torch, linformer_kernels as lk
x = torch.ones(1, 1, 4, 8)
print(lk.linformer_attention(x, x, x, torch.ones(2, 4)).shape == x.shape)
try:
    print(lk.linformer_attention(x, x, x, torch.ones(2, 4), backend="cpu").shape == x.shape)
except RuntimeError as error:
    print(error)
"""


def tried(before: str, **environment) -> list[str]:
    done = python("-c", before + TRY, **environment)
    out = succeeded(done).splitlines()
    assert done.stderr == "" and out[0] == "True"
    return out[1:]


@pytest.mark.slow
def test_a_program_in_cpp_serves_the_bits_of_python(tmp_path):
    """The page docs/deploying.md, from its first block to its last."""
    if shutil.which("cmake") is None:
        pytest.skip("there is no cmake")
    if torch.version.cuda and shutil.which("nvcc") is None:
        pytest.skip("find_package(Torch) of a torch with CUDA wants the CUDA toolkit")
    page = program(ROOT / "docs" / "deploying.md") + '\ntorch.save(served, "want.pt")\n'
    (tmp_path / "page.py").write_text(page)
    succeeded(python(tmp_path / "page.py", cwd=tmp_path, OMP_NUM_THREADS="2"))
    build = ["cmake", "-S", ROOT / "examples" / "cpp", "-B", "build", "-DCMAKE_BUILD_TYPE=Release"]
    for command in ([*build, f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"], ["cmake", "--build", "build"]):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def serve(library: Path, lines: str) -> subprocess.CompletedProcess:
        command, environment = (
            [tmp_path / "build" / "serve", library, "encoder.pt2"],
            os.environ | {"OMP_NUM_THREADS": "2"},
        )
        return subprocess.run(command, cwd=tmp_path, env=environment, input=lines, capture_output=True, text=True)

    done = serve(LIBRARY, "inputs.pt output.pt\n" * 2)
    assert done.returncode == 0 and done.stdout.count("->") == 2, done.stderr
    served, want = torch.load(tmp_path / "output.pt"), torch.load(tmp_path / "want.pt")
    assert torch.equal(served, want)
    missing = serve(tmp_path / "missing.so", "")
    assert missing.returncode == 1 and "missing.so" in missing.stderr


def test_python_and_library_have_one_list_of_schemas():
    for name, rest in _library.schemas().items():
        op = getattr(ops, name)
        assert op.default._schema == torch._C.parse_schema(f"{_library.namespace()}::{name}{rest}")
        if "triton" in op.overloads():
            assert str(op.triton._schema).replace(".triton", "") == str(op.default._schema)
            assert op.triton.tags == op.default.tags
        assert torch.Tag.needs_exact_strides in op.default.tags or torch.__version__ < "2.12"


def test_a_library_that_was_loaded_before():
    assert tried(f"import torch; torch.ops.load_library({str(LIBRARY)!r})") == ["True"]


def test_a_second_library_leaves_the_operators_to_the_first(tmp_path):
    copy = shutil.copy(LIBRARY, tmp_path / "copy.so")
    before = f"""
import ctypes, torch
for path in ({str(copy)!r}, {str(LIBRARY)!r}):
    library = ctypes.CDLL(path)
    library.linformer_problem.restype = ctypes.c_char_p
    print(library.linformer_problem().decode())
"""
    done = python("-c", before + TRY)
    first, second, *results = succeeded(done).splitlines()
    assert done.stderr == "" and first == "" and "LINFORMER_NAMESPACE" in second and results == ["True", "True"]


def test_operators_of_another_version_in_the_process():
    before = """
import torch
library = torch.library.Library("linformer_kernels", "DEF")
library.define("attention(Tensor query) -> Tensor")
"""
    (said,) = tried(before)
    assert "another version" in said and "reinstall" in said
    report = succeeded(python("-c", before + "from linformer_kernels import info; info.main()"))
    assert "not loaded: the operators linformer_kernels::*" in report


@pytest.mark.parametrize("older", ["schemas", "symbols"])
def test_a_library_older_than_the_package(older, tmp_path):
    package = shutil.copytree(Path(lk.__file__).parent, tmp_path / "linformer_kernels")
    if older == "schemas":
        schemas = package / "schemas.inc"
        schemas.write_text(schemas.read_text().replace("int num_segments)", "int num_segments, bool new)", 1))
    else:  # as before the library defined the operators
        (tmp_path / "old.c").write_text("int nothing;")
        compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("g++")
        command = [compiler, "-shared", "-o", package / LIBRARY.name, tmp_path / "old.c"]
        assert subprocess.run(command).returncode == 0
    (said,) = tried("", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert "another version" in said and str(package / LIBRARY.name) in said


def test_the_namespace_is_a_parameter_of_the_build(tmp_path):
    source = tmp_path / "mine.cpp"
    source.write_text('#include "ops/schemas.h"\nstatic const std::string& problem = linformer::schemas().problem();\n')
    torch_dir = Path(torch.__file__).parent
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    flags = ["-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += ["-DLINFORMER_NAMESPACE=mine", f"-I{ROOT / 'csrc'}", "-isystem", str(torch_dir / "include")]
    sources = [source, ROOT / "csrc/ops/tensors.cpp"]
    command = [compiler, *flags, *sources, "-o", tmp_path / "mine.so", f"-L{torch_dir / 'lib'}", "-ltorch_cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(tmp_path / "mine.so"))
    library.linformer_namespace.restype = library.linformer_problem.restype = ctypes.c_char_p
    assert (library.linformer_namespace(), library.linformer_problem()) == (b"mine", b"")
    assert str(torch.ops.mine.pool.default._schema) == str(ops.pool.default._schema).replace(
        f"{_library.namespace()}::", "mine::"
    )
