"""Which segment a position belongs to: the choice is the same on every backend and wherever a sequence lies."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import linformer_kernels as lk
from linformer_kernels import segments
from linformer_kernels.projections import LinformerProjection

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def randint(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


def packed(rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B, H, N, D) as (total, H, D), or (B, H, N) as (total, H)."""
    return torch.cat([rows[b, :, mask[b]].transpose(0, 1) for b in range(len(mask))])


def offsets(mask: torch.Tensor) -> torch.Tensor:
    return functional.pad(mask.sum(1).cumsum(0), (1, 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_backend_chooses_alike(dtype):
    for trial in range(25):
        batch, heads, group, n = randint(1, 3), randint(1, 3), randint(1, 3), randint(1, 200)
        k = randint(1, 64)
        singles = randint(0, k - 1)
        first = randint(0, singles)
        sizes = k, singles, first, randint(0, singles - first)
        width = randint(1, 70)
        query, key = torch.randn(batch, heads * group, n, width), torch.randn(batch, heads, n, width)
        if trial % 3 == 0:
            query, key = query.round(), key.round()  # equal scores
        query, key = query.to(dtype), key.to(dtype)
        mask = torch.rand(batch, n) < 0.7
        mask[0] &= trial % 5 != 0
        native = torch.ops.linformer_kernels.choose_segments
        for given in (None, mask):
            rows = query, key, given, None, None
            assert torch.equal(native(*rows, *sizes), segments.choose_segments(*rows, *sizes))
        cu, turned = offsets(mask), (packed(query, mask), packed(key, mask))
        alone = native(*turned, None, cu, cu, *sizes)
        assert torch.equal(alone, segments.choose_segments(*turned, None, cu, cu, *sizes))
        padded = native(query, key, mask, None, None, *sizes)
        assert torch.equal(packed(padded, mask), alone)
        assert (padded.transpose(1, 2)[~mask] == -1).all()
        for b in range(batch):
            of_one = query[b : b + 1, :, mask[b]], key[b : b + 1, :, mask[b]]
            assert torch.equal(native(*of_one, None, None, None, *sizes)[0].T, alone[cu[b] : cu[b + 1]])


def test_what_is_chosen():
    query, key = torch.randn(1, 4, 100, 8), torch.randn(1, 2, 100, 8)
    k, singles, first, last = 20, 9, 2, 1
    chosen = torch.ops.linformer_kernels.choose_segments(query, key, None, None, None, k, singles, first, last)
    every = torch.arange(segments.SAMPLES) * 100 // segments.SAMPLES
    asked = query[:, :, every].double().sum(2).unflatten(1, (2, 2)).sum(2)
    score = (key.double() @ asked[..., None])[..., 0]
    score[..., :first] = score[..., -last:] = torch.inf
    best = score.topk(singles, -1).indices
    for head in range(2):
        counts = chosen[0, head].bincount(minlength=k)
        assert counts[:singles].tolist() == [1] * singles
        assert counts[singles:].sum() == 100 - singles and counts[singles:].max() - counts[singles:].min() <= 1
        assert set(best[0, head].tolist()) == set((chosen[0, head] < singles).nonzero().flatten().tolist())
        for group in (chosen[0, head] < singles, chosen[0, head] >= singles):
            assert (chosen[0, head][group].diff() >= 0).all()  # in the order of the positions


def test_windows():
    for _ in range(200):
        k = randint(1, 20)
        first = randint(0, k - 1)
        keep, n = (first, randint(0, k - 1 - first)), randint(0, 60)
        mask = torch.rand(3, n) < 0.8
        rank, length = segments.ranks(mask, None, (3, n), torch.device("cpu"))
        segment = segments.window_segments(rank, length, k, keep)
        counts = torch.stack([row[row >= 0].bincount(minlength=k) for row in segment])
        assert torch.equal(counts, segments.window_counts(length, k, keep).long())
        assert torch.equal(segment >= 0, mask)
        for b in range(3):
            taken, row = int(length[b]), segment[b][mask[b]]
            assert (row.diff() >= 0).all() and (row.diff() <= 1).all()
            if taken <= k:
                assert row.tolist() == list(range(taken))
                continue
            middle = counts[b][keep[0] : k - keep[1]]
            assert middle.min() >= 1 and middle.max() - middle.min() <= 1
            assert (counts[b][: keep[0]] == 1).all() and (counts[b][k - keep[1] :] == 1).all()
        cu = offsets(mask)
        rank, length = segments.ranks(None, cu, (1, int(mask.sum())), torch.device("cpu"))
        assert torch.equal(segments.window_segments(rank, length, k, keep), torch.cat([r[r >= 0] for r in segment]))


def projections():
    yield "adaptive", LinformerProjection(None, 24, kind="adaptive")
    yield "adaptive, no keep", LinformerProjection(None, 24, kind="adaptive", keep=(0, 0), singles=0.5)
    yield "mean", LinformerProjection(None, 24, kind="mean", windows="valid", keep=(1, 1))
    yield "max", LinformerProjection(None, 24, kind="max", windows="valid")
    yield "mean over seq_len", LinformerProjection(96, 24, kind="mean")
    yield "learned", LinformerProjection(96, 24, length_norm=True)


@pytest.mark.parametrize("name", [name for name, _ in projections()])
def test_padded_packed_and_alone(name):
    torch.set_num_threads(1)
    try:
        projection = dict(projections())[name]
        lengths = torch.tensor([96, 70, 24, 3])
        query, key, value = (torch.randn(4, heads, 96, 16) for heads in (4, 2, 2))
        mask = torch.arange(96) < lengths[:, None]
        cu = offsets(mask)
        rows = {"query": packed(query, mask), "cu_seqlens_q": cu, "cu_seqlens_k": cu}
        out = projection(packed(key, mask), packed(value, mask), **rows)
        padded = packed(projection(key, value, mask, query=query), mask)
        assert torch.equal(out, padded)
        left = mask.flip(1)
        query, key, value = (_to_the_left(x, lengths) for x in (query, key, value))
        assert torch.equal(packed(projection(key, value, left, query=query), left), out)
        for b in range(4):
            of_one = (x[b : b + 1, :, left[b]] for x in (key, value, query))
            key_b, value_b, query_b = of_one
            alone = projection(key_b, value_b, query=query_b)[0].transpose(0, 1)
            if name == "mean over seq_len":  # alone and as long as that it needs no bias, and is rounded otherwise
                torch.testing.assert_close(alone, out[cu[b] : cu[b + 1]])
            else:
                assert torch.equal(alone, out[cu[b] : cu[b + 1]])
    finally:
        torch.set_num_threads(2)


def _to_the_left(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """With the padding, which is NaN, before each sequence."""
    result = torch.full_like(x, torch.nan)
    for b, length in enumerate(lengths.tolist()):
        result[b, :, x.size(2) - length :] = x[b, :, :length]
    return result


@pytest.mark.parametrize("name", ["adaptive", "adaptive, no keep", "mean"])
def test_exact_where_there_is_a_row_for_each(name):
    projection = dict(projections())[name]
    query, key, value = (torch.randn(3, 4, 24, 16) for _ in range(3))
    mask = torch.arange(24) < torch.tensor([24, 11, 1])[:, None]
    out = projection(key, value, mask, query=query)
    exact = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, _ in projections()])
def test_gradients_are_those_of_the_reference(name):
    projection = dict(projections())[name].double()
    mask = torch.rand(2, 90) < 0.8
    inputs = [torch.randn(2, heads, 90, 16, dtype=torch.float64) for heads in (2, 2, 4)]
    wanted = [x.requires_grad_() for x in inputs]
    results = []
    for dtype in (torch.float64, torch.float32):
        # Values that float32 holds, so that both choose by the same numbers.
        given = [x.detach().float().to(dtype).requires_grad_() for x in wanted]
        key, value, query = given
        out = projection.to(dtype)(key, value, mask, query=query)
        results.append([out, *torch.autograd.grad(out.square().sum(), given)])
    for exact, got in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-4 * float(exact.detach().abs().max()))


def test_compiled_and_exported():
    projection = LinformerProjection(None, 16, kind="adaptive")
    query, key, value = (torch.randn(2, 2, 80, 8) for _ in range(3))
    mask = torch.rand(2, 80) < 0.7
    call = lambda q, k, v, m: projection(k, v, m, query=q)  # noqa: E731
    wanted = call(query, key, value, mask)
    torch.testing.assert_close(torch.compile(call, fullgraph=True)(query, key, value, mask), wanted)

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.projection = projection

        def forward(self, q, k, v, m):
            return self.projection(k, v, m, query=q)

    length = torch.export.Dim("length", min=2, max=4096)
    shapes = {name: {2: length} for name in "qkv"} | {"m": {1: length}}
    program = torch.export.export(Module(), (query, key, value, mask), dynamic_shapes=shapes).module()
    torch.testing.assert_close(program(query, key, value, mask), wanted)
    query, key, value = (torch.randn(2, 2, 333, 8) for _ in range(3))
    mask = torch.rand(2, 333) < 0.7
    torch.testing.assert_close(program(query, key, value, mask), call(query, key, value, mask))


def test_in_modules():
    projection = LinformerProjection(None, 32, kind="adaptive")
    attention = lk.LinformerAttention(48, 4, batch_first=True, projection=projection)
    exact = torch.nn.MultiheadAttention(48, 4, batch_first=True)
    like = lk.from_torch(exact, projection=projection).eval()
    x, ignored = torch.randn(3, 30, 48), torch.arange(30) >= torch.tensor([30, 20, 7])[:, None]
    torch.testing.assert_close(like(x, x, x, ignored)[0], exact(x, x, x, ignored)[0], rtol=1e-5, atol=1e-5)
    assert attention(torch.randn(2, 500, 48))[0].shape == (2, 500, 48)
    encoder = lk.LinformerEncoder(48, 4, 96, batch_first=True, num_layers=2, projection=projection)
    out = encoder(torch.randn(2, 200, 48), src_key_padding_mask=torch.rand(2, 200) < 0.3)
    out.square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    assert (
        encoder.state_dict().keys()
        == lk.LinformerEncoder(
            48,
            4,
            96,
            batch_first=True,
            num_layers=2,
            projection=LinformerProjection(None, 32, kind="mean", windows="valid"),
        )
        .state_dict()
        .keys()
    )


@pytest.mark.parametrize("options", [
    {"kind": "adaptive", "keep": (20, 12)}, {"kind": "adaptive", "keep": (-1, 0)}, {"kind": "adaptive", "singles": 1.5},
    {"kind": "learned", "windows": "valid"}, {"kind": "learned", "keep": (1, 1)}, {"kind": "mean", "length_norm": True},
    {"kind": "mean", "windows": "all"}, {"kind": "conv", "head_dim": 8, "windows": "valid"},
    {"kind": "adaptive", "num_heads": 2}, {"kind": "mean", "keep": (1, 1)}, {"kind": "mean", "singles": 0.5},
    {"kind": "adaptive", "init": "mean"},
])  # fmt: skip
def test_refused(options):
    name = [name for name in options if name != "kind"][-1]
    with pytest.raises(ValueError, match=f"{name}.* wanted: "):
        LinformerProjection(64, 32, **options)


def test_words_for_what_cannot_be():
    projection = LinformerProjection(64, 32, kind="adaptive")
    key = torch.randn(1, 2, 60, 8)
    with pytest.raises(ValueError, match="no query came; wanted: "):
        projection(key, key)
    with pytest.raises(ValueError, match=r"N = 65 .*seq_len = 64; wanted: "):
        projection(torch.randn(1, 2, 65, 8), torch.randn(1, 2, 65, 8), query=key)
    long, ends = torch.randn(75, 2, 8), torch.tensor([0, 10, 75])
    with pytest.raises(ValueError, match=r"N = 65 .*seq_len = 64; wanted: "):
        projection(long, long, query=long, cu_seqlens_q=ends, cu_seqlens_k=ends)
    with pytest.raises(ValueError, match="query has head width 7 but key has 8"):
        projection(key, key, query=key[..., :7])
    with pytest.raises(TypeError, match=r"keep is 3; wanted: \(first, last\)"):
        LinformerProjection(64, 32, kind="adaptive", keep=3)
    with pytest.raises(ValueError, match='seq_len is None but kind is "learned"'):
        LinformerProjection(None, 32)


@pytest.mark.parametrize("kept", [(2**62, 2**62), (2**63 - 1, 2**63 - 1), (-1, 2), (2, -1), (4, 4)])
def test_the_op_refuses_more_to_keep_than_there_are_singles(kept):
    """A sum of two of them overflowed, and what came after wrote past the end."""
    query = torch.randn(1, 2, 50, 8)
    with pytest.raises(RuntimeError, match="first"):
        torch.ops.linformer_kernels.choose_segments(query, query, None, None, None, 10, 5, *kept)


@pytest.mark.parametrize("name", ["adaptive", "mean", "mean over seq_len", "learned"])
def test_float64_is_computed_in_float64(name):
    """Weights and factors were those of float32, and results wrong in the eighth digit."""
    projection = dict(projections())[name].double()
    query, key, value = (torch.randn(2, 2, 70, 16, dtype=torch.float64) for _ in range(3))
    if name == "learned":
        matrices = zip(projection.parameters(), (key, value), strict=True)
        rows, bias = [matrix[:, :70] @ x * (96 / 70) ** 0.5 for matrix, x in matrices], None
    else:
        if name == "mean over seq_len":
            segment = (torch.arange(70) // 4).expand(2, 2, -1)
        elif name == "mean":
            rank, length = segments.ranks(None, None, (1, 70), torch.device("cpu"))
            segment = segments.window_segments(rank, length, 24, projection.keep).expand(2, 2, -1)
        else:
            segment = projection.segments(query, key, value)
        member = (segment[:, :, None] == torch.arange(24)[:, None]).double()
        count = member.sum(-1, keepdim=True)
        means = name != "mean over seq_len"
        rows = [member @ x / (count if means else 4) for x in (key, value)]
        bias = (count.log() if means else torch.where(count > 0, 0.0, -torch.inf)).mT
    exact = functional.scaled_dot_product_attention(query, *rows, attn_mask=None if bias is None else bias.double())
    torch.testing.assert_close(projection(key, value, query=query), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("packed_rows", [False, True])
@pytest.mark.parametrize("name", [name for name, _ in projections()])
def test_autocast_casts_what_comes_in_two_types(name, packed_rows):
    """As of models with rotary positions, whose values are of the lower type and whose queries and keys are not."""
    projection = dict(projections())[name]
    query, key, value = (torch.randn(70, 2, 16) if packed_rows else torch.randn(2, 2, 70, 16) for _ in range(3))
    cu = torch.tensor([0, 30, 70]) if packed_rows else None
    options = {"query": query, "cu_seqlens_q": cu, "cu_seqlens_k": cu}
    exact = projection.bfloat16()(key.bfloat16(), value.bfloat16(), **(options | {"query": query.bfloat16()}))
    with torch.autocast("cpu", torch.bfloat16):
        out = projection(key, value.bfloat16(), **options)
        if "adaptive" not in name:
            assert projection(key, value, cu_seqlens_k=cu)[0].dtype == torch.bfloat16
    assert torch.equal(out, exact)


@pytest.mark.parametrize("singles", ["half", None, True])
def test_a_part_that_is_no_number(singles):
    with pytest.raises(TypeError, match=r"singles is .*; wanted: a part of K, between 0 and 1"):
        LinformerProjection(None, 8, kind="adaptive", singles=singles)


class Called(torch.nn.Module):
    def __init__(self, projection):
        super().__init__()
        self.projection = projection

    def forward(self, query, key, value):
        return self.projection(key, value, query=query)


@pytest.mark.parametrize("name", ["mean", "max", "mean over seq_len", "learned"])
def test_onnx_gets_what_it_knows(name, monkeypatch):
    """Windows of seq_len were looked up by searchsorted, which ONNX lacks."""
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    inputs = tuple(torch.randn(2, 2, 70, 16) for _ in range(3))
    program = torch.export.export(Called(dict(projections())[name]), inputs, strict=False)
    targets = {str(node.target) for node in program.graph.nodes}
    assert not any("linformer_kernels" in target or "searchsorted" in target for target in targets)


def test_onnx_has_no_choice(monkeypatch):
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    inputs = tuple(torch.randn(2, 2, 70, 16) for _ in range(3))
    with pytest.raises(NotImplementedError, match=r'kind is "adaptive" within .*; wanted: '):
        torch.export.export(Called(dict(projections())["adaptive"]), inputs, strict=False)


def test_wrong_offsets_stay_inside_where_nobody_reads_them():
    """Of "max", whose rows are PyTorch's: an index out of bounds, which on a GPU ends the process."""
    projection, rows = LinformerProjection(None, 8, kind="max", windows="valid"), torch.randn(60, 2, 8)
    compiled = torch.compile(lambda rows, ends: projection(rows, rows, cu_seqlens_k=ends), backend="eager")
    assert compiled(rows, torch.tensor([0, 20, 50, 55]))[0].shape == (3, 2, 8, 8)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_up_to_the_longest(strict):
    """A length of seq_len itself needs no bias, and a program of any length had to exclude it."""
    module = Called(dict(projections())["mean over seq_len"])
    inputs = [torch.randn(3, 1, 2, n, 16).unbind() for n in (70, 96, 20)]
    length = torch.export.Dim("length", min=2, max=96)
    program = torch.export.export(module, inputs[0], strict=strict, dynamic_shapes=({2: length},) * 3).module()
    for given in inputs:
        torch.testing.assert_close(program(*given), module(*given))
