"""Run by test_tritons.py in a process of its own: what Triton's launcher hands to the driver, as calls alternate."""

import importlib
import struct

import cases
import emulated_triton
import stubbed
import torch
from cases import Case

from linformer_kernels import _backends

BF16 = torch.bfloat16
# Pairs of one compiled kernel and of two: other sizes, strides and alignments, a mask, a bias, dropout, packed rows.
BASE = Case(dtype=BF16, n=70, n_q=50, k=40, d=32, kv_heads=2)
CASES = [
    BASE,
    Case(dtype=BF16, n=130, n_q=20, k=40, d=32, kv_heads=2, layout="bnhd", batch=3, mask="random"),
    Case(dtype=BF16, n=70, n_q=50, k=40, d=32, kv_heads=2, layout="offset", mask="random"),
    Case(dtype=BF16, lengths=(50, 0, 7), lengths_q=(3, 60, 0), k=40, d=32, kv_heads=2, dropout_p=0.7, bias="holes"),
    Case(n=70, n_q=50, k=20, d=16, batch=1, heads=2, kv_heads=1, sharing="per-sequence-key-value", scale=-0.3),
    Case(pooled="random", k=9, n=70, n_q=20, d=24, batch=1, dtype=BF16),
]
PACKED = {"i1": "<B", "i32": "<i", "u32": "<I", "i64": "<q", "u64": "<Q", "fp32": "<f"}


def expected(signature, arguments) -> list[bytes]:
    """The kernel's parameters: nested tuples opened, what was compiled in left out, two null pointers at the end."""

    def flat(of, value):
        if isinstance(of, tuple):
            return [x for s, v in zip(of, value, strict=True) for x in flat(s, v)]
        if of == "constexpr":
            return []
        if of.startswith("*"):
            return [struct.pack("<Q", 0 if value is None else value.data_ptr())]
        return [struct.pack(PACKED[of], value)]

    found = [x for name, of in signature.items() for x in flat(of, arguments.get(name))]
    return [*found, bytes(8), bytes(8)]


def main() -> None:
    assert _backends.triton_problem() is None, _backends.triton_problem()
    ops = importlib.import_module("linformer_kernels.triton_kernels.ops")
    usual, sizes, seen, kept = ops.launch, {}, set(), 0

    with stubbed.stubbed(90, 40, lambda function: sizes["now"]) as arrived:

        def launch(one, tensors=()):
            """Against what Triton's own way gives, from these tensors to the compiled kernel."""
            nonlocal kept
            arguments = one.filled(tensors)
            compiled = one.kernel.run(**arguments, grid=(one.grid,), warmup=True, num_warps=one.num_warps)
            parameters = expected(compiled.src.signature, arguments)
            sizes["now"] = [len(value) for value in parameters]
            arrived.clear()
            first = one not in seen
            seen.add(one)
            kept += not first
            usual(one, tensors)
            (got,) = arrived
            where = f"{compiled.name}, {'first' if first else 'later'} launch"
            assert got.function == compiled.function, where
            assert got.grid == (one.grid, 1, 1) and got.block == (32 * one.num_warps, 1, 1), (where, got)
            assert got.shared_bytes == compiled.metadata.shared and got.stream == stubbed.STREAM, (where, got)
            assert got.parameters == parameters, (where, got.parameters, parameters)
            assert emulated_triton.parameter_count(compiled) == len(parameters), where

        ops.launch = launch
        torch.manual_seed(0)
        inputs = [cases.Inputs(case, "cpu") for case in CASES]
        for _ in range(3):
            for x in inputs:
                cases.run(x, "triton")
                query = inputs[0].query.detach()  # the same at another address, once of another alignment
                for start in (0, 1):
                    memory = torch.empty(query.numel() + start, dtype=query.dtype)[start:]
                    inputs[0].query = memory.view(query.shape).copy_(query).requires_grad_()
                    cases.run(inputs[0], "triton")
        ops.launch = usual
    assert kept > len(seen)
    print(len(seen), "launches that were new, and", kept, "of kept plans")


if __name__ == "__main__":
    main()
