"""The Triton kernels without a GPU: compiled as they are on one, executed by the emulator, against the oracle.

The algorithm alone, over the whole matrix of cases, is test_triton_interpreted.py's. On a GPU, test_gpu.py runs it all.
"""

import dataclasses
import importlib
import os
import random
import subprocess
import sys
from pathlib import Path

import cases
import numpy as np
import pytest
import test_attention
import test_errors
import torch
from cases import Case

import linformer_kernels as lk
from linformer_kernels import info, linformer_attention

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


def test_tune(tuned_file, monkeypatch):
    """The fastest tiles serve later calls, in later processes too; tiles that do not fit are passed over."""

    def time(run, return_mode):
        (tiles,) = tuned.table().values()
        if tiles.forward.block_s == 32:
            raise triton.runtime.errors.OutOfResources(2, 1, "shared memory")
        return 1000 * (9 - (tiles.forward.block_q == 64) - 2 * (tiles.forward.num_warps == 4))

    monkeypatch.setattr(triton.testing, "do_bench", time)
    x = cases.Inputs(Case(dtype=BF16, d=64, k=64, n=100, n_q=100, heads=2, kv_heads=2, batch=1), "cpu")
    with emulated_triton.emulated() as run:
        found = lk.tune(*x.positional(), backward=False)
    assert found["forward"] == (9, 6)
    tuned._read.cache_clear()  # as in another process
    (tiles,) = tuned.table().values()
    assert (tiles.forward.block_q, tiles.forward.num_warps) == (64, 4)
    with emulated_triton.emulated() as run:
        cases.compare({"tuned": cases.run(x, "triton")}, x)
    assert [one.metadata.num_warps for one in run.compiled[:2]] == [4, tiles.backward.num_warps]
    assert info.collect()["tuned"]["for"] == list(tuned.table()) and info.collect()["tuned"]["path"] == str(tuned_file)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 3}', '{"a": {"forward": {}}}'])
def test_a_spoilt_file_of_tiles_is_not_used(tuned_file, text):
    tuned_file.parent.mkdir()
    tuned_file.write_text(text)
    assert tuned.config_of(SHAPE, DEVICE) == config.config_for(SHAPE, DEVICE)
    assert text == "[]" or tuned.problem()
    assert info.collect()["tuned"]["problem"] == tuned.problem()


@pytest.mark.parametrize("source, says", [("raise RuntimeError('half of it')", "half of it"), (None, "not installed")])
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
    code += "print(info.collect()['backends']['triton'])"
    paths = os.pathsep.join([str(tmp_path), str(Path(lk.__file__).parent.parent)])
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.startswith("{'available': False") and says in done.stdout


# Bytes of stores and loads that no choice of tiles has avoided yet.
KNOWN_SPILLS = {
    ("forward", BF16, 64, 100): 8,  # with a bias
    ("backward", BF16, 64, 100): 16,  # with a bias
    ("backward", torch.float32, 128, 120): 48,
    ("backward", torch.float32, 96, 90): 400,
    ("backward", torch.float32, 96, 100): 88,
}


def compiled_for(arch: int, case: Case) -> emulated_triton.Run:
    x = cases.Inputs(case, "cpu")
    with emulated_triton.emulated(arch, multiprocessors=4, execute=False) as run:
        cases.run(x, "triton")
    return run


@pytest.mark.parametrize("case, arch", SHIPPED, ids=str)
def test_every_tile_fits_its_architecture(case, arch):
    """Shared memory, no spills up to D = 128, and products on the tensor cores that were meant."""
    for compiled in compiled_for(arch, case).compiled:
        found = emulated_triton.resources(compiled)
        assert found["shared"] <= 1024 * emulated_triton.SHARED_LIMIT_KIB[arch], (compiled.name, found)
        if case.d <= 128:
            known = KNOWN_SPILLS.get((compiled.name, case.dtype, case.d, arch), 0)
            assert found["spilled"] <= known, (compiled.name, found)
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
