"""AMX tiles: the process's permission for them, infinities, subnormals. Each build in a child process of its own."""

import dataclasses
import itertools
from functools import partial

import pytest
import torch
from cases import ARGUMENTS, Case, Inputs, plain, run, run_halves
from test_package import ROOT, capability, python, succeeded

import linformer_kernels as lk

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def child(code: str, *arguments: object, **environment: str) -> str:
    """On one thread: after a fork GNU's OpenMP waits for threads that are no more."""
    done = python("-c", code, *map(str, arguments), cwd=ROOT / "tests", OMP_NUM_THREADS="1", **environment)
    return succeeded(done).strip()


@pytest.fixture
def amx() -> None:
    if capability(LINFORMER_CPU_CAPABILITY="amx") != "amx":
        pytest.skip("this processor has no AMX, or this process may not use it")


# A filter of system calls that refuses arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA), in words of seccomp's: load
# a word of the call, go on where it equals the number, else to the end.
DENIED = """
import ctypes, struct
ALLOW, REFUSE = (0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050000 | 1)
wanted = [(4, 0xC000003E), (0, 158), (16, 0x1023), (24, 18)]
steps = [step for i, (at, number) in enumerate(wanted)
         for step in ((0x20, 0, 0, at), (0x15, 0, 2 * (len(wanted) - i) - 1, number))]
words = b"".join(struct.pack("HBBI", *step) for step in (*steps, REFUSE, ALLOW))
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_char_p)]
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0, "PR_SET_NO_NEW_PRIVS"
assert libc.prctl(22, 2, ctypes.byref(Program(len(words) // 8, words)), 0, 0) == 0, "PR_SET_SECCOMP"
"""
CHECK = """
import dataclasses, threading, os, torch, cases, linformer_kernels as lk
from test_amx import DTYPES
CASES = [cases.Case(n=130, n_q=70, k=65, d=40, kv_heads=2, dtype=dtype) for dtype in DTYPES]
"""
CHECK_ALL = """
for case in CASES:
    cases.check(case, "cpu", "cpu")
"""
GRANTED = """
import ctypes
def granted():
    mask = ctypes.c_uint64()
    assert ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(mask)) == 0  # arch_prctl(ARCH_GET_XCOMP_PERM)
    return bool(mask.value >> 18 & 1)
"""


@pytest.mark.parametrize("wanted", [None, "amx"])
def test_permission_denied(wanted, amx):
    """The next build, right results, no signal; and info says why."""
    code = DENIED + CHECK + CHECK_ALL + "import runpy; runpy.run_module('linformer_kernels.info', run_name='__main__')"
    report = child(code, **({"LINFORMER_CPU_CAPABILITY": wanted} if wanted else {}))
    (line,) = (line for line in report.splitlines() if line.startswith("CPU"))
    assert "kernels use avx512," in line and "AMX" in line and "Operation not permitted" in line
    assert "AMX" not in succeeded(python("-m", "linformer_kernels.info"))


@pytest.mark.parametrize("level", ["avx512", "emulate_amx", "amx"])
def test_asks_for_tiles_only_to_use_them(level, amx):
    """By a call that makes torch ask for nothing itself: its own matrix products do."""
    code = "import torch, linformer_kernels as lk; x, e = torch.ones(1, 1, 8, 8), torch.ones(4, 8)\n"
    code += "lk.linformer_attention(x, x, x, e, backend='cpu'); print(granted())"
    assert child(GRANTED + code, LINFORMER_CPU_CAPABILITY=level) == str(level == "amx")


def test_after_a_fork(amx):
    """A forked child has the permission, but lost what is in tiles. (No backward before: where a GPU is, torch's engine
    then has threads, and refuses to run in the child.)"""
    fork = """
for case in CASES:
    lk.linformer_attention(*cases.Inputs(case, "cpu").positional(), backend="cpu")
pid = os.fork()
if pid == 0:
    try:
        for case in CASES:
            cases.check(case, "cpu", "cpu")
        os._exit(0)
    finally:
        os._exit(1)
assert os.waitpid(pid, 0)[1] == 0
"""
    child(CHECK + fork + CHECK_ALL, LINFORMER_CPU_CAPABILITY="amx")


def test_a_thread_older_than_the_permission(amx):
    """It was started before anybody asked for tiles, and computes after another thread did."""
    code = """
may, right = threading.Event(), []
def work():
    may.wait()
    for case in CASES:
        cases.check(case, "cpu", "cpu")
    right.append(True)
thread = threading.Thread(target=work)
thread.start()
before = granted()
print(torch.ops.linformer_kernels.cpu_capability(), before, granted())
may.set()
thread.join()
assert right
"""
    assert child(GRANTED + CHECK + code, LINFORMER_CPU_CAPABILITY="amx") == "amx False True"


@pytest.mark.parametrize("level", ["amx", "emulate_amx"])
def test_several_threads_at_once(level, request):
    """The first calls of all: each gives the bits that it gives alone."""
    code = """
inputs = [cases.Inputs(dataclasses.replace(case, n=130 + i), "cpu") for i, case in enumerate(2 * CASES)]
together, start = {}, threading.Barrier(len(inputs))
def work(i):
    start.wait()
    together[i] = [cases.run(inputs[i], "cpu") for _ in range(5)]
threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
for i, x in enumerate(inputs):
    alone = cases.run(x, "cpu")
    cases.compare({x.case: alone}, x)
    assert all(torch.equal(got[name], alone[name]) for got in together[i] for name in alone)
"""
    if level == "amx":
        request.getfixturevalue("amx")
    child(CHECK + code, LINFORMER_CPU_CAPABILITY=level)


PRODUCTS = (
    CHECK
    + """
import hashlib
torch.manual_seed(3)
for case in CASES:
    x = cases.Inputs(dataclasses.replace(case, n=1000, k=129, mask="random", extra=7), "cpu")
    results = lk.project_kv(*x.positional()[1:], key_padding_mask=x.mask, backend="cpu")
    leaves = [leaf for name, leaf in x.leaves().items() if name != "query"]
    results += torch.autograd.grad(results, leaves, [torch.randn_like(tensor) for tensor in results])
    for tensor in results:
        assert tensor.isfinite().all()
        print(hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy()).hexdigest())
"""
)


def test_the_instruction_written_out_gives_the_bits_of_the_processor(amx):
    """Where nothing is subnormal: what `emulate_amx` proves of products holds for AMX. In the first version it added
    products to the sum one by one, and float32 was less accurate in it than on the processor."""
    here, written_out = (child(PRODUCTS, LINFORMER_CPU_CAPABILITY=level) for level in ("amx", "emulate_amx"))
    assert here == written_out


INF = float("inf")


def assert_same_specials(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], what: str) -> None:
    """Finite where `want` is; and on AMX infinite where it is, with the same sign. Portable code's exponential of minus
    infinity is 2^-126 and not zero, which makes an infinity of what should be NaN."""
    kind = lambda t: torch.where(t.isnan(), 2.0, torch.where(t.isinf(), t.sign().float(), 0.0))  # noqa: E731
    if torch.ops.linformer_kernels.cpu_capability() != "amx":
        kind = torch.isfinite
    for name, tensor in got.items():
        here, there = kind(tensor), kind(want[name])
        assert torch.equal(here, there), f"{what}: {name} in {(here != there).sum()} of {here.numel()}"


def plain_in_float32(x: Inputs) -> dict[str, torch.Tensor]:
    """Of the same numbers. In bfloat16 torch's own products let a NaN into the neighboring row, where rows are odd."""
    wide = Inputs.__new__(Inputs)
    wide.__dict__.update(x.__dict__)
    leaves = {id(leaf): leaf.detach().float().requires_grad_() for leaf in x.leaves().values()}
    for name in (*ARGUMENTS, "grad_out"):
        tensor = getattr(x, name)
        setattr(wide, name, None if tensor is None else leaves.get(id(tensor), tensor.float()))
    return plain(wide)


def not_finite_inputs(dtype: torch.dtype) -> None:
    """One infinity or NaN somewhere."""
    for case, name, value in itertools.product(
        (Case(n=40, n_q=30, k=17, kv_heads=2, d=17), Case(n=70, n_q=1, k=3, d=1, sharing="key-value", extra=40)),
        (*ARGUMENTS, "grad_out"),
        (INF, -INF, float("nan")),
    ):
        x = Inputs(dataclasses.replace(case, dtype=dtype), "cpu")
        tensor = getattr(x, name)
        if tensor is None:
            continue
        with torch.no_grad():
            rows = tensor[..., : case.n] if name.startswith("proj") else tensor
            at = tuple(int(torch.randint(size, ())) for size in rows.shape)
            rows[at] = value
        assert_same_specials(run(x, "cpu"), plain_in_float32(x), f"{value} in {name}{at} of {x.case}")


def not_finite_in_one_sequence(dtype: torch.dtype) -> None:
    """Columns of E and F beyond a sequence have nothing of it."""
    for name, value in itertools.product(("query", "key", "value", "grad_out"), (INF, float("nan"))):
        x = Inputs(Case(lengths=(5, 40), lengths_q=(3, 20), k=9, d=17, extra=30, dtype=dtype), "cpu")
        with torch.no_grad():
            getattr(x, name)[1, 0, 2] = value
        assert_same_specials(run(x, "cpu"), plain_in_float32(x), f"{dtype}: {value} in the first sequence's {name}")


def infinite_projections(dtype: torch.dtype) -> None:
    """K' with an infinity that some queries make a weight of zero, and others NaN; V' with one column infinite."""
    for n_q, name, (value, sign) in itertools.product(
        (1, 16, 17, 40, 300), ("key_proj", "value_proj"), ((INF, 1), (INF, -1), (INF, 0), (-INF, -1))
    ):
        query, grad_out = ((0.5 * torch.randn(1, 2, n_q, 20)).to(dtype) for _ in range(2))
        if sign:  # all queries give this K' the weight zero, or all NaN
            query[..., 3] = sign * query[..., 3].abs() + sign * 0.1
        tensors = {"query": query, "key_proj": (0.5 * torch.randn(1, 2, 150, 20)).to(dtype)}
        tensors["value_proj"] = torch.randn(1, 2, 150, 20).to(dtype)
        tensors[name][0, 1, 140, 3] = value
        results = []
        for function, to in ((partial(lk.projected_attention, backend="cpu"), dtype), (plain_attention, torch.float32)):
            leaves = [tensor.to(to).requires_grad_() for tensor in tensors.values()]
            out = function(*leaves)
            grads = torch.autograd.grad(out, leaves, grad_out.to(to))
            results.append({"out": out} | {f"grad_{name}": grad for name, grad in zip(tensors, grads, strict=True)})
        assert_same_specials(*results, f"{dtype}: {value} in {name}, {n_q} queries, sign {sign}")


def plain_attention(query: torch.Tensor, key_proj: torch.Tensor, value_proj: torch.Tensor) -> torch.Tensor:
    return torch.softmax(query.shape[-1] ** -0.5 * (query @ key_proj.mT), dim=-1) @ value_proj


def overflow_of_projections() -> None:
    """K' beyond float16: the queries that give it the weight zero stay finite."""
    for n, n_q, sign in itertools.product((40, 64), (17, 32), (-1, 0)):
        x = Inputs(Case(n=n, n_q=n_q, k=17, d=20, extra=3, kv_heads=2, dtype=torch.float16), "cpu")
        with torch.no_grad():
            x.key[..., 3] = x.key[..., 3].abs() * 300 + 100
            x.proj_key[5, :n] = 100
            if sign:
                x.query[..., 3] = -x.query[..., 3].abs() - 0.1
        want = plain(x)
        assert want["key_proj"].isinf().any() and (sign == 0 or want["out"].isfinite().all())
        assert_same_specials(run(x, "cpu"), want, f"overflow of {x.case}, sign {sign}")
        assert_same_specials(run_halves(x, "cpu"), want, f"overflow of {x.case}, sign {sign}, in two halves")


@pytest.mark.parametrize("level", ["amx", "emulate_amx"])
def test_not_finite(level, seed, request):
    """What plain PyTorch gives: float32 and float16 are sums of terms on tiles, where infinity makes NaN. In bfloat16
    NaN came from the zeros that fill a tile: an infinity in K' that no query gave a weight made all of dK' and dV' NaN,
    and one in a sequence columns of dE beyond that sequence."""
    if level == "amx":
        request.getfixturevalue("amx")
    code = """
import sys, torch, test_amx as t
torch.manual_seed(int(sys.argv[1]))
for dtype in t.DTYPES:
    t.not_finite_inputs(dtype), t.not_finite_in_one_sequence(dtype), t.infinite_projections(dtype)
t.overflow_of_projections()
print(torch.ops.linformer_kernels.cpu_capability())
"""
    assert child(code, seed, LINFORMER_CPU_CAPABILITY=level) == level


SMALL = """
import torch, linformer_kernels as lk
torch.set_flush_denormal(False)
print(torch.ops.linformer_kernels.cpu_capability())
def projected(number, dtype, by=1.0):
    value = torch.full((1, 1, 8, 8), number, dtype=torch.float64).to(dtype)
    proj = (by * torch.eye(8, dtype=torch.float64)).to(dtype)
    return float(lk.project_kv(value, value, proj, backend="cpu")[0].unique())
"""


@pytest.mark.parametrize(
    "level",
    ["generic", "avx2", "avx512", "avx512_bf16", "emulate_avx512_bf16", "amx", "emulate_amx", "emulate_neon_bf16"],
)
def test_subnormals(level):
    """docs/backends.md: AMX, and the instruction for pairs of bfloat16, take subnormals for zero, and a term of a
    float32 may be one. Nobody else does, and float16 has none that are subnormal in bfloat16."""
    last = 2.0**-103 * (1 + 2.0**-23)  # its third term is the smallest normal number
    numbers = {
        "bfloat16 below 2^-126": ("2.0**-127, torch.bfloat16", 2.0**-127),
        "a product of bfloat16 below 2^-126": ("2.0**-70, torch.bfloat16, 2.0**-60", 2.0**-130),
        "float32 from 2^-103 on": (f"{last!r}, torch.float32", last),
        "float32 below 2^-103": (f"{last / 2!r}, torch.float32", last / 2),
        "a product of float32 below 2^-126": ("2.0**-70, torch.float32, 2.0**-60", 2.0**-130),
        "float16": ("2.0**-24, torch.float16", 2.0**-24),
    }
    code = SMALL + "".join(f"print(projected({arguments}).hex())\n" for arguments, _ in numbers.values())
    used, *results = child(code, LINFORMER_CPU_CAPABILITY=level).split()
    if used != level:
        pytest.skip(f"this machine does not run {level}")
    got = dict(zip(numbers, map(float.fromhex, results), strict=True))
    want = {name: number for name, (_, number) in numbers.items()}
    if level in ("amx", "avx512_bf16"):
        want |= {"bfloat16 below 2^-126": 0.0, "a product of bfloat16 below 2^-126": 0.0}
    if level == "amx":
        want |= {"float32 below 2^-103": 2.0**-104, "a product of float32 below 2^-126": 0.0}
    assert got == want


def pairs_of_small_numbers() -> None:
    """Of key and value, and of the gradients of K' and V'."""
    tiny = 3 * 2.0**-136
    for odd in (0, 1):
        rows, proj, grad = (torch.ones(shape) for shape in ((1, 2, 20, 24), (70, 20), (1, 2, 70, 24)))
        rows[:, :, odd::2] = grad[:, :, odd::2] = tiny
        rows.requires_grad_()
        results = lk.project_kv(rows, 2 * rows, proj, backend="cpu")
        assert (results[0] == 10).all() and (results[1] == 20).all()
        assert (torch.autograd.grad(results[0], rows, grad)[0] == 35).all()


@pytest.mark.parametrize("level", ["amx", "emulate_amx"])
def test_pairs_of_small_float32(level, seed, request):
    """The last term of a float32 below 2^-110 is subnormal and longer than a bfloat16. In a pair its end stood in the
    neighbor's number, which could become any other: with weights that small, dK' and dV' were wrong by factors."""
    if level == "amx":
        request.getfixturevalue("amx")
    code = """
import sys, torch, cases, test_amx as t
torch.manual_seed(int(sys.argv[1]))
t.pairs_of_small_numbers()
for scale in (1.0, -1.0):
    cases.check(cases.Case(n=130, n_q=70, k=300, d=8, scale=scale, size=30.0), "cpu", "cpu")
print(torch.ops.linformer_kernels.cpu_capability())
"""
    assert child(code, seed, LINFORMER_CPU_CAPABILITY=level) == level
