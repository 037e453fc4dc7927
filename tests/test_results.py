"""docs/results.md is what the records say, and the plan of runs is one that the examples understand."""

import importlib.util
import itertools
import json
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[1] / "docs" / "results"


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(str(RESULTS))


def load(name):
    spec = importlib.util.spec_from_file_location(f"results_{name}", RESULTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_made_of_the_records(tmp_path):
    (tmp_path / "results").mkdir()
    made = load("page").make(tmp_path).read_text()
    assert made == (RESULTS.parent / "results.md").read_text(), "run python docs/results/page.py"


def test_records_are_of_planned_runs(tmp_path):
    """A record under a name says what the plan says under that name, argument by argument."""
    plan = load("plan")
    runs = {run.name: run for run in plan.plan()}
    assert len(runs) == len(plan.plan()) and all(run.after in {*plan.PREPARED, *runs} for run in runs.values())
    for name, run in runs.items():
        file = RESULTS / "runs" / f"{name}.json"
        if not file.exists():
            continue
        recorded = json.loads(file.read_text())["arguments"]
        flags = [*run.arguments, "--"]
        pairs = [(a, b) for a, b in itertools.pairwise(flags) if a.startswith("--")]
        for option, wanted in dict(pairs).items():  # of an option given twice the last one counts
            value = recorded[option.removeprefix("--").replace("-", "_")]
            if not wanted.startswith("--"):
                text = str(value).removesuffix(".tar.gz")  # of the data as it is distributed, or unpacked
                assert text == Path(wanted).name or value == pytest.approx(float(wanted)), (name, option)
            else:
                assert value is True, (name, option)


def a_checkpoint(folder):
    """What a script reads of a checkpoint before it loads it."""
    folder.mkdir(exist_ok=True)
    settings = {"seq_len": 512, "proj_dim": 1, "sharing": "layerwise", "projection": "learned"}
    config = {"max_position_embeddings": 512, "pad_token_id": 0, "linformer": settings}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")


def test_the_plan_is_understood(tmp_path, monkeypatch):
    """Every planned command line of pretraining and conversion, and of copies.py, is one that its script parses."""
    monkeypatch.syspath_prepend(str(RESULTS.parents[1] / "examples"))
    plan = load("plan")
    (tmp_path / "imdb.txt").write_text("A few words of text. " * 2000)
    convert = importlib.import_module("convert")
    monkeypatch.setattr(convert, "models", lambda options: (None, None, None))
    monkeypatch.setattr(convert, "read_task", lambda name, path: None)
    for script in ("pretrain_mlm", "convert"):
        runs = [run for run in plan.plan() if run.script == f"{script}.py"]
        assert runs
        for run in runs:
            if script == "pretrain_mlm" and run.after not in (None, plan.MINILM):
                a_checkpoint(tmp_path / run.after)
            _, *arguments = plan.command(run, tmp_path, tmp_path)[1:]
            importlib.import_module(script).parse_arguments([a for a in arguments if a != "--resume"])
    copies = load("copies")
    for run in plan.plan():
        if run.script == "copies.py":
            options = copies.parse_arguments(plan.command(run, tmp_path, tmp_path)[2:])
            assert f"copies-n{options.seq_len}-" in run.name and run.name.endswith(f"-{options.seed}")
