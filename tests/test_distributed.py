"""DTensors in one process (LocalTensorMode), modules on several (gloo): the numbers, what is sent, what is refused."""

import dataclasses

import cases
import processes
import pytest
import torch
import torch.distributed as dist
from cases import Case, Inputs

import linformer_kernels as lk
from linformer_kernels.distributed import ProjectionOfParts, fully_shard, parallelize

local_tensor = pytest.importorskip("torch.distributed._local_tensor", reason="this torch has no LocalTensorMode")
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

WORLD = 4
R, B, H, N = Replicate(), Shard(0), Shard(1), Shard(2)
# Of query, of key and value, of E and F ("own": the dimension that they have for the plan), of mask and segments,
# of a bias.
PLANS = {
    "whole": (R, R, R, R, R),
    "batch": (B, B, "own", B, B),
    "heads": (H, H, "own", "own", H),
    "sequence": (N, N, "columns", N, R),
    "sequence, E whole": (N, N, R, N, R),
    "keys": (R, N, "columns", N, R),
    "columns": (R, R, "columns", R, R),
    "queries": (N, R, R, R, R),
}
CASES = [
    Case(4, n=64, n_q=64, k=8, d=16, layout="bnhd"),
    Case(4, n=64, n_q=30, k=8, d=16, mask="random", sharing="key-value", d_v=24),
    Case(4, 8, 4, n=37, n_q=37, k=8, d=16, mask="random", bias="holes"),
    Case(5, 4, 1, n=6, n_q=7, k=8, d=16, sharing="per-sequence"),
    Case(4, n=40, n_q=40, k=8, d=16, sharing="per-head", layout="bnhd", grad="bnhd"),
    Case(4, 8, 4, n=48, n_q=48, k=8, d=16, sharing="per-sequence-head", dtype=torch.bfloat16, mask="prefix"),
    Case(4, n=48, n_q=48, k=8, d=16, pooled="random", layout="bnhd", mask="random"),
    Case(5, 8, 4, n=37, n_q=37, k=8, d=16, pooled="windows", segments_per_head=True),
]


@pytest.fixture(scope="module", autouse=True)
def group():
    dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    yield
    dist.destroy_process_group()


def placement(what: str, tensor: torch.Tensor, plan: str) -> Shard | Replicate:
    """Of a tensor under a plan."""
    query, keys, matrices, lists, bias = PLANS[plan]
    rank = tensor.dim()
    if what.startswith("cu_seqlens"):
        return R
    if what == "query":
        return query
    if what in ("key", "value", "key_bias"):
        # One head, which all queries read, is on each device.
        return R if keys == H and tensor.size(1) == 1 else bias if what == "key_bias" else keys
    if what in ("mask", "segments"):
        if lists == N:
            return Shard(rank - 1)
        return (H if rank == 3 else R) if lists == "own" else lists
    if matrices == "columns":
        return Shard(rank - 1)
    if matrices == "own" and plan == "batch":
        return B if rank == 4 else R
    if matrices == "own":
        return R if rank == 2 else Shard(rank - 3) if tensor.size(-3) != 1 else R
    return matrices


def spread_over(*plans: str, divided: bool = True):
    """For `cases.check`: the case on DTensors, one plan for each dimension of the mesh, all processes in this one;
    `divided`: the result is as the queries are."""

    def through(x: Inputs, backend: str | None) -> dict[str, torch.Tensor]:
        # Only what is created in here is of several processes.
        with local_tensor.LocalTensorMode(WORLD):
            mesh = init_device_mesh("cpu", (WORLD,) if len(plans) == 1 else (2, WORLD // 2))
            spread = object.__new__(Inputs)
            spread.__dict__ |= x.__dict__
            for name in (*cases.LEAVES, "mask", "segments", "cu_seqlens_q", "cu_seqlens_k"):
                if (tensor := getattr(x, name)) is not None:
                    places = [placement(name, tensor, plan) for plan in plans]
                    made = distribute_tensor(tensor.detach(), mesh, places)
                    setattr(spread, name, made.requires_grad_(tensor.requires_grad))
            offsets = {name: getattr(spread, name) for name in ("cu_seqlens_q", "cu_seqlens_k")}
            spread.cu_seqlens, spread.results = lambda: offsets, lambda out: out
            out = cases.run(spread, backend)
            here = list(out.placements) == [PLANS[plan][0] for plan in plans]
            assert here or not divided, "not where the queries are"
            spread.grad_out = distribute_tensor(x.grad_out.detach(), mesh, out.placements)
            return {name: full(tensor) for name, tensor in Inputs.results(spread, out).items()}

    return through


def full(tensor: DTensor) -> torch.Tensor:
    whole = tensor.full_tensor()
    return whole.reconcile() if hasattr(whole, "reconcile") else whole


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_dimension(case, plan, native):
    if "columns" in plan and case.pooled:
        pytest.skip("means have no columns")
    cases.check(case, "cpu", native, spread_over(plan))


@pytest.mark.parametrize("plans", [("batch", "sequence"), ("sequence", "heads"), ("heads", "batch")], ids=str)
@pytest.mark.parametrize("case", [CASES[2], CASES[6], CASES[7]], ids=str)
def test_two_dimensions(case, plans, native):
    cases.check(case, "cpu", native, spread_over(*plans))


ONE_HEAD = [
    Case(4, 4, 1, n=37, n_q=30, k=8, d=16, mask="random", bias="normal"),
    Case(4, 4, 1, n=37, n_q=30, k=8, d=16, pooled="random"),
]


@pytest.mark.parametrize("plans", [("sequence", "whole"), ("whole", "sequence"), ("heads", "keys")], ids=str)
@pytest.mark.parametrize("case", ONE_HEAD, ids=str)
def test_one_key_head_and_copies_of_the_sequence(case, plans, native):
    """K' and V', or gradients of the keys, of each copy were added up, as if each had had some of the heads."""
    cases.check(case, "cpu", native, spread_over(*plans))


UNEVEN = [
    (Case(1, 24, 6, n=37, n_q=30, k=8, d=16), ("heads", "heads")),
    (Case(1, 24, 6, n=37, n_q=30, k=8, d=16, bias="normal", sharing="per-head"), ("heads", "heads")),
    (Case(1, 6, 6, n=37, n_q=30, k=8, d=16), ("heads",)),
    (Case(1, 6, 1, n=37, n_q=30, k=8, d=16), ("heads",)),
    (Case(1, 6, 6, n=37, n_q=30, k=8, d=16, pooled="random"), ("heads",)),
    (Case(2, 1, 1, n=37, n_q=30, k=8, d=16, pooled="random"), ("heads", "sequence")),
]


@pytest.mark.parametrize("case, plans", UNEVEN, ids=str)
def test_heads_that_the_devices_cannot_divide(case, plans, native):
    """Two dimensions, each of which divides 6 key heads, gave queries the keys of others; devices without a head ended
    in an error of the kernels."""
    cases.check(case, "cpu", native, spread_over(*plans, divided=False))


@pytest.mark.parametrize("plan", ["batch", "sequence"])
def test_means_by_pytorchs_own_parts(plan, native):
    """ "composed" met them with plain tensors, in an error of torch's."""
    case = CASES[6]
    with lk.use_backend("composed"), pytest.raises(NotImplementedError, match=r'refuses this call.*use "reference"'):
        spread_over(plan)(Inputs(case, "cpu"), "composed")
    cases.check(case, "cpu", "reference", spread_over(plan))


def test_dropout_of_the_reference_is_refused():
    """In words, and not in an error of torch's about tensors of two kinds."""
    mesh = init_device_mesh("cpu", (WORLD,))
    rows, proj = (distribute_tensor(torch.randn(shape), mesh, [R]) for shape in ((2, 4, 6, 8), (3, 6)))
    with pytest.raises(NotImplementedError, match=r'dropout_p is 0\.5.*"reference" .* DTensors; wanted: 0'):
        lk.linformer_attention(rows, rows, rows, proj, dropout_p=0.5, backend="reference")


PACKED = [
    Case(heads=8, k=8, d=16, lengths=(9, 0, 20), lengths_q=(3, 7, 5), bias="normal", sharing="per-head"),
    Case(heads=8, k=8, d=16, lengths=(9, 0, 20), pooled="random"),
]


@pytest.mark.parametrize("plan", ["whole", "heads"])
@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed(case, plan, native):
    cases.check(case, "cpu", native, spread_over(plan))


def test_columns_beyond_the_sequence(native):
    """E serves shorter sequences; each device takes the columns of its positions, and no others."""
    cases.check(dataclasses.replace(CASES[1], extra=7), "cpu", native, spread_over("sequence, E whole"))


@pytest.mark.parametrize("place", [B, N], ids=str)
@pytest.mark.parametrize("half", [0, 1])
def test_one_half_alone_has_a_gradient(half, place):
    """Autograd gives zeros for the other, as a plain tensor, which DTensor does not take."""
    x, segments = Inputs(CASES[0], "cpu"), torch.randint(0, 8, (4, 64))

    def grads(key, value, proj, segments, backend=None):
        projected = lk.project_kv(key, value, proj, backend=backend)[half].sum()
        pooled = lk.pool_kv(key, value, segments, 8, backend=backend)[half].square().sum()
        return [torch.autograd.grad(one, (key, value)[half])[0] for one in (projected, pooled)]

    leaves = lambda dtype: (t.detach().to(dtype).requires_grad_() for t in (x.key, x.value, x.proj_key))  # noqa: E731
    exact, plain = (grads(*leaves(dtype), segments, "reference") for dtype in (torch.float64, torch.float32))
    with local_tensor.LocalTensorMode(WORLD):
        mesh = init_device_mesh("cpu", (WORLD,))
        rows = [distribute_tensor(t.detach(), mesh, [place]).requires_grad_() for t in (x.key, x.value)]
        proj = distribute_tensor(x.proj_key.detach(), mesh, [Shard(1) if place == N else R])
        made = grads(*rows, proj, distribute_tensor(segments, mesh, [Shard(1) if place == N else B]))
        assert all(one.placements == (place,) for one in made)
        made = [full(one) for one in made]
    for got, want, usual in zip(made, exact, plain, strict=True):
        cases.oracle.assert_close(got, cases.as_array(want), usual, "gradient")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length, length_q", [(26, 26), (5, 5), (26, 9), (64, 0)])
@pytest.mark.parametrize(
    "places", [(N, N), (R, N), (N, R), ((B, N), (B, N)), ((N, H), (N, H)), ((N, N), (N, N))], ids=str
)
def test_segments_are_chosen_as_in_one_place(places, length, length_q, masked):
    """To the last bit, with scores that are equal among them."""
    rows = [torch.randint(-2, 3, (4, heads, n, 8)).float() for heads, n in ((8, length_q), (4, length))]
    rows[0][0] = torch.randn(8, length_q, 8)
    mask = torch.rand(4, length) < 0.7 if masked else None
    adaptive = lk.LinformerProjection(None, 6, kind="adaptive", keep=(1, 1))
    want = adaptive.segments(*rows, rows[1], mask)
    with local_tensor.LocalTensorMode(WORLD):
        on, of = (place if isinstance(place, tuple) else (place,) for place in places)
        mesh = init_device_mesh("cpu", (2, 2) if len(on) == 2 else (WORLD,))
        query, key = (distribute_tensor(t, mesh, place) for t, place in zip(rows, (on, of), strict=True))
        of_mask = [Shard(1) if place == N else B if place == B else R for place in of]
        spread = None if mask is None else distribute_tensor(mask, mesh, of_mask)
        got = adaptive.segments(query, key, key, spread)
        assert got.placements == key.placements
        got = full(got)
    assert torch.equal(got, want)


def refused_calls(mesh):
    r = lambda *shape: torch.randn(shape)  # noqa: E731
    d = lambda t, place: distribute_tensor(t, mesh, [place])  # noqa: E731
    q, kv, e = r(4, 8, 16, 8), r(4, 8, 16, 8), r(6, 16)
    adaptive = lk.LinformerProjection(None, 6, kind="adaptive")
    attend = lk.linformer_attention
    yield (
        r"proj_key has placement Shard\(0\), over rows of K'; wanted by project: Shard\(1\) or Replicate\(\).*"
        r"key and value Shard\(2\), proj_key Shard\(1\)",
        lambda: attend(d(q, N), d(kv, N), d(kv, N), d(e, Shard(0))),
    )
    yield (
        r"proj_key has placement Shard\(0\), over rows of K'; wanted by attention: Replicate\(\)",
        lambda: attend(d(q, B), d(kv, B), d(kv, B), d(e, Shard(0))),
    )
    yield (
        r"query has placement Shard\(3\), over the width of a head; wanted by attention: Shard\(0\) or Shard\(1\)",
        lambda: attend(d(q, Shard(3)), d(kv, R), d(kv, R), d(e, R)),
    )
    yield (
        r"query has placement Shard\(1\), over 4 devices, and there are 2 key heads; wanted: .* divides",
        lambda: attend(d(q, H), d(kv[:, :2], H), d(kv[:, :2], H), d(e, R)),
    )
    yield (
        r"proj_key has 32 columns, sharded, but the sequence has N = 16 .*pad the sequence",
        lambda: attend(d(q, N), d(kv, N), d(kv, N), d(r(6, 32), Shard(1))),
    )
    yield (
        r"proj_key is a plain tensor but query is a DTensor; wanted: all of one kind.*Replicate\(\)",
        lambda: attend(d(q, B), d(kv, B), d(kv, B), e),
    )
    yield (
        r"key has placement Shard\(3\), over the width of a head; wanted by choose_segments: Shard\(0\) or Shard\(1\)",
        lambda: adaptive(d(kv, Shard(3)), d(kv, R), query=d(q, R)),
    )


@pytest.mark.parametrize("number", range(7))
def test_placements_that_are_refused(number):
    with local_tensor.LocalTensorMode(WORLD):
        says, call = list(refused_calls(init_device_mesh("cpu", (WORLD,))))[number]
        with pytest.raises((NotImplementedError, TypeError), match=says):
            call()


def encoder(**options) -> lk.LinformerEncoder:
    options = {"num_layers": 2, "batch_first": True, "seq_len": 26, "proj_dim": 6} | options
    return lk.LinformerEncoder(32, 4, 48, 0.0, **options)


def test_modules_that_are_not_spread():
    mesh = init_device_mesh("cpu", (WORLD,))
    several = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    for error, says, spread in (
        (ValueError, "plan is 'rows'; wanted: one of heads, sequence", lambda: parallelize(encoder(), mesh, "rows")),
        (ValueError, "mesh has 2 dimensions; wanted: one", lambda: parallelize(encoder(), several, "heads")),
        (ValueError, "without a LinformerAttention", lambda: parallelize(torch.nn.Linear(3, 3), mesh, "heads")),
        (
            ValueError,
            "layers.0.self_attn has num_kv_heads = 2 and the mesh 4 devices; wanted .* divides",
            lambda: parallelize(encoder(num_kv_heads=2), mesh, "heads"),
        ),
        (
            NotImplementedError,
            "layers.0.self_attn.projection has an E for each of 4 heads",
            lambda: parallelize(encoder(sharing="none"), mesh, "heads"),
        ),
        (
            NotImplementedError,
            'projection has kind "mean"; wanted with plan="sequence"',
            lambda: parallelize(
                encoder(proj_dim=None, seq_len=None, projection=lk.LinformerProjection(26, 6, kind="mean")),
                mesh,
                "sequence",
            ),
        ),
        (TypeError, "module is a function; wanted: a torch.nn.Module", lambda: parallelize(close, mesh, "heads")),
        (
            TypeError,
            "mesh is a ProcessGroup; wanted: a DeviceMesh",
            lambda: parallelize(encoder(), dist.group.WORLD, "heads"),
        ),
        (TypeError, "came for a Linear", lambda: ProjectionOfParts()._apply(torch.nn.Linear(3, 3), mesh)),
    ):
        with pytest.raises(error, match=says):
            spread()


@pytest.mark.parametrize("options", [{}, {"kind": "adaptive"}], ids=str)
@pytest.mark.parametrize("plan", ["heads", "sequence"])
def test_a_module_is_spread_once(plan, options):
    """Twice gradients were added up twice; "sequence" took it, and its calls asked for another length."""
    mesh = init_device_mesh("cpu", (WORLD,))
    if options:
        options = {"projection": lk.LinformerProjection(None, 6, **options), "seq_len": None, "proj_dim": None}
    spread = parallelize(encoder(**options), mesh, plan)
    for module in (spread, torch.nn.ModuleList([torch.nn.Linear(3, 3), spread.layers[1]])):
        with pytest.raises(ValueError, match=r"(self_attn|projection).* is on several devices already; wanted"):
            parallelize(module, mesh, plan)


def test_parts_that_are_refused():
    spread = parallelize(encoder(), init_device_mesh("cpu", (WORLD,)), "sequence")
    with pytest.raises(ValueError, match="key has 6 rows on this process, whose columns of E are 7 of 26; wanted: as"):
        spread(torch.randn(2, 6, 32))
    padding = torch.zeros(2, 7, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match=r"key_padding_mask came.*from_first=False"):
        spread(torch.randn(2, 7, 32), src_key_padding_mask=padding)
    nested = torch.nested.nested_tensor([torch.randn(7, 32), torch.randn(5, 32)])
    with pytest.raises(NotImplementedError, match="key is packed or nested"):
        spread(nested)


# What each of several processes does.


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Of float32: sums in another order."""
    got = got.full_tensor() if isinstance(got, DTensor) else got
    assert (got - want).norm() <= 1e-5 * want.norm(), (got - want).norm() / want.norm()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    made = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return made


def modules(mesh):
    """Outputs and all gradients as those of one process."""
    here = lambda t: t.chunk(mesh.size(), 1)[mesh.get_local_rank()]  # noqa: E731
    projection = {"seq_len": None, "proj_dim": None, "projection": lk.LinformerProjection(26, 6, from_first=False)}
    padding = torch.arange(26) >= torch.tensor([[26], [11]])
    adaptive = {"seq_len": None, "proj_dim": None}
    adaptive["projection"] = lk.LinformerProjection(None, 6, kind="adaptive", keep=(1, 0))
    holes = torch.rand(2, 26) < 0.3
    for options, mask in (
        ({"sharing": "layerwise"}, None),
        ({"sharing": "headwise", "batch_first": False}, None),
        ({"sharing": "key_value", "norm_first": True, "gradient_checkpointing": True}, None),
        (projection, padding),
        (adaptive, None),
        (adaptive, holes),
    ):
        for plan in ("heads", "sequence"):
            model = encoder(**options)
            if options is projection:
                model.projection.reset_parameters()
            swap = (lambda t: t) if model.layers[0].self_attn.batch_first else (lambda t: t.transpose(0, 1))
            part = here if plan == "sequence" else (lambda t: t)
            x, grad = torch.randn(2, 26, 32, requires_grad=True), torch.randn(2, 26, 32)
            want = swap(model(swap(x), src_key_padding_mask=mask))
            (want * grad).sum().backward()
            of_input, of_weights = x.grad, gradients(model)
            frozen = options.get("sharing") == "headwise"  # and trained later: gradients were those of a process
            model.requires_grad_(not frozen)
            parallelize(model, mesh, plan)
            model.requires_grad_(True)
            for _ in range(2):  # gradients that are added to others
                x.grad = None
                out = swap(model(swap(part(x)), src_key_padding_mask=None if mask is None else part(mask)))
                close(out, part(want))
                (out * part(grad)).sum().backward()
                close(part(x.grad), part(of_input))
            for name, twice in gradients(model).items():
                if options is not adaptive or not name.endswith("k_proj.bias"):  # it moves all scores of a row alike
                    close(twice, 2 * of_weights[name])
            if options is projection:  # for the next plan
                options["projection"] = lk.LinformerProjection(26, 6, from_first=False)
            if options is adaptive:
                options["projection"] = lk.LinformerProjection(None, 6, kind="adaptive", keep=(1, 0))
    with pytest.raises(ValueError, match=r"the processes have 6, 7\S* .*positions of a sequence; wanted: its parts as"):
        model(torch.randn(2, 6 + mesh.get_local_rank(), 32))


def shards(mesh):
    """FSDP2 in one call."""
    shared = lk.LinformerProjection(26, 6)
    layers = [lk.LinformerEncoderLayer(32, 4, 48, 0.0, batch_first=True, projection=shared) for _ in range(2)]
    for model in (encoder(sharing="layerwise"), encoder(), torch.nn.Sequential(*layers), layers[0]):
        x, grad = torch.randn(2, 26, 32), torch.randn(2, 26, 32)
        want = model(x)
        (want * grad).sum().backward()
        of_weights = gradients(model)
        if model is layers[0]:  # is sharded already
            break
        fully_shard(model, mesh=mesh)
        out = model(x)
        close(out, want)
        (out * grad).sum().backward()
        for name, got in gradients(model).items():
            close(got, of_weights[name])


def drops(mesh):
    """Processes with other parts of the queries drop other elements, those with the same ones the same."""
    q, e = torch.randn(1, 1, 1, 8).expand(1, 1, 8 * mesh.size(), 8), torch.randn(16, 8 * mesh.size())
    for place in (N, R):
        spread = [distribute_tensor(t, mesh, [p]).requires_grad_() for t, p in ((q, place), (q, R), (q, R), (e, R))]
        out = lk.linformer_attention(*spread, dropout_p=0.5)
        out.sum().backward()
        local = out.to_local().detach().contiguous()
        others = [torch.empty_like(local) for _ in range(mesh.size())]
        dist.all_gather(others, local)
        assert all(torch.equal(other, local) for other in others) == (place == R)
        # Linear in the values: the same elements are dropped backward.
        close((spread[2].grad.full_tensor() * q).sum(), out.detach().full_tensor().sum())
    # Where the result is not divided as the queries are: it had numbers of theirs, alike on parts of it, and other ones
    # on each copy.
    few, more = (torch.randn(1, 1, 1, 8).expand(size, size, 8 * mesh.size(), 8) for size in (1, mesh.size()))
    for query, keys, places in (
        (more, more, (R, B, R)),
        (more, more, (R, H, R)),
        (few, few, (B, B, R)),
        (few, few, (H, R, R)),
        (few[:, :, :1], few, (N, N, Shard(1))),
    ):
        q, k, proj = (distribute_tensor(t, mesh, [p]) for t, p in zip((query, keys, e), places, strict=True))
        projected = lk.project_kv(k, k, proj)
        outs = [lk.linformer_attention(q, k, k, proj, dropout_p=0.5)]
        outs.append(lk.projected_attention(q, *projected, dropout_p=0.5))
        for out in outs:
            others = [torch.empty_like(out.to_local()).contiguous() for _ in range(mesh.size())]
            dist.all_gather(others, out.to_local().contiguous())
            assert all(torch.equal(other, others[0]) for other in others[1:]) == (out.placements == (R,)), places


def sent(mesh):
    """Numbers that the process group was given, forward and backward, whatever the length."""
    for length in (4096, 65536):
        tensors = [*torch.randn(3, 2, 2, length, 16), torch.randn(8, length)]
        places = N, N, N, Shard(1)
        q, k, v, e = (distribute_tensor(t, mesh, [p]).requires_grad_() for t, p in zip(tensors, places, strict=True))
        segments = distribute_tensor(torch.randint(0, 8, (2, length)), mesh, [Shard(1)])
        for call, numbers in (
            (lambda: lk.linformer_attention(q, k, v, e), 2 * (2 * 2 * 2 * 8 * 16)),  # noqa: B023
            (lambda: lk.pooled_attention(q, k, v, segments, 8), 2 * (2 * 2 * 2 * 8 * 16) + 2 * 2 * 8),  # noqa: B023
        ):
            with torch.profiler.profile(record_shapes=True) as profile:
                call().sum().backward()
            shapes = [event.input_shapes[0] for event in profile.events() if event.name.startswith("gloo:")]
            assert len(shapes) == 2 and sum(map(torch.Size.numel, map(torch.Size, shapes))) == numbers, shapes


def worker(rank: int, world: int, what: str, where: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://" + where, rank=rank, world_size=world)
    torch.manual_seed(0)
    globals()[what](dist.init_device_mesh("cpu", (world,)))
    processes.leave()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("what", ["modules", "shards", "drops", "sent"])
def test_on_several_processes(what, world, tmp_path):
    code = (
        "import sys, torch, test_distributed as t\n"
        "if __name__ == '__main__': torch.multiprocessing.spawn(t.worker, (int(sys.argv[1]), *sys.argv[2:]), "
        "int(sys.argv[1]))\n"
    )
    (tmp_path / "run.py").write_text(code)
    processes.start(tmp_path / "run.py", world, what, tmp_path / "rendezvous")
