"""Run by test_tritons.py in a process of its own: cases in the emulator, under whichever Triton is imported.

Prints the version, then of each case and architecture how it went: right, or what the emulator found wrong.
"""

import sys

import cases
import emulated_triton
import torch
import triton
from cases import Case
from emulator import PtxIssues

BF16 = torch.bfloat16
SMALL = {"batch": 1, "heads": 2, "kv_heads": 1, "n_q": 70}
CASES = [  # all of K' in a program, and not; packed; fp32
    (90, Case(**SMALL, dtype=BF16, d=64, k=128, n=100)),
    (90, Case(**SMALL, dtype=BF16, d=64, k=150, n=70, mask="random", bias="holes", dropout_p=0.3)),
    (80, Case(dtype=BF16, lengths=(50, 0, 7), lengths_q=(3, 60, 0), kv_heads=2, d=64, k=40, sharing="key-value")),
    (80, Case(**SMALL, d=32, k=20, n=50, extra=5, scale=-0.3)),
    (80, Case(**SMALL, pooled="random", dtype=BF16, k=9, n=70, d=24)),
]


def main(seed: int) -> None:
    print(triton.__version__)
    torch.manual_seed(seed)
    for arch, case in CASES:
        x, went = cases.Inputs(case, "cpu"), "right"
        try:
            with emulated_triton.emulated(arch=arch):
                got = cases.run(x, "triton")
        except PtxIssues as error:
            went = " ".join(sorted({issue["kind"] for issue in error.stats.issues}))
            with emulated_triton.emulated(arch=arch, proxy_fences=False):
                got = cases.run(x, "triton")
        cases.compare({case: got}, x)
        print(f"sm_{arch} {went}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
