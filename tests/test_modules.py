"""The modules against their formulas written out by hand, and against the contract of those of torch.nn."""

import copy
import functools
import itertools

import oracle
import pytest
import torch
from torch import nn

import linformer_kernels as lk
from linformer_kernels import (
    LinformerAttention,
    LinformerEncoder,
    LinformerEncoderLayer,
    LinformerProjection,
    from_torch,
)

KINDS = ("learned", "fixed", "mean", "max", "conv")
X = torch.ones(2, 4, 32)


def attention(**options):
    sizes = {} if "projection" in options else dict(seq_len=50, proj_dim=7)
    return LinformerAttention(32, 4, **(dict(batch_first=True) | sizes | options))


def encoder_layer(**options):
    sizes = dict(dim_feedforward=48, dropout=0.0, batch_first=True, seq_len=50, proj_dim=7)
    return LinformerEncoderLayer(32, 4, **(sizes | options))


def encoder(**options):
    sizes = dict(dim_feedforward=48, dropout=0.0, batch_first=True, seq_len=50, proj_dim=7, num_layers=2)
    return LinformerEncoder(32, 4, **(sizes | options))


def of_projection(kind):
    return attention(projection=LinformerProjection(50, 7, kind=kind, **({"head_dim": 8} if kind == "conv" else {})))


def rows_of_k_proj(module, x):
    """How many rows of a sequence k_proj is called with. Seen without a hook, which would change it."""
    seen, call = [], nn.functional.linear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "linear", lambda x, w, b=None: seen.append((w, x.shape)) or call(x, w, b))
        module(x)
    return next(shape[1] for weight, shape in seen if weight is module.k_proj.weight)


def windows(seq_len: int, proj_dim: int) -> list[slice]:
    edges = [k * seq_len // proj_dim for k in range(proj_dim + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def projected_by_hand(projection, rows, weight, mask):
    """(B, H, K, D) of rows (B, H, N, D), window by window, head by head. Sequences start at position 0."""
    batch, heads, n, d = rows.shape
    kept = torch.where(mask[:, None, :, None], rows, 0)
    if projection.kind in ("learned", "fixed"):
        matrix = weight if weight.dim() == 3 else weight.expand(heads, -1, -1)
        return torch.einsum("hkn,bhnd->bhkd", matrix[..., :n], kept)
    out = torch.zeros(batch, heads, projection.proj_dim, d, dtype=rows.dtype, device=rows.device)
    for k, window in enumerate(windows(projection.seq_len, projection.proj_dim)):
        part = kept[:, :, window]
        if projection.kind == "mean":
            out[:, :, k] = part.sum(2) / (window.stop - window.start)
        elif projection.kind == "conv":
            taps = weight if weight.dim() == 3 else weight.expand(heads, -1, -1)
            out[:, :, k] = torch.einsum("bhwd,hdw->bhd", part, taps[..., : part.shape[2]])
        elif part.shape[2]:
            least = torch.where(mask[:, None, window, None], part, -torch.inf).amax(2)
            out[:, :, k] = torch.where(mask[:, window].any(1)[:, None, None], least, 0)
    return out


def attention_by_hand(module, query, key, value, mask):
    """The layer as in the paper: linear layers on all N rows, then the projection, then softmax. Sequences start at the
    first position that takes part; rows that stand for windows without one have no part in the softmax."""
    heads = lambda x, h: x.unflatten(-1, (h, -1)).transpose(1, 2)  # noqa: E731
    batch, n = key.shape[:2]
    mask = torch.ones(batch, n, dtype=torch.bool, device=key.device) if mask is None else mask
    first = mask.int().argmax(1).tolist()
    turned = lambda x: torch.stack([row.roll(-start, 0) for row, start in zip(x, first, strict=True)])  # noqa: E731
    key, value, mask, projection = turned(key), turned(value), turned(mask), module.projection
    q = heads(module.q_proj(query), module.num_heads)
    k, v = heads(module.k_proj(key), module.num_kv_heads), heads(module.v_proj(value), module.num_kv_heads)
    e, f = projection.proj_key, projection.proj_value
    k = projected_by_hand(projection, k, e, mask)
    v = projected_by_hand(projection, v, e if f is None else f, mask)
    k, v = (x.repeat_interleave(module.num_heads // module.num_kv_heads, 1) for x in (k, v))
    scores = q @ k.mT / module.head_dim**0.5
    if projection.kind in ("mean", "max", "conv") or projection.init != "gaussian":
        reached = [mask[:, window].any(1) for window in windows(projection.seq_len, projection.proj_dim)]
        reached = torch.stack(reached, 1)
        reached = reached | ~reached.any(1, keepdim=True)  # where all are out, V' is zero
        scores = scores.masked_fill(~reached[:, None, None], -torch.inf)
    return module.out_proj((torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2))


def randomized(module: nn.Module) -> nn.Module:
    for name, parameter in module.named_parameters():
        if "bias" in name:  # they start as zero
            nn.init.normal_(parameter)
    return module


def compare(module, by_hand, inputs, options):
    """Module and formula: output, gradients of inputs and parameters.

    The gradients of biases count as one tensor: that of k_proj can be zero, as it moves all scores of a row alike.
    """

    def results(function, model, *xs):
        xs = [x.detach().requires_grad_() for x in xs]
        out = function(model, *xs)
        grad_out = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
        names, parameters = zip(*model.named_parameters(), strict=True)
        grads = torch.autograd.grad(out, [*xs, *parameters], grad_out)
        found = {"out": out} | dict(zip(["query", "key", "value"][: len(xs)] + list(names), grads, strict=True))
        biases = [found.pop(name).flatten() for name in names if name.endswith("bias")]
        return found | ({"biases": torch.cat(biases)} if biases else {})

    def call(m, *xs):
        out = m(*xs, **options)
        return out[0] if isinstance(out, tuple) else out

    got = results(call, module, *inputs)
    oracle.assert_module_close(got, functools.partial(results, by_hand), module, *inputs)


OWN = [dict(sharing=sharing, seq_len=50, proj_dim=k) for sharing in ("headwise", "key_value", "none") for k in (7, 40)]
SHARED = [dict(kind=kind, seq_len=50, proj_dim=7) for kind in ("learned", "fixed", "mean", "max")]
SHARED += [dict(kind=kind, seq_len=50, proj_dim=7, num_heads=2) for kind in ("learned", "fixed")]
SHARED += [dict(kind="learned", seq_len=50, proj_dim=7, num_heads=2, share_kv=True)]
SHARED += [dict(kind="learned", seq_len=50, proj_dim=7, init=init) for init in ("mean", "identity")]
SHARED += [dict(kind="conv", seq_len=50, proj_dim=7, head_dim=8)]
SHARED += [dict(kind="conv", seq_len=50, proj_dim=7, head_dim=8, num_heads=2, share_kv=True)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", OWN + SHARED, ids=lambda o: "-".join(map(str, o.values())))
def test_attention_is_the_formula(options, masked, bias, device):
    """Whichever of the two orders it takes; N < seq_len, grouped heads, other widths of key and value."""
    if "kind" in options:
        options = {"projection": LinformerProjection(**options)}
    options = options | dict(bias=bias, kdim=20, vdim=28, num_kv_heads=2, batch_first=True)
    module = LinformerAttention(32, 4, **options).to(device)
    inputs = [torch.randn(3, n, width, device=device) for n, width in ((9, 32), (43, 20), (43, 28))]
    mask = torch.rand(3, 43, device=device) < 0.6 if masked else None
    if masked:
        mask[0] = False
    hand = lambda m, *xs: attention_by_hand(m, *xs, mask)  # noqa: E731
    compare(randomized(module), hand, inputs, {"key_padding_mask": None if mask is None else ~mask})


def test_heads_of_a_width_of_their_own(device):
    """Of which embed_dim is no multiple."""
    sizes = dict(seq_len=50, proj_dim=7, head_dim=12, num_kv_heads=2)
    module = LinformerAttention(30, 4, batch_first=True, **sizes).to(device)
    assert module.q_proj.weight.shape == (48, 30) and module.out_proj.weight.shape == (30, 48)
    hand = lambda m, x: attention_by_hand(m, *[x] * 3, None)  # noqa: E731
    compare(randomized(module), hand, [torch.randn(2, 43, 30, device=device)], {})


@pytest.mark.parametrize("sharing", ["headwise", "key_value"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention_and_compress_first(sharing, batch_first, device):
    """One tensor for query, key and value; and the layer does compress first where that is cheaper."""
    module = attention(sharing=sharing, batch_first=batch_first).to(device)
    assert rows_of_k_proj(module, torch.randn(2, 43, 32, device=device)) == 7
    assert rows_of_k_proj(attention(sharing="none").to(device), torch.randn(2, 43, 32, device=device)) == 43
    turn = (lambda x: x) if batch_first else (lambda x: x.transpose(0, 1))
    hand = lambda m, x: turn(attention_by_hand(m, *[turn(x)] * 3, None))  # noqa: E731
    compare(randomized(module), hand, [torch.randn(*((2, 43) if batch_first else (43, 2)), 32, device=device)], {})


@pytest.mark.parametrize("sharing", ["headwise", "key_value", "none"])
def test_a_nan_behind_the_mask_stays_there(sharing, device):
    module = attention(sharing=sharing).to(device)
    rows = torch.randn(2, 43, 32, device=device)
    mask = torch.rand(2, 43, device=device) < 0.4
    query = torch.randn(2, 5, 32, device=device)
    clean = module(query, rows, rows, mask)[0]
    poisoned = rows.masked_fill(mask[..., None], torch.nan)
    poisoned = module(query, poisoned, poisoned, mask)[0]
    assert torch.equal(clean, poisoned) and clean.isfinite().all()


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder_layer_is_the_composition(norm_first, activation, device):
    layer = encoder_layer(activation=activation, norm_first=norm_first).to(device)
    mask = torch.rand(2, 43, device=device) < 0.6

    def by_hand(m, x):
        attend = lambda y: attention_by_hand(m.self_attn, y, y, y, mask)  # noqa: E731
        feed = lambda y: m.linear2(getattr(nn.functional, activation)(m.linear1(y)))  # noqa: E731
        if norm_first:
            x = x + attend(m.norm1(x))
            return x + feed(m.norm2(x))
        x = m.norm1(x + attend(x))
        return m.norm2(x + feed(x))

    compare(randomized(layer), by_hand, [torch.randn(2, 43, 32, device=device)], {"src_key_padding_mask": ~mask})


class Adapter(nn.Module):
    """What stands in for a linear layer in LoRA: its weight is still there to be read."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.more = linear, nn.Linear(linear.in_features, linear.out_features)

    weight, bias = property(lambda self: self.linear.weight), property(lambda self: self.linear.bias)

    def forward(self, x):
        return self.linear(x) + self.more(x)


@pytest.mark.parametrize("name", ["k_proj", "v_proj"])
def test_an_adapter_and_a_hook_are_called(name, device):
    """Where they stand all N rows go through them, and what they give is used."""
    module, x = attention(seq_len=20, proj_dim=3).to(device), torch.randn(2, 20, 32, device=device)
    by_hand = lambda: attention_by_hand(module, x, x, x, None)  # noqa: E731
    plain, linear = module(x)[0], getattr(module, name)
    setattr(module, name, Adapter(linear).to(device))
    adapted = module(x)[0]
    torch.testing.assert_close(adapted, by_hand(), rtol=1e-4, atol=1e-5)
    assert (adapted - plain).abs().max() > 1e-3
    setattr(module, name, linear)
    seen = []
    with linear.register_forward_hook(lambda module, given, out: seen.append(out.shape[1]) or out * 2):
        torch.testing.assert_close(module(x)[0], by_hand(), rtol=1e-4, atol=1e-5)
    assert set(seen) == {20}
    assert torch.equal(module(x)[0], plain)
    nn.utils.parametrizations.weight_norm(linear)
    torch.testing.assert_close(module(x)[0], plain, rtol=1e-4, atol=1e-4)


def test_dropout_in_training_only(device):
    layer = encoder_layer(dropout=0.3).to(device)
    x = torch.randn(2, 50, 32, device=device)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    module = attention(dropout=0.3).to(device)
    assert not torch.equal(module(x)[0], module(x)[0]) and not torch.equal(module(x)[0], module.eval()(x)[0])


@pytest.mark.parametrize("options", OWN + SHARED, ids=lambda o: "-".join(map(str, o.values())))
def test_state_dict_round_trip(options, device):
    own = lambda: {"projection": LinformerProjection(**options)} if "kind" in options else options  # noqa: E731
    make = lambda: LinformerAttention(32, 4, batch_first=True, num_kv_heads=2, **own()).to(device)  # noqa: E731
    first, second, x = make(), make(), torch.randn(2, 50, 32, device=device)
    assert options.get("kind") in ("mean", "max") or not torch.equal(first(x)[0], second(x)[0])
    assert second.load_state_dict(first.state_dict()) == ([], [])
    assert torch.equal(first(x)[0], second(x)[0])
    saved = any("projection.proj" in name for name in first.state_dict())
    assert saved == (options.get("kind") not in ("mean", "max"))


def test_one_projection_for_several_layers_with_their_own_k(device):
    """Layerwise sharing is one parameter; another layer may have another K."""
    shared = LinformerProjection(50, 7, share_kv=True)
    layers = [LinformerEncoderLayer(32, 4, 8, 0.0, projection=shared) for _ in range(2)]
    model = nn.Sequential(*layers, LinformerEncoderLayer(32, 4, 8, 0.0, seq_len=50, proj_dim=19)).to(device)
    shapes = [tuple(p.shape) for name, p in model.named_parameters() if "projection" in name]
    assert shapes == [(7, 50), (19, 50), (19, 50)]
    model(torch.randn(2, 50, 32, device=device)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    again = copy.deepcopy(model)
    assert again[0].self_attn.projection.proj_key is again[1].self_attn.projection.proj_key


@pytest.mark.parametrize("kind", ["learned", "fixed"])
def test_the_start_keeps_the_spread_of_the_keys(kind, device):
    projection = LinformerProjection(4000, 64, kind=kind).to(device)
    for matrix in (projection.proj_key, projection.proj_value):
        assert matrix.std().item() == pytest.approx(4000**-0.5, rel=0.02) and abs(matrix.mean()) < 1e-3
        assert isinstance(matrix, nn.Parameter) == (kind == "learned")
    keys, _ = projection(*(torch.randn(1, 2, 4000, 16, device=device) for _ in range(2)))
    assert keys.std().item() == pytest.approx(1, rel=0.15)


def used(*shape, **options):
    return attention(seq_len=8, proj_dim=4)(torch.ones(shape or (2, 8, 32)), **options)


def strided(*lengths):
    return torch.nested.nested_tensor([torch.randn(n, 32) for n in lengths])


@pytest.mark.parametrize("make", [
    lambda: LinformerProjection(0, 4), lambda: LinformerProjection(8, 4, kind="median"),
    lambda: LinformerProjection(4, 8), lambda: LinformerProjection(4, 8, kind="mean"),
    lambda: LinformerProjection(8, 4, kind="conv"),
    lambda: LinformerProjection(8, 4, kind="max", num_heads=2),
    lambda: LinformerAttention(30, 4, seq_len=8, proj_dim=4),
    lambda: LinformerProjection(8, 4, init="zeros"), lambda: LinformerProjection(8, 4, kind="max", init="mean"),
    lambda: LinformerProjection(4, 8, init="identity"),
    lambda: attention(sharing="all"), lambda: LinformerAttention(32, 4), lambda: attention(sharing="layerwise")(X),
    lambda: attention(num_kv_heads=3), lambda: attention(head_dim=0), lambda: attention(dropout=1.0),
    lambda: LinformerAttention(32, 0, seq_len=8, proj_dim=4),
    lambda: LinformerAttention(32.0, 4, seq_len=8, proj_dim=4), lambda: attention(dropout="0.1"),
    lambda: attention(num_kv_heads=2.0), lambda: attention(head_dim="8"),
    lambda: LinformerAttention(32, 4, projection=nn.Linear(2, 2)),
    lambda: attention(sharing="headwise", projection=LinformerProjection(50, 7)),
    lambda: attention(add_bias_kv=True), lambda: attention(add_zero_attn=True),
    lambda: encoder_layer(activation="tanh"), lambda: encoder_layer()(X, src_mask=torch.zeros(4, 4)),
    lambda: encoder_layer()(X, is_causal=True), lambda: encoder(proj_dim=[7, 7, 7]), lambda: encoder(num_layers=0),
    lambda: encoder(proj_dim=[7, 5], sharing="layerwise"), lambda: encoder()(X, torch.zeros(4, 4)),
    lambda: encoder()(X, is_causal=True), lambda: encoder(projection=LinformerProjection(50, 8)),
    lambda: used(2, 8, 31), lambda: used(2, 9, 32), lambda: used(8, 2, 2, 32), lambda: used(key=torch.ones(8, 32)),
    lambda: used(is_causal=True), lambda: used(need_weights=True), lambda: used(attn_mask=torch.ones(8, 8)),
    lambda: used(key_padding_mask=torch.ones(2, 8, dtype=torch.int64)), lambda: used(key_padding_mask=torch.ones(2, 8)),
    lambda: used(key_padding_mask=torch.ones(2, 7, dtype=torch.bool)),
    lambda: attention()(strided(3, 5), X, X), lambda: attention()(strided(3, 5), key_padding_mask=torch.zeros(2, 5)),
    lambda: LinformerProjection(8, 4, kind="max")(*[torch.ones(1, 1, 9, 2)] * 2),
    lambda: LinformerProjection(8.0, 4), lambda: LinformerProjection(8, 4, kind="conv", head_dim=0),
    lambda: attention()([1.0]),
    lambda: LinformerProjection(8, 4, kind="conv", head_dim=8)(*[torch.ones(2, 3, 8, 1)] * 2),
    lambda: LinformerProjection(8, 4, kind="conv", head_dim=8, num_heads=3)(*[torch.ones(2, 1, 8, 8)] * 2),
    lambda: LinformerProjection(8, 4, kind="conv", head_dim=8)(*[torch.ones(2, 3, 8, 8).bfloat16()] * 2),
    lambda: LinformerAttention(32, True, seq_len=8, proj_dim=4), lambda: attention(kdim=8.0),
    lambda: attention(vdim=0), lambda: encoder_layer(activation=None),
    lambda: attention()(X, projection=torch.ones(7, 50)),
    lambda: LinformerEncoder(32, 0, num_layers=1, projection=LinformerProjection(50, 7)),
    lambda: LinformerEncoder("32", 4, num_layers=1, projection=LinformerProjection(50, 7)),
    lambda: from_torch(nn.Linear(3, 3), seq_len=8, proj_dim=4), lambda: from_torch(nn.MultiheadAttention(32, 4)),
    lambda: from_torch(nn.MultiheadAttention(32, 4, add_bias_kv=True), seq_len=8, proj_dim=4),
    lambda: from_torch(nn.TransformerEncoder(encoder_layer(), 2), seq_len=8, proj_dim=4),
])  # fmt: skip
def test_mistakes_are_refused_with_what_is_wanted(make):
    with pytest.raises((ValueError, TypeError, NotImplementedError), match="wanted: "):
        make()


def test_compiled_layer_is_eager(device):
    torch._dynamo.reset()
    layer = encoder_layer().to(device)
    x = torch.randn(2, 50, 32, device=device)
    assert torch.allclose(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x), atol=1e-6)
    with lk.use_backend("reference"):
        assert torch.allclose(layer(x), layer(x).detach(), atol=1e-6)
