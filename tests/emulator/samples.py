"""Triton kernels that test_emulator.py runs in the emulator, and how they are compiled without a GPU."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def matmul(p_a, p_b, p_c, m, n, k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
           STAGES: tl.constexpr):  # fmt: skip
    """C = A B, ragged at all edges."""
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, k, BLOCK_K, num_stages=STAGES):
        o_at = start + o_k
        b_a = tl.load(p_a + o_m[:, None] * k + o_at[None, :], (o_m[:, None] < m) & (o_at[None, :] < k), other=0.0)
        b_b = tl.load(p_b + o_at[:, None] * n + o_n[None, :], (o_at[:, None] < k) & (o_n[None, :] < n), other=0.0)
        sums = tl.dot(b_a, b_b, sums)
    tl.store(p_c + o_m[:, None] * n + o_n[None, :], sums, (o_m[:, None] < m) & (o_n[None, :] < n))


@triton.jit
def matmul_tma(p_a, p_b, p_c, m, n, k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
               STAGES: tl.constexpr):  # fmt: skip
    """C = A B through tensor descriptors that the kernel makes."""
    a = tl.make_tensor_descriptor(p_a, [m, k], [k, 1], [BLOCK_M, BLOCK_K])
    b = tl.make_tensor_descriptor(p_b, [k, n], [n, 1], [BLOCK_K, BLOCK_N])
    c = tl.make_tensor_descriptor(p_c, [m, n], [n, 1], [BLOCK_M, BLOCK_N])
    at_m, at_n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, k, BLOCK_K, num_stages=STAGES):
        sums = tl.dot(a.load([at_m, start]), b.load([start, at_n]), sums)
    c.store([at_m, at_n], sums)


@triton.jit
def matmul_host_tma(a, b, p_c, n, k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                    STAGES: tl.constexpr):  # fmt: skip
    """C = A B through tensor descriptors that come as arguments; C is not ragged."""
    at_m, at_n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, k, BLOCK_K, num_stages=STAGES):
        sums = tl.dot(a.load([at_m, start]), b.load([start, at_n]), sums)
    o_c = (at_m + tl.arange(0, BLOCK_M))[:, None] * n + at_n + tl.arange(0, BLOCK_N)[None, :]
    tl.store(p_c + o_c, sums)


@triton.jit
def attention(p_q, p_k, p_v, p_o, scale, n, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
              STAGES: tl.constexpr):  # fmt: skip
    """softmax(scale q k^T) v with the online softmax; scale is in units of log2(e). One head a program_id(1)."""
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n, o_d = tl.arange(0, BLOCK_N), tl.arange(0, D)
    o_head = tl.program_id(1).to(tl.int64) * n * D
    m_q = o_m[:, None] < n
    b_q = tl.load(p_q + o_head + o_m[:, None] * D + o_d[None, :], m_q, other=0.0)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, D], tl.float32)
    for start in tl.range(0, n, BLOCK_N, num_stages=STAGES):
        o_key = start + o_n
        o_kv = o_head + o_key[:, None] * D + o_d[None, :]
        b_k = tl.load(p_k + o_kv, o_key[:, None] < n, other=0.0)
        b_v = tl.load(p_v + o_kv, o_key[:, None] < n, other=0.0)
        scores = tl.where(o_key[None, :] < n, tl.dot(b_q, b_k.T) * scale, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - new_best[:, None])
        shrink = tl.exp2(best - new_best)
        total = total * shrink + tl.sum(weights, 1)
        sums = tl.dot(weights.to(b_v.dtype), b_v, sums * shrink[:, None])
        best = new_best
    tl.store(p_o + o_head + o_m[:, None] * D + o_d[None, :], sums / total[:, None], m_q)


def compile_for(capability: int, kernel: Any, signature: dict[str, str], constants: dict[str, int], warps: int) -> Any:
    """For an NVIDIA GPU that need not be there. Pointers and sizes are taken to be divisible by 16."""
    types = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    aligned = [i for i, kind in enumerate(types.values()) if kind.startswith("*")]
    source = ASTSource(kernel, types, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
