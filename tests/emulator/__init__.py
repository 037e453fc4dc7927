"""Runs compiled PTX, from nvcc or from Triton, on the CPU; checks it and counts its work. See README.md.

module = emulator.from_nvcc("kernel.cu", "sm_80")  # or Module(ptx_text)
stats = module.kernel("saxpy").launch(grid, block, [x, y, 2.0, n], shared=0)

kernel = emulator.from_triton(triton.compile(...))
stats = kernel.launch(grid, [x, y, n])
"""

from emulator.arguments import Raw, TensorDesc, tensor_map
from emulator.errors import SOFT, PtxError, PtxIssues
from emulator.kernels import Kernel, Module, TritonKernel, from_nvcc, from_triton
from emulator.stats import Stats

__all__ = [
    "SOFT",
    "Kernel",
    "Module",
    "PtxError",
    "PtxIssues",
    "Raw",
    "Stats",
    "TensorDesc",
    "TritonKernel",
    "from_nvcc",
    "from_triton",
    "tensor_map",
]
