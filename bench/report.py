"""Results for people (tables, progress) and for programs (CSV, JSON)."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import asdict
from typing import Any

from bench import cost
from bench.measure import percentiles
from bench.options import Cell

Row = dict[str, Any]
MIB = 2**20
COLUMNS = ("p20", "p50", "p80", "slow", "GFLOP/s", "% peak", "x floor", "extra MiB", "vs best rival")
HEAD = f"  {'candidate':<15}" + "".join(f"{title:>11}" for title in COLUMNS[:-1]) + f"  {COLUMNS[-1]}"


class Progress:
    """A bar where stderr is a terminal and tqdm is installed, else one line a cell."""

    def __init__(self, cells: int) -> None:
        self.bar: Any = None
        self.cells, self.cell = cells, 0
        try:
            from tqdm import tqdm  # type: ignore[import-untyped]
        except ImportError:
            return
        if sys.stderr.isatty():
            form = "{desc:<18} {bar}| {n:.1f}/{total} cells, {elapsed}"
            self.bar = tqdm(total=cells, leave=False, bar_format=form)

    def start(self, cell: Cell) -> None:
        self.cell += 1
        if self.bar is None:
            print(f"[{self.cell}/{self.cells}] {cell}", file=sys.stderr, flush=True)

    def part(self, fraction: float, text: str) -> None:
        """How much of the present cell is done, and what comes now."""
        if self.bar is not None:
            self.bar.n = self.cell - 1 + fraction
            self.bar.set_description_str(text)

    def end(self, text: str) -> None:
        if self.bar is not None:
            self.bar.clear()
        print(text, flush=True)


def add_figures(rows: list[Row], cell: Cell, peaks: tuple[float, float], bandwidth: float) -> None:
    """Turns samples into percentiles, rates and ratios, in place."""
    timed = [row for row in rows if row["status"] == "ok"]
    for row in timed:
        row["p20_s"], row["p50_s"], row["p80_s"] = percentiles(row["samples"])
    # Exact attention gives another answer, so ours isn't held against it; its own row shows the ratio all the same.
    best = min((row for row in timed if row["kind"] == "rival"), key=lambda row: row["p50_s"], default=None)
    flop, size, peak = cost.flop(cell), cost.floor_bytes(cell), max(peaks)
    for row in timed:
        rate = cost.flop(cell, row["kind"] == "exact") / row["p50_s"]
        row |= {"needed_gflop": flop / 1e9, "floor_bytes": size, "floor_s": max(flop / peak, size / bandwidth)}
        row |= {"peak_before_gflop_per_s": peaks[0] / 1e9, "peak_after_gflop_per_s": peaks[1] / 1e9}
        row |= {"gflop_per_s": rate / 1e9, "peak_percent": 100 * rate / peak, "x_floor": row["p50_s"] / row["floor_s"]}
        if best is not None:
            row |= {"best_rival": best["candidate"], "vs_best_rival": best["p50_s"] / row["p50_s"]}


def cell_heading(cell: Cell, peaks: tuple[float, float], bandwidth: float) -> str:
    flop, size = cost.flop(cell), cost.floor_bytes(cell)
    seconds = flop / max(peaks), size / bandwidth
    bound = "operations" if seconds[0] >= seconds[1] else "bytes"
    return (
        f"\n{cell}\n  needs {flop / 1e9:.3g} GFLOP, {size / MIB:.4g} MiB: floor {duration(max(seconds))}, by {bound}; "
        f"peak before / after: {peaks[0] / 1e9:.0f} / {peaks[1] / 1e9:.0f} GFLOP/s"
    )


def table_row(row: Row) -> str:
    name = f"  {row['candidate']:<15}"
    if row["status"] != "ok":
        return f"{name}{row['status']}: {row['note']}"
    figures = [duration(row[key]) for key in ("p20_s", "p50_s", "p80_s")]
    slow = len(row["slow_samples"])
    # Samples that did not count, of how many; in brackets where they had to.
    figures.append(f"{slow}/{slow + len(row['samples'])}" if row["quiet"] else f"({slow}/{len(row['samples'])})")
    figures += [f"{row['gflop_per_s']:.1f}", f"{row['peak_percent']:.1f}", f"{row['x_floor']:.2f}"]
    figures.append(f"{row['extra_bytes'] / MIB:.2f}")
    ratio = ""
    if "best_rival" in row:
        ratio = "  best rival" if row["best_rival"] == row["candidate"] else f"  {row['vs_best_rival']:.2f}x"
    return name + "".join(f"{figure:>11}" for figure in figures) + ratio


def duration(seconds: float) -> str:
    unit, factor = ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("us", 1e6)
    return f"{seconds * factor:.4g} {unit}"


def dry_run(cells: list[Cell], peaks: dict[str, float]) -> str:
    lines = [f"{len(cells)} cells; times predicted at half the measured peak"]
    for cell in cells:
        ours, exact = (duration(2 * cost.flop(cell, exact) / peaks[cell.dtype]) for exact in (False, True))
        lines.append(
            f"{cell}: {cost.flop(cell) / 1e9:.3g} GFLOP, floor {cost.floor_bytes(cell) / MIB:.4g} MiB, "
            f"inputs and outputs {cost.tensor_bytes(cell) / MIB:.4g} MiB, {ours} a call, exact {exact}"
        )
    return "\n".join(lines)


def write_csv(path: str, rows: list[Row], machine: Row) -> None:
    """One line for each candidate of each cell, the machine on every line, so that files can be joined."""
    nested = ("cell", "samples", "slow_samples", "check")
    flat = [asdict(row["cell"]) | {k: row[k] for k in row if k not in nested} | machine for row in rows]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in flat for key in row)))
        writer.writeheader()
        writer.writerows(flat)


def write_json(path: str, rows: list[Row], machine: Row, command: list[str]) -> None:
    results = [row | {"cell": asdict(row["cell"])} for row in rows]
    with open(path, "w") as file:
        json.dump(
            {"command": command, "formulas": cost.FORMULAS, "machine": machine, "results": results}, file, indent=1
        )
        file.write("\n")
