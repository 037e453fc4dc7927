"""The third opinion: the operation, its gradients and its dropout in float64 NumPy, and the one rule of accuracy.

Independent of the package's reference: no PyTorch, one head of one sequence at a time, masked rows dropped by
index instead of zeroed, gradients derived by hand. With x = the rows that take part:

    K' = E x_k        S = scale Q K'^T + 1 c^T   P = softmax(S)   O = (M P) V'     M: 0 or 1 / (1 - p); c: the bias
    dV' = (M P)^T dO  dP = M (dO V'^T)       dS = P (dP - rowsum(P dP))           dQ = scale dS K'    dK' = scale dS^T Q
    dx_k = E^T dK'    dE = dK' x_k^T         dc = colsum(dS)                      and so for V', F

Where all of c is -inf, P is zero. Pooling: row k of K' is the mean of the keys of segment k, and c = log(their number).
"""

from __future__ import annotations

import copy
import functools
import itertools

import numpy as np
import torch

Array = np.ndarray
FLOAT32 = float(np.finfo(np.float32).eps)


def philox(counter: tuple, key: tuple) -> tuple[Array, ...]:
    """Philox4x32-10 (Salmon et al., 2011): four 32-bit words for each counter, held in uint64."""
    low = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(c, np.uint64) & low for c in counter))
    k0, k1 = (np.uint64(k) for k in key)
    for _ in range(10):
        left, right = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (right >> np.uint64(32)) ^ c1 ^ k0, right & low, (left >> np.uint64(32)) ^ c3 ^ k1, left & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return c0, c1, c2, c3


def dropout_multiplier(rng_state, p: float, sequence: int, head: int, heads: int, rows: int, columns: int) -> Array:
    """(rows, columns) of 0 and 1 / (1 - p)."""
    seed, offset = (int(x) for x in rng_state)
    column, row = np.arange((columns + 3) // 4)[None, :], np.arange(rows)[:, None]
    words = philox((column, row, sequence * heads + head, offset & 0xFFFFFFFF), (seed & 0xFFFFFFFF, seed >> 32))
    words = np.stack(words, axis=-1).reshape(rows, 4 * column.size)[:, :columns]
    return (words >= min(int(p * 2**32), 2**32 - 1)) / (1 - p)


def _of_sequence(x: Array, b: int, cu_seqlens) -> Array:
    """A (heads, N_b, D) view of sequence b."""
    return x[b] if cu_seqlens is None else x[cu_seqlens[b] : cu_seqlens[b + 1]].transpose(1, 0, 2)


def _matrix_of(proj: Array, b: int, h: int) -> Array:
    """A view of the matrix of this sequence and head: there may be one for all, or for all heads."""
    if proj.ndim == 2:
        return proj
    return proj[h] if proj.ndim == 3 else proj[b, h % proj.shape[1]]


def _rows_taking_part(mask, b: int, n: int) -> Array:
    return np.arange(n) if mask is None else np.flatnonzero(mask[b])


def _sequences(x: Array, cu_seqlens) -> int:
    return len(x) if cu_seqlens is None else len(cu_seqlens) - 1


def project(x: Array, proj: Array, mask=None, cu_seqlens=None) -> Array:
    """K' of key and E, or V' of value and F: (B, H_kv, K, D)."""
    heads = x.shape[1]
    result = np.zeros((_sequences(x, cu_seqlens), heads, proj.shape[-2], x.shape[-1]))
    for b in range(len(result)):
        rows_of = _of_sequence(x, b, cu_seqlens)
        rows = _rows_taking_part(mask, b, rows_of.shape[1])
        for h in range(heads):
            result[b, h] = _matrix_of(proj, b, h)[:, rows] @ rows_of[h, rows]
    return result


def project_backward(grad: Array, x: Array, proj: Array, mask=None, cu_seqlens=None) -> tuple[Array, Array]:
    """Gradients of x and of the projection."""
    grad_x, grad_proj = np.zeros_like(x), np.zeros_like(proj)
    for b in range(len(grad)):
        rows_of, grad_rows = _of_sequence(x, b, cu_seqlens), _of_sequence(grad_x, b, cu_seqlens)
        rows = _rows_taking_part(mask, b, rows_of.shape[1])
        for h in range(x.shape[1]):
            grad_rows[h, rows] = _matrix_of(proj, b, h)[:, rows].T @ grad[b, h]
            _matrix_of(grad_proj, b, h)[:, rows] += grad[b, h] @ rows_of[h, rows].T
    return grad_x, grad_proj


def _positions(segments: Array, k: int, b: int, h: int, mask, cu_seqlens) -> Array:
    """Where in sequence b keys of head h are in segment k."""
    if cu_seqlens is None:
        own = segments[b] if segments.ndim == 2 else segments[b, h]
    else:
        own = segments[cu_seqlens[b] : cu_seqlens[b + 1]]
        own = own if own.ndim == 1 else own[:, h]
    inside = own == k if mask is None else (own == k) & mask[b]
    return np.flatnonzero(inside)


def pool(x: Array, segments: Array, num_segments: int, mask=None, cu_seqlens=None) -> tuple[Array, Array]:
    """K' (B, H_kv, K, D) and how many keys each row stands for, (B, H_kv, K)."""
    result = np.zeros((_sequences(x, cu_seqlens), x.shape[1], num_segments, x.shape[-1]))
    count = np.zeros(result.shape[:-1])
    for b, h, k in np.ndindex(count.shape):
        at = _positions(segments, k, b, h, mask, cu_seqlens)
        count[b, h, k] = len(at)
        if len(at):
            result[b, h, k] = _of_sequence(x, b, cu_seqlens)[h, at].mean(axis=0)
    return result, count


def pool_backward(grad: Array, x: Array, segments: Array, mask=None, cu_seqlens=None) -> Array:
    """The gradient of x."""
    grad_x = np.zeros_like(x)
    for b, h, k in np.ndindex(grad.shape[:3]):
        at = _positions(segments, k, b, h, mask, cu_seqlens)
        if len(at):
            _of_sequence(grad_x, b, cu_seqlens)[h, at] = grad[b, h, k] / len(at)
    return grad_x


class Roundings:
    """What one implementation in a type of this epsilon rounds, done to the float64 computation.

    K', V', their gradients, P and dS are rounded to the type; scores and rowsum(P dP) are sums in float32.

    NEAREST: the former to the nearest number, the latter exact. That foresees single elements: where scores are huge
    and the type is narrow, the roundings of K' decide which of two scores wins, and they are the same for all that
    round rightly. Else a draw: everything is off by as much as such an implementation usually is, up or down by
    chance. A number of the type by a quarter of its epsilon, as roundings are on average, or by one of float32 if
    that is more; sums by four of float32, as 256 terms make about 0.29 sqrt(256), where it does most: the largest
    score of a row one way and the others the other way. In the first draw all rows go the same way, as cut-off sums
    do.
    """

    NEAREST = -1
    ALL = (NEAREST, *range(8))  # eight: one draw alone is lucky as often as an implementation is

    def __init__(self, epsilon: float, draw: int):
        self.draw, self.bits, self.unit = draw, 1 - round(np.log2(epsilon)), max(epsilon / 4, FLOAT32)
        self.rng = np.random.default_rng(max(draw, 0))

    def signs(self, shape) -> Array:
        return 1.0 - 2.0 * self.rng.integers(0, 2, shape)

    def number(self, x: Array) -> Array:
        """Of the type."""
        if self.draw != self.NEAREST:
            return x * (1 + self.unit * self.signs(x.shape))
        fraction, exponent = np.frexp(x)
        return np.ldexp(np.rint(np.ldexp(fraction, self.bits)), exponent - self.bits)

    def sums(self, rows: int) -> Array | float:
        """How far the sums of each row are off, relative to their terms: (rows, 1)."""
        if self.draw == self.NEAREST:
            return 0.0
        return 4 * FLOAT32 * (self.signs((rows, 1)) if self.draw else np.ones((rows, 1)))


class _Exact:
    def number(self, x: Array) -> Array:
        return x

    def sums(self, rows: int) -> float:
        return 0.0


EXACT = _Exact()


def attend(
    query, key_proj, value_proj, key_bias=None, grad_out=None, *, scale, cu_seqlens=None, dropout_p=0.0,
    rng_state=None, roundings=EXACT,
):  # fmt: skip
    """out, and with grad_out also the gradients of query, key_proj, value_proj, key_bias (B, H_kv, K)."""
    rounded = roundings.number
    heads, group = query.shape[1], query.shape[1] // max(key_proj.shape[1], 1)
    out = np.zeros((*query.shape[:-1], value_proj.shape[-1]))
    grad_query, grad_key_proj, grad_value_proj = (np.zeros_like(x) for x in (query, key_proj, value_proj))
    grad_key_bias = np.zeros(key_proj.shape[:3])
    for b in range(len(key_proj)):
        for h in range(heads):
            q, k, v = _of_sequence(query, b, cu_seqlens)[h], key_proj[b, h // group], value_proj[b, h // group]
            scores = scale * (q @ k.T)
            if key_bias is not None:
                scores = scores + key_bias[b, h // group]
                if np.all(key_bias[b, h // group] == -np.inf):
                    continue  # out is zero, and so are the gradients
            largest = scores.max(axis=1, keepdims=True, initial=-np.inf)
            if np.any(unit := roundings.sums(len(q))):
                scores += np.where(scores == largest, unit, -unit) * abs(scale) * np.sqrt(q**2 @ (k**2).T)
            p = np.exp(scores - scores.max(axis=1, keepdims=True, initial=-np.inf))
            p /= p.sum(axis=1, keepdims=True)
            m = dropout_multiplier(rng_state, dropout_p, b, h, heads, *p.shape) if dropout_p else np.ones_like(p)
            _of_sequence(out, b, cu_seqlens)[h] = rounded(m * p) @ v
            if grad_out is None:
                continue
            g = _of_sequence(grad_out, b, cu_seqlens)[h]
            grad_p = m * (g @ v.T)
            delta = (p * (grad_p + roundings.sums(len(q)) * np.abs(grad_p))).sum(axis=1, keepdims=True)
            grad_key_bias[b, h // group] += (p * (grad_p - delta)).sum(axis=0)
            grad_scores = rounded(scale * p * (grad_p - delta))
            _of_sequence(grad_query, b, cu_seqlens)[h] = grad_scores @ k
            grad_key_proj[b, h // group] += grad_scores.T @ q
            grad_value_proj[b, h // group] += rounded(m * p).T @ g
    return out if grad_out is None else (out, grad_query, grad_key_proj, grad_value_proj, grad_key_bias)


def attention(
    query, key, value, proj_key=None, proj_value=None, grad_out=None, *, key_bias=None, pooled=None, mask=None,
    scale=None, cu_seqlens_q=None, cu_seqlens_k=None, dropout_p=0.0, rng_state=None, roundings=EXACT,
) -> dict[str, Array]:  # fmt: skip
    """All results by name: out, key_proj, value_proj, and with grad_out `grad_<argument>`.

    pooled: segments and their number, in the place of E and F; then `count` is among the results.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    f = proj_key if proj_value is None else proj_value
    options = dict(scale=scale, cu_seqlens=cu_seqlens_q, dropout_p=dropout_p, rng_state=rng_state, roundings=roundings)
    of_sequence, result = (mask, cu_seqlens_k), {}
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        if pooled is None:
            key_proj, value_proj = project(key, proj_key, *of_sequence), project(value, f, *of_sequence)
        else:
            (key_proj, count), (value_proj, _) = pool(key, *pooled, *of_sequence), pool(value, *pooled, *of_sequence)
            key_bias, result = np.log(count) + (0 if key_bias is None else key_bias), {"count": count}
        key_proj, value_proj = roundings.number(key_proj), roundings.number(value_proj)
        result |= {"key_proj": key_proj, "value_proj": value_proj}
        if grad_out is None:
            return result | {"out": attend(query, key_proj, value_proj, key_bias, **options)}
        grads = attend(query, key_proj, value_proj, key_bias, grad_out, **options)
        result |= dict(zip(("out", "grad_query"), grads[:2], strict=True)) | {"grad_key_bias": grads[4]}
        grad_k, grad_v = roundings.number(grads[2]), roundings.number(grads[3])
        if pooled is not None:
            result["grad_key"] = pool_backward(grad_k, key, pooled[0], *of_sequence)
            return result | {"grad_value": pool_backward(grad_v, value, pooled[0], *of_sequence)}
        result["grad_key"], grad_e = project_backward(grad_k, key, proj_key, *of_sequence)
        result["grad_value"], grad_f = project_backward(grad_v, value, f, *of_sequence)
    if proj_value is None:
        return result | {"grad_proj_key": grad_e + grad_f}
    return result | {"grad_proj_key": grad_e, "grad_proj_value": grad_f}


def assert_close(actual: torch.Tensor, exact: Array, plain: torch.Tensor | None, what: str, peers=()) -> None:
    """The error against float64 is at most twice the error of plain PyTorch in the same type, plus a rounding floor.

    Measured over the whole tensor in two norms, largest and root mean square: the largest finds one wrong element,
    the mean finds an error that is small and everywhere. Errors of single elements are not compared with each
    other: plain PyTorch is exact in some elements by luck. Where it is lucky altogether (sums that cancel, a handful of
    different numbers, a softmax that hangs on one rounding), one of its `peers` counts in its place: what other right
    implementations would give, that is, the oracle with their Roundings. They are looked at one by one where plain
    PyTorch does not do, so they may be an iterator that computes them. All that is random in a peer is drawn before
    the result is seen, and has the size that roundings have; so where a tensor has many different numbers, peers are
    all equally far off and their number is of no account. Who overflows is no measure for who does not.
    The floor is one rounding of the result and four float32 roundings, relative to the size of the tensor.
    Infinities and NaN must stand where they stand in `exact`. `plain` None:
    `actual` is itself plain PyTorch in float64, where the formula is in question and not its rounding.
    """
    got = _array(actual)
    assert got.shape == exact.shape, f"{what}: shape {got.shape}, wanted {exact.shape}"
    finite = np.isfinite(exact)
    wrong = ~np.where(finite, np.isfinite(got), (got == exact) | (np.isnan(got) & np.isnan(exact)))
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{what} {tuple(got.shape)}: {wrong.sum()} of {wrong.size} elements are finite, infinite or NaN where they "
            f"should not be; the first at {at}: {got[at]}, wanted {exact[at]}"
        )
    if not finite.any():
        return
    if plain is None:
        assert actual.dtype == torch.float64, f"{what}: {actual.dtype} needs the plain result in the same type"
        unit = 2.0**-30
    else:
        assert actual.dtype == plain.dtype, f"{what}: {actual.dtype}, plain PyTorch gives {plain.dtype}"
        unit = torch.finfo(actual.dtype).eps + 4 * FLOAT32
    norms = lambda x: np.array([np.abs(x).max(), np.sqrt(np.mean(np.square(x)))])  # noqa: E731
    off = lambda other: norms(other[finite] - exact[finite])  # noqa: E731
    error, size, most = off(got), norms(exact[finite]), np.zeros(2)
    usual = most if plain is None else off(_array(plain))
    for norm in itertools.chain([usual], map(off, peers)):
        most = np.maximum(most, norm) if np.isfinite(norm).all() else most
        limit = 2 * most + unit * size
        if (error <= limit).all():
            return
    worst = tuple(int(i) for i in np.argwhere(finite)[np.abs(got - exact)[finite].argmax()])
    i = int(error[0] <= limit[0])
    name = ("largest", "root mean square")[i]
    raise AssertionError(
        f"{what} {tuple(got.shape)} {actual.dtype}: {name} error {error[i]:.3e}, limit {limit[i]:.3e} (plain PyTorch "
        f"{usual[i]:.3e}, the worst of its peers {most[i]:.3e}, {name} value {size[i]:.3e}); the worst element at "
        f"{worst}: {got[worst]:.9g}, wanted {exact[worst]:.9g}"
    )


def assert_module_close(got: dict[str, torch.Tensor], call, module: torch.nn.Module, *inputs: torch.Tensor) -> None:
    """`got`, tensors by name, is `call(module, *inputs)` in float64: by the rule, against the same call in float32.

    A peer has all inputs and parameters moved by two float32 roundings, up or down, in float64: one for each of the
    products in a row.
    """
    double, wide = copy.deepcopy(module).double(), [x.detach().double() for x in inputs]
    exact, plain = call(double, *wide), call(module, *inputs)

    @functools.cache
    def peer(_draw: int) -> dict[str, torch.Tensor]:
        model, xs = copy.deepcopy(double), [x.clone() for x in wide]
        with torch.no_grad():
            for x in [*xs, *model.parameters()]:
                x.mul_(1 + 2 * FLOAT32 * torch.randn_like(x).sign())
        return call(model, *xs)

    for name, tensor in got.items():
        peers = (_array(peer(draw)[name]) for draw in range(8))
        assert_close(tensor, _array(exact[name]), plain[name], f"{name} of {type(module).__name__}", peers)


PROMISE = 1e-5  # of docs/peers.md, in float32, relative to the largest element


def assert_as_promised(actual: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    """Converted weights against their original: in float64 by the rule, else as docs/peers.md says."""
    if actual.dtype == torch.float64:
        assert_close(actual, theirs.detach().cpu().numpy(), None, what)
        return
    error, size = (actual - theirs).abs().max().item(), theirs.abs().max().item()
    assert error <= PROMISE * size, f"{what} {tuple(actual.shape)}: error {error:.3e}, largest element {size:.3e}"


def _array(x: torch.Tensor) -> Array:
    return x.detach().to(torch.float64).cpu().numpy()
