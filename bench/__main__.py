"""`python -m bench`: check every candidate's answer, time those that are right, report."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

# Read when torch loads: its profiler, which serves here to count bytes, else announces every start on stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch

from bench import cost, machine, measure, options, plot, report
from bench.candidates import Candidate, candidates, make_inputs
from bench.check import Checker
from bench.report import Row


def main() -> int:
    settings = options.parse()
    torch.set_num_threads(settings.threads)
    cells = options.cells(settings)
    if settings.dry_run:
        peaks = {dtype: machine.peak_flops(dtype, settings.device) for dtype in settings.dtype}
        print(report.dry_run(cells, peaks))
        return 0
    facts = machine.facts(settings)
    if settings.timing == "graph":
        facts["clock"] = "replays of CUDA graphs"
    print(cost.FORMULAS, "", *(f"{key}: {value}" for key, value in facts.items()), sep="\n")
    rows: list[Row] = []
    progress = report.Progress(len(cells))
    interrupted = False
    try:
        for cell in cells:
            progress.start(cell)
            rows += run_cell(cell, settings, progress)
    except KeyboardInterrupt:
        interrupted = True
    facts["load_average_end"] = machine.load_average()
    facts["probe_best_gflop_per_s"] = round(machine.Probe.best, 1)
    end = "\ninterrupted; what was measured is kept" if interrupted else ""
    progress.end(f"\nload average: {facts['load_average']} at the start, {facts['load_average_end']} at the end{end}")
    if settings.csv:
        report.write_csv(settings.csv, rows, facts)
    if settings.json:
        report.write_json(settings.json, rows, facts, sys.argv[1:])
    if settings.plot and (remark := plot.draw(settings.plot, rows, facts)):
        print(remark, file=sys.stderr)
    bad = any(row["status"] == "WRONG" or (row["status"] == "failed" and row["kind"] == "ours") for row in rows)
    return 130 if interrupted else int(bad)


def run_cell(cell: options.Cell, settings: argparse.Namespace, progress: report.Progress) -> list[Row]:
    found = candidates(settings, cell)
    rows: list[Row] = [{"cell": cell, "candidate": c.name, "kind": c.kind, "status": "ok", "note": ""} for c in found]
    bandwidth = machine.copy_bandwidth(settings.device)
    before = machine.peak_flops(cell.dtype, settings.device)
    needed = cost.tensor_bytes(cell) / 2**30
    if needed > settings.max_memory:
        for row in rows:
            row |= {"status": "skipped", "note": f"inputs and outputs, {needed:.3g} GiB, are over --max-memory"}
    else:
        attempt(rows, partial(measure_cell, cell, settings, found, rows, progress))
    peaks = before, machine.peak_flops(cell.dtype, settings.device)
    report.add_figures(rows, cell, peaks, bandwidth)
    head = "" if settings.refcheck else "\n" + report.HEAD
    progress.end("\n".join([report.cell_heading(cell, peaks, bandwidth) + head, *map(report.table_row, rows)]))
    return rows


def measure_cell(
    cell: options.Cell, settings: argparse.Namespace, found: list[Candidate], rows: list[Row], progress: report.Progress
) -> None:
    """Fills in the rows of one cell: first every answer, then the times of those who were right."""
    inputs = make_inputs(cell, settings.device)
    checkers: dict[bool, Checker] = {}
    runners: dict[str, measure.Runner] = {}

    def check(one: Candidate, row: Row) -> None:
        if reason := too_costly(one, cell, settings):
            row |= {"status": "skipped", "note": reason}
            return
        if one.exact not in checkers:
            checkers[one.exact] = Checker(cell, inputs, one.exact)
        verdicts = checkers[one.exact](one)
        row |= {"checked": checkers[one.exact].scope, "check": [asdict(verdict) for verdict in verdicts]}
        wrong = [str(verdict) for verdict in verdicts if not verdict.right]
        if wrong:
            row |= {"status": "WRONG", "note": "; ".join(wrong)}
        elif settings.refcheck:
            closest = max(verdicts, key=lambda verdict: verdict.error / verdict.limit)
            row |= {"status": "right", "note": f"{row['checked']}; closest to its limit: {closest}"}
        else:
            runner = measure.Runner(one.call, inputs, cell.op, one.exact, one.capability)
            row["extra_bytes"] = measure.extra_memory(runner, settings.device)
            runners[one.name] = runner

    for place, (one, row) in enumerate(zip(found, rows, strict=True)):
        progress.part(0.5 * place / len(found), f"checking {one.name}")
        attempt([row], partial(check, one, row))
    checkers.clear()
    stopwatch = (measure.GraphStopwatch if settings.timing == "graph" else measure.Stopwatch)(settings)
    live = {row["candidate"]: row for row in rows if row["candidate"] in runners}

    def sample() -> None:
        tick = partial(progress.part, text="timing in turn")
        for name, samples in measure.take_samples(runners, stopwatch, settings, tick).items():
            live[name] |= {"samples": samples.seconds, "slow_samples": samples.slow, "quiet": samples.quiet}

    if runners:
        attempt(list(live.values()), sample)


def too_costly(one: Candidate, cell: options.Cell, settings: argparse.Namespace) -> str | None:
    seconds, extra = measure.predict(one, cell, settings)
    gib = (extra + cost.tensor_bytes(cell)) / 2**30
    if seconds > settings.max_seconds:
        return f"predicted {report.duration(seconds)} a call, over --max-seconds {settings.max_seconds:g}"
    if gib > settings.max_memory:
        return f"predicted {gib:.3g} GiB, over --max-memory {settings.max_memory:.3g}"
    return None


def attempt(rows: list[Row], work: Callable[[], None]) -> None:
    """A candidate that refuses, fails or runs out of memory is a result, and the run goes on."""
    try:
        work()
    except (RuntimeError, ValueError, TypeError, ImportError, MemoryError) as error:
        text = str(error).strip() or type(error).__name__
        refused = isinstance(error, NotImplementedError) or "is not available" in text  # a backend that was asked for
        status = "refused" if refused else "failed"
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
            status = "out of memory"
        for row in rows:
            row |= {"status": status, "note": text.splitlines()[0]}


if __name__ == "__main__":
    sys.exit(main())
