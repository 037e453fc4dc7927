"""The ops in ONNX, for the exporter of PyTorch: torch.onnx.export(model, ..., custom_translation_table=TABLE).

Without the table the exporter gets the formula in plain PyTorch, which has no form for kind "adaptive"; and a program
that torch.export made before holds the ops. Here they are of ONNX's own operators, opset 18, for padded sequences
without dropout; with opset_version=23 or newer the second half is its `Attention`. onnxscript, which the exporter needs
anyway, is imported when one is translated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import _library
from ._backends import callers
from .segments import SAMPLES

_FLOAT, _INT32, _INT64, _BOOL = 1, 6, 7, 9  # onnx.TensorProto


OLDEST, WITH_ATTENTION = 18, 23


def _opset() -> Any:
    from onnxscript import opset18

    return opset18


def _checked_version() -> int:
    """The opset that was asked for. Refuses one too old, which the exporter does not."""
    version = _asked_version()
    if version < OLDEST:
        raise NotImplementedError(
            f"opset_version is {version}; wanted: {OLDEST} or newer, whose operators linformer_kernels.onnx.TABLE "
            "translates to. To fix it: torch.onnx.export(..., opset_version=18), or leave it out"
        )
    return version


def _asked_version() -> int:
    # The exporter traces as 18 what was asked for as older, and does not hand on what that was.
    for frame in callers():
        if frame.f_code.co_name == "export_compat" and frame.f_locals.get("opset_version") is not None:
            return int(frame.f_locals["opset_version"])
    return OLDEST


def _refuse(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise NotImplementedError(
                f"{name} came in a model for ONNX; wanted: none, as linformer_kernels.onnx.TABLE translates padded "
                "sequences without dropout. To fix it: export model.eval() with padded inputs"
            )


def _size(tensor: Any, dim: int) -> Any:
    """As a tensor of one number."""
    return _opset().Shape(tensor, start=dim, end=dim + 1)


def _ints(*numbers: int) -> Any:
    return _opset().Constant(value_ints=list(numbers))


def _reshape(tensor: Any, *sizes: Any) -> Any:
    op = _opset()
    return op.Reshape(tensor, op.Concat(*(_ints(s) if isinstance(s, int) else s for s in sizes), axis=0))


def _zero(like: Any) -> Any:
    return _opset().CastLike(_opset().Constant(value_float=0.0), like)


def project(key, value, proj_key, proj_value=None, key_padding_mask=None, cu_seqlens_k=None, allow_tf32: bool = False):
    _refuse(cu_seqlens_k=cu_seqlens_k)
    _checked_version()
    op = _opset()

    def compress(matrix: Any, rows: Any) -> Any:
        if key_padding_mask is not None:
            rows = op.Where(op.Unsqueeze(key_padding_mask, _ints(1, 3)), rows, _zero(rows))
        return op.MatMul(op.Slice(matrix, _ints(0), _size(rows, 2), _ints(-1)), rows)

    return compress(proj_key, key), compress(proj_key if proj_value is None else proj_value, value)


def projected_attention(
    query, key_proj, value_proj, key_bias=None, cu_seqlens_q=None, rng_state=None,
    dropout_p: float = 0.0, scale: float = 1.0, allow_tf32: bool = False,
):  # fmt: skip
    _refuse(cu_seqlens_q=cu_seqlens_q, rng_state=rng_state)
    op = _opset()
    if _checked_version() >= WITH_ATTENTION:
        return _attention_operator(query, key_proj, value_proj, key_bias, float(scale))
    batch, heads, rows, key_heads = (_size(*which) for which in ((query, 0), (query, 1), (query, 2), (key_proj, 1)))
    # The queries that read a head are its rows.
    grouped = _reshape(query, batch, key_heads, -1, _size(query, 3))
    factor = op.CastLike(op.Constant(value_float=float(scale)), query)
    scores = op.MatMul(op.Mul(grouped, factor), op.Transpose(key_proj, perm=[0, 1, 3, 2]))
    if key_bias is None:
        weights = op.Softmax(scores, axis=-1)
    else:
        bias = op.Unsqueeze(key_bias, _ints(2))
        infinite = op.Constant(value_float=float("-inf"))
        some = op.Greater(op.ReduceMax(bias, _ints(-1), keepdims=1), infinite)
        scores = op.Add(op.Cast(scores, to=_FLOAT), op.Where(some, bias, op.Constant(value_float=0.0)))
        weights = op.CastLike(op.Where(some, op.Softmax(scores, axis=-1), op.Constant(value_float=0.0)), query)
    return _reshape(op.MatMul(weights, value_proj), batch, heads, rows, _size(value_proj, 3))


def _attention_operator(query: Any, key_proj: Any, value_proj: Any, key_bias: Any, scale: float) -> Any:
    from onnxscript import opset23

    op = _opset()
    if key_bias is None and scale > 0:
        return opset23.Attention(query, key_proj, value_proj, scale=scale)[0]
    # Into the query, as onnxruntime takes positive scales alone.
    scaled = op.Mul(query, op.CastLike(op.Constant(value_float=scale), query))
    if key_bias is None:
        return opset23.Attention(scaled, key_proj, value_proj, scale=1.0)[0]
    # The bias as one column more of K', for ones of the query: onnxruntime wants a mask of all N_q rows. Less its
    # largest element, which the softmax does not see: in 16 bits it might be infinite.
    most = op.ReduceMax(key_bias, _ints(-1), keepdims=1)
    some = op.Greater(most, op.Constant(value_float=float("-inf")))
    bias = op.Where(some, op.Sub(key_bias, most), _zero(key_bias))
    bias = op.CastLike(op.Unsqueeze(bias, _ints(3)), key_proj)
    ones = op.Expand(
        op.CastLike(op.Constant(value_float=1.0), query), op.Concat(op.Shape(query, end=3), _ints(1), axis=0)
    )
    rows = op.Concat(scaled, ones, axis=-1), op.Concat(key_proj, bias, axis=-1)
    out = opset23.Attention(*rows, value_proj, scale=1.0)[0]
    # Each head of keys for the queries that read it.
    heads = query.shape[1] // key_bias.shape[1]
    wide = op.Concat(_size(some, 0), _size(some, 1), _ints(heads), _ints(1), axis=0)
    some = _reshape(op.Expand(op.Unsqueeze(some, _ints(2)), wide), _size(query, 0), _size(query, 1), 1, 1)
    return op.Where(some, out, _zero(out))


def attention(
    query, key, value, proj_key, proj_value=None, key_bias=None, key_padding_mask=None, cu_seqlens_q=None,
    cu_seqlens_k=None, rng_state=None, dropout_p: float = 0.0, scale: float = 1.0, allow_tf32: bool = False,
):  # fmt: skip
    key_proj, value_proj = project(key, value, proj_key, proj_value, key_padding_mask, cu_seqlens_k)
    out = projected_attention(query, key_proj, value_proj, key_bias, cu_seqlens_q, rng_state, dropout_p, scale)
    return out, key_proj, value_proj


def pool(key, value, segments, cu_seqlens_k=None, num_segments: int = 1):
    _refuse(cu_seqlens_k=cu_seqlens_k)
    _checked_version()
    op = _opset()
    segments = op.Cast(segments, to=_INT64)
    inside = op.And(op.GreaterOrEqual(segments, _ints(0)), op.Less(segments, _ints(num_segments)))
    # What takes part nowhere goes to one row more, as zeros.
    at = op.Unsqueeze(op.Where(inside, segments, _ints(num_segments)), _ints(3))
    inside = op.Unsqueeze(inside, _ints(3))

    def total(rows: Any) -> Any:
        rows = op.Where(inside, op.Cast(rows, to=_FLOAT), op.Constant(value_float=0.0))
        size = op.Concat(_size(rows, 0), _size(rows, 1), _ints(num_segments + 1), _size(rows, 3), axis=0)
        nothing = op.Expand(op.Constant(value_float=0.0), size)
        sums = op.ScatterElements(nothing, op.Expand(at, op.Shape(rows)), rows, axis=2, reduction="add")
        return op.Slice(sums, _ints(0), _ints(num_segments), _ints(2))

    ones = op.Expand(op.Constant(value_float=1.0), op.Concat(op.Shape(key, end=3), _ints(1), axis=0))
    count = total(ones)
    some = op.Max(count, op.Constant(value_float=1.0))
    key_proj, value_proj = (op.CastLike(op.Div(total(rows), some), rows) for rows in (key, value))
    return key_proj, value_proj, op.Squeeze(count, _ints(3))


def choose_segments(
    query, key, key_padding_mask=None, cu_seqlens_q=None, cu_seqlens_k=None,
    num_segments: int = 1, singles: int = 0, first: int = 0, last: int = 0,
):  # fmt: skip
    """As `segments.choose_segments`, step by step; the operators that choose are those of floats here."""
    _refuse(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    op = _opset()
    length = _size(key, 2)
    if key_padding_mask is None:
        everywhere = op.Cast(op.Constant(value_int=1), to=_BOOL)
        key_padding_mask = op.Expand(everywhere, op.Concat(_size(key, 0), length, axis=0))
        masked = False
    else:
        masked = query.shape[2] == key.shape[2]
    taking = op.Cast(key_padding_mask, to=_INT64)
    reached = op.CumSum(taking, _ints(1))
    rank = op.Where(key_padding_mask, op.Sub(reached, _ints(1)), _ints(-1))  # (B, N)
    lengths = op.ReduceSum(taking, _ints(1), keepdims=1)  # (B, 1)

    asked = _mean_query(query, key, reached, lengths, length, masked)
    score = _sum_by_halves(op.Mul(op.Cast(key, to=_FLOAT), op.Unsqueeze(asked, _ints(2))), 3, key.shape[3])
    candidate = op.And(op.GreaterOrEqual(rank, _ints(first)), op.Less(rank, op.Sub(lengths, _ints(last))))  # (B, N)
    taken = op.Expand(op.Unsqueeze(op.GreaterOrEqual(rank, _ints(0)), _ints(1)), op.Shape(score))  # (B, H_kv, N)
    candidates = op.Unsqueeze(candidate, _ints(1))
    single = op.And(taken, op.Not(candidates))
    if singles > first + last:
        # Of equal scores TopK takes the earlier.
        low = op.Constant(value_float=float("-inf"))
        number = op.Min(_ints(singles - first - last), length)
        _, best = op.TopK(op.Where(candidates, score, low), number, axis=-1)
        none = op.Expand(_ints(0), op.Shape(score))
        chosen = op.ScatterElements(none, best, op.Expand(_ints(1), op.Shape(best)), axis=2)
        single = op.Or(single, op.And(op.Cast(chosen, to=_BOOL), candidates))
    before = lambda flags: op.Sub(op.CumSum(op.Cast(flags, to=_INT64), _ints(2)), _ints(1))  # noqa: E731
    place, other = before(single), before(op.And(taken, op.Not(single)))
    lengths, rank = op.Unsqueeze(lengths, _ints(1)), op.Unsqueeze(rank, _ints(1))
    rest = op.Max(op.Sub(lengths, _ints(singles)), _ints(1))
    window = op.Add(op.Div(op.Mul(other, _ints(num_segments - singles)), rest), _ints(singles))
    segment = op.Where(op.LessOrEqual(lengths, _ints(num_segments)), rank, op.Where(single, place, window))
    return op.Cast(op.Where(taken, segment, _ints(-1)), to=_INT32)


def _mean_query(query: Any, key: Any, reached: Any, lengths: Any, length: Any, masked: bool) -> Any:
    op = _opset()
    steps = list(range(SAMPLES))
    if masked:
        # The position whose rank is that of the sample: as many are before it as have not reached it.
        wanted = op.Add(op.Div(op.Mul(_ints(*steps), lengths), _ints(SAMPLES)), _ints(1))  # (B, SAMPLES)
        less = op.Less(op.Unsqueeze(reached, _ints(1)), op.Unsqueeze(wanted, _ints(2)))  # (B, SAMPLES, N)
        at = op.ReduceSum(op.Cast(less, to=_INT64), _ints(2), keepdims=0)
        at = op.Unsqueeze(op.Min(at, op.Sub(length, _ints(1))), _ints(1, 3))
        size = op.Concat(_size(query, 0), _size(query, 1), _ints(SAMPLES), _size(query, 3), axis=0)
        rows = op.GatherElements(query, op.Expand(at, size), axis=2)
        some = op.Unsqueeze(op.Greater(lengths, _ints(0)), _ints(2, 3))
        rows = op.Where(some, rows, _zero(rows))
    else:
        at = op.Div(op.Mul(_ints(*steps), _size(query, 2)), _ints(SAMPLES))
        rows = op.Gather(query, at, axis=2)
    summed = _sum_by_halves(op.Cast(rows, to=_FLOAT), 2, SAMPLES)  # (B, H, D)
    group = query.shape[1] // key.shape[1]
    grouped = _reshape(summed, _size(key, 0), _size(key, 1), group, _size(query, 3))
    total = op.Gather(grouped, op.Constant(value_int=0), axis=2)
    for member in range(1, group):
        total = op.Add(total, op.Gather(grouped, op.Constant(value_int=member), axis=2))
    return total


def _sum_by_halves(rows: Any, dim: int, size: int) -> Any:
    op = _opset()
    while size > 1:
        half = 1 << ((size - 1).bit_length() - 1)
        left = op.Slice(rows, _ints(0), _ints(half), _ints(dim))
        more = op.Slice(rows, _ints(half), _ints(size), _ints(dim))
        if size < 2 * half:
            more = op.Pad(more, _ints(0, 2 * half - size), op.Constant(value_float=0.0), _ints(dim))
        rows, size = op.Add(left, more), half
    return op.Squeeze(rows, _ints(dim))


TABLE: dict[Callable[..., Any], Callable[..., Any]] = {
    getattr(_library.ops(), function.__name__).default: function
    for function in (attention, project, projected_attention, pool, choose_segments)
}
