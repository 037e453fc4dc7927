"""Makes docs/results.md and its pictures of the records in docs/results/runs. No number on the page is typed in.

python docs/results/page.py
"""

from __future__ import annotations

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
    ADAPTIVE,
    CONTINUED,
    CONVERTED,
    CONVERTED_TASKS,
    CONVERTED_VARIANTS,
    COPIES,
    COPIES_STEPS,
    LONGER,
    LONGER_NAME,
    RUNS,
    SEEDS,
    TAUGHT_MODELS,
    tuned_sizes,
)

FOLDER = Path(__file__).parents[1]  # of results.md; its pictures go to results/ beside it
TASKS = {"imdb": "IMDB", "sst2": "SST-2", "qnli": "QNLI"}
Record = dict[str, Any]

INTRODUCTION = """\
# Results

What Linformer attention costs a model, and what the paper claims of it, tried at the size that one or two CPU cores
train in hours. Made by `python docs/results/page.py` from the records in [results/runs](results/runs); each record
holds its arguments, seed, versions and measurements, and [results/plan.py](results/plan.py) is the list of runs and the
queue that does them:

```console
python docs/results/plan.py --data DATA --work FOLDER --jobs 2
python docs/results/attention.py --data DATA --work FOLDER
python docs/results/page.py
```

**How to read it.** Every experiment has a control without attention (no position sees another; or K = 1, where every
position attends to one and the same mean), and stands here only if that control does worse: otherwise it says nothing
about attention. Small language models trained from scratch on words were such, and reviews by bytes; they are gone.
What a trained model does with Linformer attention is shown with MiniLM (6 layers, width 384). Means and, after ±,
standard deviations over seeds; *n* is the number of seeds on record: where it is less than three, or a run is missing,
the plan has more than there was time for. Minutes are of the processor, as the machines were shared. IMDB's text: every
sixth review of the training set; a tenth of it is held out.
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
        rows.append([title, *measured, len(found)])
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

    def faster(op: str) -> str:
        found = [
            f"{speedup(*pair):.1f} times faster ({pair[1]['model']})"
            for record, name, *pair in model_speeds()
            if (record["options"]["shape"], name) == ("roberta-base", op)
        ]
        return ", ".join(found) or "(not run yet)"

    tasks = "; ".join(
        f"{percent(task, 'exact')} % unconverted, "
        + f"{percent(task, f'adaptive{k}')} % with an adaptive K = {k}, " * bool(records(f"minilm-{task}-adaptive{k}"))
        + f"{percent(task, f'k{k}')} % with a learned K = {k} and "
        f"{percent(task, f'k{control}')} % with K = {control} on {TASKS[task]} (N = {n})"
        for task, _data, n, _sizes in CONVERTED_TASKS
        for k, control in [tuned_sizes(n)]
    )
    n, k = CONVERTED[0]
    sharings = {title: f"minilm-{name}" for title, name in variant_runs("sharing", "layerwise").items()}
    by_n = {f"N = {n}": f"minilm-n{n}-k64" for n, k in sorted(CONVERTED) if k == 64}
    by_k = {f"K = {k}": f"minilm-n512-k{k}" for n, k in sorted(CONVERTED) if n == 512}
    bits = "; ".join(
        f"N = {n:,}: " + listed(bits_at_equal_steps, {COPIES_NAMES[m]: f"copies-n{n}-{m}" for m in COPIES_NAMES}, ".2f")
        for n in COPIES
        if records(f"copies-n{n}-exact")
    )
    rows = [
        (
            "K = 128 comes near exact attention at N = 512",
            f"MiniLM as a masked language model has a held-out perplexity of {listed(perplexity, mlm_runs(), '.0f')}. "
            f"Fine-tuned, it has an accuracy of {tasks}. QNLI alone is about pairs of texts. From scratch, where a "
            f"masked byte has to be found elsewhere in the window, bits for each after {COPIES_STEPS} steps: "
            f"{bits or '(not run yet)'}.",
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
            f"A model of RoBERTa-base's shape with K = 128 at N = 4,096 is {faster('fwd')} forward and "
            f"{faster('train')} in training.",
        ),
    ]  # fmt: skip
    made = "".join(f"- **{claim}.** {text}\n" for claim, text in rows)
    return f"{kept_in_short()}\nIn bold a claim of the paper, and after it what was measured:\n\n{made}"


def variant_runs(option: str, usual: str) -> dict[str, str]:
    """MiniLM converted at the first N and K, as usual and with each other value of an option: title and name."""
    n, k = CONVERTED[0]
    others = [name for name in CONVERTED_VARIANTS if name.startswith(f"{option}-")]
    return {usual: f"n{n}-k{k}"} | {name.removeprefix(f"{option}-"): name for name in others}


def mlm_runs() -> dict[str, str]:
    """MiniLM as a masked language model: title and name."""
    return {"exact": "minilm-mlm-exact"} | {f"K = {k}": f"minilm-mlm-k{k}" for k in sorted(CONTINUED)}


def draw(axis: Any, runs: dict[str, str], title: str, steps: str, metric: Callable[[Record], float]) -> None:
    """What was measured on held-out text against steps, a line a seed; from the first evaluation on after which
    something was learned."""
    for color, (label, name) in enumerate(runs.items()):
        for index, record in enumerate(records(name)):
            points = [p for p in record["held_out"] if p["step"] > 0]
            x, y = [p["step"] for p in points], [metric(p) for p in points]
            axis.plot(x, y, color=f"C{color}", label=label if index == 0 else None, alpha=0.8)
    axis.set(title=title, xlabel=steps)
    if axis.lines:
        axis.legend()


def continued(folder: Path) -> str:
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    draw(axis, mlm_runs(), "IMDB, from MiniLM", "steps of 1,024 tokens", lambda point: math.exp(point["loss"]))
    axis.set(ylabel="held-out perplexity", yscale="log")
    figure.savefig(folder / "results" / "mlm.png", dpi=110)
    exact, ours, control = "minilm-mlm-exact", "minilm-mlm-k128", "minilm-mlm-k1"
    sentences = [
        against("K = 128", ours, "exact attention", exact), against("K = 1", control, "exact attention", exact),
        against("K = 1", control, "K = 128", ours),
    ]  # fmt: skip
    return f"{pretrained(mlm_runs())}\n{' '.join(filter(None, sentences))}".rstrip() + "\n"


COPIES_NAMES = {"none": "no attention", "k64": "K = 64", "k128": "K = 128", "k256": "K = 256", "exact": "exact"}


def bits_at_equal_steps(record: Record) -> float:
    """After COPIES_STEPS; a longer run is read there."""
    value: float = next(p for p in record["held_out"] if p["step"] == COPIES_STEPS)["bits"]
    return value


def seconds_a_step(record: Record) -> float:
    return last(record, "cpu_seconds") / last(record, "step")


def exact_by_then(n: int, found: list[Record]) -> str:
    """Bits of exact attention of the same seeds, at its last evaluation before these runs ended, by the processor."""
    values = []
    for record in found:
        seed, end = record["arguments"]["seed"], last(record, "cpu_seconds")
        for exact in records(f"copies-n{n}-exact"):
            points = [p["bits"] for p in exact["held_out"] if p["cpu_seconds"] <= end]
            if exact["arguments"]["seed"] == seed and points:
                values.append(points[-1])
    return spread(values, ".2f")


def copies(folder: Path) -> str:
    figure, axes = plt.subplots(1, len(COPIES), figsize=(4 * len(COPIES), 3.6), layout="constrained", sharey=True)
    rows = []
    for axis, n in zip(axes, COPIES, strict=True):
        draw(
            axis, {label: f"copies-n{n}-{name}" for name, label in COPIES_NAMES.items()}, f"N = {n:,}",
            "steps of 2,048 bytes", lambda point: point["bits"],
        )  # fmt: skip
        for name, label in COPIES_NAMES.items():
            if found := records(f"copies-n{n}-{name}"):
                pace, steps = statistics.mean(map(seconds_a_step, found)), last(found[0], "step")
                row = [
                    f"{n:,}",
                    label,
                    spread([bits_at_equal_steps(r) for r in found], ".2f"),
                    f"{COPIES_STEPS * pace:.0f}",
                ]
                longer = [
                    steps,
                    spread([last(r, "bits") for r in found], ".2f"),
                    f"{steps * pace:.0f}",
                    "" if name == "exact" else exact_by_then(n, found),
                ]
                rows.append([*row, *(longer if steps > COPIES_STEPS else [""] * 4), len(found)])
    axes[0].set(ylabel="bits for each masked byte, held out")
    figure.savefig(folder / "results" / "copies.png", dpi=110)
    plt.close(figure)
    all_runs = [record for n in COPIES for name in COPIES_NAMES for record in records(f"copies-n{n}-{name}")]
    processors = sorted({record["machine"]["processor"] for record in all_runs if "processor" in record["machine"]})
    head = [
        "N",
        "attention",
        f"bits after {COPIES_STEPS} steps",
        "seconds",
        "went on to step",
        "bits",
        "seconds",
        "exact in that time",
        "n",
    ]
    return f"{table(head, rows)}\nMeasured on: {'; '.join(processors) or 'nothing yet'}, one thread.\n"


KEPT_KINDS = {
    "exact": "exact", "adaptive": "adaptive", "valid": "windows over the text", "windows": "windows over N = 512",
    "gaussian": "learned, as it starts", "none": "no attention",
}  # fmt: skip
KEPT_TASKS = {
    "sentences": "sentences of QNLI",
    "pairs": "pairs of QNLI",
    "passages": "passages of 512 tokens",
    "reviews": "reviews of IMDB",
}


def kept_rows(name: str = "kept") -> list[Record]:
    file = RUNS / f"{name}.json"
    rows: list[Record] = json.loads(file.read_text())["rows"] if file.exists() else []
    return rows


def kept_value(task: str, kind: str, k: int | None, metric: str) -> float | None:
    """Of the conversion as linformerize makes it."""
    found = [r for r in kept_rows() if (r["task"], r["kind"], r["k"], r.get("singles")) == (task, kind, k, None)]
    return found[0][metric] if found else None


def kept_in_short() -> str:
    """What linformerize(projection="adaptive") keeps without training."""
    parts = []
    for k in (64, 128, 256):
        cosine = kept_value("reviews", "adaptive", k, "cosine")
        passages = kept_value("passages", "adaptive", k, "accuracy")
        if cosine is not None and passages is not None:
            parts.append(f"with K = {k} a cosine similarity of {cosine:.3f} and {100 * passages:.1f} %")
    exact, none = (kept_value("passages", kind, None, "accuracy") for kind in ("exact", "none"))
    if not parts or exact is None or none is None:
        return "Not run yet: what a conversion keeps without training.\n"
    return (
        'MiniLM converted by `linformerize(model, proj_dim=K, projection="adaptive")`, without any training, keeps '
        "of its embeddings of reviews, and finds of the passages for questions about them, "
        f"{', '.join(parts)}; exact attention finds {100 * exact:.1f} %, no attention {100 * none:.1f} %. A text of up "
        f"to K tokens is kept exactly. {pairs_in_short()}\n"
    )


def pairs_in_short() -> str:
    """Where fewer rows than tokens cost most: each kind beside exact attention, at the smallest K on record."""
    rows = [r for r in kept_rows() if r["task"] == "pairs"]
    sizes = [r["k"] for r in rows if r["k"]]
    if not sizes:
        return ""
    k = min(sizes)
    right = {r["kind"]: f"{100 * r['accuracy']:.1f} %" for r in rows if r["k"] in (k, None)}
    listed = [f"{right[kind]} ({KEPT_KINDS[kind]})" for kind in KEPT_KINDS if kind in right]
    return f"Fine-tuned for pairs of texts before, and converted to K = {k}, it is right in {', '.join(listed)}."


def kept(_: Path) -> str:
    parts = []
    for task, title in KEPT_TASKS.items():
        rows = [r for r in kept_rows() if r["task"] == task and r.get("singles") is None]
        sizes = sorted({r["k"] for r in rows if r["k"]})
        lines = []
        for kind, label in KEPT_KINDS.items():
            mine = {r["k"]: r for r in rows if r["kind"] == kind}
            if not mine:
                continue
            if None in mine:
                mine = dict.fromkeys(sizes, mine[None])
            same = "cosine" if "cosine" in rows[0] else "same_as_exact"
            cells = [f"{mine[k][same]:.4f}" if k in mine else "-" for k in sizes]
            cells += [f"{100 * mine[k]['accuracy']:.1f}" if k in mine else "-" for k in sizes]
            lines.append([label, *cells])
        if lines:
            what = ", ".join(f"{count} {name}" for name, count in counts(rows).items())
            share = next((r["accuracy"] for r in rows if r["kind"] == "exact"), 0.5)
            error = 100 * math.sqrt(share * (1 - share) / next(iter(counts(rows).values())))
            what += f"; the standard error of the share that exact attention has right is {error:.1f} points"
            kept_as = "cosine" if "cosine" in rows[0] else "same answer"
            head = ["", *(f"{kept_as}, K = {k}" for k in sizes), *(f"%, K = {k}" for k in sizes)]
            parts.append(f"### {title[0].upper()}{title[1:]}\n\n{what}.\n\n{table(head, lines)}")
    return "\n".join(parts) or "Not run yet.\n"


def counts(rows: list[Record]) -> dict[str, int]:
    """How many of what a cell measures, which all cells of a task have in common."""
    found: dict[str, int] = rows[0]["counts"]
    assert all(r["counts"] == found for r in rows)
    return found


def choices(_: Path) -> str:
    tried = {(r["task"], r["k"]) for r in kept_rows() if r.get("singles") is not None}
    rows = [r for r in kept_rows() if r["kind"] == "adaptive" and (r["task"], r["k"]) in tried]
    rows.sort(key=lambda r: (r["task"], r["k"], r["singles"] or 0))
    lines = [
        [
            r["task"],
            r["k"],
            r["singles"] or "by default",
            f"{r['cosine']:.4f}" if "cosine" in r else "",
            100 * r["accuracy"],
        ]
        for r in rows
    ]
    for line in lines:
        line[-1] = f"{line[-1]:.1f}"
    return table(["", "K", "part for single tokens", "cosine", "%"], lines) if lines else "Not run yet.\n"


def taught(_: Path) -> str:
    rows = []
    for task, _data, n, _sizes in CONVERTED_TASKS:
        for kind, k in TAUGHT_MODELS[n]:
            found = records(f"taught-{task}-{kind}{k}")
            if not found:
                continue
            seeds = {r["arguments"]["seed"] for r in found}
            teachers = [r for r in records(f"minilm-{task}-exact") if r["arguments"]["seed"] in seeds]
            values = [spread([100 * last(r, "accuracy") for r in teachers])]
            values += [spread([100 * r["held_out"][index]["accuracy"] for r in found]) for index in (0, -1)]
            rows.append([TASKS[task], n, f"{kind}, K = {k}", *values, spread([minutes(r) for r in found]), len(found)])
    head = ["task", "N", "attention", "exact, %", "converted, %", "taught, %", "minutes", "n"]
    return table(head, rows) if rows else "Not run yet.\n"


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
        runs = {"exact": "exact"}
        runs |= {f"adaptive, K = {k}, not taught": f"adaptive{k}" for length, k in ADAPTIVE if length == n}
        runs |= {f"learned, K = {k}": f"k{k}" for k in tuned_sizes(n)}
        if n == LONGER[0]:
            runs[f"learned, K = {LONGER[1]}, converted longer"] = "longer"
        for label, name in runs.items():
            found = records(f"minilm-{task}-{name}")
            values = [spread([100 * last(r, metric) for r in found]) for metric in ("accuracy", "f1")]
            rows.append([TASKS[task], n, label, *values, spread([minutes(r) for r in found]), len(found)])
    return table(["task", "N", "attention", "accuracy, %", "F1, %", "minutes", "n"], rows)


def model_speeds() -> Iterator[tuple[Record, str, Record, Record]]:
    """Of each pair on record: the whole record, the operation, what exact attention took, and what another did."""
    for name in ("minilm", "roberta-base"):
        file = RUNS / f"speed-{name}.json"
        record = json.loads(file.read_text()) if file.exists() else {"results": []}
        exact: dict[str, Record] = {result["op"]: result for result in record["results"] if result["model"] == "exact"}
        for result in record["results"]:
            if result["model"] != "exact":
                yield record, result["op"], exact[result["op"]], result


def speedup(exact: Record, other: Record) -> float:
    return statistics.median(exact["seconds"]) / statistics.median(other["seconds"])


def speed(_: Path) -> str:
    rows = []
    for record, op, exact, other in model_speeds():
        o, pair = record["options"], (exact, other)
        rows.append([
            f"{o['shape']}, {o['layers'] or 'all'} layers", op, o["seq_len"], o["proj_dim"], other["model"],
            *(f"{statistics.median(result['seconds']):.2f}" for result in pair), f"{speedup(*pair):.2f}",
            *(f"{result['extra_bytes'] / 2**20:,.0f}" for result in pair), len(other["seconds"]),
            f"{record['machine']['device']}, {record['machine']['capability']}",
        ])  # fmt: skip
    head = [
        "shape", "", "N", "K", "attention", "exact, s", "this, s", "ratio", "exact, MiB", "this, MiB", "samples",
        "processor",
    ]  # fmt: skip
    return table(head, rows)


SECTIONS: list[tuple[str, str, Callable[[Path], str]]] = [
    ("In short", "Means over the seeds on record; spreads are in the tables below.", in_short),
    (
        "What a trained model keeps without training",
        "MiniLM as it is, with other attention in it; nothing was trained after the change. Cosine similarity of its "
        "embeddings to those of exact attention, and a task. Sentences and passages: a question of QNLI finds the "
        "sentence, or the passage, that answers it among all others, by its embedding. A passage is filled with "
        "sentences of QNLI up to 512 tokens. Reviews: the sign of a linear classifier that was fitted to embeddings of "
        "the exact model, on other reviews, and stays as it is. Pairs: whether a sentence answers a question, both "
        "in one text, by MiniLM as fine-tuned on that with exact attention, and the share of answers that stay the "
        "same. Reviews have up to 512 tokens, sentences mostly less than 64.\n\n*Adaptive*: "
        "`linformerize(projection=\"adaptive\")`; windows over the text: `projection=\"mean\", "
        "windows=\"valid\"`; windows over N: `projection=\"mean\"`; learned, as it starts: a Gaussian E with "
        "`length_norm`.",
        kept,
    ),
    (
        "Single tokens in an adaptive projection",
        "Which part of K is for single tokens, `singles`; the rest is for windows over the other tokens; measured "
        "as above.",
        choices,
    ),
    (
        "Where attention matters from scratch",
        "The model of [examples/train_mlm.py](../examples/train_mlm.py) (2 layers, width 64, 4 heads, a convolution "
        "over 7 bytes below), [results/copies.py](results/copies.py): masked bytes of windows that hold one text of "
        "128 bytes again and again, each time from another byte on. A masked byte stands elsewhere in the window, and "
        "attention can find it by its neighbors. On plain text that model learns from its convolution alone for longer "
        "than these runs last, with and without attention. K = 128 "
        f"went on until it had had about the time of {COPIES_STEPS} steps of exact attention, and the model without "
        "attention as many steps; exact attention goes on where it has learned little by then.\n\n"
        "![Bits against steps](results/copies.png)",
        copies,
    ),
    (
        "What a trained model keeps after a short training",
        "[examples/convert.py](../examples/convert.py) gives MiniLM one learned E and F for all layers, which start as "
        "the mean over windows, and teaches it to give the original's hidden states on IMDB text without labels: 300 "
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
        "Converted after fine-tuning",
        "MiniLM fine-tuned with exact attention as above, converted, and evaluated as it is; and after 100 steps in "
        "which it was taught on the task (`convert.py --task`): the task's loss and the mean square of what every "
        "layer's hidden states lack of the teacher's, as in CALD (arXiv 2410.06846). On 1,000 examples at most.",
        taught,
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
        "Spectrum of attention",
        "The paper (Figure 1): most of the sum of the singular values of an attention matrix is in the first 128 of "
        "512. Mean over heads and 16 texts of 512 tokens.\n\n"
        "![Spectrum](results/spectrum.png)",
        spectra,
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
    parts = [INTRODUCTION]
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
