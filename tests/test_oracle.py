"""The measuring instruments themselves: the NumPy oracle against finite differences and published numbers, the accuracy
rule against planted errors, the poison, and then the package's PyTorch reference against the oracle."""

import cases
import numpy as np
import oracle
import pytest
import torch
from cases import Case

import linformer_kernels as lk


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)  # fmt: skip
def test_philox_known_answers(counter, key, words):
    """The three vectors that the authors of Philox publish (Random123, kat_vectors)."""
    assert " ".join(f"{int(w):08x}" for w in oracle.philox(counter, key)) == words


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_oracle_gradients_are_finite_differences(seed, packed, shared):
    rng = np.random.default_rng(seed)
    rows, cu = ((7,), np.array([0, 3, 3, 7])) if packed else ((2, 4, 5), None)
    kv_rows = (7, 2) if packed else (2, 2, 6)
    arrays = {
        "query": rng.standard_normal((7, 4, 3) if packed else (*rows, 3)),
        "key": rng.standard_normal((*kv_rows, 3)),
        "value": rng.standard_normal((*kv_rows, 2)),
        "proj_key": rng.standard_normal((2, 5, 6)),
    }
    if not shared:
        arrays["proj_value"] = rng.standard_normal((2, 5, 6))
    mask = None if packed else rng.random((2, 6)) < 0.7
    options = dict(mask=mask, cu_seqlens_q=cu, cu_seqlens_k=cu, dropout_p=0.3, rng_state=(seed, 5), scale=0.8)
    grad_out = rng.standard_normal((7, 4, 2) if packed else (*rows, 2))
    grads = oracle.attention(**arrays, grad_out=grad_out, **options)
    for name, array in arrays.items():
        step = 1e-5 * rng.standard_normal(array.shape)
        loss = [
            (oracle.attention(**arrays | {name: array + sign * step}, **options)["out"] * grad_out).sum()
            for sign in (1, -1)
        ]
        expected = 2 * (grads[f"grad_{name}"] * step).sum()
        assert loss[0] - loss[1] == pytest.approx(expected, rel=1e-6, abs=1e-12), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("planted", ["nothing", "element", "everywhere", "zero row", "nan", "inf", "shape", "dtype"])
def test_the_rule_of_accuracy_can_fail(dtype, planted):
    exact = np.random.default_rng(0).standard_normal((4, 8, 16))
    plain, actual = torch.from_numpy(exact).to(dtype), torch.from_numpy(exact).to(dtype)
    eps = torch.finfo(dtype).eps
    if planted == "nothing":
        oracle.assert_close(actual + eps * torch.sign(actual), exact, plain, "x")
        return
    if planted == "element":
        actual[1, 2, 3] += 8 * eps * np.abs(exact).max()
    elif planted == "everywhere":
        actual *= 1 + 16 * eps
    elif planted == "zero row":
        actual[0, 3] = 0
    elif planted in ("nan", "inf"):
        actual[3, 7, 15] = float(planted)
    elif planted == "shape":
        actual = actual[:, :-1]
    else:
        actual = actual.to(torch.float64)
    with pytest.raises(AssertionError, match="x"):
        oracle.assert_close(actual, exact, plain, "x")


def test_the_rule_of_accuracy_wants_the_same_infinities():
    exact = np.array([1.0, np.inf, -np.inf, np.nan])
    plain = torch.from_numpy(exact).float()
    oracle.assert_close(plain, exact, plain, "x")
    for wrong in ([1.0, -np.inf, -np.inf, np.nan], [1.0, np.inf, 3e38, np.nan], [1.0, np.inf, -np.inf, 0.0]):
        with pytest.raises(AssertionError, match="where they"):
            oracle.assert_close(torch.tensor(wrong), exact, plain, "x")


def test_the_rule_of_accuracy_looks_at_peers_where_plain_pytorch_is_lucky():
    """And at no more of them than it takes; one that overflows says nothing."""
    exact, seen = np.array([[3.0, -1.0]]), []

    def peers(*errors):
        for error in errors:
            seen.append(error)
            yield exact + error

    plain = torch.from_numpy(exact).float()
    actual = plain + 1e-3
    oracle.assert_close(actual, exact, plain, "x", peers(1e-9, 0.6e-3, 1.0))
    assert seen == [1e-9, 0.6e-3]
    for too_near in ((), (0.4e-3, 0.3e-3), (np.inf, np.nan)):
        with pytest.raises(AssertionError, match="largest error"):
            oracle.assert_close(actual, exact, plain, "x", peers(*too_near))


def narrower(x: torch.Tensor, bits: int) -> torch.Tensor:
    fraction, exponent = torch.frexp(x.detach())
    return x + (torch.ldexp(torch.round(fraction * 2**bits), exponent - bits) - x).detach()


def without_last_row(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[..., :-1, :], torch.zeros_like(x[..., -1:, :])], dim=-2)


SAME = lambda x: x  # noqa: E731


@pytest.mark.parametrize("k, d", [(64, 32), (16, 17), (128, 64)])
@pytest.mark.parametrize(
    ("dtype", "scale", "change"),
    [
        (torch.float32, 1.001, SAME), (torch.float16, 1.01, SAME), (torch.bfloat16, 1.04, SAME),
        (torch.float32, 1.0, lambda x: narrower(x, 11)), (torch.float32, 1.0, without_last_row),
        (torch.float16, 1.0, without_last_row), (torch.bfloat16, 1.0, without_last_row),
    ],
    ids=("fp32-scale", "fp16-scale", "bf16-scale", "tf32", "fp32-row", "fp16-row", "bf16-row"),
)  # fmt: skip
def test_planted_errors_are_beyond_all_peers(k, d, dtype, scale, change, device, native):
    """A scale that is a little off, K' in TF32, and a row of K' lost."""
    x = cases.Inputs(Case(k=k, d=d, dtype=dtype), device)

    def results(scale, change):
        key_proj, value_proj = lk.project_kv(*x.positional()[1:], backend=native)
        return x.results(
            lk.projected_attention(x.query, change(key_proj), value_proj, scale=scale * d**-0.5, backend=native)
        )

    cases.compare({"as it is": results(1.0, SAME)}, x)
    with pytest.raises(AssertionError, match="error"):
        cases.compare({"planted": results(scale, change)}, x)


def test_a_softmax_that_hangs_on_one_rounding(device, native):
    """Inputs of size 1000 in 16 bits: which of two scores wins depends on the roundings of K', and dK' of one row is
    most of its tensor. An eighth of all roundings, eight times, stood for their effect; but it turns an eighth as many
    rows, not rows an eighth as far, and a kernel that rounded rightly failed once in thirty runs."""
    case = Case(size=1e3, dtype=torch.float16)
    for seed in range(40):
        torch.manual_seed(seed)
        cases.check(case, device, native)


def test_empty_is_poisoned(device):
    made = torch.empty(3, device=device), torch.empty_like(torch.ones(3, device=device)), torch.ones(1).new_empty(3)
    assert all(x.isnan().all() for x in made)


REFERENCE = [
    Case(dtype=torch.float64),
    Case(dtype=torch.float64, mask="random", kv_heads=2, extra=5, n=131, n_q=40, k=33, d=17, d_v=9),
    Case(dtype=torch.float64, mask="nothing", sharing="per-head", layout="bnhd"),
    Case(dtype=torch.float64, sharing="key-value", alias="kv", scale=0.0),
    Case(dtype=torch.float64, sharing="per-head-key-value", kv_heads=1, scale=-2.0, layout="padded", grad="scalar"),
    Case(dtype=torch.float64, sharing="same", alias="qkv", layout="expanded", grad="expanded"),
    Case(dtype=torch.float64, lengths=(5, 0, 64, 31), lengths_q=(7, 3, 0, 40), kv_heads=2, k=17),
    Case(dtype=torch.float64, lengths=(40, 1), sharing="per-head", layout="offset", extra=3),
    Case(dtype=torch.float64, size=1e4),
    Case(dtype=torch.float64, dropout_p=0.4, kv_heads=2, k=30),
    Case(dtype=torch.float64, dropout_p=0.4, lengths=(9, 0, 30), k=7),
    Case(dtype=torch.float64, batch=0),
    Case(dtype=torch.float64, n=0),
    Case(dtype=torch.float64, n_q=0),
    Case(dtype=torch.float64, lengths=()),
]


@pytest.mark.parametrize("case", REFERENCE, ids=str)
def test_reference_is_the_oracle(case, device):
    cases.check(case, device, "reference")
