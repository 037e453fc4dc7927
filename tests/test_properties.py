"""What must hold whatever the numbers are: nothing leaks, packed is padded is alone, runs repeat, dropout is as agreed,
only the wanted gradients are computed."""

import dataclasses
import itertools

import cases
import numpy as np
import oracle
import pytest
import torch
from cases import Case, Inputs, Spy

import linformer_kernels as lk

LOW = torch.bfloat16
ragged = pytest.mark.parametrize("dtype", [torch.float32, LOW], ids=("fp32", "bf16"))


@ragged
@pytest.mark.parametrize("sharing", ["headwise", "key-value", "per-head"])
@pytest.mark.parametrize("mask", ["random", "prefix", "nothing"])
def test_what_takes_no_part_neither_leaks_nor_moves(mask, sharing, dtype, device, native):
    """Masked rows and unused columns are NaN: results are finite, and the gradients there are zero exactly."""
    x = Inputs(Case(mask=mask, sharing=sharing, dtype=dtype, batch=3, kv_heads=2, extra=6, n=71), device)
    got = cases.run(x, native)
    assert all(t.isfinite().all() for t in got.values())
    for name in ("grad_key", "grad_value"):
        assert (got[name].movedim(2, 1)[~x.mask] == 0).all(), name
    for name in ("grad_proj_key", "grad_proj_value"):
        assert name not in got or (got[name][..., 71:] == 0).all(), name
    if mask == "nothing":
        assert all((got[name][0] == 0).all() for name in ("out", "grad_query", "grad_key", "grad_value"))
    key_proj, value_proj = lk.project_kv(*x.positional()[1:], key_padding_mask=x.mask, backend=native)
    assert key_proj.isfinite().all() and value_proj.isfinite().all()
    assert mask != "nothing" or not (key_proj[0].any() or value_proj[0].any())


@ragged
@pytest.mark.parametrize("packed", [False, True])
def test_a_nan_stays_in_its_sequence(packed, dtype, device, native):
    shape = dict(lengths=(20, 33, 47)) if packed else dict(batch=3, n=33, n_q=33)
    x = Inputs(Case(**shape, dtype=dtype, kv_heads=2), device)
    clean = cases.run(x, native)
    one = (slice(20, 53),) if packed else (1,)
    with torch.no_grad():
        for name in ("query", "key", "value"):
            getattr(x, name)[one] = cases.NAN
    poisoned = cases.run(x, native)
    for name in ("out", "grad_query", "grad_key", "grad_value"):
        assert poisoned[name][one].isnan().all(), name
        poisoned[name][one] = clean[name][one]
        assert torch.equal(poisoned[name], clean[name]), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("name", [*cases.ARGUMENTS, "grad_out"])
def test_not_finite_is_what_the_plain_formula_gives(name, value, device, native):
    x = Inputs(Case(n=40, n_q=30, k=17, kv_heads=2, d=17), device)
    with torch.no_grad():
        tensor = getattr(x, name)
        tensor.view(-1)[torch.randint(tensor.numel(), ())] = value
    got, plain = cases.run(x, native), cases.plain(x)
    assert any(not t.isfinite().all() for t in plain.values())
    for result, tensor in got.items():
        assert torch.equal(tensor.isfinite(), plain[result].isfinite()), result


def alone(x: Inputs, b: int, rows_q: slice, rows: slice, native) -> dict[str, torch.Tensor]:
    """Sequence b of a padded batch as a batch of one."""
    one = Inputs.__new__(Inputs)
    one.__dict__.update(x.__dict__)
    cut = lambda t, r: t[b : b + 1, :, r].detach().requires_grad_()  # noqa: E731
    one.query, one.key, one.value = cut(x.query, rows_q), cut(x.key, rows), cut(x.value, rows)
    one.mask, one.grad_out = None, x.grad_out[b : b + 1, :, rows_q]
    return cases.run(one, native)


@ragged
@pytest.mark.parametrize("sharing", ["headwise", "key-value", "per-head"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_packed_is_padded_is_alone(kv_heads, sharing, dtype, device, native):
    lengths, lengths_q, n, n_q = (50, 0, 7, 31), (33, 2, 0, 40), 50, 40
    case = Case(batch=4, n=n, n_q=n_q, kv_heads=kv_heads, sharing=sharing, dtype=dtype, extra=3, k=24, d=17)
    padded = Inputs(case, device)
    at = lambda size, of: torch.arange(size, device=device) < torch.tensor(of, device=device)[:, None]  # noqa: E731
    padded.mask, queries = at(n, lengths), at(n_q, lengths_q)
    with torch.no_grad():
        padded.key.movedim(1, 2)[~padded.mask] = cases.NAN
        padded.value.movedim(1, 2)[~padded.mask] = cases.NAN
        padded.grad_out.movedim(1, 2)[~queries] = 0
    packed = Inputs(dataclasses.replace(case, lengths=lengths, lengths_q=lengths_q), device)
    packed.proj_key, packed.proj_value = padded.proj_key, padded.proj_value
    pack = lambda t, rows: t.detach().movedim(1, 2)[rows]  # noqa: E731
    packed.query = pack(padded.query, queries).requires_grad_()
    packed.key, packed.value = (pack(t, padded.mask).requires_grad_() for t in (padded.key, padded.value))
    packed.grad_out = pack(padded.grad_out, queries)
    other = cases.run(padded, native)
    of_rows = {"out": queries, "grad_query": queries, "grad_key": padded.mask, "grad_value": padded.mask}
    for name, rows in of_rows.items():
        other[name] = pack(other[name], rows)
    each = enumerate(zip(lengths_q, lengths, strict=True))
    single = [alone(padded, b, slice(0, q), slice(0, k), native) for b, (q, k) in each]
    single = {name: torch.cat([s[name][0].movedim(0, 1) for s in single]) for name in of_rows}
    cases.compare({"packed": cases.run(packed, native), "padded": other, "alone": single}, packed)


REPEATED = [
    Case(n=1000, n_q=700, k=128, heads=8, kv_heads=4, d=64),
    Case(n=900, k=200, sharing="per-head", mask="random", dtype=LOW, layout="bnhd"),
    Case(lengths=(300, 5, 0, 401), sharing="key-value", kv_heads=2, k=65),
    Case(n=300, n_q=300, k=600, dropout_p=0.2, dtype=torch.float16),
]


@pytest.mark.parametrize("case", REPEATED, ids=str)
def test_two_runs_are_bitwise_equal(case, device, native):
    x = Inputs(case, device)
    first = cases.run(x, native)
    for _ in range(3):
        for name, again in cases.run(x, native).items():
            assert torch.equal(first[name], again), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="threads are the CPU kernels' affair")
@pytest.mark.parametrize("threads", [1, 3, 64])
@pytest.mark.parametrize("case", REPEATED, ids=str)
def test_any_number_of_threads(case, threads, device, native):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        cases.check(case, device, native)
    finally:
        torch.set_num_threads(before)


def needs_of(calls: list[tuple[str, dict]]) -> dict[str, int]:
    return {name: arguments["needs"] for name, arguments in calls if "needs" in arguments}


@pytest.mark.parametrize("sharing", ["headwise", "key-value"])
def test_only_the_wanted_gradients_are_computed(sharing, device, native):
    x = Inputs(Case(sharing=sharing, n=33, n_q=33, k=8, kv_heads=2), device)
    names, full = list(x.leaves()), cases.run(x, native)
    for wanted in itertools.product([False, True], repeat=len(names)):
        for name, want in zip(names, wanted, strict=True):
            getattr(x, name).requires_grad_(want)
        with Spy() as spy:
            out = lk.linformer_attention(*x.positional(), backend=native)
            assert out.requires_grad == any(wanted)
            if out.requires_grad:
                out.backward(x.grad_out)
        needs = needs_of(spy.calls)
        assert needs == ({"attention_backward": sum(w << i for i, w in enumerate(wanted))} if any(wanted) else {})
        for name, want in zip(names, wanted, strict=True):
            tensor = getattr(x, name)
            assert (tensor.grad is not None) == want, name
            assert not want or torch.equal(tensor.grad, full[f"grad_{name}"]), f"{name} of {wanted}"
            tensor.grad = None


@pytest.mark.parametrize("like", ["bhnd", "bnhd", "padded", "expanded"])
def test_results_have_the_strides_of_the_inputs(like, device, native):
    """(B, N, H, D) storage in gives (B, N, H, D) storage out, gradients too: no copy on the way to the next layer."""
    x = Inputs(Case(layout=like, n=40, n_q=30, d_v=16, kv_heads=2), device)
    got = cases.run(x, native)
    for name, tensor in got.items():
        source = x.query if name == "out" else getattr(x, name.removeprefix("grad_"))
        if source.dim() == 4 and source.stride(1) < source.stride(2):
            tensor = tensor.transpose(1, 2)
        assert tensor.is_contiguous(), name


def test_changing_an_input_before_backward_is_an_error(device, native):
    x = Inputs(Case(), device)
    out = lk.linformer_attention(*x.positional(), backend=native)
    with torch.no_grad():
        x.query.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def dropped_probabilities(p, rows, columns, device, backend, heads=3) -> torch.Tensor:
    """P after dropout, shown by an identity for V'."""
    query = torch.zeros(2, heads, rows, 8, device=device)
    key_proj = torch.randn(2, heads, columns, 8, device=device)
    value_proj = torch.eye(columns, device=device).expand(2, heads, columns, columns)
    return lk.projected_attention(query, key_proj, value_proj, dropout_p=p, backend=backend)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.97])
def test_dropout_statistics(p, device, native):
    """All of P is 1 / columns: what is kept is 1 / (1 - p) times that, and its number is binomial."""
    columns = 250
    kept = dropped_probabilities(p, 700, columns, device, native)
    assert torch.allclose(kept[kept != 0], torch.tensor(1 / columns / (1 - p), device=device), rtol=1e-5)
    kept = (kept != 0).double()
    for axes in ((), (0,), (1,), (2,), (3,)):  # over everything, then for every sequence, head, row, column
        others = [i for i in range(4) if i not in axes]
        count = kept.numel() / np.prod([kept.shape[i] for i in axes] or [1])
        z = (kept.mean(others) - (1 - p)).abs().max() / np.sqrt(p * (1 - p) / count)
        assert z < 6, f"kept share along {axes}"
    a, b = kept[..., 1:] - (1 - p), kept[..., :-1] - (1 - p)
    assert abs((a * b).mean()) < 6 * p * (1 - p) / np.sqrt(a.numel()), "neighbors are correlated"


def test_dropout_follows_the_seed_of_torch(device, native):
    draw = lambda: dropped_probabilities(0.5, 20, 30, device, native)  # noqa: E731
    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first) and not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(dropped_probabilities(0.5, 20, 30, device, "reference") != 0, first != 0)


def test_dropout_of_zero_is_no_dropout(device, native):
    x = Inputs(Case(), device)
    state = torch.get_rng_state()
    with Spy() as spy:
        out = lk.linformer_attention(*x.positional(), dropout_p=0.0, backend=native)
    assert torch.equal(out, lk.linformer_attention(*x.positional(), backend=native))
    assert torch.equal(state, torch.get_rng_state()), "numbers were drawn"
    assert spy.calls[0][1]["rng_state"] is None


def test_a_fixed_rng_state(device):
    """The raw op, with high bits in seed and offset, against the oracle's numbers."""
    query, key_proj = torch.randn(2, 4, 9, 8, device=device), torch.randn(2, 2, 37, 8, device=device)
    value_proj = torch.eye(37, device=device).expand(2, 2, 37, 37)
    state = torch.tensor([0x7EDCBA9876543210, 0xFFFFFFFE], device=device)
    out = torch.ops.linformer_kernels.projected_attention(
        query, key_proj, value_proj, None, None, state, 0.3, 0.5, False
    )
    for b, h in itertools.product(range(2), range(4)):
        kept = oracle.dropout_multiplier(state.cpu().numpy(), 0.3, b, h, 4, 9, 37)
        assert np.array_equal(out[b, h].cpu().numpy() != 0, kept != 0)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_nothing_as_large_as_the_sequence_is_saved(dropout_p, device, native):
    """Beyond the inputs, autograd keeps K', V' and the seed."""
    x = Inputs(Case(n=500, n_q=700, k=24, kv_heads=2, sharing="per-head", dropout_p=dropout_p), device)
    saved: dict[int, int] = {}
    pack = lambda t: saved.update({t.data_ptr(): t.numel()}) or t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lk.linformer_attention(*x.positional(), dropout_p=dropout_p, backend=native)
    extra = [size for pointer, size in saved.items() if pointer not in {t.data_ptr() for t in x.positional()}]
    assert sorted(extra) == ([2] if dropout_p else []) + [2 * 2 * 24 * 32] * 2
