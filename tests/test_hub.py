"""hub/: the package as a kernel of the Hugging Face Hub, parsed by `kernels`' own parser and loaded by its loader."""

import json
import re
import shutil
import subprocess

import pytest
from test_package import ROOT, python, succeeded

# What kernel-builder adds to the folder of a kernel without compiled parts.
ADDED = "ops = None\n\n\ndef add_op_namespace_prefix(name):\n    raise NotImplementedError\n"
PROGRAM = """
import sys
from pathlib import Path
import torch
from kernels import get_local_kernel

loaded = [get_local_kernel(Path(folder)) for folder in sys.argv[1:]]
query, key, value = (torch.randn(2, 4, 37, 8, requires_grad=True) for _ in range(3))
proj = torch.randn(5, 37, requires_grad=True)
rows = [proj @ rows for rows in (key, value)]
want = (query @ rows[0].mT / 8**0.5).softmax(-1) @ rows[1]
grad = torch.randn_like(want)
inputs = query, key, value, proj
wanted = torch.autograd.grad(want, inputs, grad)
for module in loaded:
    got = module.linformer_attention(*inputs)
    torch.testing.assert_close(got, want)
    for one, other in zip(torch.autograd.grad(got, inputs, grad), wanted):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    print(module.__name__, module.package._library.namespace(), module.LinformerAttention.__module__)
assert not [name for name in sys.modules if name.split(".")[0] == "linformer_kernels"]
"""


@pytest.fixture(scope="module")
def project():
    succeeded(subprocess.run(["make", "-s", "hub"], cwd=ROOT, capture_output=True, text=True))
    return ROOT / "build" / "hub"


def test_the_builder_reads_its_configuration(project):
    parser = pytest.importorskip("kernels._rust", reason="kernels is not installed; requirements-models.txt has it")
    parser.Build.open(project)  # raises for an unknown name or a wrong value
    text = (project / "build.toml").read_text()
    assert 'name = "linformer-kernels"' in text
    assert (project / "torch-ext" / "linformer_kernels" / "__init__.py").exists()
    oldest = re.search(r'cuda_capabilities = \["([\d.]+)"', text)[1]
    assert f"compute capability {oldest} and later" in (ROOT / "README.md").read_text()


def test_nothing_that_was_built_is_in_it(project):
    assert not [path for path in project.rglob("*") if path.suffix in (".so", ".pyc") or path.is_symlink()]
    assert (project / "torch-ext/linformer_kernels/package/triton_kernels/forward.py").exists()


def test_two_versions_of_it_load_beside_each_other(project, tmp_path):
    """Each has its operators in a namespace of its own, which is its id."""
    pytest.importorskip("kernels", reason="it is not installed; requirements-models.txt has it")
    names = ["_linformer_kernels_cpu_a1", "_linformer_kernels_cpu_b2"]
    for name in names:
        variant = tmp_path / name / "torch-cpu"
        shutil.copytree(project / "torch-ext" / "linformer_kernels", variant)
        (variant / "_ops.py").write_text(ADDED)
        metadata = {"name": "linformer-kernels", "id": name, "version": 0, "license": "Apache-2.0"}
        metadata |= {"python-depends": [], "backend": {"type": "cpu"}, "digest": {"algorithm": "sha256", "files": {}}}
        (variant / "metadata.json").write_text(json.dumps(metadata))
    script = tmp_path / "loads.py"
    script.write_text(PROGRAM)
    folders = [str(tmp_path / name) for name in names]
    printed = succeeded(python(script, *folders, cwd=tmp_path, HF_HUB_OFFLINE="1"))
    assert printed.splitlines() == [f"{name} {name} {name}.package.modules" for name in names]
