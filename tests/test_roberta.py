"""integrations/roberta.py: fairseq's Linformer against fairseq's own files, CALD's against its formula."""

import argparse
import copy
import io
import math

import fairseqs
import pytest
import torch
from oracle import PROMISE
from oracle import assert_as_promised as agree
from torch import nn
from transformers import RobertaConfig, RobertaForMaskedLM, RobertaForSequenceClassification, RobertaModel

from linformer_kernels.integrations.roberta import roberta_from_cald, roberta_from_fairseq
from linformer_kernels.integrations.transformers import load

VERSIONS = ("0.10.2", "0.12.2")
N, TOKENS, LAYERS = 48, 50, 3
SIZES = dict(
    encoder_layers=LAYERS, encoder_embed_dim=32, encoder_ffn_embed_dim=40, encoder_attention_heads=4, max_positions=N
)
SHARED = {
    "headwise": {},
    "key_value": {"shared_kv_compressed": 1},
    "layerwise": {"shared_layer_kv_compressed": 1},
    "layerwise, kv": {"shared_layer_kv_compressed": 1, "shared_kv_compressed": 1},
}


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module", params=VERSIONS)
def version(request):
    return request.param


@pytest.fixture(scope="module")
def module(version):
    with fairseqs.linformer_roberta(version) as module:
        yield module


def theirs(module, device, **options):
    model, args = fairseqs.build(module, TOKENS, **SIZES, compressed=5, **options)
    return fairseqs.drawn(model).to(device), args


def checkpoint(model, args):
    """As fairseq saves and torch loads it, whose pickles hold a Namespace: 0.12 in a configuration."""
    weights, file = model.state_dict(), io.BytesIO()
    options = {"args": None, "cfg": {"_name": None, "model": args}} if "encoder.version" in weights else {"args": args}
    torch.save({"model": weights, **options}, file)
    file.seek(0)
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(file, weights_only=True)


def gradients(peer):
    """A peer that has gradients for weights, shared as they are. Ours has no bias of values, but what it adds to the
    output: W (a + b_v) + b = W a + (W b_v + b), so that of the gradient of W the part of b_v is to be left out."""
    held = copy.deepcopy(peer)
    with torch.no_grad():
        for gradient, parameter in zip(held.parameters(), peer.parameters(), strict=True):
            gradient.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        for there, layer in zip(
            held.encoder.sentence_encoder.layers, peer.encoder.sentence_encoder.layers, strict=True
        ):
            attention, weights = there.self_attn, layer.self_attn
            agree(attention.v_proj.bias, attention.out_proj.bias @ weights.out_proj.weight, "gradient of b_v")
            attention.out_proj.weight -= torch.outer(attention.out_proj.bias, weights.v_proj.bias)
            attention.v_proj.bias.zero_()
    return held


def compare(peer, args, ours, want_output, got_output, head=None):
    """Gradients in float64 alone: some are sums of much that cancels."""
    agree(got_output, want_output, "logits")
    if got_output.dtype != torch.float64:
        return
    grad = torch.randn_like(got_output)
    want_output.backward(grad)
    got_output.backward(grad)
    want = dict(roberta_from_fairseq({"model": gradients(peer).state_dict(), "args": args}, head).named_parameters())
    for name, parameter in ours.named_parameters():
        if name.endswith(("self.key.bias", "self.value.bias")):
            assert not parameter.requires_grad and not parameter.any()
        elif name == "lm_head.bias" and not ours.config.tie_word_embeddings:
            assert parameter.grad is None  # transformers then takes that of the decoder, and keeps this one unused
        elif "token_type" not in name:  # theirs has none
            agree(parameter.grad, want[name], f"gradient of {name}")


@pytest.mark.parametrize("length", [N, 31])
@pytest.mark.parametrize("sharing", SHARED)
def test_masked_language_model_of_fairseq(sharing, length, module, version, dtype, device):
    """fairseq 0.10 shares nothing between layers, whatever it is told."""
    peer, args = theirs(module, device, **SHARED[sharing])
    ours = roberta_from_fairseq(checkpoint(peer, args)).to(device)
    assert type(ours) is RobertaForMaskedLM and ours.dtype == dtype
    made = ours.roberta.linformer
    shared = sharing.startswith("layerwise") and version == "0.12.2"
    assert len(made) == (1 if shared else LAYERS)
    assert ours.config.linformer["sharing"] == (
        "layerwise" if shared else "headwise" if sharing == "headwise" else "key_value"
    )
    assert made[0].proj_key.shape == (N // 5, N)
    tokens = torch.randint(4, TOKENS, (3, length), device=device)
    want, got = peer(tokens)[0], ours(tokens, attention_mask=torch.ones_like(tokens)).logits
    compare(peer, args, ours, want, got)


def test_untied_and_old_names_of_fairseq(module, dtype, device):
    peer, args = theirs(module, device, untie_weights_roberta=True)
    weights = {name.replace("encoder.", "decoder.", 1): weight for name, weight in reversed(peer.state_dict().items())}
    ours = roberta_from_fairseq({"model": weights, "cfg": {"model": args}}).to(device)
    assert not ours.config.tie_word_embeddings
    tokens = torch.randint(4, TOKENS, (3, 31), device=device)
    want, got = peer(tokens)[0], ours(tokens).logits
    compare(peer, args, ours, want, got)


def test_classifier_of_fairseq(module, dtype, device):
    peer, args = theirs(module, device, shared_kv_compressed=1)
    for name, count in (("other", 2), ("mnli", 3)):
        peer.register_classification_head(name, count)
    peer = fairseqs.drawn(peer).to(device)
    ours = roberta_from_fairseq(checkpoint(peer, args), head="mnli").to(device)
    assert type(ours) is RobertaForSequenceClassification and ours.config.num_labels == 3
    tokens = torch.randint(4, TOKENS, (3, 31), device=device)
    want, got = peer(tokens, classification_head_name="mnli")[0], ours(tokens).logits
    compare(peer, args, ours, want, got, "mnli")


def test_a_padded_text_is_what_it_is_alone(module, dtype, device):
    """In fairseq it is not: its E takes padded positions in."""
    peer, args = theirs(module, device)
    ours = roberta_from_fairseq(checkpoint(peer, args)).to(device)
    tokens = torch.randint(4, TOKENS, (2, 40), device=device)
    tokens[1, 29:] = 1
    got = ours(tokens, attention_mask=tokens != 1).logits
    agree(got[1, :29], peer(tokens[1:, :29])[0][0], "alone")
    agree(got[0], peer(tokens[:1])[0][0], "the longer one")
    there = peer(tokens)[0][1, :29]
    assert (there - got[1, :29]).abs().max() > 100 * PROMISE * there.abs().max()


def test_frozen_matrices_stay_frozen(module, device):
    peer, args = theirs(module, device, freeze_compress=1)
    ours = roberta_from_fairseq(checkpoint(peer, args)).to(device)
    assert not any("linformer" in name for name, _ in ours.named_parameters())
    tokens = torch.randint(4, TOKENS, (2, 20), device=device)
    agree(ours(tokens).logits, peer(tokens)[0], "frozen")


@pytest.mark.parametrize("sharing", ["headwise", "layerwise"])
def test_saved_and_loaded(sharing, module, device, tmp_path):
    ours = roberta_from_fairseq(checkpoint(*theirs(module, device, **SHARED[sharing])))
    ours.save_pretrained(tmp_path)
    again = load(RobertaForMaskedLM, tmp_path).eval()
    tokens = torch.randint(4, TOKENS, (2, 31))
    assert torch.equal(again(tokens).logits, ours(tokens).logits)


class Cald(nn.Module):
    """RoBERTa's self-attention after CALD's conversion: linear layers, E^T X / sqrt(length), exact attention to that.

    Of He and Garner 2025, section 3.1 and appendix; checked by hand against their file, see docs/peers.md.
    """

    def __init__(self, old: nn.Module, config, proj_k: nn.Parameter, proj_v: nn.Parameter) -> None:
        super().__init__()
        self.query, self.key, self.value = old.query, old.key, old.value
        self.heads, self.proj_k, self.proj_v = config.num_attention_heads, proj_k, proj_v

    def forward(self, hidden_states, attention_mask=None, **options):
        lengths = [hidden_states.size(1)] * len(hidden_states)
        if attention_mask is not None:
            taken = attention_mask if attention_mask.dtype == torch.bool else attention_mask > -1
            lengths = taken[:, 0, -1].sum(-1).tolist()
        outs = []
        for rows, length in zip(hidden_states, lengths, strict=True):
            key, value = (
                matrix[:length].T @ linear(rows[:length]) / math.sqrt(length)
                for linear, matrix in ((self.key, self.proj_k), (self.value, self.proj_v))
            )
            q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(0, 1) for x in (self.query(rows), key, value))
            scores = q @ k.transpose(1, 2) / math.sqrt(q.size(-1))
            outs.append((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
        return torch.stack(outs), None


def cald(mode: str, config: RobertaConfig, model_class=RobertaForSequenceClassification) -> nn.Module:
    """A model as CALD's code leaves it, with its names of weights: E of max_position_embeddings rows."""
    model = model_class._from_config(config, attn_implementation="eager").eval()
    draw = lambda: nn.Parameter(torch.randn(config.max_position_embeddings, 9))  # noqa: E731
    of_all = draw()
    for layer in model.base_model.encoder.layer:
        key = of_all if mode == "layer" else draw()
        value = draw() if mode == "none" else key
        layer.attention.self = Cald(layer.attention.self, config, key, value)
    return model


CONFIG = dict(
    vocab_size=TOKENS, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=40,
    max_position_embeddings=N, type_vocab_size=1, num_labels=3,
)  # fmt: skip


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("mode", ["none", "kv", "layer"])
def test_cald(mode, padded, dtype, device):
    config = RobertaConfig(**CONFIG)
    peer = cald(mode, config).to(device)
    ours = roberta_from_cald(RobertaForSequenceClassification, config, peer.state_dict()).to(device)
    assert ours.config.linformer["sharing"] == {"none": "headwise", "kv": "key_value", "layer": "layerwise"}[mode]
    tokens = torch.randint(4, TOKENS, (3, 31), device=device)
    mask = torch.ones_like(tokens)
    if padded:
        tokens[1, 20:], mask[1, 20:] = 1, 0
    want, got = (model(tokens, attention_mask=mask).logits for model in (peer, ours))
    agree(got, want, "logits")
    if dtype != torch.float64:
        return
    grad = torch.randn_like(got)
    want.backward(grad)
    got.backward(grad)
    named = dict(peer.named_parameters())
    for name, parameter in ours.named_parameters():
        if "linformer" in name:
            which = "k" if name.endswith("proj_key") else "v"
            found = named[f"roberta.encoder.layer.{name.split('.')[2]}.attention.self.proj_{which}"]
            # E is theirs / sqrt(N), so what its gradient is to theirs is the other way round.
            agree(parameter.grad, found.grad.T * N**0.5, f"gradient of {name}")
        else:
            agree(parameter.grad, named[name].grad, f"gradient of {name}")


@pytest.mark.parametrize("mode", ["kv", "layer"])
def test_cald_without_the_copies_that_a_file_leaves_out(mode, device):
    config = RobertaConfig(**CONFIG)
    weights = cald(mode, config, RobertaModel).state_dict()
    whole = roberta_from_cald(RobertaModel, config, weights)
    seen, kept = set(), {}
    for name, weight in reversed(weights.items()):  # as safetensors: one name for each tensor
        if weight.data_ptr() not in seen:
            seen.add(weight.data_ptr())
            kept[name] = weight
    tokens = torch.randint(4, TOKENS, (2, 31))
    want, got = (model(tokens).last_hidden_state for model in (whole, roberta_from_cald(RobertaModel, config, kept)))
    assert len(kept) < len(weights) and torch.equal(got, want)


def test_cald_with_a_decoder_of_its_own():
    """A config that ties it to the embeddings put its numbers there, in silence."""
    apart = RobertaConfig(**CONFIG, tie_word_embeddings=False)
    peer = cald("layer", apart, RobertaForMaskedLM)
    ours = roberta_from_cald(RobertaForMaskedLM, apart, peer.state_dict())
    tokens = torch.randint(4, TOKENS, (2, 31))
    agree(ours(tokens).logits, peer(tokens).logits, "logits")
    with pytest.raises(ValueError, match=r"word_embeddings\.weight than for .* wanted: .*tie_word_embeddings=False"):
        roberta_from_cald(RobertaForMaskedLM, RobertaConfig(**CONFIG), peer.state_dict())


def fake(**changes):
    """A checkpoint of fairseq of which no model was built."""
    layer = "encoder.sentence_encoder.layers.0.self_attn.compress_k.weight"
    return {"model": {layer: torch.zeros(4, 8)}, "args": argparse.Namespace(**changes)}


@pytest.mark.parametrize("make, error, message", [
    (lambda: roberta_from_fairseq(7), TypeError, "checkpoint is a int"),
    (lambda: roberta_from_fairseq({"model": {}}), ValueError, r"checkpoint holds \['model'\]"),
    (lambda: roberta_from_fairseq({"model": {}, "args": argparse.Namespace()}), ValueError, "compress_k"),
    (lambda: roberta_from_fairseq({"model": {"encoder.x": 0}, "args": {}}), ValueError, "holds 'encoder.x'"),
    (lambda: roberta_from_fairseq({"model": {"encoder.sentence_encoder.layer_norm.bias": 0}, "args": {}}),
     NotImplementedError, "norms before the layers"),
    (lambda: roberta_from_fairseq(fake(activation_fn="relu")), NotImplementedError, 'activation_fn="relu"'),
    (lambda: roberta_from_fairseq(fake(pooler_activation_fn="relu"), "a"), NotImplementedError, "pooler_activation_fn"),
    (lambda: roberta_from_fairseq(fake(), "mnli"), ValueError, "head is 'mnli' but checkpoint has none"),
    (lambda: roberta_from_fairseq(fake()), ValueError, "checkpoint lacks"),
    (lambda: roberta_from_cald(7, RobertaConfig(), {}), TypeError, "model_class is 7"),
    (lambda: roberta_from_cald(RobertaModel, RobertaConfig(), {}), ValueError, "proj_k"),
    (lambda: roberta_from_cald(RobertaModel, {}, {}), TypeError, "config is a dict"),
    (lambda: roberta_from_cald(RobertaModel, RobertaConfig(), None), TypeError, "weights is a NoneType"),
    (lambda: roberta_from_fairseq({"model": None, "args": {}}), TypeError, r'checkpoint\["model"\] is a NoneType'),
    (lambda: roberta_from_cald(RobertaModel, RobertaConfig(), {"layer.0.attention.self.proj_k": torch.zeros(4)}),
     ValueError, "proj_k of other than two dimensions"),
    (lambda: roberta_from_cald(RobertaModel, RobertaConfig(**CONFIG),
                               {"encoder.layer.0.attention.self.proj_k": torch.zeros(N, 4)}),
     ValueError, "checkpoint lacks"),
    (lambda: roberta_from_cald(RobertaModel, RobertaConfig(**CONFIG),
                               {f"encoder.layer.{i}.attention.self.proj_k": torch.zeros(N, i + 4) for i in range(3)}),
     ValueError, "of shapes"),
])  # fmt: skip
def test_a_checkpoint_of_another_shape_is_refused(make, error, message):
    with pytest.raises(error, match=message) as raised:
        make()
    assert "wanted: " in str(raised.value)
