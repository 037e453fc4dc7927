"""Makes docs/results.md and its pictures of the records in docs/results/runs. No number on the page is typed in.

python docs/results/page.py
"""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from plan import (
    CONTINUED,
    CONVERTED,
    CONVERTED_TASKS,
    CONVERTED_VARIANTS,
    LONGER,
    LONGER_NAME,
    RUNS,
    SEEDS,
    TEXTS,
    tuned_sizes,
)

FOLDER = Path(__file__).parents[1]  # of results.md; its pictures go to results/ beside it
NAMES = {"exact": "exact", "none": "no attention"} | {f"k{k}": f"K = {k}" for k in (32, 64, 128, 256)}
TASKS = {"imdb": "IMDB", "sst2": "SST-2", "qnli": "QNLI"}
Record = dict[str, Any]

INTRODUCTION = """\
# Results

What the paper claims, tried at the size that two CPU cores train in hours. Made by `python docs/results/page.py` from
the records in [results/runs](results/runs); each record holds its arguments, seed, versions and measurements, and
[results/plan.py](results/plan.py) is the list of runs and the queue that does them:

```console
python docs/results/plan.py --data DATA --work FOLDER --jobs 2
python docs/results/attention.py --data DATA --work FOLDER
python docs/results/page.py
```

**How to read it.** What a trained model does with Linformer attention is shown with MiniLM (6 layers, width 384),
which [examples/convert.py](../examples/convert.py) converts; with K = 1 every position attends to one and the same
mean, so K = 1 is the control that has no attention to speak of. Training from scratch is shown with models of 4
layers, width 128, 2 heads, which see {tokens:.1f} million tokens (the paper's corpus has 3,300 million words). These
learn which words are frequent and which go together in one text, and little of grammar: a model in which no position
sees another does as well, so their equal perplexities say less than the paper's. They start on a plateau, on which a
model knows how frequent each token is and nothing else: a perplexity of {plateau:.0f} on IMDB. *Stuck* are runs that
were still there at their end (within 2 %); it is largely luck which ones leave it in time, so a mean in which some are
stuck compares nothing but that. Variants of the small models (sharing, kinds of projection, N = 1024 and 2048) were
tried with one or two seeds and were mostly stuck; they are not shown, as MiniLM is converted in these ways instead.
Means and, after ±, standard deviations over seeds; *n* is the number of seeds on record. Minutes are of the processor,
as the machine was shared. Text: reviews of IMDB (every sixth of the training set) and the validation part of
WikiText-2; a tenth of each is held out.
"""


def records(name: str) -> list[Record]:
    """The runs NAME-SEED that are on record."""
    files = [RUNS / f"{name}-{seed}.json" for seed in SEEDS]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def last(record: Record, metric: str) -> float:
    value: float = record["held_out"][-1][metric]
    return value


def perplexity(record: Record) -> float:
    return math.exp(last(record, "loss"))


def stuck(record: Record) -> bool:
    """No better than word frequencies alone, or within 2 % of that: a small model from scratch."""
    arguments = record["arguments"]
    text = next(text for text, file in TEXTS.items() if Path(file).name == arguments["data"])
    return arguments.get("checkpoint") is None and perplexity(record) > 0.98 * frequencies()[text]


@functools.cache
def frequencies() -> dict[str, float]:
    found: dict[str, float] = json.loads((RUNS / "frequencies.json").read_text())
    return found


def count(found: list[Record]) -> str:
    bad = sum(map(stuck, found))
    return f"{len(found)}, {bad} stuck" if bad else str(len(found))


def weights(found: list[Record]) -> str:
    """In E and F, which are the same for every seed."""
    return f"{found[0]['projection_weights']:,}" if found else "not run yet"


def minutes(record: Record) -> float:
    return last(record, "cpu_seconds") / 60


def spread(values: list[float], form: str = ".1f") -> str:
    if not values:
        return "not run yet"
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {format(statistics.stdev(values), form)}" if len(values) > 1 else mean


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(head), *([str(cell) for cell in row] for row in rows)]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([text[0], "|" + " --- |" * len(lines[0]), *text[1:]]) + "\n"


def pretrained(names: dict[str, str]) -> str:
    """Rows of pretraining runs: title and name."""
    rows = []
    for title, name in names.items():
        found = records(name)
        measured = [spread([perplexity(r) for r in found]), weights(found), spread([minutes(r) for r in found])]
        rows.append([title, *measured, count(found)])
    return table(["", "held-out perplexity", "weights in E and F", "minutes", "n"], rows)


def against(title: str, name: str, other_title: str, other: str) -> str:
    """A sentence that compares two means with the spread of their seeds."""
    ours, theirs = ([math.log(perplexity(r)) for r in records(n)] for n in (name, other))
    if not ours or not theirs:
        return ""
    difference = statistics.mean(ours) - statistics.mean(theirs)
    sentence = (
        f"The loss of {title} is {abs(difference):.3f} {'above' if difference > 0 else 'below'} that of {other_title}"
    )
    if min(len(ours), len(theirs)) < 2:
        return sentence + " (one seed: the spread is not known)."
    noise = math.sqrt(statistics.variance(ours) / len(ours) + statistics.variance(theirs) / len(theirs))
    verdict = "more than" if abs(difference) > 2 * noise else "within"
    return f"{sentence}, {verdict} twice the standard error of the difference, {noise:.3f}."


def in_short(_: Path) -> str:
    """Each claim of the paper, and what the tables below say of it."""

    def of(value: Callable[[Record], float], name: str, form: str = ".0f") -> str:
        found = [value(record) for record in records(name)]
        return format(statistics.mean(found), form) if found else "(not run yet)"

    def percent(task: str, name: str) -> str:
        return of(lambda record: 100 * last(record, "accuracy"), f"minilm-{task}-{name}", ".1f")

    def sentence(record: Record) -> float:
        return last(record, "sentence_cosine")

    def listed(value: Callable[[Record], float], names: dict[str, str], form: str) -> str:
        ran = [f"{of(value, name, form)} ({title})" for title, name in names.items() if records(name)]
        return ", ".join(ran) or "(not run yet)"

    speedups = {(name, op): f"{before / after:.1f} times faster" for name, op, before, after, *_ in model_speeds()}
    tasks = "; ".join(
        f"{percent(task, 'exact')} % unconverted, {percent(task, f'k{k}')} % with K = {k} and "
        f"{percent(task, f'k{control}')} % with K = {control} on {TASKS[task]} (N = {n})"
        for task, _data, n, _sizes in CONVERTED_TASKS
        for k, control in [tuned_sizes(n)]
    )
    n, k = CONVERTED[0]
    sharings = {title: f"minilm-{name}" for title, name in variant_runs("sharing", "layerwise").items()}
    by_n = {f"N = {n}": f"minilm-n{n}-k64" for n, k in sorted(CONVERTED) if k == 64}
    by_k = {f"K = {k}": f"minilm-n512-k{k}" for n, k in sorted(CONVERTED) if n == 512}
    rows = [
        (
            "K = 128 comes near exact attention at N = 512",
            f"MiniLM as a masked language model has a held-out perplexity of {listed(perplexity, mlm_runs(), '.0f')}. "
            f"Fine-tuned, it has an accuracy of {tasks}. QNLI alone is about pairs of texts.",
        ),
        (
            "One matrix for all layers is as good as more",
            f"MiniLM converted at N = {n}, K = {k} keeps a cosine similarity of "
            + listed(sentence, sharings, ".3f") + ".",
        ),
        (
            "Quality depends on K, hardly on N",
            f"MiniLM keeps, with K = 64, a cosine similarity of {listed(sentence, by_n, '.2f')}; at N = 512 "
            f"{listed(sentence, by_k, '.2f')}.",
        ),
        (
            "Time and memory grow linearly",
            f"N = 4,096: the same steps on reviews by bytes take {of(minutes, 'bytes-exact', '.1f')} minutes with "
            f"exact attention and {of(minutes, 'bytes-k256', '.1f')} with K = 256; a model of RoBERTa-base's shape "
            f"with K = 128 is {speedups.get(('roberta-base', 'fwd'), '(not run yet)')} forward and "
            f"{speedups.get(('roberta-base', 'train'), '(not run yet)')} in training.",
        ),
    ]  # fmt: skip
    return "".join(f"- **{claim}.** {text}\n" for claim, text in rows)


def variant_runs(option: str, usual: str) -> dict[str, str]:
    """MiniLM converted at the first N and K, as usual and with each other value of an option: title and name."""
    n, k = CONVERTED[0]
    others = [name for name in CONVERTED_VARIANTS if name.startswith(f"{option}-")]
    return {usual: f"n{n}-k{k}"} | {name.removeprefix(f"{option}-"): name for name in others}


def mlm_runs() -> dict[str, str]:
    """MiniLM as a masked language model: title and name."""
    return {"exact": "minilm-mlm-exact"} | {f"K = {k}": f"minilm-mlm-k{k}" for k in sorted(CONTINUED)}


def draw(axis: Any, runs: dict[str, str], title: str, tokens: str) -> None:
    """Perplexity against steps, a line a seed; from the first evaluation on after which something was learned."""
    for color, (label, name) in enumerate(runs.items()):
        for index, record in enumerate(records(name)):
            points = [p for p in record["held_out"] if p["step"] > 0]
            x, y = [p["step"] for p in points], [math.exp(p["loss"]) for p in points]
            axis.plot(x, y, color=f"C{color}", label=label if index == 0 else None, alpha=0.8)
    axis.set(title=title, xlabel=f"steps of {tokens} tokens", ylabel="held-out perplexity", yscale="log")
    if axis.lines:
        axis.legend()


def continued(folder: Path) -> str:
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    draw(axis, mlm_runs(), "IMDB, from MiniLM", "1,024")
    figure.savefig(folder / "results" / "mlm.png", dpi=110)
    exact, ours, control = "minilm-mlm-exact", "minilm-mlm-k128", "minilm-mlm-k1"
    sentences = [
        against("K = 128", ours, "exact attention", exact), against("K = 1", control, "exact attention", exact),
        against("K = 1", control, "K = 128", ours),
    ]  # fmt: skip
    return f"{pretrained(mlm_runs())}\n{' '.join(filter(None, sentences))}".rstrip() + "\n"


def curves(folder: Path) -> str:
    titles = {"imdb": "IMDB", "wiki": "WikiText-2"}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    parts = []
    for axis, (text, title) in zip(axes, titles.items(), strict=True):
        rows = {label: f"{text}-{name}" for name, label in NAMES.items()}
        draw(axis, rows, title, "2,048")
        axis.axhline(frequencies()[text], color="gray", linestyle=":")
        sentence = against("K = 128", f"{text}-k128", "exact attention", f"{text}-exact")
        control = against("exact attention", f"{text}-exact", "no attention", f"{text}-none")
        parts.append(f"### {title}\n\n{pretrained(rows)}\n{sentence} {control}".rstrip() + "\n")
    figure.savefig(folder / "results" / "perplexity.png", dpi=110)
    return "\n".join(parts)


def longer(_: Path) -> str:
    runs = {name: f"imdb-longer-{name}" for name in ("exact", "k128", "none")}
    rows = pretrained({NAMES[name]: run for name, run in runs.items()})
    ours = against("K = 128", runs["k128"], "exact attention", runs["exact"])
    control = against("exact attention", runs["exact"], "no attention", runs["none"])
    return f"{rows}\n{ours} {control}".rstrip() + "\n"


def tuned(_: Path) -> str:
    rows = []
    for task, title in TASKS.items():
        for name, label in (("exact", "exact"), ("k128", "Linformer, K = 128")):
            found = records(f"{task}-tuned-{name}")
            values = [spread([100 * last(r, metric) for r in found]) for metric in ("accuracy", "f1")]
            rows.append([title, label, *values, spread([minutes(r) for r in found]), len(found)])
    return table(["task", "attention", "accuracy, %", "F1, %", "minutes", "n"], rows)


def by_bytes(_: Path) -> str:
    rows = []
    for name, label in (("exact", "exact"), ("k256", "Linformer, K = 256")):
        found = records(f"bytes-{name}")
        accuracy = spread([100 * last(r, "accuracy") for r in found])
        rows.append([label, accuracy, spread([minutes(r) for r in found]), len(found)])
    return table(["attention", "accuracy, %", "minutes", "n"], rows)


def spectra(folder: Path) -> str:
    found = json.loads((RUNS / "spectrum.json").read_text())
    figure, axes = plt.subplots(1, len(found), figsize=(5 * len(found), 3.6), layout="constrained", squeeze=False)
    for axis, (title, spectrum) in zip(axes[0], found.items(), strict=True):
        for index, layer in enumerate(spectrum["layers"]):
            axis.plot(range(1, len(layer) + 1), layer, label=f"layer {index}")
        axis.axvline(128, color="gray", linestyle=":")
        axis.set(title=title, xlabel="singular values", ylabel="cumulative share", ylim=(0, 1))
        axis.legend()
    figure.savefig(folder / "results" / "spectrum.png", dpi=110)
    depth = max(len(spectrum["layers"]) for spectrum in found.values())
    rows = [
        [title, *(f"{100 * layer[127]:.0f}" for layer in spectrum["layers"]), *[""] * (depth - len(spectrum["layers"]))]
        for title, spectrum in found.items()
    ]
    head = ["share of the 128 largest of 512 singular values, %", *(f"layer {index}" for index in range(depth))]
    return table(head, rows)


def kept(_: Path) -> str:
    rows = json.loads((RUNS / "starts.json").read_text())
    sizes = sorted({row["k"] for row in rows})

    def cell(init: str, sharing: str, k: int) -> str:
        wanted = (init, sharing, k)
        return spread([r["cosine"] for r in rows if (r["init"], r["sharing"], r["k"]) == wanted], ".3f")

    pairs = sorted({(row["init"], row["sharing"]) for row in rows})
    return table(
        ["start of E", "sharing", *(f"K = {k}" for k in sizes)],
        [[f'`"{init}"`', sharing, *(cell(init, sharing, k) for k in sizes)] for init, sharing in pairs],
    )


def cosines(titles: Iterable[str], rows: dict[tuple[object, ...], str]) -> str:
    """Conversions of MiniLM: cells with these titles, and name."""
    made = []
    for cells, name in rows.items():
        found = records(f"minilm-{name}")
        values = [
            spread([record["held_out"][index][metric] for record in found], ".3f")
            for metric in ("sentence_cosine", "token_cosine")
            for index in (0, -1)
        ]
        made.append([*cells, weights(found), *values, spread([minutes(r) for r in found]), len(found)])
    head = ["weights in E and F", "sentence, before", "after", "token, before", "after", "minutes", "n"]
    return table([*titles, *head], made)


def converted(_: Path) -> str:
    rows: dict[tuple[object, ...], str] = {
        (n, k, n // k): f"n{n}-k{k}" for n, k in sorted(CONVERTED, key=lambda size: (-size[0], size[1]))
    }
    n, k = LONGER
    return cosines(["N", "K", "N / K"], rows | {(n, f"{k}, longer", n // k): LONGER_NAME})


def variants(option: str, usual: str) -> str:
    """MiniLM converted with each value of an option, at the first N and K."""
    return cosines([""], {(title,): name for title, name in variant_runs(option, usual).items()})


def converted_and_tuned(_: Path) -> str:
    rows = []
    for task, _data, n, _sizes in CONVERTED_TASKS:
        runs = {"exact": "exact"} | {f"Linformer, K = {k}": f"k{k}" for k in tuned_sizes(n)}
        if n == LONGER[0]:
            runs[f"Linformer, K = {LONGER[1]}, converted longer"] = "longer"
        for label, name in runs.items():
            found = records(f"minilm-{task}-{name}")
            values = [spread([100 * last(r, metric) for r in found]) for metric in ("accuracy", "f1")]
            rows.append([TASKS[task], n, label, *values, spread([minutes(r) for r in found]), len(found)])
    return table(["task", "N", "attention", "accuracy, %", "F1, %", "minutes", "n"], rows)


def model_speeds() -> Iterator[tuple[str, str, float, float, Record, Record, Record]]:
    """Of each pair on record: model, operation, median seconds exact and ours, both results, and the whole record."""
    for name in ("minilm", "roberta-base"):
        file = RUNS / f"speed-{name}.json"
        if not file.exists():
            continue
        record = json.loads(file.read_text())
        for op in record["options"]["ops"]:
            exact, ours = (result for result in record["results"] if result["op"] == op)
            times = [statistics.median(result["seconds"]) for result in (exact, ours)]
            yield name, op, *times, exact, ours, record


def speed(_: Path) -> str:
    rows = []
    for name, op, before, after, exact, ours, record in model_speeds():
        o = record["options"]
        rows.append([
            f"{name}, {o['layers'] or 'all'} layers", op, o["seq_len"], o["proj_dim"], f"{before:.2f}", f"{after:.2f}",
            f"{before / after:.2f}", *(f"{r['extra_bytes'] / 2**20:,.0f}" for r in (exact, ours)),
            len(ours["seconds"]), record["machine"]["load_average"],
        ])  # fmt: skip
    head = [
        "model", "", "N", "K", "exact, s", "Linformer, s", "ratio", "exact, MiB", "Linformer, MiB", "samples", "load",
    ]  # fmt: skip
    return table(head, rows)


SECTIONS: list[tuple[str, str, Callable[[Path], str]]] = [
    (
        "In short",
        "In bold a claim of the paper, and after it what was measured here, whether it agrees or not. Means over the "
        "seeds on record; spreads are in the tables below.",
        in_short,
    ),
    (
        "What a trained model keeps after a short training",
        "[examples/convert.py](../examples/convert.py) gives MiniLM one E and F for all layers, which start as the "
        "mean over windows, and teaches it to give the original's hidden states on IMDB text without labels: 300 "
        "batches of 1,024 tokens (one sequence where N is 2,048), each cut to a random length; \"longer\": 1,500. "
        "Cosine similarity with the original on other text of N tokens, of sentence embeddings and of each token's "
        "hidden state, before and after. MiniLM takes 512 tokens; for more, it and its copy get its table of "
        "positions several times over.",
        converted,
    ),
    (
        "Perplexity against steps, from a trained model",
        "The paper (Figure 3): with N = 512, K = 128 comes near the exact model and K = 256 is as good. MiniLM "
        "itself, and as converted above, trained on as masked language models with a new head, 200 steps of 2 "
        "sequences of IMDB text, dropout as in the original.\n\n"
        "![Perplexity](results/mlm.png)",
        continued,
    ),
    (
        "Fine-tuning of a trained model",
        "MiniLM itself, and as converted above, fine-tuned in the same way; not for the best accuracy that it can "
        "reach, but few steps: IMDB 100 of 8 reviews (at most 512 tokens), evaluated on 1,000 of the test set; SST-2 "
        "and QNLI 250 of 16. Of QNLI only dev.tsv was at hand, four fifths of which (by a hash of the question) "
        "train. F1 is of the label 1. The minutes are those of the steps.",
        converted_and_tuned,
    ),
    (
        "Sharing",
        "The paper: one matrix shared by all layers is as good as any other sharing. MiniLM converted, N = 512, K = "
        "128, measured as above.",
        lambda _: variants("sharing", "layerwise"),
    ),
    (
        "Kinds of projection",
        "The paper (section 4) names pooling and convolution as alternatives to a learned matrix. `fixed` is random "
        "and not trained. MiniLM converted, N = 512, K = 128, one projection for all layers.",
        lambda _: variants("projection", "learned, mean start"),
    ),
    (
        "Perplexity against steps, from scratch",
        "Small models, N = 512. Dotted: what word frequencies alone give.\n\n![Perplexity](results/perplexity.png)",
        curves,
    ),
    (
        "Longer",
        "The same models on IMDB over six times as many steps, at half the rate; the text is then read several times.",
        longer,
    ),
    (
        "Fine-tuning of small models",
        "From the checkpoints above on IMDB's text. SST-2: its training set, once through at the most; QNLI as above; "
        "IMDB: 512 tokens of a review, 2,000 reviews of the test set.",
        tuned,
    ),
    (
        "Reviews by bytes, N = 4,096",
        "The long-range text benchmark, from scratch, 2 layers, 250 steps of 4 reviews: far too few for its published "
        "accuracies (about 64 %), enough for the time of both.",
        by_bytes,
    ),
    (
        "Spectrum of attention",
        "The paper (Figure 1): most of the sum of the singular values of an attention matrix is in the first 128 of "
        "512. Mean over heads and 16 texts of 512 tokens.\n\n"
        "![Spectrum](results/spectrum.png)",
        spectra,
    ),
    (
        "What a start of E keeps of a trained model",
        "Cosine similarity of MiniLM's sentence embeddings (N = 512, mean over positions) before and after "
        "`linformerize`, without any training; seeds draw the texts and the Gaussian E. `mean` and `identity` are the "
        "same matrix in every layer, whatever the sharing.",
        kept,
    ),
    (
        "Speed of whole models",
        "`python -m bench.models`, one thread, time of the processor, in turn in one run; weights are random. `train` "
        "is forward, backward and AdamW.",
        speed,
    ),
]  # fmt: skip


def make(folder: Path) -> Path:
    """Writes folder/results.md and its pictures."""
    seen = [
        json.loads(file.read_text())
        for file in RUNS.glob("imdb-*-0.json")
        if not ("tuned" in file.name or "longer" in file.name)
    ]
    tokens = [r["held_out"][-1]["step"] * r["arguments"]["batch"] * r["arguments"]["seq_len"] for r in seen]
    parts = [INTRODUCTION.format(tokens=max(tokens, default=0) / 1e6, plateau=frequencies()["imdb"])]
    for title, text, body in SECTIONS:
        try:
            made = body(folder)
        except FileNotFoundError as error:
            made = f"Not run yet: there is no {Path(str(error.filename)).name}.\n"
        parts.append(f"## {title}\n\n{text}\n\n{made}")
    page = folder / "results.md"
    page.write_text("\n".join(parts), encoding="utf-8")
    return page


if __name__ == "__main__":
    print(f"Page: {make(FOLDER)}")
