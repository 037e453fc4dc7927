"""The Triton kernels without a GPU: compiled as they are on one, executed by the emulator, against the oracle.

The algorithm alone, over the whole matrix of cases, is test_triton_interpreted.py's. On a GPU, test_gpu.py runs it all.
"""

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import random
import subprocess
import sys
import types
from pathlib import Path

import cases
import numpy as np
import pytest
import test_attention
import test_errors
import torch
from cases import Case

import linformer_kernels as lk
from linformer_kernels import _backends, _validation, info, linformer_attention, tuning

triton = pytest.importorskip("triton")  # behind it, what needs Triton: that must import
emulated_triton = importlib.import_module("emulated_triton")
config = importlib.import_module("linformer_kernels.triton_kernels.config")
tuned = importlib.import_module("linformer_kernels.triton_kernels.tuned")

BF16, FP16 = torch.bfloat16, torch.float16
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
CASES = [
    Case(dtype=BF16, d=64, k=128, n=300, n_q=200),
    Case(dtype=BF16, d=64, k=200, n=300, n_q=170, kv_heads=2, mask="random", layout="bnhd"),
    Case(d=64, k=64, n=200, extra=8),
    Case(n=130, n_q=70, d=17, d_v=33, k=20, extra=5, mask="random", kv_heads=2),
    Case(lengths=(50, 0, 7), lengths_q=(3, 60, 0), kv_heads=2, sharing="key-value", k=129, layout="padded", dtype=BF16),
    Case(dropout_p=0.3, sharing="per-head", layout="offset", mask="nothing", dtype=FP16),
    Case(dropout_p=0.3, d=96, k=150, sharing="per-head-key-value", dtype=FP16, scale=-0.3),
    Case(d=128, k=40, n=70, n_q=70, dtype=BF16, alias="qkv", sharing="same"),
    Case(d=256, k=70, n=40, n_q=40, heads=2, kv_heads=1, batch=1, dtype=BF16),
    Case(lengths=(64, 40), d=32, k=32, dropout_p=0.2, kv_heads=1),
    Case(bias="out", d=64, k=100, n=70, n_q=50, dtype=BF16, dropout_p=0.3, kv_heads=2),
    Case(bias="holes", d=40, k=150, n=70, n_q=50, bias_shape="1hk", scale=-0.3, mask="random", dtype=FP16),
    Case(bias="holes", lengths=(50, 0, 7), lengths_q=(3, 60, 0), kv_heads=2, k=40, sharing="per-sequence", extra=3),
    Case(sharing="per-sequence-head-key-value", d=64, k=70, n=150, n_q=40, extra=2, mask="random", dtype=BF16),
    Case(pooled="random", segments_per_head=True, k=20, d=24, d_v=40, layout="bnhd", mask="random", kv_heads=2),
    Case(pooled="windows", lengths=(50, 0, 7), lengths_q=(3, 60, 0), kv_heads=1, k=9, d=200, d_v=64, dtype=FP16),
    Case(pooled="one", k=3, n=70, n_q=20, dtype=BF16, segments_per_head=True, layout="padded"),
]


def check(case: Case, through=cases.run, **options) -> emulated_triton.Run:
    x = cases.Inputs(case, "cpu")
    with emulated_triton.emulated(**options) as run:
        got = through(x, "triton")
    cases.compare({case: got}, x)
    return run


def test_tiles_are_those_of_the_gpu_of_the_tensor(monkeypatch):
    """They were those of the current one, for good: the wrong ones where two kinds of GPU are together."""
    from linformer_kernels.triton_kernels import ops

    with emulated_triton.emulated(arch=90):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((9, 0), (8, 6))[index])
        assert [ops._device(index).capability for index in (0, 1)] == [90, 86]
        monkeypatch.undo()


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_chosen(case, arch):
    check(case, arch=arch)


@pytest.mark.parametrize("index", range(6))
def test_sampled(index, seed):
    """On a GPU of another size each time: other splits, other residents, another order of warps."""
    rng = np.random.default_rng(seed)
    case = test_attention.sampled(rng)
    while cases.work(case) > cases.MOST_WORK:
        case = test_attention.sampled(rng)
    arch, residents = int(rng.choice([80, 90])), int(rng.choice([0, 1, 3]))
    check(
        case,
        arch=arch,
        multiprocessors=int(rng.integers(1, 40)),
        seed=int(rng.integers(1, 2**31)),
        max_resident=residents,
    )


@pytest.mark.parametrize(
    "case",
    [Case(dtype=BF16, k=100, n=130, mask="prefix"), Case(lengths=(9, 31), kv_heads=1, bias="holes")],
    ids=str,
)
def test_the_two_halves(case):
    run = check(case, through=cases.run_halves)
    assert run.kernels == ["forward", "forward", "backward", "project_backward"]
    run = check(dataclasses.replace(case, pooled="random", k=8), through=cases.run_halves)
    assert run.kernels == ["pool", "forward", "backward", "pool_backward"]


SPLIT = Case(batch=1, heads=2, kv_heads=1, n=1100, n_q=1050, k=96, d=32, dtype=BF16, sharing="key-value", mask="random")


SPLITS = [
    SPLIT,
    dataclasses.replace(SPLIT, k=160, sharing="headwise", d=64),
    dataclasses.replace(SPLIT, bias="holes"),
    dataclasses.replace(SPLIT, pooled="random", k=40, n_q=50),
]


@pytest.mark.parametrize("case", SPLITS, ids=str)
def test_splits_and_orders_give_the_same_bits(case, seed):
    """Whatever order warps run in, and however many programs are resident."""
    x = cases.Inputs(case, "cpu")
    results = []
    for order, residents in ((0, 0), (seed + 1, 1), (seed + 2, 3)):
        with emulated_triton.emulated(80, 24, seed=order, max_resident=residents) as run:
            results.append(cases.run(x, "triton"))
    assert run.grids[0] > 10
    cases.compare({case: results[0]}, x)
    for other in results[1:]:
        for name, tensor in results[0].items():
            assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=("fp32", "bf16"))
@pytest.mark.parametrize("case", cases.ENORMOUS, ids=str)
def test_values_near_the_largest_number(case, dtype):
    """As in test_limits.py."""
    x = cases.enormous(case, dtype, "cpu")
    with emulated_triton.emulated():
        got = cases.run(x, "triton")
    cases.compare({case: got}, x)


def test_launches():
    """One launch forward, two backward; none for what nobody wants."""
    x = cases.Inputs(Case(dtype=BF16, d=64, k=40), "cpu")
    with emulated_triton.emulated(execute=False) as run:
        cases.run(x, "triton")
    assert run.kernels == ["forward", "backward", "project_backward"]
    x = cases.Inputs(Case(dtype=BF16, batch=0), "cpu")
    with emulated_triton.emulated() as run:
        cases.run(x, "triton")
    assert run.kernels == ["project_backward"]  # dE of an empty batch is zero, and has to be written


@pytest.mark.parametrize("wanted", [("query",), ("value",), ("proj_key",), ("key", "proj_value")], ids=str)
@pytest.mark.parametrize("k", [32, 150])
def test_gradients_that_are_wanted(wanted, k):
    """The others are neither computed nor written."""
    x = cases.Inputs(Case(dtype=BF16, k=k, n=70, n_q=50, heads=2, kv_heads=2), "cpu")
    for name in cases.ARGUMENTS:
        getattr(x, name).requires_grad_(name in wanted)
    with emulated_triton.emulated():
        got = cases.run(x, "triton")
    assert set(got) == {"out", *(f"grad_{name}" for name in wanted)}
    cases.compare({wanted: got}, x)


@pytest.mark.parametrize("wanted", [("key_bias",), ("query", "key_bias"), ("value", "key_bias"), ("key",)], ids=str)
@pytest.mark.parametrize("k", [32, 150])
def test_gradients_that_are_wanted_with_a_bias(wanted, k):
    """Summed over splits too: the last of the parts that share the room for them."""
    x = cases.Inputs(Case(bias="holes", batch=1, dtype=BF16, k=k, n=70, n_q=600, heads=2, kv_heads=1), "cpu")
    for name in cases.LEAVES:
        getattr(x, name).requires_grad_(name in wanted)
    with emulated_triton.emulated(multiprocessors=12):
        got = cases.run(x, "triton")
    assert set(got) == {"out", *(f"grad_{name}" for name in wanted)}
    cases.compare({wanted: got}, x)


@pytest.mark.parametrize("k", [40, 150])
def test_the_lowest_finite_bias_takes_no_row_out(k):
    """Rows all of which have it weigh the same, and a row that has less weighs all."""
    query, key, value = torch.zeros(1, 1, 5, 16), torch.randn(1, 1, k, 16), torch.randn(1, 1, k, 16)
    bias = torch.full((2, 1, 1, k), torch.finfo(torch.float32).min)
    bias[1, ..., 7] = -1e4
    with emulated_triton.emulated():
        means, one = (lk.projected_attention(query, key, value, key_bias=b, backend="triton") for b in bias)
    torch.testing.assert_close(means, value.mean(2, keepdim=True).expand_as(means))
    torch.testing.assert_close(one, value[:, :, 7:8].expand_as(one))


def test_segments_out_of_range_are_nowhere():
    """On a GPU nobody reads them before the kernels do. The memory behind them is not there to be read, either."""
    ops = torch.ops.linformer_kernels
    segments = torch.tensor([[[0, 5, 4, -2, 2**31 - 1, 4, -(2**31), 6, 0]]], dtype=torch.int32)
    inside = torch.where((segments >= 0) & (segments < 5), segments, -1)
    key = torch.randn(1, 2, 9, 24)
    for cu in (None, torch.tensor([0, 4, 9])):
        rows = key if cu is None else key[0].transpose(0, 1).contiguous()
        got = []
        for of in (segments, inside):
            of = of if cu is None else of[0].t().contiguous()
            with emulated_triton.emulated():  # raises if anything is read or written out of bounds
                k, v, count = ops.pool.triton(rows, rows, of, cu, 5)
                grads = ops.pool_backward.triton(k, v, count, of, cu, False, 3)
            got.append((k, v, count, *grads))
        for one, other in zip(*got, strict=True):
            assert torch.equal(one, other)
        assert got[0][2].sum() == 8  # two heads


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("k, backward", [(128, 5), (256, 9)])
def test_no_product_is_computed_twice(k, backward, arch):
    """By warps that share rows, as small tiles make them do. Where K' does not fit a program, S and dP are computed
    three times, on purpose: that makes nine products of five."""
    x = cases.Inputs(Case(batch=1, heads=2, kv_heads=2, n=256, n_q=256, d=64, k=k, dtype=BF16), "cpu")
    with emulated_triton.emulated(arch, races=False) as run:
        cases.run(x, "triton")
    product = 2 * k * 64 * 256 * 2
    assert [stats.tensor_flops / product for stats in run.stats] == [4, backward, 4]


def test_offsets_that_run_past_their_tensor_are_held_inside():
    """On a GPU nobody reads them before the kernels do, so the kernels must."""
    q, proj = torch.randn(20, 2, 16), torch.randn(8, 30)
    for wrong in ([0, 5, 400], [0, 2**40, 20], [-7, 10, 20], [0, 15, 3]):
        offsets = torch.tensor(wrong)
        with emulated_triton.emulated():  # raises if anything is read or written out of bounds
            tensors = (q, q, q, proj, None, None, None, offsets, offsets, None)
            out, k, v = torch.ops.linformer_kernels.attention.triton(*tensors, 0.0, 1.0, False)
            backward = torch.ops.linformer_kernels.attention_backward.triton
            backward(out, *tensors, k, v, 0.0, 1.0, False, 15)
            segments = torch.randint(0, 8, (20, 2), dtype=torch.int32)
            k, v, count = torch.ops.linformer_kernels.pool.triton(q, q, segments, offsets, 8)
            torch.ops.linformer_kernels.pool_backward.triton(k, v, count, segments, offsets, False, 3)


def test_no_recompilation_storm():
    """Fifty shapes: neither batch, heads, lengths nor strides compile a kernel anew, only whether a sum is split."""
    rng = random.Random(0)
    compiled = set()
    with emulated_triton.emulated(execute=False, multiprocessors=108) as run:
        for _ in range(50):
            b, h, group, n = rng.randint(1, 4), rng.randint(1, 5), rng.randint(1, 2), rng.randint(1, 5000)
            shapes = ((b, n, h * group, 64), (b, n, h, 64), (b, n, h, 64))
            inputs = [torch.empty(shape, dtype=BF16, requires_grad=True).transpose(1, 2) for shape in shapes]
            proj = torch.empty(128, 5000, dtype=BF16, requires_grad=True)
            out = linformer_attention(*inputs, proj, backend="triton")
            out.backward(torch.empty_like(out))
        compiled = {(one.name, one.hash) for one in run.compiled}
    for name, most in (("forward", 2), ("backward", 2), ("project_backward", 1)):
        assert len([1 for kernel, _ in compiled if kernel == name]) <= most, (name, len(compiled))


def one_after_the_other():
    """Calls that differ from one another in little, twice each, in an order of its own each time."""
    base = Case(batch=2, heads=4, kv_heads=2, n_q=50, n=70, extra=10, k=40, d=32, dtype=BF16)
    changes = [
        {}, {"batch": 3}, {"heads": 2}, {"n_q": 51}, {"n": 71}, {"extra": 9}, {"extra": 18}, {"k": 41}, {"d": 24},
        {"d_v": 64}, {"dtype": FP16}, {"dtype": torch.float32}, {"mask": "random"}, {"bias": "normal"},
        {"bias": "holes", "bias_shape": "1hk"}, {"sharing": "key-value"}, {"sharing": "same"}, {"sharing": "per-head"},
        {"sharing": "per-sequence"}, {"sharing": "per-sequence-head"}, {"layout": "bnhd"}, {"layout": "padded"},
        {"layout": "offset"}, {"layout": "expanded"}, {"grad": "scalar"}, {"grad": "bnhd"}, {"alias": "kv"},
        {"alias": "qk", "n_q": 70, "heads": 2}, {"scale": 0.5}, {"scale": -0.5}, {"dropout_p": 0.3},
        {"dropout_p": 0.4}, {"lengths": (50, 20)}, {"lengths": (50, 20), "lengths_q": (30, 40)}, {"lengths": (20, 50)},
        {"lengths": (50, 19)}, {"pooled": "random"}, {"pooled": "random", "segments_per_head": True},
        {"pooled": "random", "lengths": (50, 20)},
    ]  # fmt: skip
    inputs = [cases.Inputs(dataclasses.replace(base, **change), "cpu") for change in changes]
    wanted = [cases.Inputs(base, "cpu") for _ in range(2)]
    for name in ("query", "proj_key"):
        getattr(wanted[0], name).requires_grad_(False)
        getattr(wanted[1], "value" if name == "query" else "key").requires_grad_(False)
    calls = 2 * [*inputs, *wanted]
    random.shuffle(calls)
    return calls


def test_a_kept_plan_is_that_of_the_call(monkeypatch, seed):
    """Whatever other calls came between: the launches are those that a plan made for this call alone has."""
    from linformer_kernels.triton_kernels import ops

    launched = []

    def launch(one, tensors=()):
        arguments = one.filled(tensors)
        values = [arguments[name] for name in one.kernel.arg_names]
        flat = [x for value in values for x in (value if type(value).__name__ in ("Mask", "Bias") else [value])]
        launched.append((one.kernel.fn.__name__, one.grid, one.num_warps, [described(x) for x in flat]))

    def described(x):
        """Of a tensor: which of the call, or what it is."""
        if not isinstance(x, torch.Tensor):
            return x
        of_call = [i for i, tensor in enumerate(call_tensors) if tensor is x]
        return of_call[0] if of_call else (x.shape, x.stride(), x.dtype, x.data_ptr() % 16)

    random.seed(seed)
    with emulated_triton.emulated():
        monkeypatch.setattr(ops, "launch", launch)
        plan_run, call_tensors = ops.Plan.run, []

        def run(plan, inputs):
            call_tensors[:] = [t for t in inputs if t is not None]
            return plan_run(plan, inputs)

        monkeypatch.setattr(ops.Plan, "run", run)
        calls, kept = one_after_the_other(), 0
        for x in calls:
            launched.clear()
            before = len(ops._PLANS)
            cases.run(x, "triton")
            kept += len(ops._PLANS) == before
            got, plans = list(launched), dict(ops._PLANS)
            ops.forget()
            launched.clear()
            cases.run(x, "triton")
            ops._PLANS.update(plans)
            assert got == launched and got, x.case
        assert kept >= len(calls) // 2
        monkeypatch.undo()


def test_plans_are_kept_apart_and_few():
    """By device too; and not for ever."""
    from linformer_kernels.triton_kernels import ops

    here, there = torch.empty(4), torch.empty(4, device="meta")
    assert ops._described([here]) != ops._described([there])
    assert ops._described([here, None]) != ops._described([None, here])
    with emulated_triton.emulated(execute=False):
        ops._PLANS.update({index: None for index in range(ops.MOST_PLANS)})
        cases.run(cases.Inputs(Case(batch=0, dtype=BF16), "cpu"), "triton")
        assert 0 < len(ops._PLANS) <= 2


def test_raw_ops_refuse_nonsense():
    """As the native ops do, before anything is launched."""
    source = test_errors.RAW.replace("ops, R, I = torch.ops.linformer_kernels,", "ops, R, I = Overloads(),")
    # The values of offsets are not read on a GPU.
    source = source.replace(
        "bad_cu = [", "bad_cu = [I(0, 4, 9).int(), I(0, 9), I([0, 4, 9]), I(0, 4, 9)[::2]]; unused = ["
    )
    source = source.replace(
        "wrong(ops.attention, packed, [dict(cu_seqlens_k=bad_cu[-1]), ", "wrong(ops.attention, packed, ["
    )
    prelude = """
import torch, emulated_triton
class Overloads:
    def __getattr__(self, name):
        return getattr(torch.ops.linformer_kernels, name).triton
"""
    body = "".join(f"    {line}\n" for line in source.splitlines())
    code = f"{prelude}with emulated_triton.emulated(execute=False):\n{body}"
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(lk.__file__).parent.parent)])
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_compilers_see_one_op():
    x = cases.Inputs(Case(dtype=BF16, n=40, n_q=40, k=16, heads=2, kv_heads=2), "cpu")
    graphs = []

    def backend(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    with emulated_triton.emulated(execute=False):
        function = torch.compile(lambda *t: linformer_attention(*t, backend="triton"), fullgraph=True, backend=backend)
        function(*x.positional())
    assert torch.ops.linformer_kernels.attention.triton in graphs[0]


def test_opcheck():
    x = cases.Inputs(Case(dtype=torch.float32, n=20, n_q=20, k=16, heads=2, kv_heads=2, batch=1), "cpu")
    with emulated_triton.emulated():
        arguments = (*x.positional(), None, None, None, None, None, 0.0, 1.0, False)
        torch.library.opcheck(torch.ops.linformer_kernels.attention.triton, arguments)
        segments = torch.randint(-1, 4, (1, 2, 20), dtype=torch.int32)
        torch.library.opcheck(torch.ops.linformer_kernels.pool.triton, (x.key, x.value, segments, None, 4))


TENSOR_INSTRUCTIONS = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}
SHIPPED = [  # as Case, architecture: the usual sizes on all six, the others where code differs most
    (Case(dtype=dtype, d=d, k=k, n=256, n_q=256, sharing=sharing), arch)
    for dtype in (BF16, torch.float32)
    for d, k, sharing, architectures in (
        (64, 128, "headwise", ARCHITECTURES),
        (128, 256, "headwise", ARCHITECTURES),
        (64, 256, "key-value", (80, 90, 100)),
        (32, 128, "headwise", (80, 90, 120)),
        (64, 64, "per-head", (80, 120)),
        (96, 128, "headwise", (90, 100)),
        (128, 64, "headwise", (86, 90)),
        (256, 256, "headwise", (80, 90, 100, 120)),
    )
    for arch in architectures
] + [
    (Case(dtype=dtype, d=64, k=k, n=256, n_q=256, bias="normal"), arch)
    for dtype in (BF16, torch.float32)
    for k in (128, 256)
    for arch in (80, 90, 100)
]


SHAPE = config.Shape(2, 128, 64, 64)
DEVICE = config.Device("a GPU", "cuda", 80, 108)


def test_parts_fill_the_last_wave():
    """The first number is that of the tiles, the last that of the parts of each."""
    from linformer_kernels.triton_kernels.ops import splits_of

    for *arguments, parts in [
        (132, 132, 4096, False, 1),  # full
        (136, 132, 4096, False, 6),  # 7 waves of a sixth instead of 2
        (72, 132, 4096, False, 5), (72, 132, 4096, True, 5), (136, 132, 4096, True, 1),  # others fill the last wave
        (72, 132, 300, False, 1), (8, 108, 4096, False, 9), (8, 108, 32768, False, 13), (0, 132, 4096, False, 1),
    ]:  # fmt: skip
        assert splits_of(*arguments) == parts, arguments


def test_tiles_are_a_pure_function_of_the_problem():
    """Powers of two that cover K and the heads as the kernels expect it, for any problem that the backend takes."""
    rng = random.Random(0)
    for _ in range(300):
        shape = config.Shape(rng.choice((2, 4)), rng.randint(1, 2000), rng.randint(1, 256), rng.randint(1, 256),
                             rng.random() < 0.5, rng.random() < 0.5)  # fmt: skip
        tiles, unit = config.config_for(shape, DEVICE), config.unit_for(shape)
        assert tiles == config.config_for(shape, DEVICE)
        for part in (tiles.forward, tiles.backward, tiles.project_backward):
            for name, value in dataclasses.asdict(part).items():
                if name.startswith("block"):
                    assert value >= 16 and value & value - 1 == 0, (shape, name, value)
        assert not tiles.backward.fused or tiles.backward.block_k >= shape.proj_dim
        assert unit.piece * unit.parts >= max(shape.head_dim, shape.value_dim)
        assert tiles.forward.block_c == unit.columns and unit.columns % unit.piece == 0
        pieces = unit.heads * unit.parts * (2 if shape.shared_kv else 1)
        assert unit.tiles // (1 if shape.shared_kv else 2) * (unit.columns // unit.piece) >= pieces


@pytest.fixture
def tuned_file(tmp_path, monkeypatch):
    monkeypatch.setenv(tuned.ENVIRONMENT_VARIABLE, str(tmp_path / "folder" / "tuned.json"))
    tuned._read.cache_clear()
    yield tmp_path / "folder" / "tuned.json"
    tuned._read.cache_clear()


def timer(tiles_of, calls=None):
    """In the place of triton.testing.do_bench: milliseconds, by the tiles of the moment; of whole calls by backend."""

    def time(run, return_mode):
        if isinstance(run, functools.partial):
            run()
            return 1000 * calls[run.keywords["backend"]]
        (tiles,) = tuned.table().values()
        return 1000 * tiles_of(tiles)

    return time


def test_tune(tuned_file, monkeypatch, capsys):
    """The fastest tiles serve later calls, in later processes too; tiles that do not fit are passed over."""

    def seconds(tiles):
        if tiles.forward.block_s == 32:
            raise triton.runtime.errors.OutOfResources(2, 1, "shared memory")
        return 9 - (tiles.forward.block_q == 64) - 2 * (tiles.forward.num_warps == 4)

    monkeypatch.setattr(triton.testing, "do_bench", timer(seconds, {"triton": 6, "cpu": 9, "composed": 7}))
    x = cases.Inputs(Case(dtype=BF16, d=64, k=64, n=100, n_q=100, heads=2, kv_heads=2, batch=1), "cpu")
    with emulated_triton.emulated() as run:
        found = lk.tune(*x.positional(), backward=False, verbose=True)
    assert found["forward"] == (9, 6)
    told = capsys.readouterr().out
    assert "forward, {'block_s': 32}: does not fit" in told and "composed: 7000000.0 us" in told
    tuned._read.cache_clear()  # as in another process
    (tiles,) = tuned.table().values()
    assert (tiles.forward.block_q, tiles.forward.num_warps) == (64, 4)
    with emulated_triton.emulated() as run:
        cases.compare({"tuned": cases.run(x, "triton")}, x)
    assert [one.metadata.num_warps for one in run.compiled[:2]] == [4, tiles.backward.num_warps]
    assert info.collect()["tuned"]["for"] == list(tuned.table()) and info.collect()["tuned"]["path"] == str(tuned_file)


@pytest.mark.parametrize("fastest, backward", [("composed", True), ("triton", False), ("cuda", False)])
def test_tune_finds_a_backend(fastest, backward, tuned_file, monkeypatch):
    """Of those that take the call. It serves calls of that kind on that GPU, in later processes too."""
    case = Case(dtype=BF16, d=32, k=16, n=40, n_q=40, heads=2, kv_heads=2, batch=1)
    x = cases.Inputs(case, "cpu")
    times = {"triton": 5.0, "cpu": 6.0, "composed": 7.0, "cuda": 8.0} | {fastest: 4.0}
    monkeypatch.setattr(triton.testing, "do_bench", timer(lambda tiles: 1.0, times))
    takes_all = dataclasses.replace(_backends.BACKENDS["cpu"], name="cuda", missing=None, limits=lambda call: None)
    monkeypatch.setitem(_backends.BACKENDS, "cuda", takes_all)  # stands in on CPU tensors
    with emulated_triton.emulated():
        found = lk.tune(*x.positional(), backward=backward)
    assert {name: found[name] for name in ("cuda", "cpu", "composed")} == {
        name: (times["triton"], times[name]) for name in ("cuda", "cpu", "composed")
    }
    tuned._read.cache_clear()  # as in another process
    (one,) = tuned.fastest().values()
    assert one.backend == fastest and list(info.collect()["tuned"]["fastest"].values()) == [fastest]

    monkeypatch.setattr(_backends, "_TUNED", tuned)
    monkeypatch.setattr(_backends, "UNFENCED_TRITON", None)
    monkeypatch.setattr(_backends, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: one.device)

    def first(x=x, **more):
        checked = _validation.check_attention(*x.positional(), None, None, None, None, 0.0, None, False, False)
        call = dataclasses.replace(checked, device_type="cuda", **more)
        return next(iter(_backends._in_order(call))).name

    assert first() == fastest
    assert first(cases.Inputs(dataclasses.replace(case, n=70, n_q=50, batch=3), "cpu")) == fastest
    for other in ({"k": 17}, {"d": 16}, {"sharing": "key-value"}, {"dtype": torch.float32}):
        by_rule = "cuda" if "dtype" in other else "triton"
        assert first(cases.Inputs(dataclasses.replace(case, **other), "cpu")) == by_rule, other
    assert first(dropout_p=0.1) == first(key_padding_mask=torch.ones(1, 40, dtype=torch.bool)) == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another GPU")
    assert first() == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: one.device)
    monkeypatch.setattr(_backends, "UNFENCED_TRITON", "leaves out a fence")
    assert first() == ("cuda" if fastest == "triton" else fastest)


def test_compiled_code_asks_what_was_tuned(tuned_file, monkeypatch):
    """Sizes that a compiler keeps open must not break its graph."""
    shape = config.Shape(2, 16, 32, 32, False, True)
    tuned.fastest()["any"] = tuned.Fastest("composed", "GPU", shape)
    monkeypatch.setattr(_backends, "_TUNED", tuned)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")

    def asked(query, proj):
        call = _validation.check_attention(query, query, query, proj, None, *[None] * 4, 0.0, None, False, False)
        return query + (1 if _backends._found_fastest(call) == "composed" else 2)

    compiled = torch.compile(asked, fullgraph=True, dynamic=True, backend="eager")
    for k, n, wanted in ((16, 40, 1), (16, 50, 1), (17, 50, 2)):
        query, proj = torch.zeros(1, 2, n, 32, dtype=BF16), torch.zeros(k, n, dtype=BF16)
        assert asked(query, proj).max() == compiled(query, proj).max() == wanted


def test_tune_times_on_the_gpu_of_the_tensors(tuned_file, monkeypatch):
    """Triton's timer and its kernels take the current GPU."""
    current = []

    @contextlib.contextmanager
    def device(index):
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    call = types.SimpleNamespace(
        **dict.fromkeys(("query", "key", "value", "proj_key", "proj_value")), device="cuda:1", device_type="cuda"
    )
    seen = []
    tuner = importlib.import_module("linformer_kernels.triton_kernels.tune")
    monkeypatch.setattr(tuning, "check_attention", lambda *arguments: call)
    monkeypatch.setattr(tuning, "choose", lambda call, backend, source: None)
    monkeypatch.setattr(tuning, "contenders", lambda call: ["composed"])
    monkeypatch.setattr(tuner, "tune", lambda *arguments: seen.append(list(current)) or {})
    monkeypatch.setattr(tuner, "seconds", lambda run: seen.append(list(current)) or 1.0)
    monkeypatch.setattr(tuner, "keep_fastest", lambda *arguments: seen.append(arguments[1]))
    assert lk.tune(None, None, None, None) == {"composed": (1.0, 1.0)}
    assert seen == [["cuda:1"]] * 3 + ["composed"] and current == []


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 3}', '{"a": {"forward": {}}}', "fastest"])
def test_a_spoilt_file_of_tiles_is_not_used(tuned_file, text):
    if text == "fastest":
        entry = dataclasses.asdict(config.config_for(SHAPE, DEVICE)) | {
            "fastest": {"backend": "composed", "device": "x"}
        }
        text = json.dumps({"a": entry})
    tuned_file.parent.mkdir()
    tuned_file.write_text(text)
    assert tuned.config_of(SHAPE, DEVICE) == config.config_for(SHAPE, DEVICE)
    assert text == "[]" or tuned.problem()
    assert tuned.fastest() == {}
    assert info.collect()["tuned"]["problem"] == tuned.problem()


@pytest.mark.parametrize("source, says", [
    ("raise RuntimeError('half of it')", "half of it"),
    ("__version__ = '3.5.1'", "Triton 3.5.1 is too old, 3.6 or newer is wanted"),
    (None, "not installed"),
])  # fmt: skip
def test_triton_that_is_missing_or_broken_is_a_reason(tmp_path, source, says):
    """And neither an error nor output at import; the CPU goes on."""
    code = "import sys\n"
    if source is None:
        code += "sys.modules['triton'] = None\n"
    else:
        (tmp_path / "triton").mkdir()
        (tmp_path / "triton" / "__init__.py").write_text(source)
    code += "import torch, linformer_kernels as lk\nfrom linformer_kernels import info\n"
    code += "x, e = torch.randn(1, 1, 4, 8), torch.randn(2, 4)\nlk.linformer_attention(x, x, x, e)\n"
    code += "from linformer_kernels import _backends\nprint(info.collect()['backends']['triton'])\n"
    code += "assert 'triton' not in [b.name for b in _backends.BACKENDS.values() if b.missing is None]"
    paths = os.pathsep.join([str(tmp_path), str(Path(lk.__file__).parent.parent)])
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.startswith("{'available': False") and says in done.stdout


# Bytes of stores and loads that no choice of tiles has avoided yet.
KNOWN_SPILLS = {
    ("forward", BF16, 64, 100): 8,  # with a bias; without a pipeline there is none, but then nothing hides the loads
    ("backward", torch.float32, 128, 120): 48,
    ("backward", torch.float32, 96, 90): 400,
    ("backward", torch.float32, 96, 100): 88,
}


# Kernels whose products wait for one another, by what no choice of tiles has avoided yet.
KNOWN_SERIALIZED: set[tuple] = set()


def compiled_for(arch: int, case: Case) -> emulated_triton.Run:
    x = cases.Inputs(case, "cpu")
    with emulated_triton.emulated(arch, multiprocessors=4, execute=False) as run:
        cases.run(x, "triton")
    return run


@pytest.mark.parametrize("case, arch", SHIPPED, ids=str)
def test_every_tile_fits_its_architecture(case, arch):
    """Shared memory, no spills up to D = 128, and products on the tensor cores that were meant, none of which waits for
    the one before it."""
    for compiled in compiled_for(arch, case).compiled:
        found = emulated_triton.resources(compiled)
        assert found["shared"] <= 1024 * emulated_triton.SHARED_LIMIT_KIB[arch], (compiled.name, found)
        if case.d <= 128:
            known = KNOWN_SPILLS.get((compiled.name, case.dtype, case.d, arch), 0)
            assert found["spilled"] <= known, (compiled.name, found)
        known = (compiled.name, case.dtype, case.d, case.k, arch) in KNOWN_SERIALIZED
        assert (found["serialized"] > 0) == known, (compiled.name, found)
        if case.dtype == BF16 and case.d <= 128:  # wider heads go in tiles that are too small for wgmma and tcgen05
            assert TENSOR_INSTRUCTIONS[arch] in compiled.asm["ptx"], compiled.name


@pytest.mark.parametrize("arch", [80, 90, 120])
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=("bf16", "fp32"))
def test_pooling_loads_whole_vectors(dtype, arch):
    """Of keys and gradients that lie so; and spills nothing."""
    x = cases.Inputs(Case(dtype=dtype, d=64, k=40, pooled="random"), "cpu")
    with emulated_triton.emulated(arch, multiprocessors=4, execute=False) as run:
        cases.run_halves(x, "triton")
    of_pooling = [compiled for compiled in run.compiled if "pool" in compiled.name]
    assert len(of_pooling) == 2
    for compiled in of_pooling:
        assert emulated_triton.resources(compiled)["spilled"] == 0
        assert "ld.global.v" in compiled.asm["ptx"], compiled.name


def test_a_first_call_may_be_captured(monkeypatch):
    """Loading a kernel, which Triton does at the first launch, ended the capture. Of a stand-in for the driver."""
    ops, capture = (importlib.import_module(f"linformer_kernels.triton_kernels.{name}") for name in ("ops", "capture"))
    mode, seen = [0], []  # 0: what a capture of torch's sets

    def exchange(argument):
        mode[0], argument._obj.value = argument._obj.value, mode[0]

    driver = types.SimpleNamespace(cuThreadExchangeStreamCaptureMode=exchange)
    monkeypatch.setattr(capture, "_driver", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: seen.append(mode[0])

    one = ops.Launch(Kernel(), 1, {}, 4)
    for capturing, wanted in ((False, 0), (True, 2)):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        ops.launch(one)
        assert seen.pop() == wanted and mode == [0]
    with pytest.raises(KeyError), capture.may_load():
        raise KeyError
    assert mode == [0]
