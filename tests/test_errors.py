"""Every mistake a user can make: the type and the very words of the error (tests/snapshots/errors.txt, rewritten with
--update-snapshots), and raw ops called with nonsense, which must raise and never touch memory that is not theirs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import linformer_kernels as lk

SNAPSHOT = Path(__file__).parent / "snapshots" / "errors.txt"
ALLOWED = (ValueError, TypeError, NotImplementedError)
R, META = torch.randn, torch.device("meta")


def attention(*, varlen=False, **changed):
    good = {"query": R(2, 4, 6, 8), "key": R(2, 2, 5, 8), "value": R(2, 2, 5, 8), "proj_key": R(3, 7)}
    if varlen:
        good = {"query": R(9, 4, 8), "key": R(9, 2, 8), "value": R(9, 2, 8), "proj_key": R(3, 7)}
        good |= {"cu_seqlens_q": torch.tensor([0, 4, 9]), "cu_seqlens_k": torch.tensor([0, 4, 9])}
    function = lk.linformer_attention_varlen if varlen else lk.linformer_attention
    return lambda: function(**good | {"proj_value": R(3, 7)} | changed)


def packed(**changed):
    return attention(varlen=True, **changed)


def project(**changed):
    good = {"key": R(2, 2, 5, 8), "value": R(2, 2, 5, 8), "proj_key": R(3, 7), "proj_value": R(3, 7)}
    return lambda: lk.project_kv(**good | changed)


def projected(**changed):
    good = {"query": R(2, 4, 6, 8), "key_proj": R(2, 2, 3, 8), "value_proj": R(2, 2, 3, 8)}
    return lambda: lk.projected_attention(**good | changed)


def pool(**changed):
    good = {"key": R(2, 2, 5, 8), "value": R(2, 2, 5, 8), "segments": cu([0, 2, 2, -1, 1]).expand(2, 5)}
    return lambda: lk.pool_kv(**good | {"num_segments": 3} | changed)


def packed_pool(**changed):
    good = {"key": R(9, 2, 8), "value": R(9, 2, 8), "segments": cu(*range(9)), "cu_seqlens_k": cu(0, 4, 9)}
    return pool(**good | {"num_segments": 9} | changed)


def pooled(**changed):
    good = {"query": R(2, 4, 6, 8), "key": R(2, 2, 5, 8), "value": R(2, 2, 5, 8), "segments": cu([0] * 5, [1] * 5)}
    return lambda: lk.pooled_attention(**good | {"num_segments": 2} | changed)


def forced(name):
    def call():
        with lk.use_backend(name):
            attention()()

    return call


def cu(*values, **options):
    return torch.tensor(values, **options)


MISTAKES = {
    "query is not a tensor": attention(query=[1.0]),
    "proj_key is None": attention(proj_key=None),
    "query has rank 3": attention(query=R(4, 6, 8)),
    "key has rank 5": attention(key=R(1, 2, 2, 5, 8)),
    "value has rank 2": attention(value=R(5, 8)),
    "proj_key has rank 1": attention(proj_key=R(7)),
    "proj_key has rank 5": attention(proj_key=R(1, 2, 2, 3, 7)),
    "proj_key of another batch": attention(proj_key=R(1, 2, 3, 7), proj_value=None),
    "proj_key of each sequence, other heads": attention(proj_key=R(2, 4, 3, 7), proj_value=None),
    "proj_key of each sequence, proj_value of all": attention(proj_key=R(2, 1, 3, 7)),
    "proj_value of another batch": attention(proj_key=R(2, 1, 3, 7), proj_value=R(1, 1, 3, 7)),
    "packed proj_key of another batch": packed(proj_key=R(9, 2, 3, 7), proj_value=None),
    "proj_value has rank 1": attention(proj_value=R(7)),
    "another batch in key": attention(key=R(3, 2, 5, 8)),
    "another batch in value": attention(value=R(3, 2, 5, 8)),
    "another D in key": attention(key=R(2, 2, 5, 9)),
    "another N in value": attention(value=R(2, 2, 6, 8)),
    "another H_kv in value": attention(value=R(2, 4, 5, 8)),
    "H not a multiple of H_kv": attention(key=R(2, 3, 5, 8), value=R(2, 3, 5, 8)),
    "H_kv is zero": attention(key=R(2, 0, 5, 8), value=R(2, 0, 5, 8)),
    "H less than H_kv": attention(query=R(2, 1, 6, 8)),
    "H_kv of proj_key": attention(proj_key=R(4, 3, 7)),
    "H_kv of proj_value": attention(proj_value=R(4, 3, 7)),
    "K differs": attention(proj_value=R(4, 7)),
    "K is zero": attention(proj_key=R(0, 7), proj_value=R(0, 7)),
    "D is zero": attention(query=R(2, 4, 6, 0), key=R(2, 2, 5, 0)),
    "N_max differs": attention(proj_value=R(3, 8)),
    "N beyond N_max": attention(proj_key=R(3, 4), proj_value=R(3, 4)),
    "integer query": attention(query=torch.ones(2, 4, 6, 8, dtype=torch.int64)),
    "integers throughout": attention(**dict.fromkeys(("query", "key", "value"), R(2, 2, 5, 8).int())),
    "complex key": attention(key=torch.ones(2, 2, 5, 8, dtype=torch.complex64)),
    "mixed types": attention(key=R(2, 2, 5, 8, dtype=torch.float64)),
    "mixed types in proj_key": attention(proj_key=R(3, 7, dtype=torch.bfloat16)),
    "mixed devices": attention(value=torch.empty(2, 2, 5, 8, device=META)),
    "mixed devices in proj_key": attention(proj_key=torch.empty(3, 7, device=META)),
    "sparse key": attention(key=R(2, 2, 5, 8).to_sparse()),
    "mask of floats": attention(key_padding_mask=torch.ones(2, 5)),
    "mask of another N": attention(key_padding_mask=torch.ones(2, 6, dtype=torch.bool)),
    "mask of rank 4": attention(key_padding_mask=torch.ones(2, 1, 1, 5, dtype=torch.bool)),
    "mask is sparse": attention(key_padding_mask=torch.ones(2, 5, dtype=torch.bool).to_sparse()),
    "mask is a list": attention(key_padding_mask=[[True]]),
    "mask on another device": attention(key_padding_mask=torch.ones(2, 5, dtype=torch.bool, device=META)),
    "key_bias of queries and rows": attention(key_bias=R(2, 2, 6, 3)),
    "key_bias of another K": attention(key_bias=R(2, 2, 7)),
    "key_bias of query heads": attention(key_bias=R(2, 4, 3)),
    "key_bias of another batch, packed": packed(key_bias=R(9, 2, 3)),
    "key_bias is a bool": attention(key_bias=torch.ones(3, dtype=torch.bool)),
    "key_bias of integers": attention(key_bias=torch.ones(3, dtype=torch.int64)),
    "key_bias is complex": attention(key_bias=torch.ones(3, dtype=torch.complex64)),
    "key_bias is a number": attention(key_bias=1.0),
    "key_bias is sparse": attention(key_bias=R(2, 2, 3).to_sparse()),
    "key_bias on another device": attention(key_bias=R(3, device=META)),
    "dropout of 1": attention(dropout_p=1.0),
    "dropout below 0": attention(dropout_p=-0.1),
    "dropout is NaN": attention(dropout_p=float("nan")),
    "dropout is a string": attention(dropout_p="0.1"),
    "scale is NaN": attention(scale=float("nan")),
    "scale is infinite": attention(scale=float("inf")),
    "scale is a string": attention(scale="1"),
    "is_causal": attention(is_causal=True),
    "is_causal, packed": packed(is_causal=True),
    "scale beyond floats": attention(scale=10**400),
    "unknown backend": attention(backend="cudnn"),
    "unknown backend in use_backend": forced("cudnn"),
    "backend is a number": attention(backend=3),
    "packed query of rank 4": packed(query=R(1, 9, 4, 8)),
    "packed proj_key too short": packed(proj_key=R(3, 4), proj_value=R(3, 4)),
    "packed H not a multiple of H_kv": packed(query=R(9, 3, 8)),
    "packed totals differ": packed(value=R(8, 2, 8)),
    "cu_seqlens is None": packed(cu_seqlens_q=None),
    "cu_seqlens is a list": packed(cu_seqlens_q=[0, 4, 9]),
    "cu_seqlens of floats": packed(cu_seqlens_q=cu(0.0, 4.0, 9.0)),
    "cu_seqlens is sparse": packed(cu_seqlens_q=cu(0, 4, 9).to_sparse()),
    "cu_seqlens is a Parameter": packed(cu_seqlens_q=torch.nn.Parameter(cu(0, 4, 10), requires_grad=False)),
    "cu_seqlens of rank 2": packed(cu_seqlens_k=cu([0, 4, 9])),
    "cu_seqlens is empty": packed(cu_seqlens_k=cu(dtype=torch.int64)),
    "cu_seqlens not from 0": packed(cu_seqlens_k=cu(1, 4, 9)),
    "cu_seqlens_q not from 0": packed(cu_seqlens_q=cu(1, 4, 9)),
    "cu_seqlens decrease": packed(cu_seqlens_k=cu(0, 10, 9)),
    "cu_seqlens_q decrease": packed(cu_seqlens_q=cu(0, 5, 4, 9), cu_seqlens_k=cu(0, 4, 5, 9)),
    "cu_seqlens past the end": packed(cu_seqlens_k=cu(0, 4, 10)),
    "cu_seqlens_q past the end": packed(cu_seqlens_q=cu(0, 4, 10)),
    "cu_seqlens before the end": packed(cu_seqlens_k=cu(0, 4, 8)),
    "cu_seqlens negative": packed(cu_seqlens_k=cu(0, -4, 9)),
    "cu_seqlens beyond 32 bits": packed(cu_seqlens_k=cu(0, 2**33, 9)),
    "cu_seqlens of different lengths": packed(cu_seqlens_q=cu(0, 9)),
    "cu_seqlens on another device": packed(cu_seqlens_q=torch.empty(3, dtype=torch.int64, device=META)),
    "project_kv: key of rank 2": project(key=R(5, 8)),
    "project_kv: another N in value": project(value=R(2, 2, 6, 8)),
    "project_kv: N beyond N_max": project(proj_key=R(3, 4), proj_value=R(3, 4)),
    "project_kv: mask and cu_seqlens": project(
        key=R(9, 2, 8), value=R(9, 2, 8), cu_seqlens_k=cu(0, 4, 9), key_padding_mask=torch.ones(2, 5, dtype=torch.bool)
    ),
    "project_kv: cu_seqlens decrease": project(key=R(9, 2, 8), value=R(9, 2, 8), cu_seqlens_k=cu(0, 6, 4, 9)),
    "projected_attention: another K": projected(value_proj=R(2, 2, 4, 8)),
    "projected_attention: K is zero": projected(key_proj=R(2, 2, 0, 8), value_proj=R(2, 2, 0, 8)),
    "projected_attention: another D": projected(key_proj=R(2, 2, 3, 9)),
    "projected_attention: H not a multiple of H_kv": projected(query=R(2, 3, 6, 8)),
    "projected_attention: another batch": projected(query=R(3, 4, 6, 8)),
    "projected_attention: cu_seqlens past the end": projected(query=R(9, 4, 8), cu_seqlens_q=cu(0, 4, 10)),
    "projected_attention: sequences differ": projected(query=R(9, 4, 8), cu_seqlens_q=cu(0, 4, 6, 9)),
    "projected_attention: key_bias of another K": projected(key_bias=R(4)),
    "project_kv: proj_key of another batch": project(proj_key=R(3, 2, 3, 7), proj_value=None),
    "pool_kv: segments of rank 1": pool(segments=cu(0, 1, 2, 0, 1)),
    "pool_kv: segments of another N": pool(segments=cu([0] * 6, [1] * 6)),
    "pool_kv: segments of query heads": pool(segments=torch.zeros(2, 4, 5, dtype=torch.int64)),
    "pool_kv: segments of another batch": pool(segments=torch.zeros(1, 5, dtype=torch.int64)),
    "pool_kv: segments, heads last": pool(segments=torch.zeros(2, 5, 2, dtype=torch.int64)),
    "pool_kv: segments is None": pool(segments=None),
    "pool_kv: segments is a list": pool(segments=[[0] * 5] * 2),
    "pool_kv: segments of floats": pool(segments=torch.zeros(2, 5)),
    "pool_kv: segments of int16": pool(segments=torch.zeros(2, 5, dtype=torch.int16)),
    "pool_kv: segments of bool": pool(segments=torch.zeros(2, 5, dtype=torch.bool)),
    "pool_kv: segments is sparse": pool(segments=torch.zeros(2, 5, dtype=torch.int64).to_sparse()),
    "pool_kv: segments on another device": pool(segments=torch.zeros(2, 5, dtype=torch.int64, device=META)),
    "pool_kv: a segment too many": pool(num_segments=2),
    "pool_kv: a segment below -1": pool(segments=cu([0, -2, 0, 0, 0]).expand(2, 5)),
    "pool_kv: a segment beyond 32 bits": pool(segments=cu([0, 2**32, 0, 0, 0]).expand(2, 5)),
    "pool_kv: num_segments is 0": pool(num_segments=0),
    "pool_kv: num_segments is negative": pool(num_segments=-3),
    "pool_kv: num_segments beyond 32 bits": pool(num_segments=2**31),
    "pool_kv: num_segments is a float": pool(num_segments=3.0),
    "pool_kv: num_segments is None": pool(num_segments=None),
    "pool_kv: another N in value": pool(value=R(2, 2, 6, 8)),
    "pool_kv: mixed types": pool(value=R(2, 2, 5, 8).half()),
    "pool_kv: integer key": pool(key=torch.ones(2, 2, 5, 8, dtype=torch.int64)),
    "pool_kv: mask of another N": pool(key_padding_mask=torch.ones(2, 6, dtype=torch.bool)),
    "pool_kv: mask of floats": pool(key_padding_mask=torch.ones(2, 5)),
    "pool_kv: packed without cu_seqlens": packed_pool(cu_seqlens_k=None),
    "pool_kv: mask and cu_seqlens": packed_pool(key_padding_mask=torch.ones(2, 5, dtype=torch.bool)),
    "pool_kv: packed segments of rank 3": packed_pool(segments=torch.zeros(1, 2, 9, dtype=torch.int64)),
    "pool_kv: packed segments, heads first": packed_pool(segments=torch.zeros(2, 9, dtype=torch.int64)),
    "pool_kv: cu_seqlens past the end": packed_pool(cu_seqlens_k=cu(0, 4, 10)),
    "pool_kv: unknown backend": pool(backend="cudnn"),
    "pooled_attention: cu_seqlens_q alone": pooled(cu_seqlens_q=cu(0, 6)),
    "pooled_attention: cu_seqlens_k alone": pooled(cu_seqlens_k=cu(0, 5)),
    "pooled_attention: another batch in query": pooled(query=R(3, 4, 6, 8)),
    "pooled_attention: another D in query": pooled(query=R(2, 4, 6, 9)),
    "pooled_attention: H not a multiple of H_kv": pooled(query=R(2, 3, 6, 8)),
    "pooled_attention: a segment too many": pooled(num_segments=1),
    "pooled_attention: query is not a tensor": pooled(query=3),
    "pooled_attention: query of another type": pooled(query=R(2, 4, 6, 8).bfloat16()),
    "pooled_attention: query has rank 3": pooled(query=R(4, 6, 8)),
    "pooled_attention: mask and cu_seqlens": lambda: lk.pooled_attention(
        R(9, 4, 8), R(9, 2, 8), R(9, 2, 8), cu(*range(9)), 9, cu_seqlens_q=cu(0, 4, 9), cu_seqlens_k=cu(0, 4, 9),
        key_padding_mask=torch.ones(2, 5, dtype=torch.bool)
    ),
    "pooled_attention: sequences differ": lambda: lk.pooled_attention(
        R(9, 4, 8), R(9, 2, 8), R(9, 2, 8), cu(*range(9)), 9, cu_seqlens_q=cu(0, 9), cu_seqlens_k=cu(0, 4, 9)
    ),
    "pooled_attention: key of another type": pooled(key=R(2, 2, 5, 8).half(), value=R(2, 2, 5, 8).half()),
    "pooled_attention: key has no heads": pooled(key=R(2, 0, 5, 8), value=R(2, 0, 5, 8)),
    "pooled_attention: dropout of 1": pooled(dropout_p=1.0),
    "pooled_attention: scale is NaN": pooled(scale=float("nan")),
}  # fmt: skip


def test_freed_memory_is_not_read():
    """As a storage that a library shrinks to nothing between forward and backward."""
    query, key, value, proj = R(2, 4, 6, 8), R(2, 2, 5, 8), R(2, 2, 5, 8), R(3, 7, requires_grad=True)
    out = lk.linformer_attention(query, key, value, proj, backend="cpu")
    for tensor, name in ((key, "key"), (proj, "proj_key")):
        tensor.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match=f"memory of {name} has been freed"):
            lk.linformer_attention(query, key, value, proj, backend="cpu")
        key = R(2, 2, 5, 8)
    with pytest.raises(RuntimeError, match="has been freed"):
        out.sum().backward()


def said_by(name: str) -> str:
    with pytest.raises(ALLOWED) as info:
        MISTAKES[name]()
    return f"{name}\n    {info.type.__name__}: {info.value}\n"


@pytest.fixture(scope="module")
def snapshot(request) -> dict[str, str]:
    if request.config.getoption("--update-snapshots"):
        SNAPSHOT.write_text("".join(map(said_by, MISTAKES)))
    entries: dict[str, str] = {}
    for line in SNAPSHOT.read_text().splitlines(keepends=True):
        if not line.startswith(" "):
            name = line.strip()
        entries[name] = entries.get(name, "") + line
    return entries


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name, snapshot):
    assert said_by(name) == snapshot[name]


def test_the_snapshot_has_no_other_entries(snapshot):
    assert list(snapshot) == list(MISTAKES)


RAW = """
import itertools, torch, linformer_kernels
ops, R, I = torch.ops.linformer_kernels, torch.randn, lambda *v: torch.tensor(v)
calls, caught = [], 0
def wrong(op, good, changes):
    for change in changes:
        calls.append((op, {**good, **change}))
state = I(1, 0)
forward = dict(query=R(2, 4, 6, 8), key=R(2, 2, 5, 8), value=R(2, 2, 5, 8), proj_key=R(3, 7), proj_value=R(3, 7),
    key_bias=None, key_padding_mask=None, cu_seqlens_q=None, cu_seqlens_k=None, rng_state=None, dropout_p=0.0,
    scale=1.0, allow_tf32=False)
big = 10**6
shapes = [dict(query=R(2, 4, 6, 9)), dict(query=R(3, 4, 6, 8)), dict(query=R(2, 3, 6, 8)), dict(query=R(4, 6, 8)),
    dict(key=R(2, 2, 5, 7)), dict(key=R(2, 2, big, 8)), dict(key=R(1, 2, 5, 8)), dict(key=R(8)),
    dict(value=R(2, 2, 4, 8)), dict(cu_seqlens_q=I(0, 6)),
    dict(value=R(2, 1, 5, 8)), dict(value=R(1, 2, 5, 8)), dict(value=R(2, 2, 5, 8).bfloat16()), dict(proj_key=R(3, 4)),
    dict(proj_key=R(3)), dict(proj_key=R(1, 3, 7)), dict(proj_key=R(7, 3).t()), dict(proj_value=R(3, 4)),
    dict(proj_value=R(4, 7)), dict(proj_value=R(5, 3, 7)), dict(key=torch.ones(2, 2, 5, 8, dtype=torch.int32)),
    dict(key_padding_mask=R(2, 4) > 9), dict(key_padding_mask=R(1, 5) > 9),
    dict(key_padding_mask=R(2, 5)), dict(key_padding_mask=R(5) > 9),
    dict(rng_state=I(1), dropout_p=0.5), dict(rng_state=None, dropout_p=0.5), dict(rng_state=R(2), dropout_p=0.5),
    dict(query=R(2, 4, 8, 6).mT), dict(key=R(2, 2, 8, 5).mT),
    dict(proj_key=R(1, 2, 3, 7), proj_value=None), dict(proj_key=R(2, 4, 3, 7), proj_value=None),
    dict(proj_key=R(2, 1, 3, 7)), dict(proj_key=R(2, 1, 3, 7), proj_value=R(2, 2, 3, 7)),
    dict(proj_key=R(2, 2, 7, 3).mT, proj_value=None), dict(proj_key=R(1, 2, 2, 3, 7), proj_value=None)]
biases = [dict(key_bias=b) for b in (R(3), R(2, 2, 4), R(1, 2, 3), R(2, 4, 3), R(2, 2, 3).double(), R(2, 2, 3).half(),
    R(2, 3, 2).mT, R(2, 2, 3, 1), R(2, 2, 3) > 0)]
wrong(ops.attention, forward, biases)
wrong(ops.attention, forward, shapes)
packed = dict(forward, query=R(9, 4, 8), key=R(9, 2, 8), value=R(9, 2, 8))
packed |= dict(cu_seqlens_q=I(0, 4, 9), cu_seqlens_k=I(0, 4, 9))
bad_cu = [I(0, 4, 10), I(0, 4, 2**40), I(-5, 4, 9), I(0, 10, 9), I(0, -3, 9), I(0, 4, 9).int(), I(0, 9), I([0, 4, 9]),
    I(0, 0, 9)]
wrong(ops.attention, packed, [{name: cu} for name in ("cu_seqlens_q", "cu_seqlens_k") for cu in bad_cu[:-1]])
wrong(ops.attention, packed, [dict(cu_seqlens_k=bad_cu[-1]), dict(cu_seqlens_q=None), dict(cu_seqlens_k=None)])
out, key_proj, value_proj = ops.attention(**forward)
backward = dict(forward, grad_out=out, key_proj=key_proj, value_proj=value_proj, needs=63)
more = [dict(grad_out=R(2, 4, 5, 8)), dict(grad_out=R(2, 4, 6, 9)), dict(grad_out=R(2, 4, 6)),
    dict(key_proj=R(2, 2, 4, 8)),
    dict(key_proj=R(2, 1, 3, 8)), dict(value_proj=R(2, 2, 3, 7)), dict(value_proj=R(3)), dict(grad_out=out.double())]
wrong(ops.attention_backward, backward, shapes + more + biases)
wrong(ops.attention_backward, dict(packed, grad_out=R(9, 4, 8), key_proj=key_proj, value_proj=value_proj, needs=63),
    [{name: cu} for name in ("cu_seqlens_q", "cu_seqlens_k") for cu in bad_cu[:-1]])
pick = lambda source, *names: {name: source[name] for name in names}
project = pick(forward, "key", "value", "proj_key", "proj_value", "key_padding_mask", "cu_seqlens_k", "allow_tf32")
usable = [s for s in shapes if set(s) <= set(project) and not {"query"} & set(s)]
usable = [s for s in usable if "key" not in s or s["key"].shape[-1] != 7]  # project alone does not care for D of key
wrong(ops.project, project, usable)
wrong(ops.project_backward, dict(project, grad_key_proj=key_proj, grad_value_proj=value_proj, needs=15),
    usable + [dict(grad_key_proj=R(2, 2, 4, 8)), dict(grad_value_proj=R(2, 1, 3, 8)), dict(grad_key_proj=R(3))])
attend = pick(backward, "query", "key_bias", "cu_seqlens_q", "rng_state", "dropout_p", "scale", "allow_tf32",
    "key_proj", "value_proj")
attended = [dict(query=R(2, 4, 6, 9)), dict(query=R(3, 4, 6, 8)), dict(query=R(2, 3, 6, 8)),
    dict(key_proj=R(2, 2, 4, 8)),
    dict(value_proj=R(2, 1, 3, 8)), dict(value_proj=R(3)), dict(rng_state=None, dropout_p=0.5)]
wrong(ops.projected_attention, attend, attended + biases)
wrong(ops.projected_attention, attend, [dict(query=R(9, 4, 8), cu_seqlens_q=cu) for cu in bad_cu[:-1]])
wrong(ops.projected_attention_backward, dict(attend, grad_out=out, needs=15), attended + more[:3] + biases)
Z = lambda *shape, dtype=torch.int32: torch.zeros(shape, dtype=dtype)
pool = dict(pick(forward, "key", "value", "cu_seqlens_k"), segments=Z(2, 1, 5), num_segments=3)
segments = [dict(segments=s) for s in (Z(2, 1, 5, dtype=torch.int64), Z(2, 5), Z(2, 1, 6), Z(1, 1, 5), Z(2, 4, 5), Z(5),
    Z(2, 0, 5), Z(2, 1, 5).float(), Z(), Z(2, 1, 1, 5), Z(2, 1, big))]
keys = [change for change in usable if "key" in change or "value" in change]
wrong(ops.pool, pool, segments + keys + [dict(num_segments=n) for n in (0, -1, -2**63, 2**31, 2**40, 2**63 - 1)])
of_packed = dict(pick(packed, "key", "value", "cu_seqlens_k"), segments=Z(9, 1), num_segments=3)
packed_segments = [dict(segments=s) for s in (Z(8, 1), Z(9), Z(9, 3), Z(1, 1, 9), Z(9, 1).long(), Z(1, 9), Z())]
wrong(ops.pool, of_packed, packed_segments + [dict(cu_seqlens_k=cu) for cu in bad_cu[:-1] if cu.tolist() != [0, 9]])
back = dict(segments=Z(2, 1, 5), cu_seqlens_k=None, grad_key_proj=key_proj, grad_value_proj=value_proj, needs=3,
    count=torch.ones(2, 2, 3), heads_inner=False)
counts = [dict(count=c) for c in (R(2, 2, 4), R(1, 2, 3), R(2, 1, 3), R(2, 2, 3).double(), R(3), R(2, 3, 2).mT, R(()))]
grads = [dict(grad_key_proj=g) for g in (R(2, 2, 4, 8), R(2, 1, 3, 8), R(3), R(2, 2, 8, 3).mT, R(2, 2, 3, 8).half())]
without = [change for change in segments if change["segments"].shape != (2, 1, 6) and change["segments"].numel() < big]
wrong(ops.pool_backward, back, without + counts + grads)
wrong(ops.pool_backward, dict(back, segments=Z(9, 1), cu_seqlens_k=I(0, 4, 9)), counts + [dict(cu_seqlens_k=cu)
    for cu in bad_cu[:-1]] + [change for change in packed_segments if len(change["segments"].shape) != 2])
for op, arguments in calls:
    try:
        op(**arguments)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        assert str(error).strip(), op
        caught += 1
    else:
        print("accepted:", op, {n: tuple(t.shape) if isinstance(t, torch.Tensor) else t for n, t in arguments.items()})
print(caught, "of", len(calls))
assert caught == len(calls)
"""


def test_packed_sequences_on_meta_are_refused_in_words():
    """They have no lengths to read; the error was PyTorch's, about a copy."""
    rows, ends = torch.empty(9, 2, 8, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
    proj = torch.empty(3, 9, device="meta")
    with pytest.raises(NotImplementedError, match=r"cu_seqlens_k is on .* wanted: padded sequences"):
        lk.linformer_attention_varlen(rows, rows, rows, proj, cu_seqlens_q=ends, cu_seqlens_k=ends)


def test_raw_ops_refuse_nonsense():
    """In a process of its own: a crash is a failure, not the end of the run."""
    environment = os.environ | {"PYTHONPATH": str(Path(lk.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", RAW], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


def test_tune_without_triton_says_that_it_is_tune():
    """It said "argument backend", which nobody had given."""
    rows = torch.randn(1, 2, 8, 4)
    with pytest.raises((RuntimeError, NotImplementedError), match=r'^tune: "triton" '):
        lk.tune(rows, rows, rows, torch.randn(3, 8))
