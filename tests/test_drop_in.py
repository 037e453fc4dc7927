"""The modules in the place of torch.nn's, and others in the place of their parts: contract, conversion, sharding."""

import copy
import functools
import inspect
import io
import os
import re
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import oracle
import processes
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import linformer_kernels as lk
from linformer_kernels import (
    LinformerAttention,
    LinformerEncoder,
    LinformerEncoderLayer,
    LinformerProjection,
    from_torch,
)

N = 24
SIZES = dict(seq_len=N, proj_dim=6)
PAIRS = [
    (nn.MultiheadAttention, LinformerAttention),
    (nn.TransformerEncoderLayer, LinformerEncoderLayer),
    (nn.TransformerEncoder, LinformerEncoder),
]


@pytest.fixture(autouse=True)
def _quiet():
    """torch.nn.TransformerEncoder warns of the ways in which it does not use nested tensors, and those of being new."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def randomized(module):
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(std=0.3)
    return module


def padding(batch, n):
    """True = ignored: none in the first sequence, then on the right, on the left, on both sides."""
    mask = torch.zeros(batch, n, dtype=torch.bool)
    mask[1, n // 2 :], mask[2, : n // 3] = True, True
    mask[3, :2], mask[3, -3:] = True, True
    return mask


def right(ours, theirs, x, **options):
    """The output of ours is that of theirs."""
    call = lambda module, x: {"out": module(x, **options)}  # noqa: E731
    oracle.assert_module_close(call(ours, x), call, theirs, x)


@pytest.mark.parametrize("theirs, ours", PAIRS[:2], ids=lambda c: c.__name__)
def test_arguments_are_those_of_torch(theirs, ours):
    """Names, order and defaults; what is new can be given by its name alone."""
    allowed = {"need_weights", "key", "value"}  # plain calls, and self-attention
    for method in ("__init__", "forward"):
        want = list(inspect.signature(getattr(theirs, method)).parameters.values())
        got = list(inspect.signature(getattr(ours, method)).parameters.values())
        assert [p.name for p in got[: len(want)]] == [p.name for p in want]
        for a, b in zip(got, want, strict=False):
            assert a.name in allowed or a.default == b.default, a.name
        assert all(p.kind is p.KEYWORD_ONLY for p in got[len(want) :])


def test_arguments_of_the_encoder():
    want = list(inspect.signature(nn.TransformerEncoderLayer).parameters.values())
    got = list(inspect.signature(LinformerEncoder).parameters.values())
    assert [(p.name, p.default) for p in got[: len(want)]] == [(p.name, p.default) for p in want]
    assert all(p.kind is p.KEYWORD_ONLY for p in got[len(want) :])
    both = (inspect.signature(c.forward).parameters for c in PAIRS[2])
    assert len({tuple((p.name, p.default) for p in parameters.values()) for parameters in both}) == 1


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_result_is_a_pair(batch):
    """`x + attention(x, x, x)[0]` took the first sample of the batch for all."""
    attention, x = LinformerAttention(32, 4, **SIZES).eval(), torch.randn(20, batch, 32)
    out, weights = attention(x, x, x)
    assert weights is None and out.shape == x.shape
    alone = torch.stack([attention(x[:, b])[0] for b in range(batch)], 1)
    torch.testing.assert_close(x + attention(x, x, x)[0], x + alone, rtol=1e-5, atol=1e-5)
    assert attention(x, x, x, None, False, None, True, False)[1] is None


def test_the_start_is_that_of_torch():
    """Of all three weights as one matrix, where they are alike, and one by one where not."""
    for options in ({}, dict(kdim=48, vdim=24)):
        ours, theirs = LinformerAttention(64, 4, **options, **SIZES), nn.MultiheadAttention(64, 4, **options)
        weights = theirs.in_proj_weight.chunk(3) if not options else (theirs.q_proj_weight, theirs.k_proj_weight)
        for linear, weight in zip((ours.q_proj, ours.k_proj), weights, strict=False):
            assert linear.weight.shape == weight.shape
            assert linear.weight.abs().max().item() == pytest.approx(weight.abs().max().item(), rel=0.02)


@pytest.mark.parametrize("options", [
    {}, dict(batch_first=True), dict(bias=False), dict(kdim=20, vdim=28), dict(kdim=20, vdim=28, bias=False),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("sharing", ["none", "headwise", "key_value"])
def test_multihead_attention_with_its_weights(sharing, options):
    """With E = I what torch computes: padded on both sides, shorter than seq_len, masked by bool and by -inf, without a
    batch, across sequences; and the gradients."""
    theirs = randomized(nn.MultiheadAttention(32, 4, dropout=0.1, **options)).eval()
    ours = from_torch(theirs, seq_len=N, proj_dim=N, sharing=sharing, init="identity")
    assert (ours.dropout, ours.training) == (0.1, False)
    turn = (lambda x: x) if options.get("batch_first") else (lambda x: x.transpose(0, 1))
    for n in (N, 17):
        inputs = torch.randn(4, 9, 32), torch.randn(4, n, options.get("kdim", 32)), torch.randn(4, n, ours.vdim)
        mask = padding(4, n)
        for given in (None, mask, torch.zeros(4, n).masked_fill(mask, -torch.inf)):

            def call(module, *xs, given=given):
                xs = [x.detach().requires_grad_() for x in xs]
                masks = given if given is None or given.dtype == torch.bool else given.to(xs[0].dtype)
                out = turn(module(*map(turn, xs), key_padding_mask=masks, need_weights=False)[0])
                grads = torch.autograd.grad(out.square().sum(), xs)
                return dict(zip(("out", "query", "key", "value"), (out, *grads), strict=True))

            oracle.assert_module_close(call(ours, *inputs), call, theirs, *inputs)
        alone = lambda module, *xs: {"unbatched": module(*xs, need_weights=False)[0]}  # noqa: E731
        firsts = [x[0] for x in inputs]
        oracle.assert_module_close(alone(ours, *firsts), alone, theirs, *firsts)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "options", [{}, dict(batch_first=True, activation="gelu"), dict(norm_first=True, bias=False)], ids=str
)
@pytest.mark.parametrize("sharing", ["none", "headwise", "key_value", "layerwise"])
def test_an_encoder_with_its_weights(sharing, options, norm):
    layer = nn.TransformerEncoderLayer(32, 4, 48, **options)
    theirs = nn.TransformerEncoder(layer, 2, nn.LayerNorm(32) if norm else None, enable_nested_tensor=False)
    theirs = randomized(theirs).eval()
    ours = from_torch(theirs, seq_len=N, proj_dim=N, sharing=sharing, init="identity")
    assert type(ours) is LinformerEncoder and all(type(layer) is LinformerEncoderLayer for layer in ours.layers)
    turn = (lambda x: x) if options.get("batch_first") else (lambda x: x.transpose(0, 1))
    for n in (N, 17):
        x, mask = turn(torch.randn(4, n, 32)), padding(4, n)
        for given in (None, mask):
            right(ours, theirs, x, src_key_padding_mask=given)
        if ours.projection is None:
            right(ours.layers[0], theirs.layers[0], x, src_key_padding_mask=mask)
    right(ours, theirs, turn(x)[0])


def test_what_comes_along_with_the_weights():
    """Mode, dtype, which weights are trained, dropouts, hooks and layers of its own; and nothing is shared with it."""
    theirs = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, 0.3, batch_first=True), 2).to(torch.bfloat16)
    theirs.layers[0].self_attn.in_proj_weight.requires_grad_(False)
    theirs.layers[1].dropout2.p = 0.5
    ours = from_torch(theirs, seq_len=N, proj_dim=[6, 4], sharing="key_value")
    assert ours.training and {weight.dtype for weight in ours.parameters()} == {torch.bfloat16}
    assert [layer.self_attn.projection.proj_dim for layer in ours.layers] == [6, 4]
    first, second = ours.layers
    assert not first.self_attn.q_proj.weight.requires_grad and second.self_attn.q_proj.weight.requires_grad
    assert (first.self_attn.dropout, first.dropout.p, second.dropout2.p) == (0.3, 0.3, 0.5)
    x = torch.randn(2, N, 32, dtype=torch.bfloat16)
    before = ours.eval()(x)
    nn.init.zeros_(theirs.layers[0].linear1.weight)
    nn.init.zeros_(theirs.layers[0].self_attn.out_proj.weight)
    assert torch.equal(ours(x), before)


class Theirs(nn.TransformerEncoderLayer):
    def forward(self, src, *_, **__):
        return 2 * src


@pytest.mark.parametrize("sharing", ["headwise", "layerwise"])
def test_a_layer_that_stands_several_times_stays_one(sharing):
    """It became several, each to be trained by itself."""
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    theirs = nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(32))
    theirs.layers = nn.ModuleList([layer, theirs.layers[1], layer])
    theirs.eval()
    ours = from_torch(theirs, seq_len=N, proj_dim=N, init="identity", sharing=sharing)
    assert ours.layers[0] is ours.layers[2] and ours.layers[0] is not ours.layers[1]
    x = torch.randn(4, 20, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def joined(module, one, other):
    """With what stands under the first name under the second, too."""
    owner, _, name = other.rpartition(".")
    setattr(module.get_submodule(owner), name, functools.reduce(getattr, one.split("."), module))
    return module


@pytest.mark.parametrize("one, other", [
    ("layers.0.self_attn", "layers.1.self_attn"), ("layers.0.linear1", "layers.1.linear1"),
    ("layers.0.norm1", "layers.0.norm2"), ("layers.1.norm2", "norm"),
    ("layers.0.linear2.weight", "layers.1.linear2.weight"),
    ("layers.0.self_attn.in_proj_weight", "layers.1.self_attn.in_proj_weight"),
    ("layers.0.self_attn.in_proj_bias", "layers.1.self_attn.in_proj_bias"),
])  # fmt: skip
def test_what_is_tied_stays_tied(one, other):
    """Of an encoder only whole layers did: their parts and weights became several, each to be trained by itself, and a
    norm that a layer has twice was left on the meta device."""
    theirs = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True), 2, nn.LayerNorm(32))
    place, _, name = other.rpartition(".")
    setattr(theirs.get_submodule(place), name, functools.reduce(getattr, one.split("."), theirs))
    ours = from_torch(theirs, seq_len=N, proj_dim=N, init="identity", sharing="layerwise")
    size = lambda module: sum(weight.numel() for weight in module.parameters())  # noqa: E731
    assert size(ours) - size(ours.projection) == size(theirs)
    right(ours, theirs, torch.randn(4, N, 32))


def test_a_subclass_may_replace_a_block_as_of_torch():
    """`_sa_block` of a subclass was not called."""

    class Halved(LinformerEncoderLayer):
        def _sa_block(self, *arguments, **options):
            return super()._sa_block(*arguments, **options) / 2

    layer, x = LinformerEncoderLayer(32, 4, 48, 0.0, batch_first=True, norm_first=True, **SIZES), torch.randn(4, 20, 32)
    halved = Halved(32, 4, 48, 0.0, batch_first=True, norm_first=True, **SIZES)
    halved.load_state_dict(layer.state_dict())
    with torch.no_grad():
        for weight in layer.self_attn.out_proj.parameters():
            weight /= 2
    torch.testing.assert_close(halved(x), layer(x), rtol=1e-4, atol=1e-5)


def test_an_activation_with_weights_is_each_layers_own():
    """As torch.nn.TransformerEncoder copies it with the layer; it was one for all layers."""
    theirs = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, activation=nn.PReLU()), 2)
    ours = LinformerEncoder(32, 4, 48, activation=nn.PReLU(), num_layers=2, **SIZES)
    names = lambda module: [name for name, _ in module.named_parameters() if "activation" in name]  # noqa: E731
    assert names(ours) == names(theirs) == ["layers.0.activation.weight", "layers.1.activation.weight"]


def test_a_layer_with_a_forward_of_its_own_is_not_converted():
    with pytest.raises(TypeError, match=r"a Theirs, with a forward of its own; wanted: a torch\.nn\."):
        from_torch(nn.TransformerEncoder(Theirs(32, 4), 2), **SIZES)

    class Blocks(nn.TransformerEncoderLayer):
        def _sa_block(self, *arguments, **options):
            return 0 * super()._sa_block(*arguments, **options)

    with pytest.raises(TypeError, match="Blocks, with a _sa_block of its own"):  # it had been left out, in silence
        from_torch(Blocks(32, 4), **SIZES)


@pytest.mark.parametrize("place", ["", "layers.1", "layers.0.self_attn"])
@pytest.mark.parametrize("change, says", [
    (lambda module: module.register_forward_hook(print), "forward hooks"),
    (lambda module: module.register_full_backward_pre_hook(print), "backward pre hooks"),
    (lambda module: nn.utils.parametrize.register_parametrization(module, "weight", nn.Identity()), "parametrizations"),
], ids=["forward", "backward", "parametrized"])  # fmt: skip
def test_what_would_be_lost_is_refused(change, says, place):
    """They were left behind, in silence. Those of modules that come along as they are come along."""
    theirs = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2)
    module = theirs.get_submodule(place)
    module.weight = nn.Parameter(torch.zeros(2))
    theirs.layers[0].linear1.register_forward_hook(lambda *_: None)
    assert from_torch(theirs, **SIZES).layers[0].linear1._forward_hooks
    change(module)
    with pytest.raises(ValueError, match=rf"module has {says} .* wanted: a module without, and them on what"):
        from_torch(theirs, **SIZES)


def test_an_encoder_of_other_layers_is_not_converted():
    stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4), 1)
    for layers, says in (
        ([nn.Sequential(stack.layers[0])], "layer 0 is a Sequential"),
        ([], "no layers"),
    ):
        stack.layers = nn.ModuleList(layers)
        with pytest.raises((TypeError, ValueError), match=says):
            from_torch(stack, **SIZES)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("way", ["layer", "layers replaced", "self_attn replaced"])
def test_in_torch_encoder(way, grad, nested):
    """Its evaluation without gradients goes through nested tensors, and would go past a module that is not torch's."""
    layers = [LinformerEncoderLayer(32, 4, 48, batch_first=True, **SIZES) for _ in range(2)]
    layer = layers[0] if way == "layer" else nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
    for index in range(2):
        if way == "layers replaced":
            stack.layers[index] = layers[index]
        elif way == "self_attn replaced":
            stack.layers[index].self_attn = layers[index].self_attn
    randomized(stack).eval()
    x, mask = torch.randn(4, 20, 32), padding(4, 20)
    mask[2:] = mask[1]  # nested tensors take padding on the right alone

    def by_hand(model, x):
        for layer in model.layers:
            attended = layer.self_attn(x, x, x, mask.to(x.device))[0]
            x = layer.norm1(x + attended)
            x = layer.norm2(x + layer.linear2(torch.relu(layer.linear1(x))))
        return {way: x[~mask]}

    with torch.set_grad_enabled(grad):
        for given in (mask, torch.zeros(4, 20).masked_fill(mask, -torch.inf)):
            oracle.assert_module_close({way: stack(x, src_key_padding_mask=given)[~mask]}, by_hand, stack, x)
        assert stack(x).shape == stack(x, mask=None, is_causal=False).shape == x.shape
    with pytest.raises(NotImplementedError, match=r"wanted: (None|False)"):
        stack(x, mask=nn.Transformer.generate_square_subsequent_mask(20))


def test_in_torch_decoder_and_transformer():
    decoder = nn.TransformerDecoderLayer(32, 4, 48).eval()
    decoder.multihead_attn = LinformerAttention(32, 4, **SIZES).eval()
    x, memory, ignored = torch.randn(7, 4, 32), torch.randn(20, 4, 32), padding(4, 20)
    out = decoder(x, memory, memory_key_padding_mask=ignored)
    alone = decoder(x[:, 1:2], memory[:10, 1:2])
    torch.testing.assert_close(out[:, 1:2], alone, rtol=1e-4, atol=1e-5)
    stack = LinformerEncoder(32, 4, 48, num_layers=1, **SIZES)
    model = nn.Transformer(32, 4, 1, 1, 48, custom_encoder=stack).eval()
    assert torch.equal(model.encoder(memory), stack(memory)) and model(memory, x).shape == x.shape


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("kind", ["learned", "mean", "max", "conv"])
def test_nested_tensors(kind, layout):
    """Each sequence as alone, and gradients."""
    options = {"head_dim": 8} if kind == "conv" else {}
    projection = LinformerProjection(N, 6, kind=kind, **options)
    layer = randomized(LinformerEncoderLayer(32, 4, 48, 0.0, projection=projection)).eval()
    sequences = [torch.randn(n, 32, requires_grad=True) for n in (9, 1, 17)]
    alone = [layer(x) for x in sequences]
    want = torch.autograd.grad(sum(x.square().sum() for x in alone), sequences)
    out = layer(torch.nested.as_nested_tensor(sequences, layout=layout))
    assert out.is_nested and out.layout == layout
    for got, one in zip(out.unbind(), alone, strict=True):
        torch.testing.assert_close(got, one, rtol=1e-4, atol=1e-4)
    got = torch.autograd.grad(sum(x.square().sum() for x in out.unbind()), sequences)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("sharing", ["none", "headwise", "key_value", "layerwise", "projection"])
def test_the_encoder_is_its_layers(sharing, batch_first):
    own = {"projection": LinformerProjection(N, 6, kind="conv", head_dim=8)} if sharing == "projection" else SIZES
    own = own if sharing == "projection" else own | {"sharing": sharing}
    norm = nn.LayerNorm(32)
    stack = LinformerEncoder(32, 4, 48, num_layers=3, batch_first=batch_first, norm=norm, **own).eval()
    x, mask = torch.randn(*((4, 20) if batch_first else (20, 4)), 32), padding(4, 20)
    want = x
    for layer in stack.layers:
        want = layer(want, src_key_padding_mask=mask, projection=stack.projection)
    assert torch.equal(stack(x, src_key_padding_mask=mask), norm(want))
    names = [name for name in stack.state_dict() if "proj_key" in name]
    assert len(names) == (1 if sharing in ("layerwise", "projection") else 3)
    if sharing in ("layerwise", "projection"):
        assert names == ["projection.proj_key"] == [name for name, _ in stack.named_parameters() if "proj_key" in name]
        with pytest.raises(ValueError, match='sharing is "layerwise" but the call has no projection'):
            stack.layers[0](x)


@pytest.mark.parametrize("arguments, options", [
    ((nn.TransformerEncoderLayer(32, 4), 2), {}), ((LinformerEncoderLayer(32, 4, **SIZES),), dict(num_layers=2)),
    ((), dict(encoder_layer=nn.TransformerEncoderLayer(32, 4), num_layers=2)),
])  # fmt: skip
def test_an_encoder_says_that_it_is_not_made_of_a_layer(arguments, options):
    with pytest.raises(TypeError, match="came with an encoder layer; wanted: the layer's arguments"):
        LinformerEncoder(*arguments, **options)
    assert list(inspect.signature(LinformerEncoder).parameters)[:2] == ["d_model", "nhead"]


def own(**sizes):
    return LinformerProjection(N, 6, **sizes)


PACKED = torch.ones(5, 4, 8), torch.tensor([0, 2, 5])
PADDED = torch.ones(1, 4, 5, 8)


@pytest.mark.parametrize("make, name", [
    (lambda: LinformerAttention(32, 4, sharing="layerwise", seq_len=N), "seq_len is 24"),
    (lambda: LinformerEncoderLayer(32, 4, sharing="layerwise", proj_dim=6), "proj_dim is 6"),
    (lambda: LinformerEncoderLayer(32, 4, sharing="layerwise", init="mean"), "init is 'mean'"),
    (lambda: from_torch(nn.TransformerEncoderLayer(32, 4), sharing="layerwise", **SIZES), "seq_len is 24"),
    (lambda: LinformerAttention(32, 4, projection=own(), init="gaussian"), "init is 'gaussian'"),
    (lambda: LinformerEncoderLayer(32, 4, projection=own(), init="mean"), "init is 'mean'"),
    (lambda: LinformerEncoder(32, 4, num_layers=1, projection=own(), init="mean"), "init is 'mean'"),
    (lambda: from_torch(nn.MultiheadAttention(32, 4), projection=own(), init="identity"), "init is 'identity'"),
    (lambda: from_torch(nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4), 1), projection=own(), init="mean"),
     "init is 'mean'"),
    (lambda: own()(PADDED, PADDED, scale=1.0), "scale came without a query"),
    (lambda: own()(PADDED, PADDED, dropout_p=0.1), "dropout_p or scale came without a query"),
    (lambda: own()(PADDED, PADDED, query=PADDED, cu_seqlens_q=PACKED[1]), "cu_seqlens_q came without cu_seqlens_k"),
    *((lambda kind=kind: own(kind=kind)(
        *[PACKED[0]] * 2, torch.ones(2, 3) > 0, query=PACKED[0], cu_seqlens_q=PACKED[1], cu_seqlens_k=PACKED[1]
    ), "key_padding_mask came with cu_seqlens_k") for kind in ("learned", "max")),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_no_argument_is_ignored(make, name):
    """Sizes of a layer that gets its projection with each call, `init` beside a projection, a mask of packed rows."""
    with pytest.raises(ValueError, match=f"{name}.*; wanted: "):
        make()


def test_a_layerwise_layer_takes_the_projection_of_the_call():
    layer = LinformerEncoderLayer(32, 4, 48, 0.0, sharing="layerwise")
    stack = LinformerEncoder(32, 4, 48, 0.0, num_layers=1, sharing="layerwise", init="mean", **SIZES)
    assert stack.projection.init == "mean" and stack.layers[0].self_attn.projection is None
    stack.layers[0].load_state_dict(layer.state_dict())
    x = torch.randn(N, 2, 32)
    assert torch.equal(layer(x, projection=stack.projection), stack(x))


@pytest.mark.parametrize("shapes, says", [
    (((10, 2, 32), (12, 2, 32), (11, 2, 32)), "value has shape (11, 2, 32) but key has (12, 2, 32)"),
    (((10, 2, 32), (12, 2, 32), (12, 3, 32)), "value has shape (12, 3, 32) but key has (12, 2, 32)"),
    (((10, 2, 32), (12, 3, 32), (12, 3, 32)), "query has shape (10, 2, 32) but key has (12, 3, 32)"),
    (((10, 32), (12, 32), (11, 32)), "value has shape (11, 32) but key has (12, 32)"),
    (((10, 2, 32), (12, 2, 31), (12, 2, 32)), "key has shape (12, 2, 31)"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("sharing", ["none", "headwise"])
def test_shapes_in_errors_are_those_that_came(shapes, says, sharing):
    """They were those of heads: (2, 4, 11, 8) for (11, 2, 32)."""
    attention = LinformerAttention(32, 4, sharing=sharing, **SIZES)
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        attention(*map(torch.ones, shapes))
    assert "wanted: " in str(error.value)


def test_lengths_in_errors_are_those_that_came():
    nested = lambda *lengths: torch.nested.nested_tensor([torch.ones(n, 32) for n in lengths])  # noqa: E731
    attention = LinformerAttention(32, 4, **SIZES)
    for lengths in (((3, 5), (3, 5), (5, 3)), ((3, 5), (3,), (3,))):
        with pytest.raises(ValueError, match="wanted: as many sequences in all, and key and value alike"):
            attention(*(nested(*of) for of in lengths))


def test_a_mask_of_a_batch_is_refused_where_there_is_none():
    layer = LinformerEncoderLayer(32, 4, batch_first=True, **SIZES)
    with pytest.raises(ValueError, match=r"has shape \(1, 10\); wanted: \(N,\) = \(10,\), as query has no batch"):
        layer(torch.randn(10, 32), src_key_padding_mask=torch.zeros(1, 10, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"has shape \(9,\); wanted: \(N,\) = \(10,\)"):
        layer(torch.randn(10, 32), src_key_padding_mask=torch.zeros(9, dtype=torch.bool))


def test_a_mask_of_the_other_order_is_told_of_batch_first():
    attention = LinformerAttention(32, 4, **SIZES)
    with pytest.raises(ValueError, match=r"check which dimension is the batch: .* batch_first of the module"):
        attention(torch.randn(2, 10, 32), key_padding_mask=torch.zeros(2, 10, dtype=torch.bool))


def test_a_model_is_told_how_its_modules_are_converted():
    with pytest.raises(
        TypeError, match=r"a Sequential; .* as in model\.encoder = from_torch\(model\.encoder, \.\.\.\)"
    ):
        from_torch(nn.Sequential(nn.MultiheadAttention(32, 4)), **SIZES)


def test_k_of_each_layer():
    stack = LinformerEncoder(32, 4, 48, num_layers=3, seq_len=N, proj_dim=(6, 4, 2))
    assert [layer.self_attn.projection.proj_key.shape for layer in stack.layers] == [(k, N) for k in (6, 4, 2)]


@pytest.mark.parametrize("sharing", ["headwise", "layerwise"])
def test_gradient_checkpointing_changes_no_gradient(sharing):
    stack = LinformerEncoder(32, 4, 48, 0.2, num_layers=3, sharing=sharing, **SIZES)
    x, mask, gradients = torch.randn(20, 4, 32), padding(4, 20), []
    calls = []
    stack.layers[0].linear1.register_forward_hook(lambda *_: calls.append(1))
    for stack.gradient_checkpointing in (False, True):
        torch.manual_seed(3)
        loss = stack(x, src_key_padding_mask=mask).square().sum()
        gradients.append(torch.autograd.grad(loss, list(stack.parameters())))
    assert len(calls) == 3 and all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_gradient_checkpointing_repeats_a_layer_on_its_backend():
    """What was repeated after the block of `use_backend`, or in another thread, as of a GPU, ran on another backend,
    which saves other tensors: torch raised CheckpointError."""
    stack, gradients = LinformerEncoder(32, 4, 48, 0.2, num_layers=2, gradient_checkpointing=True, **SIZES), []
    x, weights = torch.randn(20, 4, 32), list(stack.parameters())
    for stack.gradient_checkpointing in (False, True):
        torch.manual_seed(3)
        with lk.use_backend("reference"):
            loss = stack(x).square().sum()
        with ThreadPoolExecutor(1) as pool:
            gradients.append(pool.submit(torch.autograd.grad, loss, weights).result())
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("way", ["to_empty", "assign"])
@pytest.mark.parametrize("kind", ["learned", "fixed", "mean", "max", "conv"])
def test_made_on_the_meta_device(kind, way):
    """Windows and means were buffers that no checkpoint fills: garbage, or left on the meta device."""
    options = {"head_dim": 8} if kind == "conv" else {}
    make = lambda: LinformerAttention(32, 4, projection=LinformerProjection(N, 6, kind=kind, **options)).eval()  # noqa: E731
    saved, x = make(), torch.randn(20, 3, 32)
    with torch.device("meta"):
        again = make()
    if way == "to_empty":
        again.to_empty(device="cpu")
        for tensor in (*again.parameters(), *again.buffers()):
            tensor.data.fill_(torch.nan)
    assert again.load_state_dict(saved.state_dict(), assign=way == "assign") == ([], [])
    assert torch.equal(again(x)[0], saved(x)[0])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["learned", "fixed", "mean", "max", "conv", "adaptive"])
def test_called_on_the_meta_device(kind, autocast):
    """Of "conv" torch was asked whether there is autocast on "meta", which it refuses to say."""
    options = {"head_dim": 8} if kind == "conv" else {}
    module = LinformerAttention(32, 4, projection=LinformerProjection(N, 6, kind=kind, **options), device="meta")
    x, mask = torch.empty(20, 4, 32, device="meta"), torch.empty(4, 20, dtype=torch.bool, device="meta")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = module.to("meta")(x, key_padding_mask=mask)[0]
    assert out.shape == x.shape and out.dtype == x.dtype and out.is_meta


class Copying(nn.Module):
    """As PEFT's modules_to_save, which says nothing of what it stands for."""

    def __init__(self, original):
        super().__init__()
        self.original, self.used = original.requires_grad_(False), copy.deepcopy(original).requires_grad_(True)

    def forward(self, *arguments, **options):
        return self.used(*arguments, **options)


@pytest.mark.parametrize("init", ["gaussian", "mean"])
@pytest.mark.parametrize("sharing", ["none", "headwise", "layerwise"])
def test_what_stands_in_the_place_of_a_projection_is_called(sharing, init):
    stack = LinformerEncoder(32, 4, 48, 0.0, num_layers=2, sharing=sharing, init=init, **SIZES)
    x, mask = torch.randn(20, 4, 32), padding(4, 20)
    want = stack(x, src_key_padding_mask=mask)
    owners = [stack] if sharing == "layerwise" else [layer.self_attn for layer in stack.layers]
    for owner in owners:
        owner.projection = Copying(owner.projection)
    got = stack(x, src_key_padding_mask=mask)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    (got * torch.randn_like(got)).sum().backward()
    assert all(owner.projection.used.proj_key.grad.any() for owner in owners)


@pytest.mark.parametrize("sharing", ["none", "headwise", "key_value"])
def test_padding_anywhere_is_no_sequence(sharing):
    """Column n of E met position n, padding on the left included."""
    attention = LinformerAttention(32, 4, batch_first=True, sharing=sharing, **SIZES)
    x, mask = torch.randn(4, 20, 32), padding(4, 20)
    out = attention(x, key_padding_mask=mask)[0]
    for b in range(4):
        alone = attention(x[b, ~mask[b]])[0]
        torch.testing.assert_close(out[b, ~mask[b]], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["gaussian", "mean"])
def test_masks_of_the_modules_and_of_the_functions(init):
    """True = ignored here, True = takes part there. With from_first=False both count columns of E from position 0."""
    projection = LinformerProjection(N, 6, init=init, from_first=False)
    attention = LinformerAttention(32, 4, batch_first=True, projection=projection)
    x, mask = torch.randn(4, 20, 32), padding(4, 20)
    if init == "mean":  # rows of windows without a position would take part there
        x, mask = torch.randn(4, N, 32), torch.arange(N).expand(4, -1) % 4 == 0
    heads = [
        linear(x).unflatten(-1, (4, 8)).transpose(1, 2)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    ]
    matrices = attention.projection.proj_key, attention.projection.proj_value
    out = lk.linformer_attention(*heads, *matrices, key_padding_mask=~mask)
    want = attention.out_proj(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, key_padding_mask=mask)[0], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_traced_with_gradients(masked):
    """torch.jit.trace outside no_grad recorded a Python function; the trace takes other lengths and other masks."""
    layer = LinformerEncoderLayer(32, 4, 48, 0.0, batch_first=True, **SIZES).eval()
    function = (lambda x, mask: layer(x, None, mask)) if masked else (lambda x, mask: layer(x))

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, mask):
            return function(x, mask)

    inputs = lambda n: (torch.randn(4, n, 32), padding(4, n))  # noqa: E731
    traced = torch.jit.trace(Call(), inputs(20), check_trace=False)
    traced = torch.jit.load(io.BytesIO(traced.save_to_buffer()))
    for n in (20, 13):
        given = inputs(n)
        torch.testing.assert_close(traced(*given), function(*given), rtol=1e-4, atol=1e-5)


def test_per_sample_gradients():
    stack = LinformerEncoder(32, 4, 48, 0.0, num_layers=2, batch_first=True, sharing="layerwise", **SIZES)
    weights, x, mask = {n: w.detach() for n, w in stack.named_parameters()}, torch.randn(4, 20, 32), padding(4, 20)
    factors = torch.randn(20, 32)

    def loss(weights, x, mask):
        out = torch.func.functional_call(stack, weights, (x[None],), {"src_key_padding_mask": mask[None]})
        return (out[0] * factors).masked_fill(mask[:, None], 0).sum()

    with lk.use_backend("reference"):
        got = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, x, mask)
    for b in range(4):
        want = torch.autograd.grad(loss(dict(stack.named_parameters()), x[b], mask[b]), list(stack.parameters()))
        for name, one in zip(weights, want, strict=True):
            torch.testing.assert_close(got[name][b], one, rtol=1e-3, atol=1e-4 * (1 + one.abs().max().item()))


KINDS = [{}, {"init": "mean"}, {"kind": "mean"}, {"kind": "max"}, {"kind": "conv", "head_dim": 8}, {"kind": "adaptive"}]


def of_kind(options):
    return LinformerAttention(32, 4, batch_first=True, projection=LinformerProjection(N, 6, **options))


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_no_positions_and_a_mask_of_none(options):
    """Rows that stand for windows looked for the first position that takes part, and PyTorch's argmax found none."""
    attention, nothing = randomized(of_kind(options)), torch.zeros(2, 0, 32)
    given = {"key_padding_mask": torch.zeros(2, 0, dtype=torch.bool)}
    assert attention(nothing, **given)[0].shape == (2, 0, 32)
    out = attention(torch.randn(2, 5, 32), nothing, **given)[0]
    torch.testing.assert_close(out, attention.out_proj.bias.expand_as(out))


def test_a_mask_of_nan_is_refused():
    """It passed for a padded position."""
    x, mask = torch.randn(4, 20, 32), torch.zeros(4, 20)
    mask[0, 3] = torch.nan
    with pytest.raises(ValueError, match="adds other numbers"):
        of_kind({})(x, key_padding_mask=mask)


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_jagged_tensor_with_holes(norm_first):
    """torch.nested.narrow makes one: the layer's sums were of two tensors whose lengths PyTorch took for different."""
    layer = randomized(LinformerEncoderLayer(32, 4, 48, 0.0, norm_first=norm_first, **SIZES)).eval()
    starts, lengths = torch.tensor([0, 1, 2]), torch.tensor([4, 3, 6])
    narrow = torch.nested.narrow(torch.randn(3, 8, 32), 1, starts, lengths, layout=torch.jagged)
    for got, sequence in zip(layer(narrow).unbind(), narrow.unbind(), strict=True):
        torch.testing.assert_close(got, layer(sequence), rtol=1e-4, atol=1e-4)


def test_nested_tensors_under_another_default_device():
    attention = of_kind({})
    nested = torch.nested.nested_tensor([torch.randn(4, 32), torch.randn(2, 32)], layout=torch.jagged)
    want = attention(nested)[0].unbind()
    with torch.device("meta"):
        got = attention(nested)[0].unbind()
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("way", ["layer", "self_attn replaced"])
def test_dynamically_quantized_in_torch_encoder(way):
    """torch.ao's linear layers keep weight and bias behind methods, which torch.nn's encoder could not look at."""
    quantize = pytest.importorskip("torch.ao.quantization").quantize_dynamic
    layer = LinformerEncoderLayer(32, 4, 48, batch_first=True, **SIZES)
    if way == "self_attn replaced":
        attention, layer = layer.self_attn, nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        layer.self_attn = attention
    stack = nn.TransformerEncoder(layer, 2).eval()
    x, ignored = torch.randn(4, 20, 32), torch.zeros(4, 20, dtype=torch.bool)
    with torch.no_grad():
        got = quantize(stack, {nn.Linear})(x, src_key_padding_mask=ignored)
        torch.testing.assert_close(got, stack(x, src_key_padding_mask=ignored), rtol=0.1, atol=0.1)


class Packed(torch.Tensor):
    """As a weight of torchao's: it multiplies and is detached, and no more."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.cat:
            raise NotImplementedError("aten.cat")
        return super().__torch_function__(function, types, args, kwargs or {})


def test_weights_that_cannot_be_joined_in_torch_encoder():
    """torch.nn's encoder looks at in_proj_weight, which failed of weights that torchao's quantize_ had replaced."""
    stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2)
    for index in range(2):
        stack.layers[index] = LinformerEncoderLayer(32, 4, 48, batch_first=True, **SIZES)
    x, ignored = torch.randn(4, 20, 32), torch.zeros(4, 20, dtype=torch.bool)
    want = stack.eval()(x)
    for module in stack.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().as_subclass(Packed), requires_grad=False)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            got = stack(x, src_key_padding_mask=ignored).as_subclass(torch.Tensor)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_traced_with_a_mask(options):
    """With rows that stand for windows: torch.jit knows no product of a tensor and a bool."""
    attention = of_kind(options)

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = attention

        def forward(self, x, mask):
            return self.attention(x, key_padding_mask=mask)[0]

    traced = torch.jit.trace(Call(), (torch.randn(4, 20, 32), padding(4, 20)), check_trace=False)
    traced = torch.jit.load(io.BytesIO(traced.save_to_buffer()))
    given = torch.randn(4, 20, 32), padding(4, 20).flip(0, 1)
    torch.testing.assert_close(traced(*given), Call()(*given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_recorded_by_make_fx(options, pre_dispatch):
    """Its tensors look as if they could be read; reading one is an error of PyTorch's."""
    attention = of_kind(options)
    weights = {name: weight.detach() for name, weight in attention.named_parameters()}

    def call(weights, x, mask):
        return torch.func.functional_call(attention, weights, (x,), {"key_padding_mask": mask})[0]

    recorded = make_fx(call, pre_dispatch=pre_dispatch)(
        weights, torch.randn(4, 20, 32), torch.zeros(4, 20).masked_fill(padding(4, 20), -torch.inf)
    )
    given = torch.randn(4, 20, 32), torch.zeros(4, 20).masked_fill(padding(4, 20).flip(0, 1), -torch.inf)
    torch.testing.assert_close(recorded(weights, *given), call(weights, *given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_exported_with_a_dynamic_batch_and_a_mask(options):
    """Rows that stand for windows fixed the batch to that of the example."""
    layer = LinformerEncoderLayer(32, 4, 48, batch_first=True, projection=LinformerProjection(N, 6, **options)).eval()
    batch, n = torch.export.Dim("batch", min=1, max=9), torch.export.Dim("n", min=2, max=N)
    given = {"src": torch.randn(4, 20, 32), "src_key_padding_mask": padding(4, 20)}
    program = torch.export.export(layer, (), given, dynamic_shapes={key: {0: batch, 1: n} for key in given}).module()
    for given in ((torch.randn(5, 13, 32), padding(5, 13)), (torch.randn(1, N, 32), padding(4, N)[2:3])):
        torch.testing.assert_close(
            program(src=given[0], src_key_padding_mask=given[1]),
            layer(given[0], src_key_padding_mask=given[1]),
            rtol=1e-4,
            atol=1e-5,
        )


def run(code, *arguments):
    environment = os.environ | {"PYTHONPATH": str(Path(lk.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]


def test_a_pickled_module_in_a_process_that_imports_nothing(tmp_path):
    stack, x = LinformerEncoder(32, 4, 48, num_layers=1, activation="gelu", **SIZES).eval(), torch.randn(20, 2, 32)
    torch.save((stack, x, stack(x)), tmp_path / "stack.pt")
    run(
        "import sys, torch\n"
        "stack, x, want = torch.load(sys.argv[1], weights_only=False)\n"
        "assert torch.equal(stack(x), want)",
        str(tmp_path / "stack.pt"),
    )


def test_exported_to_onnx(tmp_path):
    """It failed, and nothing said that the reference is what ONNX takes."""
    pytest.importorskip("onnxscript")
    layer, x = LinformerEncoderLayer(32, 4, 48, batch_first=True, **SIZES).eval(), torch.randn(2, 20, 32)
    with torch.no_grad():
        model = torch.onnx.export(layer, (x,), dynamo=True, verbose=False).model_proto
    evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator(model)
    (got,) = evaluator.run(None, {model.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), layer(x), rtol=1e-4, atol=1e-5)


DISTRIBUTED = """
import sys, warnings, torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from linformer_kernels import LinformerAttention, LinformerEncoder, LinformerEncoderLayer, LinformerProjection
from processes import leave

QKV = ("q_proj", "k_proj", "v_proj")

def refused(make, says):
    try:
        make()
    except ValueError as error:
        assert says in str(error) and "wanted" in str(error), error
    else:
        raise AssertionError("not refused: " + says)

def close(got, want):
    assert (got - want).norm() <= 1e-5 * want.norm(), (got - want).norm() / want.norm()

def tensor_parallel(mesh):
    x, mask = torch.randn(20, 3, 32), torch.arange(20) > torch.tensor([[19], [11], [15]])
    columns = {name: ColwiseParallel() for name in QKV} | {"out_proj": RowwiseParallel()}
    for options in ({}, dict(sharing="key_value"), dict(num_kv_heads=2), dict(bias=False)):
        attention = LinformerAttention(32, 4, seq_len=24, proj_dim=6, **options)
        want = attention(x, key_padding_mask=mask)[0]
        (grad,) = torch.autograd.grad(want.square().sum(), attention.projection.proj_key)
        parallelize_module(attention, mesh, columns)
        got = attention(x, key_padding_mask=mask)[0]
        close(got, want)
        (part,) = torch.autograd.grad(got.square().sum(), attention.projection.proj_key)
        dist.all_reduce(part)  # of this process's heads
        close(part, grad)
    def make(names, **options):
        attention = LinformerAttention(32, 4, seq_len=24, proj_dim=6, **options)
        given = dict(columns)
        if options.pop("dtensor", None):
            given["q_proj"] = ColwiseParallel(use_local_output=False)
        return parallelize_module(attention, mesh, {name: given[name] for name in names})
    refused(lambda: make((*QKV, "out_proj"), num_kv_heads=1)(x), "whole heads")
    refused(lambda: make(("q_proj", "out_proj"), num_kv_heads=2)(x), "heads; wanted: the same part")
    refused(lambda: make((*QKV, "out_proj"), sharing="none")(x), "proj_key")
    attention = LinformerAttention(32, 4, seq_len=24, proj_dim=6)
    parallelize_module(attention, mesh, {"q_proj": ColwiseParallel(use_local_output=False)})
    refused(lambda: attention(x), "q_proj returned a DTensor")

def sharded(mesh):
    x = torch.randn(20, 2, 32)
    def check(model, parts):
        want = model(x)
        names, weights = zip(*model.named_parameters())
        factors = torch.randn_like(want)
        grads = torch.autograd.grad((want * factors).sum(), weights)
        for part in parts(model):
            fully_shard(part, mesh=mesh)
        out = model(x)
        close(out, want)
        (out * factors).sum().backward()
        for (name, weight), grad in zip(model.named_parameters(), grads):
            close(weight.grad.full_tensor(), grad)
    for sharing in ("layerwise", "headwise"):
        for checkpointing in (False, True):
            encoder = LinformerEncoder(32, 4, 48, 0.0, num_layers=2, seq_len=24, proj_dim=6, sharing=sharing,
                                       gradient_checkpointing=checkpointing)
            check(encoder, lambda model: [*model.layers, model])
    encoder = LinformerEncoder(32, 4, 48, 0.0, num_layers=2, seq_len=24, proj_dim=6, sharing="layerwise")
    check(encoder, lambda model: [model.projection, *model.layers, model])
    shared = LinformerProjection(24, 6)
    layers = [LinformerEncoderLayer(32, 4, 48, 0.0, projection=shared) for _ in range(2)]
    check(nn.Sequential(*layers), lambda model: [shared, *model, model])
    attention = [LinformerEncoderLayer(32, 4, 48, 0.0, seq_len=24, proj_dim=6)]
    check(nn.Sequential(*attention), lambda model: [model[0].self_attn.k_proj, model[0].self_attn.projection, model])

def started_on_meta(mesh):
    for init in ("mean", "identity", "gaussian"):
        with torch.device("meta"):
            model = LinformerEncoder(32, 4, 48, num_layers=2, batch_first=True, seq_len=24, proj_dim=6, init=init)
        for part in (*model.layers, model):
            fully_shard(part, mesh=mesh)
        model.to_empty(device="cpu")
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        assert model(torch.randn(2, 20, 32)).isfinite().all()
        projection = model.layers[0].self_attn.projection
        if init != "gaussian":
            assert torch.equal(projection.proj_key.full_tensor(), projection.window_rows(init == "mean").float())

def worker(rank, where):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method="file://" + where, rank=rank, world_size=2)
    torch.manual_seed(0)
    mesh = dist.init_device_mesh("cpu", (2,))
    globals()[sys.argv[1]](mesh)
    leave()

if __name__ == "__main__":
    torch.multiprocessing.spawn(worker, (sys.argv[2],), 2)
"""


@pytest.mark.parametrize("way", ["tensor_parallel", "sharded", "started_on_meta"])
def test_on_two_processes(way, tmp_path):
    """Tensor parallelism attended with narrower heads and another scale, in silence; FSDP2 of a projection failed."""
    script = tmp_path / "distributed.py"
    script.write_text(DISTRIBUTED)
    processes.start(script, way, tmp_path / "rendezvous")
