"""The CUDA kernels without a GPU: those of the built library, executed by the emulator, against the oracle.

Out-of-bounds accesses, races and copies that nobody waited for raise in the emulator. On a GPU, test_attention.py and
the others run the same kernels on it.
"""

import dataclasses

import cases
import emulated
import numpy as np
import pytest
import test_attention
import torch
from cases import Case

REASON = emulated.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
BF16, FP16 = torch.bfloat16, torch.float16


def check(case: Case, through=cases.run, **options) -> emulated.Run:
    x = cases.Inputs(case, "cpu")
    with emulated.emulated(**options) as run:
        got = through(x, "cpu")
    cases.compare({case: got}, x)
    return run


# An emulated kernel takes its time: what follows the sequence in one type each, all else in all.
CHOSEN = [
    dataclasses.replace(case, dtype=dtype)
    for index, case in enumerate(test_attention.CHOSEN)
    for dtype in test_attention.DTYPES
    if cases.work(case) < cases.MOST_WORK
    and (case not in test_attention.FOLLOWING or dtype == test_attention.DTYPES[index % 3])
]


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_chosen(case):
    check(case)


@pytest.mark.parametrize("index", range(40))
def test_sampled(index, seed):
    """On a GPU of another size each time: other splits, other runs of tiles, other residents."""
    rng = np.random.default_rng(seed)
    case = test_attention.sampled(rng)
    while cases.work(case) > cases.MOST_WORK:
        case = test_attention.sampled(rng)
    order, shared_bytes = int(rng.integers(1, 2**31)), emulated.SHARED_BYTES[rng.choice([80, 86])]
    check(case, multiprocessors=int(rng.integers(1, 9)), shared_bytes=shared_bytes, seed=order)


@pytest.mark.parametrize("case", [
    Case(mask="random", kv_heads=2, extra=5, n=130, d_v=40, layout="bnhd"),
    Case(lengths=(50, 0, 7), lengths_q=(3, 60, 0), kv_heads=2, sharing="key-value", k=129, layout="padded", dtype=BF16),
    Case(dropout_p=0.3, sharing="per-head", layout="offset", mask="nothing", dtype=FP16),
    Case(batch=0), Case(n=0), Case(n_q=0),
], ids=str)  # fmt: skip
def test_the_two_halves(case):
    check(case, cases.run_halves)


@pytest.mark.parametrize("case, through", [
    (Case(n=130, n_q=40, k=40, mask="random", kv_heads=2, d_v=24, extra=5, dropout_p=0.2), cases.run),
    (Case(n=40, n_q=130, k=70, d=64, sharing="key-value", layout="padded"), cases.run_halves),
    (Case(lengths=(50, 0, 7), lengths_q=(3, 60, 0), k=20, d=96), cases.run),
    (Case(batch=1, heads=1, kv_heads=1, n=70, n_q=30, k=129, d=128), cases.run),
    (Case(batch=1, heads=1, kv_heads=1, n=40, n_q=20, k=20, d=250, scale=-0.1), cases.run_halves),
], ids=str)  # fmt: skip
def test_tf32_where_torch_allows_it(case, through):
    """As near as torch's own products in TF32 and no nearer, gradients too, for a third of the work."""
    x, stats = cases.Inputs(case, "cpu"), {}
    for x.case in (case, dataclasses.replace(case, tf32=True)):
        with emulated.emulated() as run:
            got = through(x, "cpu")
        cases.compare({x.case: got}, x)
        stats[x.case.tf32] = run.stats
    assert [one.tensor_flops for one in stats[False]] == [3 * one.tensor_flops for one in stats[True]]
    x.case = case
    for name, tensor in got.items():
        with pytest.raises(AssertionError, match="error"):
            cases.compare({"TF32": {name: tensor}}, x)


# Beside those of test_attention.py, for each width of the kernels, and with K in several blocks.
FOLLOWING = [
    Case(bias="normal", n=70, n_q=70, d=64), Case(bias="holes", n=30, n_q=200, k=70, d=96, layout="padded"),
    Case(bias="out", n=30, n_q=50, k=200, d=64, kv_heads=2, dropout_p=0.3, scale=-0.4, bias_shape="b11"),
    Case(bias="out", n=20, n_q=40, k=300, d=128, heads=2, kv_heads=1, layout="offset", dropout_p=0.1),
    Case(bias="holes", n=20, n_q=40, k=70, d=250, d_v=100, heads=2, kv_heads=2, scale=0.0, bias_shape="k"),
    Case(sharing="per-sequence", batch=3, n=70, n_q=40, d=64, extra=5, bias="holes"),
    Case(sharing="per-sequence-head", batch=3, n=130, n_q=33, k=140, d=96, kv_heads=2, layout="padded"),
    Case(sharing="per-sequence-head-key-value", lengths=(12, 40), d=250, heads=2, kv_heads=2, k=20, layout="offset"),
    Case(pooled="random", n=130, n_q=40, k=37, d=64, kv_heads=2),
    Case(pooled="one", n=150, n_q=30, k=5, d=96, d_v=200, heads=2, kv_heads=1, layout="padded", dropout_p=0.2),
    Case(pooled="random", lengths=(50, 0, 77), lengths_q=(3, 60, 0), k=20, d=64, kv_heads=2, segments_per_head=True),
    Case(pooled="windows", lengths=(12, 140), k=30, d=250, d_v=128, heads=2, kv_heads=2, layout="padded"),
]  # fmt: skip


@pytest.mark.parametrize("dtype", test_attention.DTYPES, ids=("fp32", "bf16", "fp16"))
@pytest.mark.parametrize("case", FOLLOWING, ids=str)
def test_projections_that_follow_the_sequence(case, dtype):
    check(dataclasses.replace(case, dtype=dtype), cases.run_halves)


@pytest.mark.parametrize("through", [cases.run, cases.run_halves])
def test_gradient_of_each_alone(through):
    """A launch computes what is wanted, and no bit depends on what else is."""
    x = cases.Inputs(Case(bias="holes", n=50, n_q=60, k=150, kv_heads=2, dtype=BF16), "cpu")
    with emulated.emulated(multiprocessors=20):
        together = through(x, "cpu")
    for name, leaf in x.leaves().items():
        for other in x.leaves().values():
            other.requires_grad_(other is leaf)
        with emulated.emulated(multiprocessors=20):
            alone = through(x, "cpu")
        assert torch.equal(alone[f"grad_{name}"], together[f"grad_{name}"]), name


@pytest.mark.parametrize("dtype", test_attention.DTYPES, ids=("fp32", "bf16", "fp16"))
def test_the_lowest_number_as_bias_is_not_minus_infinity(dtype):
    """Where all rows have it, they share the weight."""
    x = cases.Inputs(Case(bias="normal", n=40, n_q=40, k=150, kv_heads=2, dtype=dtype), "cpu")
    lowest = torch.finfo(torch.float32).min
    with torch.no_grad():
        x.key_bias[0] = lowest
        x.key_bias[1, 0, ::2] = lowest
        x.key_bias[1, 1, 3] = -lowest
    with emulated.emulated():
        got = cases.run(x, "cpu")
    cases.compare({"": got}, x)


@pytest.mark.parametrize("dtype", test_attention.DTYPES, ids=("fp32", "bf16", "fp16"))
@pytest.mark.parametrize("packed", [False, True], ids=("padded", "packed"))
def test_pooling_has_the_bits_of_the_cpu(packed, dtype, seed):
    """Sums have the order of the sequence on both. Numbers that are none take part nowhere: NaN stands there."""
    ops, k, none = torch.ops.linformer_kernels, 21, (-1, 21, 22, 2**31 - 1, -(2**31))
    shape = (200, 3) if packed else (2, 3, 200)
    segments = torch.randint(-len(none), k, shape, dtype=torch.int32)
    for i, number in enumerate(none):
        segments[segments == i - len(none)] = number
    key, value = (torch.randn(*shape, d).to(dtype) for d in (64, 9))
    out = (segments < 0) | (segments >= k)
    for rows in (key, value):
        rows[out] = cases.NAN
    offsets = torch.tensor([0, 90, 90, 200]) if packed else None

    def results():
        pooled = ops.pool(key, value, segments, offsets, k)
        return (
            *pooled,
            *ops.pool_backward(*pooled, segments, offsets, False, 3),
            *ops.pool_backward(*pooled, segments, offsets, False, 2),
        )

    with emulated.emulated(seed=seed + 1) as run:
        got = results()
    assert [name.split("_")[1:-1] for name in run.kernels] == [["pool"], *2 * [["pool", "backward"]]]
    for one, other in zip(got, results(), strict=True):
        assert torch.equal(one, other)
    assert not got[3][out].any() and got[5].shape == (0,)


SPLIT = Case(batch=1, heads=2, kv_heads=2, n=1500, n_q=700, k=70, d=32, dtype=BF16)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("case", [
    SPLIT, dataclasses.replace(SPLIT, dtype=torch.float32, n=1000, sharing="key-value", mask="random"),
    Case(heads=4, kv_heads=4, n=70, n_q=70, k=256, d=64, dtype=BF16, batch=1),
    dataclasses.replace(SPLIT, bias="holes", sharing="per-sequence"),
], ids=str)  # fmt: skip
def test_splits_and_orders_give_the_same_bits(case, arch, seed):
    """Whatever order warps run in, and however many CTAs are resident."""
    if f"{arch}+PTX" not in emulated._library.cuda_architectures().split(","):
        pytest.skip(f"the library was built without sm_{arch}")
    x = cases.Inputs(case, "cpu")
    results = []
    for order, residents in ((0, 0), (seed + 1, 0), (seed + 2, 1), (seed + 3, 3)):
        with emulated.emulated(arch, 8, seed=order, max_resident=residents):
            results.append(cases.run(x, "cpu"))
    cases.compare({case: results[0]}, x)
    for other in results[1:]:
        for name, tensor in results[0].items():
            assert torch.equal(tensor, other[name]), name


def test_an_earlier_block_of_scores_is_scaled_by_what_it_was_shifted_by():
    """When a later block had a larger score, what was summed before was scaled by the power of the exact difference,
    but powers are taken of rounded products. Where scores are large, dS of a row did not sum to zero, and dQ, here a
    small difference of two rows of K' that share the softmax, was off a hundred times as far as plain PyTorch's."""
    x = cases.Inputs(Case(batch=1, heads=1, kv_heads=1, n=1, n_q=128, k=100, d=1), "cpu")
    with torch.no_grad():
        x.query.copy_(torch.linspace(150, 250, 128).view_as(x.query))
        x.key.fill_(1)  # K' is E
        x.proj_key.fill_(-1)
        x.proj_key[3], x.proj_key[90] = 1.9396, 1.9402
    with emulated.emulated():
        got = cases.run(x, "cpu")
    cases.compare({"": got}, x)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=("fp32", "bf16"))
@pytest.mark.parametrize("case", cases.ENORMOUS, ids=str)
def test_values_near_the_largest_number(case, dtype):
    """As in test_limits.py; K over 128 goes in blocks, which are shifted by what came before."""
    x = cases.enormous(case, dtype, "cpu")
    with emulated.emulated():
        got = cases.run(x, "cpu")
    cases.compare({case: got}, x)


@pytest.mark.parametrize("dtype", test_attention.DTYPES, ids=("fp32", "bf16", "fp16"))
@pytest.mark.parametrize("case", [
    Case(batch=1, heads=2, kv_heads=1, n=197, n_q=20, k=128, d=64), Case(batch=1, n=150, n_q=9, k=260, d=33, d_v=70),
    Case(batch=1, heads=2, kv_heads=1, n=133, n_q=300, k=130, d=64, layout="offset", mask="random"),
], ids=str)  # fmt: skip
def test_rows_that_start_anywhere(case, dtype):
    """Whole tiles of E whose rows start at even and at odd elements, the last one ragged; and keys, too."""
    check(dataclasses.replace(case, dtype=dtype))


def test_parts_fill_the_last_wave():
    """3 tiles on 2 multiprocessors are two waves, one of them half full; in halves they are three, of half the time."""
    x = cases.Inputs(Case(batch=1, heads=3, kv_heads=3, n=1024, n_q=1024, k=8, d=32, dtype=BF16), "cpu")
    with emulated.emulated(multiprocessors=2) as run:
        cases.run(x, "cpu")
    backward, grid = run.stats[1], run.grids[1]
    atomics = [line for line in backward.lines if line["op"].startswith("atom.") and "acq_rel" not in line["op"]]
    rows, columns = 3, 3  # items of 1,024 queries, and tiles of rows of K': one for each head
    assert sum(line["warps"] for line in atomics) - grid == rows + 2 * columns  # each CTA draws one more, which is none


@pytest.mark.parametrize("bias", [None, "normal"])
@pytest.mark.parametrize("k, rows", [(128, 32), (192, 32), (200, 16), (256, 16), (257, 32)])
def test_fewer_query_rows_where_that_keeps_k_and_v_in_shared_memory(k, rows, bias):
    """In 99 KB, with heads of 64. Then they are read once for several tiles of queries, else once for each."""
    case = Case(batch=1, heads=1, kv_heads=1, n=40, n_q=600, k=k, d=64, bias=bias, dtype=BF16)
    name = check(case, shared_bytes=emulated.SHARED_BYTES[86], multiprocessors=1).kernels[0]
    assert name == "linformer_forward_bf16_d64_r128" + ("_w16" if rows == 16 else "")


# (architecture, kernel): bytes, where none has been avoided yet, with the reason.
KNOWN_STACKS = {
    # What an item of queries begins with, read again behind its products: fp32 leaves a bias no registers there.
    ("90", "linformer_backward_fp32_d256_bias"): 24,
}


def test_no_other_kernel_has_a_stack():
    """That is where registers spill to, and arrays that are not in registers. In the library as it was built, for every
    architecture in it."""
    found = emulated.resources()
    assert {arch for arch, _ in found} == {
        arch.split("+")[0] for arch in emulated._library.cuda_architectures().split(",")
    }
    stacks = {key: of["STACK"] for key, of in found.items() if of["STACK"]}
    assert stacks == {key: size for key, size in KNOWN_STACKS.items() if key in found}


def test_launches():
    """One launch forward, two backward; none for what nobody wants."""
    x = cases.Inputs(Case(dtype=BF16, d=64, k=40), "cpu")
    with emulated.emulated() as run:
        cases.run(x, "cpu")
    assert [name.split("_")[1] for name in run.kernels] == ["forward", "backward", "project"]
    x = cases.Inputs(Case(dtype=BF16, batch=0), "cpu")
    with emulated.emulated() as run:
        cases.run(x, "cpu")
    assert run.kernels == ["linformer_project_backward_bf16"]  # dE of an empty batch is zero, and has to be written


def test_no_bank_conflicts_in_16_bits():
    """Aligned rows, no tails: every shared-memory access of the main loops is as fast as it can be."""
    x = cases.Inputs(Case(batch=1, heads=2, kv_heads=2, n=256, n_q=256, k=128, d=64, dtype=BF16), "cpu")
    with emulated.emulated() as run:
        cases.run(x, "cpu")
    for name, stats in zip(run.kernels, run.stats, strict=True):
        assert stats.bank_conflicts == 0, (name, stats.hot(5, "wavefronts"))


def test_offsets_that_run_past_their_tensor_are_held_inside():
    """On a GPU nobody reads them before the kernels do, so the kernels must."""
    from linformer_kernels import linformer_attention_varlen

    q = torch.randn(20, 2, 16)
    proj = torch.randn(8, 30)
    for wrong in ([0, 5, 400], [0, 2**40, 20], [-7, 10, 20], [0, 15, 3]):
        offsets = torch.tensor(wrong)
        with emulated.emulated():  # raises if anything is read or written out of bounds
            torch.ops.linformer_kernels.attention(*[q] * 3, proj, *[None] * 3, offsets, offsets, None, 0.0, 1.0, False)
            torch.ops.linformer_kernels.pool(q, q, torch.zeros(20, 1, dtype=torch.int32), offsets, 8)
    with pytest.raises(ValueError, match="cu_seqlens_q"):
        linformer_attention_varlen(q, q, q, proj, cu_seqlens_q=offsets, cu_seqlens_k=offsets)
