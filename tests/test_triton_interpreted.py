"""The algorithm of the Triton kernels over the whole matrix of cases, in Triton's interpreter.

Triton decides when it is imported whether it interprets, so the tests run in a process of their own, which
`test_in_the_interpreter` starts; TRITON_INTERPRET=1 pytest tests/test_triton_interpreted.py runs them one by one.
"""

import dataclasses
import os
import subprocess
import sys

import cases
import numpy as np
import pytest
import test_attention
import torch

pytest.importorskip("triton")
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16)

if INTERPRETING:
    import triton.language as tl
    from triton.runtime import interpreter

    @pytest.fixture(autouse=True)
    def nearest(monkeypatch):
        """The interpreter cuts off what does not fit into bfloat16, GPUs round to nearest even."""
        usual = interpreter._convert_float

        def convert(values, source, target, mode):
            if (source, target) == (tl.bfloat16, tl.float32):
                return values.astype(np.uint32) << 16
            if (source, target) != (tl.float32, tl.bfloat16):
                return usual(values, source, target, mode)
            bits = np.ascontiguousarray(values).view(np.uint32)
            rounded = bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)
            return (np.where(np.isnan(values), bits | 0x400000, rounded) >> 16).astype(np.uint16)

        monkeypatch.setattr(interpreter, "_convert_float", convert)

    @pytest.fixture(autouse=True)
    def products(monkeypatch):
        """numpy sums a product in an order that depends on its shape, so that backward would not see forward's scores.
        A GPU does it the same way every time; sums in float64, rounded once, do so too."""

        def create_dot(self, a, b, c, input_precision, max_num_imprecise_acc):
            product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64))
            return interpreter.TensorHandle((product + c.data).astype(c.data.dtype), c.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)

    _PATCHED: set[int] = set()

    @pytest.fixture(autouse=True)
    def patched_once(monkeypatch):
        """Each call of a function within a kernel makes triton.language interpret once more: most of the time, for
        nothing, as the kernel's launch has done so; the functions that Triton brings need it once."""

        def call(self, *args, **kwargs):
            if self.fn.__module__.startswith("triton.") and id(self.fn.__globals__) not in _PATCHED:
                interpreter._patch_lang(self.fn)
                _PATCHED.add(id(self.fn.__globals__))
            return self.rewrite()(*args, **kwargs)

        monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)

    @pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "bf16"))
    @pytest.mark.parametrize(
        "case", [case for case in test_attention.CHOSEN if cases.work(case) < cases.MOST_WORK], ids=str
    )
    def test_chosen(case, dtype):
        cases.check(dataclasses.replace(case, dtype=dtype), "cpu", "triton")

    @pytest.mark.parametrize("index", range(30))
    def test_sampled(index, seed):
        rng = np.random.default_rng(seed)
        case = test_attention.sampled(rng)
        while cases.work(case) > cases.MOST_WORK:
            case = test_attention.sampled(rng)
        cases.check(case, "cpu", "triton")

else:

    def test_in_the_interpreter(request):
        command = [sys.executable, "-m", "pytest", "-q", "--seed", str(request.config.run_seed), __file__]
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        print(done.stdout[-200:])
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
