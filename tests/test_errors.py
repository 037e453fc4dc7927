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
    "proj_key has rank 4": attention(proj_key=R(1, 2, 3, 7)),
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
    key_padding_mask=None, cu_seqlens_q=None, cu_seqlens_k=None, rng_state=None, dropout_p=0.0, scale=1.0,
    allow_tf32=False)
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
    dict(query=R(2, 4, 8, 6).mT), dict(key=R(2, 2, 8, 5).mT)]
wrong(ops.attention, forward, shapes)
packed = dict(forward, query=R(9, 4, 8), key=R(9, 2, 8), value=R(9, 2, 8))
packed |= dict(cu_seqlens_q=I(0, 4, 9), cu_seqlens_k=I(0, 4, 9))
bad_cu = [I(0, 4, 10), I(0, 4, 2**40), I(-5, 4, 9), I(0, 10, 9), I(0, -3, 9), I(0, 4, 9).int(), I(0, 9), I([0, 4, 9]),
    I(0, 0, 9)]
wrong(ops.attention, packed, [{name: cu} for name in ("cu_seqlens_q", "cu_seqlens_k") for cu in bad_cu[:-1]])
wrong(ops.attention, packed, [dict(cu_seqlens_k=bad_cu[-1]), dict(cu_seqlens_q=None), dict(cu_seqlens_k=None)])
out, key_proj, value_proj = ops.attention(**forward)
backward = dict(forward, grad_out=out, key_proj=key_proj, value_proj=value_proj, needs=31)
more = [dict(grad_out=R(2, 4, 5, 8)), dict(grad_out=R(2, 4, 6, 9)), dict(grad_out=R(2, 4, 6)),
    dict(key_proj=R(2, 2, 4, 8)),
    dict(key_proj=R(2, 1, 3, 8)), dict(value_proj=R(2, 2, 3, 7)), dict(value_proj=R(3)), dict(grad_out=out.double())]
wrong(ops.attention_backward, backward, shapes + more)
wrong(ops.attention_backward, dict(packed, grad_out=R(9, 4, 8), key_proj=key_proj, value_proj=value_proj, needs=31),
    [{name: cu} for name in ("cu_seqlens_q", "cu_seqlens_k") for cu in bad_cu[:-1]])
pick = lambda source, *names: {name: source[name] for name in names}
project = pick(forward, "key", "value", "proj_key", "proj_value", "key_padding_mask", "cu_seqlens_k", "allow_tf32")
usable = [s for s in shapes if set(s) <= set(project) and not {"query"} & set(s)]
usable = [s for s in usable if "key" not in s or s["key"].shape[-1] != 7]  # project alone does not care for D of key
wrong(ops.project, project, usable)
wrong(ops.project_backward, dict(project, grad_key_proj=key_proj, grad_value_proj=value_proj, needs=15),
    usable + [dict(grad_key_proj=R(2, 2, 4, 8)), dict(grad_value_proj=R(2, 1, 3, 8)), dict(grad_key_proj=R(3))])
attend = pick(backward, "query", "cu_seqlens_q", "rng_state", "dropout_p", "scale", "allow_tf32", "key_proj",
    "value_proj")
attended = [dict(query=R(2, 4, 6, 9)), dict(query=R(3, 4, 6, 8)), dict(query=R(2, 3, 6, 8)),
    dict(key_proj=R(2, 2, 4, 8)),
    dict(value_proj=R(2, 1, 3, 8)), dict(value_proj=R(3)), dict(rng_state=None, dropout_p=0.5)]
wrong(ops.projected_attention, attend, attended + [dict(query=R(9, 4, 8), cu_seqlens_q=cu) for cu in bad_cu[:-1]])
wrong(ops.projected_attention_backward, dict(attend, grad_out=out, needs=7), attended + more[:3])
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


def test_raw_ops_refuse_nonsense():
    """In a process of its own: a crash is a failure, not the end of the run."""
    environment = os.environ | {"PYTHONPATH": str(Path(lk.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", RAW], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
