"""Output and gradients of the native backend against the oracle: chosen corners, and a new sample of the cross product
in every run."""

import dataclasses

import cases
import numpy as np
import pytest
import torch
from cases import Case

import linformer_kernels as lk

BF16, FP16 = torch.bfloat16, torch.float16
DTYPES = (torch.float32, BF16, FP16)

WIDTHS = [Case(d=d, k=16, n=33, n_q=33, extra=2) for d in (1, 8, 17, 32, 64, 96, 128, 256)]
WIDTHS += [Case(d=d, d_v=d_v, k=16, n=33, n_q=35) for d, d_v in ((64, 1), (1, 64), (17, 32), (96, 40), (24, 256))]
LENGTHS = [Case(n=n, n_q=n, k=24, d=16) for n in (1, 2, 31, 255, 256, 257, 1000)]
LENGTHS += [Case(n=n, n_q=n_q, k=24, d=16, kv_heads=2) for n, n_q in ((1, 300), (513, 1), (64, 127), (1000, 17))]
SIZES_OF_K = (1, 7, 64, 127, 128, 129, 256, 511, 512, 513, 1000)
PROJECTED = [Case(k=k, n=70, n_q=50, d=16, heads=2, kv_heads=2) for k in SIZES_OF_K]
EMPTY = [Case(batch=0), Case(n_q=0), Case(n=0), Case(n=0, extra=3, sharing="key-value"), Case(n=0, n_q=0)]
EMPTY += [Case(batch=0, n_q=0), Case(lengths=()), Case(lengths=(0,)), Case(lengths=(0, 0), extra=4)]
EMPTY += [Case(lengths=(0, 5, 0), lengths_q=(3, 0, 0))]
SHARINGS = [
    Case(sharing=sharing, kv_heads=kv_heads, extra=extra, n=65, n_q=65)
    for sharing in ("headwise", "key-value", "per-head", "per-head-key-value", "same")
    for kv_heads, extra in ((4, 0), (2, 7), (1, 3))
]
MASKS = [Case(mask=mask, n=67, batch=3) for mask in ("random", "prefix", "alternate", "one", "all", "nothing")]
MASKS += [
    Case(mask=mask, n=67, batch=3, kv_heads=2, sharing=sharing, layout="bnhd", extra=5)
    for mask, sharing in (("random", "key-value"), ("nothing", "per-head"), ("prefix", "per-head-key-value"))
]
LAYOUTS = [
    Case(layout=layout, grad=grad, sharing=sharing, n=65, n_q=63, d=d, kv_heads=2)
    for layout, grad, sharing, d in (
        ("bnhd", "bnhd", "headwise", 64), ("bnhd", "scalar", "per-head", 16), ("strided", "strided", "headwise", 32),
        ("padded", "padded", "headwise", 32), ("padded", "strided", "per-head", 17),
        ("offset", "offset", "headwise", 32), ("offset", "scalar", "key-value", 17),
        ("expanded", "expanded", "headwise", 32), ("expanded", "scalar", "per-head", 8),
    )
]  # fmt: skip
ALIASES = [Case(alias="kv"), Case(alias="kv", sharing="key-value"), Case(alias="qk")]
ALIASES += [Case(alias="qkv", sharing="key-value"), Case(alias="qkv", sharing="same")]
SCALES = [Case(scale=scale) for scale in (0.0, -0.3, 1.0, 40.0)] + [Case(size=1e3), Case(size=1e3, d=64, k=600)]
PACKED = [
    Case(lengths=(5, 0, 64, 31), lengths_q=(7, 3, 0, 40)),
    Case(lengths=(257,), kv_heads=2, sharing="key-value"),
    Case(lengths=(1, 1, 1, 130), lengths_q=(1, 200, 2, 3), kv_heads=1, sharing="per-head", extra=9),
    Case(lengths=(0, 0, 3, 70, 1, 0, 64, 0, 9, 0), lengths_q=(2, 0, 129, 1, 0, 0, 128, 5, 0, 1), heads=2, kv_heads=1),
    Case(lengths=(12, 40), layout="padded", grad="padded", sharing="per-head-key-value"),
    Case(lengths=(12, 40), layout="offset", grad="scalar", alias="kv"),
    Case(lengths=(30, 70), layout="strided", grad="strided", d=17, d_v=9),
]
# Results that the CPU kernels stream past the caches, and so large that bf16 is streamed too.
LARGE = [
    Case(batch=4, heads=8, kv_heads=8, n=3200, n_q=3200, k=16, d=32, layout="bnhd", mask="random"),
    Case(batch=4, heads=8, kv_heads=8, n=3200, n_q=3200, k=16, d=32, layout="bnhd", grad="bnhd", sharing="per-head"),
]
SMALL = dict(kv_heads=2, n=50, n_q=37, d=16)
BIASED = [Case(bias=bias, k=k, **SMALL) for bias in ("normal", "holes", "out") for k in (1, 40, 129, 600)]
BIASED += [Case(bias="holes", bias_shape=shape, k=24, mask="random", **SMALL) for shape in ("11k", "1hk", "b11", "k")]
BIASED += [
    Case(bias="holes", k=33, scale=0.0, **SMALL), Case(bias="holes", k=33, scale=-0.7, sharing="key-value", **SMALL),
    Case(bias="out", k=70, dropout_p=0.3, **SMALL), Case(bias="out", k=24, size=1e3, **SMALL),
    Case(bias="out", k=24, sharing="per-head", layout="strided", grad="scalar", **SMALL), Case(bias="out", n_q=0),
    Case(bias="out", bias_shape="k", **SMALL), Case(bias="normal", batch=0), Case(bias="holes", n=0),
    Case(bias="out", k=17, lengths=(5, 0, 64, 31), lengths_q=(7, 3, 0, 40), kv_heads=2),
    Case(bias="holes", k=300, lengths=(90, 1), kv_heads=1, layout="padded"), Case(bias="normal", lengths=()),
]  # fmt: skip
PER_SEQUENCE = [
    Case(sharing=sharing, extra=extra, k=40, layout=layout, mask=mask, **SMALL)
    for sharing, extra, layout, mask in (
        ("per-sequence", 0, "bhnd", None), ("per-sequence", 5, "bnhd", "nothing"),
        ("per-sequence-key-value", 3, "padded", "random"), ("per-sequence-head", 0, "bnhd", "random"),
        ("per-sequence-head", 7, "expanded", None), ("per-sequence-head-key-value", 2, "offset", None),
    )
] + [
    Case(sharing="per-sequence", batch=3, heads=6, kv_heads=3, n=300, n_q=20, k=150, d=17, d_v=9),
    Case(sharing="per-sequence-head", batch=1, kv_heads=1, n=70), Case(sharing="per-sequence-head", batch=0),
    Case(sharing="per-sequence", lengths=(5, 0, 64, 31), lengths_q=(7, 3, 0, 40), k=20, kv_heads=2, extra=2),
    Case(sharing="per-sequence-head-key-value", lengths=(40, 7), k=130, bias="holes"),
    Case(sharing="per-sequence", n=0), Case(sharing="per-sequence-head", lengths=()),
]  # fmt: skip
POOLED = [
    Case(pooled=pattern, segments_per_head=per_head, segments_dtype=dtype, mask=mask, k=k, **SMALL)
    for pattern, per_head, dtype, mask, k in (
        ("random", False, torch.int32, None, 20), ("random", True, torch.int64, "random", 20),
        ("random", True, torch.int32, "nothing", 300), ("windows", False, torch.int64, "prefix", 20),
        ("windows", True, torch.int32, None, 64), ("one", False, torch.int32, None, 1),
        ("one", True, torch.int64, None, 9),
        ("each", False, torch.int64, "nothing", 50), ("each", True, torch.int32, None, 600),
        ("none", False, torch.int32, None, 20), ("none", True, torch.int64, "random", 3),
    )
] + [
    Case(pooled="random", n=700, n_q=20, k=300, d=d, d_v=d_v, kv_heads=2) for d, d_v in ((17, 40), (1, 3), (64, None))
] + [
    Case(pooled="windows", n=1000, k=128, layout="bnhd", grad="bnhd", dropout_p=0.2, kv_heads=1),
    Case(pooled="random", layout="strided", grad="strided", k=33, segments_per_head=True, **SMALL),
    Case(pooled="random", layout="expanded", grad="expanded", k=33, **SMALL),
    Case(pooled="random", k=20, alias="kv", scale=-0.5, **SMALL), Case(pooled="windows", k=20, scale=0.0, **SMALL),
    Case(pooled="random", batch=0), Case(pooled="random", n=0), Case(pooled="windows", n_q=0), Case(pooled="one", n=1),
    Case(pooled="random", lengths=()), Case(pooled="random", lengths=(0, 0), segments_per_head=True),
    Case(pooled="random", lengths=(5, 0, 64, 31), lengths_q=(7, 3, 0, 40), k=20, kv_heads=2, segments_per_head=True),
    Case(pooled="windows", lengths=(1, 130), lengths_q=(30, 2), k=60, kv_heads=1, layout="padded", grad="padded"),
]  # fmt: skip
FOLLOWING = BIASED + PER_SEQUENCE + POOLED  # projections that follow the sequence
CHOSEN = (
    FOLLOWING + WIDTHS + LENGTHS + PROJECTED + EMPTY + SHARINGS + MASKS + LAYOUTS + ALIASES + SCALES + PACKED + LARGE
)


@pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "bf16", "fp16"))
@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_chosen(case, dtype, device, native):
    cases.check(dataclasses.replace(case, dtype=dtype), device, native)


@pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "bf16", "fp16"))
@pytest.mark.parametrize("case", [
    Case(mask="random", kv_heads=2, extra=5, n=130, d_v=40, layout="bnhd"),
    Case(lengths=(50, 0, 7), lengths_q=(3, 60, 0), kv_heads=2, sharing="key-value", k=129, layout="padded"),
    Case(dropout_p=0.3, sharing="per-head", layout="offset", mask="nothing"),
    Case(batch=0), Case(n=0), Case(n_q=0),
    Case(bias="out", sharing="per-sequence-head", mask="random", dropout_p=0.2, **SMALL),
    Case(bias="holes", sharing="per-sequence", lengths=(50, 0, 7), lengths_q=(3, 60, 0), kv_heads=2, k=20),
    Case(pooled="random", bias="holes", segments_per_head=True, mask="random", k=30, **SMALL),
    Case(pooled="windows", lengths=(50, 0, 7), lengths_q=(3, 60, 0), kv_heads=2, k=129, layout="padded"),
    Case(pooled="random", batch=0), Case(pooled="random", n=0), Case(pooled="random", n_q=0),
], ids=str)  # fmt: skip
def test_the_two_halves(case, dtype, device, native):
    cases.check(dataclasses.replace(case, dtype=dtype), device, native, cases.run_halves)


@pytest.mark.parametrize("bias", [None, "zero", "the largest is out"])
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_huge_scores(scale, bias):
    """From 2^31 on the rounding of max * scale exceeds the range of exponents: docs/proof.md on the GPU's kernels. Here
    the largest score stands alone."""
    query = torch.rand(1, 2, 3000, 32).add(1).mul(1e5)
    key = torch.arange(1e4, 71e4, 1e4)[:, None] * query.new_ones(2, 70, 32)
    value = torch.randn(1, 2, 70, 32)
    largest, second = (-1, -2) if scale > 0 else (0, 1)
    key_bias = None if bias is None else torch.zeros(70)
    if bias == "the largest is out":
        key_bias[largest], largest = -torch.inf, second
    out = lk.projected_attention(query, key[None], value, key_bias=key_bias, scale=scale, backend="cpu")
    torch.testing.assert_close(out, value[:, :, largest, None].expand_as(out), rtol=1e-6, atol=1e-6)


def sampled(rng: np.random.Generator) -> Case:
    """A case out of the whole cross product, with at most 60 million scores times width.

    Large scores in float32 alone: in 16 bits they make the softmax a choice that hangs on one rounding of K', and in a
    tensor of a few elements there is no saying who is luckier, the plain formula or the kernel.
    """
    pick = lambda *choices: choices[rng.integers(len(choices))]  # noqa: E731
    kv_heads = int(pick(1, 2, 3, 4))
    packed = rng.random() < 0.3
    case = Case(
        batch=int(rng.integers(1, 4)), heads=kv_heads * int(pick(1, 1, 2, 3)), kv_heads=kv_heads,
        n=pick(1, 2, 31, 64, 100, 255, 256, 257, 1000, int(rng.integers(1, 700))),
        n_q=pick(1, 2, 31, 64, 100, 255, 256, 257, 1000, int(rng.integers(1, 700))),
        extra=pick(0, 0, 1, 64), k=pick(1, 7, 64, 128, 256, 512, 1000, int(rng.integers(1, 300))),
        d=pick(1, 8, 17, 32, 64, 96, 128, 256), d_v=pick(None, None, None, 16, 33, 64, 128), dtype=pick(*DTYPES),
        sharing=pick("headwise", "key-value", "per-head", "per-head-key-value", "same", "per-sequence",
                     "per-sequence-head", "per-sequence-key-value"),
        bias=pick(None, None, "normal", "holes", "out"), bias_shape=pick("bhk", "bhk", "11k", "1hk", "k"),
        pooled=pick(None, None, None, "random", "windows", "one"), segments_per_head=bool(pick(False, True)),
        segments_dtype=pick(torch.int32, torch.int64),
        mask=None if packed else pick(None, None, "random", "prefix", "alternate", "one", "nothing"),
        layout=pick("bhnd", "bnhd", "bnhd", "padded", "offset", "expanded", "strided"),
        grad=pick("bhnd", "bnhd", "padded", "offset", "expanded", "scalar"),
        scale=pick(None, None, None, 0.0, -1.0, 3.0),
        dropout_p=pick(0.0, 0.0, 0.0, 0.1, 0.9),
    )  # fmt: skip
    if case.pooled:  # whose bias is the number of keys
        case = dataclasses.replace(case, bias=None)
    if case.scale is not None:
        case = dataclasses.replace(case, scale=case.scale * case.d**-0.5)
    if case.dtype == torch.float32:
        case = dataclasses.replace(case, size=pick(1.0, 1.0, 100.0))
    if packed:
        several = lambda: tuple(int(rng.integers(0, pick(2, 50, 200))) for _ in range(4))  # noqa: E731
        case = dataclasses.replace(case, lengths=several(), lengths_q=pick(None, several()))
    rows = max(case.n, case.n_q) if not packed else 200
    cost = case.batch * case.heads * rows * case.k * max(case.d, case.d_v or 0)
    return case if cost < 6e7 else sampled(rng)


@pytest.mark.parametrize("index", range(50))
def test_sampled(index, seed, device, native):
    cases.check(sampled(np.random.default_rng(seed)), device, native)
