"""The importers of integrations/peers against the packages that they import from: outputs and all gradients."""

import copy
import io
import re
import sys
import types
import warnings

import linformer
import linformer_pytorch
import pytest
import torch
from oracle import assert_as_promised as agree
from torch import nn
from torch.nn.utils import prune

from linformer_kernels import LinformerAttention, LinformerEncoderLayer, LinformerProjection, projected_attention
from linformer_kernels.integrations.peers import (
    BiasedProjection,
    attention_from_linformer,
    attention_from_linformer_pytorch,
    attention_from_xformers,
    encoder_from_linformer,
    encoder_from_linformer_pytorch,
    encoder_from_vision_xformer,
    projection_from_linformer_pytorch,
    projection_from_xformers,
)

N, WIDTH, K = 48, 32, 12
SHARINGS = ("none", "headwise", "kv", "layerwise")
SIZES = dict(seq_len=N, proj_dim=K, batch_first=True)
SHARED = [dict(one_kv_head=one, share_kv=share, dim_head=d) for one, share, d in [
    (False, False, None), (True, False, 12), (False, True, None), (True, True, 12)
]]  # fmt: skip


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    """All that the test makes is of this type, also the E of linformer-pytorch that no .double() would reach."""
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def ready(peer: nn.Module, device: str) -> nn.Module:
    """In evaluation, with weights of which none, also of the layer norms, is as at the start."""
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return peer.eval().to(device)


def theirs(device: str, depth: int = 1, **options) -> linformer_pytorch.Linformer:
    return ready(linformer_pytorch.Linformer(N, WIDTH, K, dim_ff=40, depth=depth, **options), device)


def check(peer, convert, inputs, call_peer=None, call_ours=None) -> nn.Module:
    """Output and all gradients. That of a weight is known by converting a peer that has gradients for weights."""
    peer.zero_grad()
    ours = convert(peer)
    results = []
    grad_out = None
    for module, call in ((peer, call_peer), (ours, call_ours)):
        call = (lambda m, *xs: m(*xs)) if call is None else call
        xs = [x.detach().clone().requires_grad_() for x in inputs]
        out = call(module, *xs)
        out = out[0] if isinstance(out, tuple) else out  # of an attention of ours
        grad_out = torch.randn_like(out) if grad_out is None else grad_out
        out.backward(grad_out)
        results.append([out, *(x.grad for x in xs)])
    for what, want, got in zip(["out", "query", "context"], *results, strict=False):
        agree(got, want, what)
    gradients = copy.deepcopy(peer)
    with torch.no_grad():
        for gradient, parameter in zip(gradients.parameters(), peer.parameters(), strict=True):
            gradient.copy_(parameter.grad)
    trained = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == sum(p.numel() for p in peer.parameters())
    want = dict(convert(gradients).named_parameters())
    for name, parameter in trained.items():
        agree(parameter.grad, want[name], f"gradient of {name}")
    for name in want.keys() - trained.keys():
        assert name.endswith("_proj.bias") and not want[name].any()
    return ours


@pytest.mark.parametrize("length", [N, 31])
@pytest.mark.parametrize("options", SHARED, ids=str)
def test_attention_of_linformer(options, length, dtype, device):
    peer = ready(linformer.LinformerSelfAttention(WIDTH, N, k=K, heads=4, **options), device)
    ours = check(peer, attention_from_linformer, [torch.randn(3, length, WIDTH, device=device)])
    assert (ours.v_proj is ours.k_proj) == options["share_kv"]
    inputs = [torch.randn(3, n, WIDTH, device=device) for n in (7, length)]
    check(peer, attention_from_linformer, inputs, lambda m, x, context: m(x, context=context))


@pytest.mark.parametrize("length", [N, 31])
@pytest.mark.parametrize("options", SHARED, ids=str)
def test_encoder_of_linformer(options, length, dtype, device):
    peer = ready(linformer.Linformer(WIDTH, N, 2, k=K, heads=4, **options), device)
    layers = check(peer, encoder_from_linformer, [torch.randn(3, length, WIDTH, device=device)])
    assert len(layers) == 2 and all(type(layer) is LinformerEncoderLayer for layer in layers)


@pytest.mark.parametrize("method", ["learnable", "no_params"])
@pytest.mark.parametrize("sharing", SHARINGS)
def test_attention_of_linformer_pytorch(sharing, method, dtype, device):
    peer = theirs(device, parameter_sharing=sharing, method=method, dim_d=12).seq[0].fn
    ours = check(peer, attention_from_linformer_pytorch, [torch.randn(3, N, WIDTH, device=device)])
    assert type(ours.projection) is (BiasedProjection if method == "learnable" else LinformerProjection)
    assert ours.projection.share_kv == (sharing in ("kv", "layerwise"))
    assert ours.projection.num_heads == (4 if sharing == "none" else None)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_masked_attention_of_linformer_pytorch(sharing, dtype, device):
    """A sequence without any position left is what the biases of F make it, there and here."""
    peer = theirs(device, parameter_sharing=sharing).seq[0].fn
    mask = torch.rand(3, N, device=device) < 0.6
    mask[0] = False
    inputs = [torch.randn(3, N, WIDTH, device=device)]
    masked = lambda m, x: m(x, input_mask=mask)  # noqa: E731
    check(peer, attention_from_linformer_pytorch, inputs, masked, lambda m, x: m(x, key_padding_mask=~mask))


def test_masked_queries_of_linformer_pytorch_are_zero(dtype, device):
    peer = theirs(device).seq[0].fn
    mask, rows = (torch.rand(2, 3, N, device=device) < 0.6).unbind()
    masked = lambda m, x: m(x, input_mask=mask, embeddings_mask=rows)  # noqa: E731
    ours = lambda m, x: m(x.masked_fill(~rows[..., None], 0), x, key_padding_mask=~mask)  # noqa: E731
    check(peer, attention_from_linformer_pytorch, [torch.randn(3, N, WIDTH, device=device)], masked, ours)


def test_cross_attention_of_linformer_pytorch(dtype, device):
    peer = theirs(device, decoder_mode=True).seq[2].fn
    inputs = [torch.randn(3, N, WIDTH, device=device) for _ in range(2)]
    check(peer, attention_from_linformer_pytorch, inputs, lambda m, x, y: m(x, embeddings=y))


@pytest.mark.parametrize("sharing", SHARINGS)
def test_encoder_of_linformer_pytorch(sharing, dtype, device):
    """Layerwise, all layers have one projection; otherwise each has its own, here of another K.

    relu in float64 alone: in float32 a rounding lands on the other side of its kink in one of some hundred runs.
    """
    activation = "relu" if dtype == torch.float64 else "gelu"
    peer = theirs(device, 3, parameter_sharing=sharing, activation=activation, k_reduce_by_layer=2)
    layers = check(peer, encoder_from_linformer_pytorch, [torch.randn(3, N, WIDTH, device=device)])
    made = [layer.self_attn.projection for layer in layers]
    assert [projection.proj_dim for projection in made] == ([K] * 3 if sharing == "layerwise" else [K, K - 2, K - 4])
    assert len(set(made)) == (1 if sharing == "layerwise" else 3)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_short_sequence_is_the_masked_one_of_linformer_pytorch(sharing, dtype, device):
    """Which itself takes full sequences only."""
    peer = theirs(device, 2, parameter_sharing=sharing)
    x = torch.randn(3, 31, WIDTH, device=device)
    padded = torch.cat([x, torch.randn(3, N - 31, WIDTH, device=device)], 1)
    mask = (torch.arange(N, device=device) < 31).expand(3, -1)
    ours = encoder_from_linformer_pytorch(peer)
    want = peer(padded, input_mask=mask)[:, :31]
    agree(ours(x), want, "short")
    for layer in ours:
        padded = layer(padded, src_key_padding_mask=~mask)
    agree(padded[:, :31], want, "masked")


@pytest.mark.parametrize("bias", [True, False])
def test_head_of_linformer_pytorch(bias, dtype, device):
    """With the scale that it was given, which need not be that of its width."""
    e, f = (nn.Linear(N, K, bias=bias) for _ in range(2))
    peer = ready(linformer_pytorch.LinearAttentionHead(20, 0.1, e, f, None), device)
    query, key, value = (torch.randn(3, N, 8, device=device) for _ in range(3))
    projection = projection_from_linformer_pytorch(peer)
    assert type(projection) is (BiasedProjection if bias else LinformerProjection)
    keys, values = projection(key[:, None], value[:, None])
    out = projected_attention(query[:, None], keys, values, scale=peer.dim**-0.5)
    agree(out[:, 0], peer(query, key, value), "head")


def test_language_models_with_layers_of_ours(dtype, device):
    tokens = torch.randint(100, (2, N), device=device)
    peer = ready(linformer.LinformerLM(100, WIDTH, N, 2, k=K, heads=4), device)
    want = peer(tokens)
    peer.linformer = encoder_from_linformer(peer.linformer)
    agree(peer(tokens), want, "LinformerLM of linformer")
    peer = ready(linformer_pytorch.LinformerLM(100, N, WIDTH, dim_k=K), device)
    want = peer(tokens)
    peer.linformer = encoder_from_linformer_pytorch(peer.linformer)
    agree(peer(tokens), want, "LinformerLM of linformer_pytorch")


@pytest.fixture(scope="module")
def vision_xformer():
    """The module with ViL. The package imports all of its models, and one of them another package's Performer."""
    pytest.importorskip("einops")
    with pytest.MonkeyPatch.context() as patch:
        performer = types.ModuleType("vision_xformer.vision_performer")
        performer.ViP = None
        patch.setitem(sys.modules, performer.__name__, performer)
        yield pytest.importorskip("vision_xformer.vision_linformer")


@pytest.mark.parametrize("options", SHARED, ids=str)
def test_encoder_of_vision_xformer(options, vision_xformer, dtype, device):
    options = {"dim_head": 8} | {name: value for name, value in options.items() if value is not None}
    peer = ready(vision_xformer.Transformer(WIDTH, 2, 4, mlp_dim=40, seq_len=N, k=K, **options), device)
    inputs = [torch.randn(3, N, WIDTH, device=device)]
    layers = check(peer, encoder_from_vision_xformer, inputs)
    assert len(layers) == 2 and all(type(layer) is LinformerEncoderLayer for layer in layers)
    check(peer.layers[0][0].fn, attention_from_linformer, inputs)
    peer = vision_xformer.Transformer(WIDTH, 1, 4, mlp_dim=40, seq_len=N, k=K, dropout=0.3, **options)
    layer = encoder_from_vision_xformer(peer)[0]
    assert (layer.self_attn.dropout, layer.dropout1.p, layer.dropout.p, layer.dropout2.p) == (0.3, 0, 0.3, 0.3)


def test_of_a_vision_xformer_its_transformer_is_wanted(vision_xformer):
    peer = vision_xformer.ViL(image_size=8, patch_size=4, num_classes=2, dim=8, depth=1, heads=2, mlp_dim=8, k=3)
    with pytest.raises(TypeError, match=r"of a ViL: its \.transformer"):
        encoder_from_vision_xformer(peer)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_images_with_layers_of_ours(pool, vision_xformer, dtype, device):
    sizes = dict(image_size=(12, 20), patch_size=4, num_classes=7, dim=WIDTH, depth=2, heads=4, mlp_dim=40, k=5)
    peer = ready(vision_xformer.ViL(**sizes, pool=pool), device)
    images = torch.randn(3, 3, 12, 20, device=device)
    want = peer(images)
    peer.transformer = encoder_from_vision_xformer(peer.transformer)
    agree(peer(images), want, "ViL")


@pytest.fixture(scope="module")
def xformers():
    with warnings.catch_warnings(action="ignore"):  # that its kernels are of another torch, and that this is old
        yield pytest.importorskip("xformers.components")


def dispatch(xformers, device, seq_len=N, dropout=0.0, **options):
    from xformers.components.attention.linformer import LinformerAttention as Theirs

    return ready(xformers.MultiHeadDispatch(WIDTH, 4, Theirs(dropout, seq_len, K), **options), device)


@pytest.mark.parametrize("length", [N, 31])
@pytest.mark.parametrize("options", [
    {}, {"bias": (False, True, False, True)}, {"bias": (False,) * 4}, {"use_separate_proj_weight": False},
], ids=str)  # fmt: skip
def test_attention_of_xformers(options, length, xformers, dtype, device):
    peer = dispatch(xformers, device, **options)
    ours = check(peer, attention_from_xformers, [torch.randn(3, length, WIDTH, device=device)], None, alone)
    assert (ours.q_proj.weight is ours.v_proj.weight) == (not options.get("use_separate_proj_weight", True))
    inputs = [torch.randn(3, length, WIDTH, device=device) for _ in range(3)]
    check(peer, attention_from_xformers, inputs)


def alone(attention, x):
    return attention(x, x, x)


@pytest.mark.parametrize("length", [N, 31])
def test_projection_of_xformers(length, xformers, dtype, device):
    peer = dispatch(xformers, device).attention
    query, key, value = (torch.randn(2, 4, length, 9, device=device) for _ in range(3))
    out = projection_from_xformers(peer)(key, value, query=query)
    agree(out.flatten(0, 1), peer(*(x.flatten(0, 1) for x in (query, key, value))), "heads")


def test_dropout_of_xformers_comes_along(xformers, device):
    """Of the weights, of what they make of values, and of the output."""
    peer = dispatch(xformers, device, dropout=0.3, residual_dropout=0.4)
    ours = attention_from_xformers(peer.train())
    assert (ours.dropout, ours.out_proj.before.p, ours.out_proj.dropout.p) == (0.3, 0.3, 0.4)
    x = torch.randn(8, N, WIDTH, device=device)
    assert (ours(x)[0] == 0).float().mean().item() == pytest.approx(0.4, abs=0.05)
    agree(ours.eval()(x)[0], peer.eval()(x), "evaluation")


def test_what_xformers_has_beyond_is_refused(xformers):
    for change, message in (
        ({"use_rotary_embeddings": True}, "use_rotary_embeddings=True"),
        ({"dim_key": 2 * WIDTH}, "16 wide for keys and 8 for values"),
        ({"out_proj": nn.Identity()}, "out_proj of peer is a Identity"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            attention_from_xformers(dispatch(xformers, "cpu", **change))
    peer = dispatch(xformers, "cpu")
    with pytest.raises(TypeError, match="for a MultiHeadDispatch: attention_from_xformers"):
        projection_from_xformers(peer)
    with pytest.raises(TypeError, match="projection_from_xformers"):
        attention_from_xformers(peer.attention)


class First(nn.Module):
    """The output of an attention alone."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return self.attention(x)[0]


def test_reversible_layers_take_attention_of_ours(dtype, device):
    peer = ready(linformer.Linformer(WIDTH, N, 2, k=K, heads=4, reversible=True), device)
    x = torch.randn(2, N, WIDTH, device=device)
    want = peer(x)
    for block in peer.net.blocks:
        block.f.net.fn = First(attention_from_linformer(block.f.net.fn))
    agree(peer(x), want, "reversible")


def biased(**options) -> BiasedProjection:
    return BiasedProjection(N, K, **options)


@pytest.mark.parametrize("convert, make_peer, make", [
    (attention_from_linformer, lambda: linformer.LinformerSelfAttention(WIDTH, N, k=K, heads=4, dim_head=12),
     lambda: LinformerAttention(WIDTH, 4, **SIZES, head_dim=12)),
    (attention_from_linformer, lambda: linformer.LinformerSelfAttention(WIDTH, N, k=K, heads=4, share_kv=True),
     lambda: LinformerAttention(WIDTH, 4, **SIZES, sharing="key_value")),
    (encoder_from_linformer, lambda: linformer.Linformer(WIDTH, N, 1, k=K, heads=4),
     lambda: nn.Sequential(LinformerEncoderLayer(WIDTH, 4, 4 * WIDTH, activation="gelu", norm_first=True, **SIZES))),
    (attention_from_linformer_pytorch, lambda: linformer_pytorch.Linformer(N, WIDTH, K).seq[0].fn,
     lambda: LinformerAttention(WIDTH, 4, batch_first=True, projection=biased(share_kv=True))),
    (encoder_from_linformer_pytorch, lambda: linformer_pytorch.Linformer(N, WIDTH, K, parameter_sharing="none"),
     lambda: nn.Sequential(LinformerEncoderLayer(WIDTH, 4, 256, activation="gelu", batch_first=True,
                                                 projection=biased(num_heads=4)))),
], ids=["dim_head", "share_kv", "linformer", "biased", "linformer_pytorch"])  # fmt: skip
def test_a_saved_result_loads_without_the_peer(convert, make_peer, make, device):
    ours = convert(ready(make_peer(), device))
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    loaded = make().eval().to(device)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(2, N, WIDTH, device=device)
    outputs = [out[0] if isinstance(out, tuple) else out for out in (loaded(x), ours(x))]
    assert torch.equal(*outputs)


def test_the_result_is_a_copy_in_the_same_type_and_mode(device):
    x = torch.randn(2, N, WIDTH, device=device)
    peers = {
        attention_from_linformer: linformer.LinformerSelfAttention(WIDTH, N, k=K, heads=4),
        encoder_from_linformer: linformer.Linformer(WIDTH, N, 1, k=K, heads=4),
        attention_from_linformer_pytorch: theirs(device).seq[0].fn,
        encoder_from_linformer_pytorch: theirs(device),
    }
    for convert, peer in peers.items():
        ours = convert(ready(peer, device))
        first = (lambda: ours(x)[0]) if isinstance(ours, LinformerAttention) else (lambda: ours(x))  # noqa: B023
        before = first()
        nn.init.zeros_(next(peer.parameters()))
        assert torch.equal(first(), before) and not any(m.training for m in ours.modules())
        ours = convert(peer.to(torch.bfloat16).train())
        assert {p.dtype for p in ours.parameters()} == {torch.bfloat16} and all(m.training for m in ours.modules())


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_weights_come_along(frozen, grad):
    """All were trained. Which is which is told by numbers: 2 for those that are, 1 for the frozen."""
    peers = {
        attention_from_linformer: linformer.LinformerSelfAttention(WIDTH, N, k=K, heads=4),
        encoder_from_linformer: linformer.Linformer(WIDTH, N, 1, k=K, heads=4),
        attention_from_linformer_pytorch: theirs("cpu", parameter_sharing="none").seq[0].fn,
        encoder_from_linformer_pytorch: theirs("cpu"),
        projection_from_linformer_pytorch: theirs("cpu").seq[0].fn.heads[0],
    }
    for convert, peer in peers.items():
        kinds = sorted({re.sub("[0-9]", "", name) for name, _ in peer.named_parameters()})  # alike in all heads
        for name, weight in peer.named_parameters():
            nn.init.constant_(weight, 1 + (kinds.index(re.sub("[0-9]", "", name)) + frozen) % 2)
            weight.requires_grad_(bool((weight == 2).all()))
        with torch.set_grad_enabled(grad):
            ours = convert(peer)
        assert {int(weight.max()) for weight in ours.parameters()} >= {1, 2}
        assert all(weight.requires_grad == bool((weight == 2).all()) for weight in ours.parameters())


def test_hooks_of_a_peer_are_refused():
    """They were left behind, in silence, and so were parametrizations and what prunes."""
    peer = linformer.Linformer(WIDTH, N, 1, k=K, heads=4)
    place = next(name for name, module in peer.named_modules() if name.endswith("to_q"))
    prune.random_unstructured(peer.get_submodule(place), "weight", 0.5)
    with pytest.raises(ValueError, match=rf"peer\.{place} has forward pre hooks .* wanted: a module without"):
        encoder_from_linformer(peer)


def test_dropout_comes_along(device):
    layer = encoder_from_linformer(linformer.Linformer(WIDTH, N, 1, k=K, heads=4, dropout=0.3))[0]
    assert (layer.self_attn.dropout, layer.dropout1.p, layer.dropout.p, layer.dropout2.p) == (0.3, 0, 0.3, 0)
    peer = linformer_pytorch.Linformer(N, WIDTH, K, dropout=0.4, dropout_ff=0.2).to(device)
    layer = encoder_from_linformer_pytorch(peer)[0]
    assert (layer.self_attn.dropout, layer.dropout1.p, layer.dropout.p, layer.dropout2.p) == (0.4, 0.4, 0.2, 0.2)
    ours, x = attention_from_linformer_pytorch(peer.seq[0].fn), torch.randn(8, N, WIDTH, device=device)
    assert ours.dropout == 0.4
    assert (ours(x)[0] == 0).float().mean().item() == pytest.approx(0.4, abs=0.05)
    assert (ours.eval()(x)[0] != 0).all()


def test_biases_start_anew_as_zero():
    projection = attention_from_linformer_pytorch(theirs("cpu", parameter_sharing="headwise").seq[0].fn).projection
    matrix = projection.proj_key.clone()
    projection.reset_parameters()
    assert not projection.bias_key.any() and not projection.bias_value.any()
    assert not torch.equal(projection.proj_key, matrix) and projection.proj_key.all()


def attention_of(**options):
    return attention_from_linformer_pytorch(linformer_pytorch.Linformer(N, WIDTH, K, **options).seq[0].fn)


def encoder_of(**options):
    return encoder_from_linformer_pytorch(linformer_pytorch.Linformer(N, WIDTH, K, **options))


def half_shared():
    peer = linformer_pytorch.Linformer(N, WIDTH, K, parameter_sharing="none").seq[0].fn
    peer.heads[1].E = peer.heads[0].E
    return attention_from_linformer_pytorch(peer)


@pytest.mark.parametrize("make, error, message", [
    (lambda: attention_from_linformer(nn.Linear(2, 2)), TypeError, "peer is a Linear, without to_q"),
    (lambda: attention_from_linformer(linformer.Linformer(8, 8, 1, k=4)), TypeError, "encoder_from_linformer"),
    (lambda: encoder_from_linformer(linformer.LinformerLM(9, 8, 8, 1, k=4)), TypeError, r"its \.linformer"),
    (lambda: encoder_from_linformer(linformer.Linformer(8, 8, 1, k=4, reversible=True)), NotImplementedError,
     "reversible=True"),
    (lambda: attention_from_linformer_pytorch(linformer_pytorch.Linformer(N, WIDTH, K)), TypeError,
     "encoder_from_linformer_pytorch"),
    (lambda: attention_from_linformer_pytorch(linformer.LinformerSelfAttention(8, 8, k=4)), TypeError, "MHAttention"),
    (lambda: encoder_from_linformer_pytorch(linformer.Linformer(8, 8, 1, k=4)), TypeError, "without seq"),
    (lambda: projection_from_linformer_pytorch(nn.Linear(2, 2)), TypeError, "LinearAttentionHead"),
    (lambda: attention_of(causal=True), NotImplementedError, "causal=True"),
    (lambda: attention_of(full_attention=True), NotImplementedError, "full_attention=True"),
    (lambda: attention_of(method="convolution"), NotImplementedError, "E of peer is a Conv1d"),
    (lambda: attention_of(w_o_intermediate_dim=8), NotImplementedError, "w_o_intermediate_dim=8"),
    (half_shared, NotImplementedError, "some heads of peer share"),
    (lambda: encoder_of(decoder_mode=True), NotImplementedError, "decoder_mode=True"),
    (lambda: encoder_of(include_ff=False), NotImplementedError, "include_ff=False"),
    (lambda: encoder_of(include_ff=False, depth=2), NotImplementedError, "include_ff=False"),
    (lambda: encoder_of(ff_intermediate=16, depth=2, parameter_sharing="kv"), NotImplementedError, "ff_intermediate"),
    (lambda: encoder_of(causal=True), NotImplementedError, "causal=True"),
])  # fmt: skip
def test_what_cannot_be_converted_is_refused(make, error, message):
    with pytest.raises(error, match=message) as raised:
        make()
    assert "wanted: " in str(raised.value)
