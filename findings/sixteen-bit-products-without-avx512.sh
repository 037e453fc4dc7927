#!/usr/bin/env bash
# On an x86 processor without AVX-512 PyTorch multiplies matrices of bf16 and fp16 some 40 times slower than of fp32.
#
# Where: torch 2.13.0 on the CPU, on processors that oneDNN does not multiply 16-bit matrices on (seen: AMD EPYC, Zen 3,
# AVX2 and F16C, Linux 6). One thread.
#
# What one would guess: without instructions of their own, 16-bit matrices are converted to fp32 and multiplied by the
# fast library, which costs a few percent; so a bf16 model is about as fast as an fp32 one, and half as large.
#
# What happens: where oneDNN says no, the product goes to a loop of PyTorch's own, element by element. Converting both
# matrices to fp32 by hand, multiplying and converting back takes as long as the fp32 product. PyTorch's own fused
# attention does just that, and is as fast in bf16; the formula of two products and a softmax is not.
#
# Output seen:
#   512 x 512 x 512: fp32 4.6 ms; bf16 197 ms, converted by hand 4.4 ms; fp16 197 ms, converted by hand 3.5 ms
#   fused attention, 8 heads, 512 positions of 64: fp32 11 ms; bf16 10.1 ms, converted by hand 14 ms
#
# Exits 0 where products take more than 5 times as long as by hand and attention less than 2, 1 where not,
# 2 where oneDNN takes bf16 (AVX-512).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder" torch==2.13.0
PYTHONPATH="$folder" python3 - <<'PY'
import sys
import time

import torch

if torch.ops.mkldnn._is_mkldnn_bf16_supported():
    print("oneDNN multiplies bf16 on this processor")
    sys.exit(2)
torch.set_num_threads(1)


def best(call):
    """Milliseconds of this thread, of the fastest of seven calls after one."""
    times = []
    for _ in range(8):
        begin = time.thread_time()
        call()
        times.append(1e3 * (time.thread_time() - begin))
    return min(times[1:])


def compare(operation, inputs, dtype):
    narrow = [x.to(dtype) for x in inputs]
    return best(lambda: operation(*narrow)), best(lambda: operation(*(x.float() for x in narrow)).to(dtype))


matrices = torch.randn(512, 512), torch.randn(512, 512)
rows = [torch.randn(1, 8, 512, 64) for _ in range(3)]
attention = torch.nn.functional.scaled_dot_product_attention
bf16, fp16 = (compare(torch.matmul, matrices, dtype) for dtype in (torch.bfloat16, torch.float16))
attended = compare(attention, rows, torch.bfloat16)
text = "bf16 {:.3g} ms, converted by hand {:.2g} ms"
print(f"512 x 512 x 512: fp32 {best(lambda: torch.matmul(*matrices)):.2g} ms;", text.format(*bf16) + ";",
      text.format(*fp16).replace("bf16", "fp16"))
fused = best(lambda: attention(*rows))
print(f"fused attention, 8 heads, 512 positions of 64: fp32 {fused:.2g} ms;", text.format(*attended))
as_seen = all(slow > 5 * by_hand for slow, by_hand in (bf16, fp16)) and attended[0] < 2 * attended[1]
sys.exit(not as_seen)
PY
