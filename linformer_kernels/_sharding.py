"""How the ops run on DTensors: which dimensions may be sharded, and what one process computes is then a part of.

Imported when the first DTensor comes. Each dimension of a tensor has a letter, and the sharding of a letter is that of
every tensor that has it: b batch, h heads, g key heads, m query rows, n the sequence, k rows of K', d and e the widths
of a head. What an op returns without the letter is a sum over the devices, where it is a sum over that dimension.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor, zeros
from torch.distributed.tensor.experimental import register_sharding

from . import segments
from ._ops import OPS, OVERLOADS, heads_inner
from ._validation import Call

_LETTERS = {
    "query": "bhmd",
    "key": "bgnd",
    "value": "bgne",
    "key_bias": "bgk",
    "key_padding_mask": "bn",
    "segments": "bgn",
    "key_proj": "bgkd",
    "value_proj": "bgke",
    "count": "bgk",
    "grad_out": "bhme",
    "grad_key_proj": "bgkd",
    "grad_value_proj": "bgke",
}
_MATRICES = {2: "kn", 3: "gkn", 4: "bgkn"}
# Of packed sequences, whose offsets are those of all rows: heads alone are sharded.
_PACKED = {
    "query": "mhd", "key": "ngd", "value": "nge", "segments": "ng", "grad_out": "mhe",
}  # fmt: skip

# The tensors whose letters the results have, and what may be sharded.
_OPS = {
    "attention": (("grad_out", "key_proj", "value_proj"), ("b", "hg", "m")),
    "attention_backward": (("query", "key", "value", "proj_key", "proj_value", "key_bias"), ("b", "hg", "m")),
    "project": (("key_proj", "value_proj"), ("b", "hg", "n")),
    "project_backward": (("key", "value", "proj_key", "proj_value"), ("b", "hg", "n")),
    "projected_attention": (("grad_out",), ("b", "hg", "m")),
    "projected_attention_backward": (("query", "key_proj", "value_proj", "key_bias"), ("b", "hg", "m")),
    "pool": (("key_proj", "value_proj", "count"), ("b", "hg")),
    "pool_backward": (("key", "value"), ("b", "hg", "n")),
    "choose_segments": (("segments",), ("b", "hg")),
}
_WORDS = {
    "b": "the batch", "h": "heads", "g": "key heads", "m": "query rows", "n": "the sequence", "k": "rows of K'",
    "d": "the width of a head", "e": "the width of a head", "": "its only dimension",
}  # fmt: skip


def _letters(name: str, rank: int, packed: bool) -> str:
    if name in ("proj_key", "proj_value"):
        return _MATRICES[rank]
    return _PACKED.get(name, _LETTERS.get(name, "")) if packed else _LETTERS.get(name, "")


def _strategies(op: str, names: list[str], *arguments: Any) -> list[tuple[list[Any], list[Any]]]:
    """For `register_sharding`: placements of the results and of the arguments, one pair for each choice."""
    given = dict(zip(names, arguments, strict=False))
    tensors = {name: spec for name, spec in given.items() if hasattr(spec, "placements")}
    results, shardable = _OPS[op]
    packed = any(given.get(name) is not None for name in ("cu_seqlens_q", "cu_seqlens_k"))
    letters = {name: _letters(name, len(spec.shape), packed) for name, spec in tensors.items()}
    heads = {}
    for letter in "hg":
        sizes = [tensors[name].shape[own.index(letter)] for name, own in letters.items() if letter in own]
        if sizes:
            heads[letter] = max(sizes)
    if heads["g"] == 1:  # that all heads read: each device has it
        shardable = tuple(choice.replace("hg", "h" if "h" in heads else "") for choice in shardable)
    shardable = tuple(choice for choice in shardable if choice and (not packed or "h" in choice or "g" in choice))
    backward = op.endswith("_backward")
    if not backward:
        _check_placements(op, tensors, letters, heads, "".join(shardable))

    def placed(name: str, own: str, sharded: str, otherwise: Placement) -> Placement:
        for i, letter in enumerate(own):
            # Of size 1 where one matrix, or one list of segments, serves all heads.
            if letter in sharded and (name not in tensors or letter != "g" or tensors[name].shape[i] == heads["g"]):
                return Shard(i)
        return otherwise

    if not _heads_fit(heads, _over_heads(tensors, letters)):
        shardable = tuple(choice for choice in shardable if choice not in ("hg", "h", "g"))
    choices = []
    for sharded in ("", *shardable):
        summed: Placement = Partial() if sharded and (backward or op == "project") else Replicate()
        made: list[Any] = []
        for i, name in enumerate(results):
            absent = backward and (not given["needs"] >> i & 1 or given.get(name, 0) is None)
            own = "" if absent else letters.get(name) or _letters(name, 0, packed)
            made.append(placed(name, own, sharded, Replicate() if absent else summed))
        taken = [placed(name, letters[name], sharded, Replicate()) if name in tensors else None for name in names]
        choices.append((made, taken))
    return choices


def _divided(heads: dict[str, int], devices: int) -> bool:
    """Whether the queries of a key head would come to lie on several devices, without that head on each."""
    return heads["g"] not in (1, heads["h"]) and heads["g"] % devices != 0


def _over_heads(tensors: dict[str, Any], letters: dict[str, str]) -> list[int]:
    """Sizes of the dimensions of the mesh over which heads are sharded, or where a sum may be left that way."""
    mesh = next(iter(tensors.values())).mesh
    return [
        size
        for i, size in enumerate(mesh.shape)
        if any(
            spec.placements[i].is_partial()
            or (spec.placements[i].is_shard() and letters[name][spec.placements[i].dim :][:1] in ("h", "g"))
            for name, spec in tensors.items()
        )
    ]


def _heads_fit(heads: dict[str, int], mesh: Sequence[int]) -> bool:
    """Whether over all or some of these dimensions each device gets heads, and to its queries the heads they read.

    Of fewer heads than devices torch leaves all on each.
    """
    grouped = heads["g"] not in (1, heads.get("h", heads["g"]))
    number = heads.get("h", 1) if heads["g"] == 1 else heads["g"]
    for some in (some for n in range(1, len(mesh) + 1) for some in combinations(mesh, n)):
        if math.prod(some) <= number and (number % math.prod(some) if grouped else 0 in chunks(number, some)):
            return False
    return True


def chunks(number: int, mesh: Sequence[int]) -> list[int]:
    """Of so many, how many devices get: divided as torch.chunk divides, over one dimension after the other."""
    parts = [number]
    for size in mesh:
        parts = [min(-(-n // size), max(n - i * -(-n // size), 0)) for n in parts for i in range(size)]
    return parts


def _check_placements(
    op: str, tensors: dict[str, Any], letters: dict[str, str], heads: dict[str, int], shardable: str
) -> None:
    for name, spec in tensors.items():
        for placement, size in zip(spec.placements, spec.mesh.shape, strict=True):
            if not placement.is_shard():
                continue
            letter = letters[name][placement.dim] if letters[name] else ""
            if letter not in shardable or not letter:
                allowed = "".join(f"Shard({i}) or " for i, own in enumerate(letters[name]) if own in shardable)
                columns = len(spec.shape) - 1
                sequence = f". For a sequence over several devices: key and value Shard(2), {name} Shard({columns})"
                raise NotImplementedError(
                    f"{name} has placement Shard({placement.dim}), over {_WORDS[letter]}; wanted by {op}: {allowed}"
                    f"Replicate(). To fix it: use {name}.redistribute(placements=...)"
                    + (sequence if name in ("proj_key", "proj_value") and letter == "k" else "")
                )
            if letter in ("h", "g") and "h" in heads and _divided(heads, size):
                raise NotImplementedError(
                    f"{name} has placement Shard({placement.dim}), over {size} devices, and there are {heads['g']} key "
                    f"heads; wanted: a number of devices that divides them, or Replicate()"
                )


for _name in _OPS:
    for _overload in OVERLOADS if _name != "choose_segments" else ("default",):
        _op = getattr(getattr(OPS, _name), _overload)
        register_sharding(_op)(partial(_strategies, _name, [argument.name for argument in _op._schema.arguments]))


def _on(tensor: DTensor, dim: int) -> list[int]:
    """The dimensions of the mesh over which it is sharded there."""
    return [i for i, placement in enumerate(tensor.placements) if placement.is_shard(dim)]


def _over_sequence(key: DTensor, proj_key: DTensor) -> bool:
    return bool(_on(key, 2) or _on(proj_key, proj_key.dim() - 1))


def whole(tensor: DTensor) -> DTensor:
    """With the sum of what is partial."""
    placements = [Replicate() if placement.is_partial() else placement for placement in tensor.placements]
    return tensor.redistribute(placements=placements)


def check_distributed(call: Call) -> None:
    """That all tensors are DTensors, if one is."""
    tensors = {field.name: getattr(call, field.name) for field in dataclasses.fields(call)}
    tensors = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    spread = next(name for name, tensor in tensors.items() if isinstance(tensor, DTensor))
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            raise TypeError(
                f"{name} is a plain tensor but {spread} is a DTensor; wanted: all of one kind. To fix it: use "
                f"distribute_tensor({name}, mesh, placements), with [Replicate()] for what every process has whole"
            )


def _columns(name: str, matrix: Any, length: int) -> Any:
    """Those that meet the sequence, sharded as it is."""
    if matrix is None or matrix.size(-1) == length:
        return matrix
    if _on(matrix, matrix.dim() - 1):
        raise NotImplementedError(
            f"{name} has {matrix.size(-1)} columns, sharded, but the sequence has N = {length} positions, sharded; "
            "wanted: as many, so that each device has the columns of its positions. To fix it: pad the sequence, with "
            "key_padding_mask, or make the projection for this length"
        )
    return matrix[..., :length]


class _WithZeros(Function):
    """K' and V', one of which nobody may use: autograd's zeros for its gradient are no DTensor."""

    @staticmethod
    def forward(ctx: Any, key_proj: DTensor, value_proj: DTensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.made = [(rows.shape, rows.dtype, rows.device_mesh) for rows in (key_proj, value_proj)]
        return key_proj, value_proj

    @staticmethod
    def backward(ctx: Any, *grads: DTensor | None) -> Any:
        if not any(grad is not None for grad in grads):
            return grads
        return tuple(
            zeros(shape, dtype=dtype, device_mesh=mesh) if grad is None else grad
            for grad, (shape, dtype, mesh) in zip(grads, ctx.made, strict=True)
        )


def project(backend: Any, key: Any, value: Any, proj_key: Any, proj_value: Any, *rest: Any) -> Any:
    """K' and V', which are sums over the devices that have a part of the sequence, not yet added up."""
    _, cu_seqlens_k, _ = rest
    if cu_seqlens_k is None and _over_sequence(key, proj_key):
        proj_key, proj_value = (
            _columns(*one, key.size(2)) for one in (("proj_key", proj_key), ("proj_value", proj_value))
        )
    return _WithZeros.apply(*backend.project(key, value, proj_key, proj_value, *rest))


def attention(backend: Any, query: Any, key: Any, value: Any, proj_key: Any, proj_value: Any, *rest: Any) -> Any:
    """Of a sequence over several devices in two halves, between which the parts of K' and V' are added up."""
    key_bias, mask, cu_seqlens_q, cu_seqlens_k, rng_state, *numbers = rest
    if cu_seqlens_k is not None or not _over_sequence(key, proj_key):
        given = query, key, value, proj_key, proj_value, *rest[:4]
        return _with_numbers(lambda state: backend.attention(*given, state, *numbers), query, rng_state)
    parts = project(backend, key, value, proj_key, proj_value, mask, None, numbers[-1])
    key_proj, value_proj = _Sum.apply(*parts)
    out = projected_attention(backend, query, key_proj, value_proj, key_bias, cu_seqlens_q, rng_state, *numbers)
    return out, key_proj, value_proj


def projected_attention(backend: Any, query: Any, *rest: Any) -> Any:
    """With dropout numbers for the parts of the queries."""
    *given, rng_state, dropout_p, scale, allow_tf32 = rest
    numbers = dropout_p, scale, allow_tf32
    return _with_numbers(lambda state: backend.projected_attention(query, *given, state, *numbers), query, rng_state)


def _total(parts: Sequence[Tensor], mesh: DeviceMesh, placements: Sequence[Placement], size: Any) -> list[DTensor]:
    """What the devices have of rows (*size, width), as tensors of all of it without partial sums: by one all-reduce."""

    def spread(local: Tensor, placements: Sequence[Placement]) -> DTensor:
        return _spread(local, mesh, placements, (*size, local.size(-1)))

    total = whole(spread(torch.cat(list(parts), -1), placements))
    rows = total.to_local().split([part.size(-1) for part in parts], -1)
    return [spread(one.contiguous(), total.placements) for one in rows]


def _both(key_rows: DTensor, value_rows: DTensor) -> list[DTensor]:
    """K' and V', or their gradients, of what the devices have of them."""
    placements = key_rows.placements
    if value_rows.placements != placements:
        return [whole(key_rows), whole(value_rows)]
    parts = key_rows.to_local(), value_rows.to_local()
    return _total(parts, key_rows.device_mesh, placements, key_rows.shape[:-1])


class _Sum(Function):
    """K' and V' of parts of the sequence, and their gradients of parts of the queries."""

    @staticmethod
    def forward(ctx: Any, key_proj: DTensor, value_proj: DTensor) -> Any:
        return tuple(_both(key_proj, value_proj))

    @staticmethod
    def backward(ctx: Any, grad_key_proj: DTensor, grad_value_proj: DTensor) -> Any:
        return tuple(_both(grad_key_proj, grad_value_proj))


class _PoolOfParts(Function):
    """Means of a sequence over several devices: the sums and counts of each are added up, and then divided."""

    @staticmethod
    def forward(ctx: Any, overload: str, key: DTensor, value: DTensor, segments: DTensor, number: int) -> Any:
        *means, count = getattr(OPS.pool, overload)(*(x.to_local() for x in (key, value, segments)), None, number)
        count = count[..., None]
        sums = [Partial() if placement == Shard(2) else placement for placement in key.placements]
        size = (*key.shape[:2], number)
        *totals, counts = _total([mean.float() * count for mean in means] + [count], key.device_mesh, sums, size)
        key_proj, value_proj = ((total / counts.clamp(min=1)).to(key.dtype) for total in totals)
        count = counts.squeeze(-1)
        ctx.op, ctx.heads_inner = getattr(OPS.pool_backward, overload), heads_inner(key)
        ctx.save_for_backward(count, segments)
        ctx.mark_non_differentiable(count)
        return key_proj, value_proj, count

    @staticmethod
    def backward(ctx: Any, grad_key_proj: DTensor, grad_value_proj: DTensor, _: None) -> Any:
        needs = ctx.needs_input_grad[1] + 2 * ctx.needs_input_grad[2]
        grads = _both(grad_key_proj, grad_value_proj)
        of_key, of_value = ctx.op(*grads, *ctx.saved_tensors, None, ctx.heads_inner, needs)
        return None, of_key if needs & 1 else None, of_value if needs & 2 else None, None, None


def pool(backend: Any, key: Any, value: Any, segments: Any, cu_seqlens_k: Any, number: int) -> Any:
    """Of a sequence over several devices without sending its rows."""
    if cu_seqlens_k is not None or not _on(key, 2):
        *means, count = backend.pool(key, value, segments, cu_seqlens_k, number)
        return *_WithZeros.apply(*means), count
    key = whole(key)
    if 0 in chunks(key.size(1), [key.device_mesh.size(i) for i in _on(key, 1)]):  # heads for some devices only
        key = key.redistribute(placements=[Replicate() if place.is_shard(1) else place for place in key.placements])
    lists = [Replicate() if place == Shard(1) and segments.size(1) == 1 else place for place in key.placements]
    value, segments = value.redistribute(placements=key.placements), segments.redistribute(placements=lists)
    overload = "triton" if backend.name == "triton" else "default"
    *means, count = _PoolOfParts.apply(overload, key, value, segments, number)
    return *_WithZeros.apply(*means), count


def _spread(local: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int]) -> DTensor:
    """This device's part of a contiguous tensor."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, shape=torch.Size(shape), stride=stride, run_check=False)


def _gathered(local: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int]) -> Tensor:
    """What this device needs of a tensor of which dimension 2 is the sequence: all of that, its part of the others."""
    target = [Replicate() if place == Shard(2) or place.is_partial() else place for place in placements]
    return _spread(local, mesh, placements, shape).redistribute(placements=target).to_local()


def _positions(tensor: DTensor) -> Tensor:
    """Of the rows that this device has, along dimension 2: (N here,)."""
    places = [Shard(0) if place == Shard(2) else Replicate() for place in tensor.placements]
    position = torch.arange(tensor.size(2), device=tensor.device)
    return distribute_tensor(position, tensor.device_mesh, places, src_data_rank=None).to_local()


@torch.no_grad()
def choose_segments(query: Any, key: Any, key_padding_mask: Any, *numbers: int) -> DTensor:
    """Of a sequence over several devices what it is in one place, to the bit. Sent are the queries that choose, the
    mask, and a number for each key and head."""
    key, mesh = whole(key), key.device_mesh
    places = key.placements
    asking = [
        place if place == Shard(2) and of_key in (Shard(2), Replicate())
        else Replicate() if of_key == Shard(2) else of_key
        for place, of_key in zip(query.placements, places, strict=True)
    ]  # fmt: skip
    query, mask = query.redistribute(placements=asking), None
    if key_padding_mask is not None:
        batch = [place if place == Shard(0) else Replicate() for place in places]
        mask = key_padding_mask.redistribute(placements=batch).to_local()
    at, lengths = segments.sampled(mask if query.size(2) == key.size(2) else None, query.size(2), key.device)
    here = _positions(query)
    index = torch.searchsorted(here, at)
    index = torch.where(torch.nn.functional.pad(here, (0, 1), value=-1)[index] == at, index + 1, 0)
    local = torch.nn.functional.pad(query.to_local(), (0, 0, 1, 0))  # a row of zeros for those that others have
    rows = local.gather(2, index[:, None, :, None].expand(*local.shape[:2], -1, local.size(3)))
    summed = [Partial() if place == Shard(2) else place for place in asking]
    rows = _gathered(rows, mesh, summed, (*query.shape[:2], index.size(1), query.size(3)))
    own = key.to_local()
    asked = segments.sum_of_samples(rows, lengths, own.size(1))
    score = _gathered(segments.scores(own, asked[:, :, None]), mesh, places, key.shape[:3])
    rank, length = segments.ranks(mask, None, (own.size(0), key.size(2)), key.device)
    segment = segments.divided(score, rank.expand(own.size(0), -1), length, None, None, *numbers)
    return _spread(segment.index_select(2, _positions(key)), mesh, places, key.shape[:3])


def chosen_in_parts(query: Any, key: Any, key_padding_mask: Any, cu_seqlens_k: Any) -> bool:
    """Whether a device has a part of a sequence alone."""
    parts = [*_on(query, 2), *_on(key, 2), *([] if key_padding_mask is None else _on(key_padding_mask, 1))]
    return cu_seqlens_k is None and bool(parts)


def _with_numbers(call: Any, query: Any, rng_state: Any) -> Any:
    """A call of dropout numbers: each part of its result has its own; processes with the same part have the same.

    Mostly it is divided as the query is; if it was not, again with the numbers of its parts.
    """
    if rng_state is None:
        return call(None)
    made = call(_numbers(rng_state, query))
    rows = made[0] if isinstance(made, tuple) else made
    over = [[i for i, place in enumerate(one.placements) if place.is_shard()] for one in (query, rows)]
    return made if over[0] == over[1] else call(_numbers(rng_state, rows))


def _numbers(state: Any, rows: Any) -> DTensor:
    mesh, part = rows.device_mesh, 0
    for i, placement in enumerate(rows.placements):
        if placement.is_shard():
            part = part * mesh.size(i) + mesh.get_local_rank(i)
    return DTensor.from_local(state + torch.tensor([0, part], device=state.device), mesh, run_check=False)
