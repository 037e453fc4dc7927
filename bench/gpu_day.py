"""One day with a GPU: what only hardware can answer, in three phases, each in under ten minutes.

    python -m bench.gpu_day correctness     is it right there: smoke, tests/test_gpu.py, repetition under load
    python -m bench.gpu_day speed           times by CUDA graphs and events, ours, rivals and pieces; the profiler
    python -m bench.gpu_day doubt           sanitizers, other versions of ptxas, tuning, more than 2^31 elements

Each step is a process of its own (`bench.gpu_steps`) under a kill timer. One that hangs is killed and said to HANG, and
its backend is not called again in that phase. Output goes to PHASE.log as it comes; the summary is printed last, and
PHASE.json has it for programs. `--dry-run` shows the steps and runs nothing. This file imports no torch, so that no GPU
can stop it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).parents[1]
PHASES = ("correctness", "speed", "doubt")
BACKENDS = ("cuda", "triton")
LIMIT = 590.0  # seconds of a phase, of which the last few are for the summary
RESERVE = 6.0
LEAST = 3.0  # a step is not begun with less
COLD = 90.0  # seconds of silence, or of a short step, that mean a hang: Triton compiles some 10 s a kernel
SLOW = 1e4  # of a tool that says nothing while it works: it is cut, and its backend not blamed
TAIL = 11_000  # characters of the summary: who reads a tail of the output gets all of it
FACT = ">> "  # begins a line for the summary
CONDEMN = "!! "  # "!! cuda: why" takes a backend out, "!! all: why" all of them


@dataclass(frozen=True)
class Step:
    """A program, and how long it may take."""

    name: str
    command: Sequence[str]
    seconds: float
    backend: str = ""
    silence: float = math.inf  # it hangs if it prints nothing for so long; if that is inf, if it takes `seconds`
    environment: tuple[tuple[str, str], ...] = ()


@dataclass
class Result:
    name: str
    status: str  # ok, FAILED, CRASH, HANG, CUT: at work when its time was over, skipped
    seconds: float = 0.0
    note: str = ""
    facts: list[str] = field(default_factory=list)


class Running:
    """A step's process, which a thread listens to."""

    def __init__(self, step: Step, limit: float, day: Day) -> None:
        self.step, self.limit, self.day = step, limit, day
        self.facts: list[str] = []
        self.start = self.heard = time.monotonic()
        self.last = ""
        self.verdict: tuple[str, str] | None = None
        self.killed, self.patience = False, 0.0
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        mine = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
        self.process = subprocess.Popen(
            step.command, cwd=ROOT, env=os.environ | mine | dict(step.environment), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        self.thread = threading.Thread(target=self.listen, daemon=True)
        self.thread.start()

    def listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            line = line.rstrip("\n")
            self.heard = time.monotonic()
            self.last = line.strip() or self.last
            self.day.write(f"{self.step.name}| {line}")
            if line.startswith(FACT):
                self.facts.append(line[len(FACT) :])
            elif line.startswith(CONDEMN):
                backend, _, why = line[len(CONDEMN) :].partition(": ")
                self.day.condemn(backend, why)

    def poll(self, interrupted: bool) -> Result | None:
        """What came of it, or None while it is at work and within its time. Never waits."""
        now = time.monotonic()
        code = self.process.poll()
        if code is None and self.verdict is None:
            self.verdict = self.overdue(now, interrupted)
            if self.verdict is None:
                return None
            self.process.send_signal(signal.SIGABRT)  # Python prints where each thread is
            self.patience = now + 1
        if code is None and now < self.patience:
            return None
        if not self.killed:
            self.killed, self.patience = True, now + 3
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)  # with whatever it has left running
        if self.process.poll() is None and now < self.patience:
            return None
        self.thread.join(0.5)  # not for ever: who holds the pipe's other end may have left the group
        status, note = self.verdict or outcome(code, self.last)
        note += "; it cannot be killed" if self.process.poll() is None else ""
        return Result(self.step.name, status, round(now - self.start, 1), note, self.facts)

    def overdue(self, now: float, interrupted: bool) -> tuple[str, str] | None:
        if interrupted:
            return "CUT", "interrupted"
        if now - self.heard > self.step.silence:
            return "HANG", f"silent for {self.step.silence:g} s after: {self.last}"
        if now - self.start <= self.limit:
            return None
        if self.limit < self.step.seconds or self.step.silence < math.inf:
            return "CUT", f"still at work; its last line: {self.last}"
        return "HANG", f"not done in {self.limit:g} s; its last line: {self.last}"


def outcome(code: int | None, last: str) -> tuple[str, str]:
    if not code:
        return "ok", ""
    if code < 0:
        with contextlib.suppress(ValueError):
            return "CRASH", f"{signal.Signals(-code).name}; its last line: {last}"
    return "CRASH" if code < 0 else "FAILED", f"exit {code}; its last line: {last}"


class Day:
    """One phase: runs its steps, keeps what they say."""

    def __init__(self, phase: str, folder: Path, seconds: float = LIMIT) -> None:
        self.phase, self.folder = phase, folder
        self.begin = time.monotonic()
        self.stop = self.begin + max(seconds - RESERVE, LEAST)
        self.results: list[Result] = []
        self.condemned: dict[str, str] = {}
        self.interrupted = False
        self.lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self.log: TextIO = (folder / f"{phase}.log").open("w", buffering=1)

    def write(self, line: str) -> None:
        with self.lock:
            if not self.log.closed:
                self.log.write(line + "\n")

    def condemn(self, backend: str, why: str) -> None:
        self.condemned.setdefault(backend, why)

    def say(self, line: str) -> None:
        self.write(line)
        print(line, flush=True)

    def run(self, batches: Iterable[Sequence[Step]]) -> None:
        """One batch after the other, the steps of a batch at the same time."""
        for batch in batches:
            running: list[Running] = []
            for step in batch:
                if (reason := self.reason_against(step)) is not None:
                    self.keep(Result(step.name, "skipped", note=reason))
                    continue
                self.write(f"{step.name}| $ {shlex.join(step.command)}")
                running.append(Running(step, min(step.seconds, self.stop - time.monotonic()), self))
            while running:
                for one in list(running):
                    if (result := one.poll(self.interrupted)) is not None:
                        running.remove(one)
                        if result.status == "HANG" and one.step.backend:
                            self.condemn(one.step.backend, f"{result.name} hung")
                        self.keep(result)
                time.sleep(0.02)

    def reason_against(self, step: Step) -> str | None:
        if self.interrupted:
            return "interrupted"
        if step.backend in self.condemned:
            return f"{step.backend}: {self.condemned[step.backend]}"
        if "all" in self.condemned:
            return self.condemned["all"]
        return None if self.stop - time.monotonic() > LEAST else "no time left in this phase"

    def keep(self, result: Result) -> None:
        self.results.append(result)
        self.say(f"[{time.monotonic() - self.begin:5.0f} s] {row(result)}")
        for fact in result.facts:
            print(f"           {fact}", flush=True)
        part = self.folder / f"{self.phase}.json.part"
        part.write_text(json.dumps(self.as_data(), indent=1) + "\n")
        part.replace(self.folder / f"{self.phase}.json")

    def as_data(self) -> dict[str, Any]:
        return {
            "phase": self.phase, "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seconds": round(time.monotonic() - self.begin, 1), "condemned": dict(self.condemned),
            "results": [asdict(result) for result in self.results],
        }  # fmt: skip

    @property
    def good(self) -> bool:
        return all(result.status == "ok" for result in self.results)

    def summary(self) -> str:
        counts = Counter(result.status for result in self.results)
        head = ", ".join(f"{count} {status}" for status, count in counts.items())
        rows = [row(result) for result in self.results]
        rows += [f"not called any more: {backend}: {why}" for backend, why in self.condemned.items()]
        rows.append(f"== {self.phase}: {head}, in {time.monotonic() - self.begin:.0f} s")
        room = TAIL - sum(len(line) + 1 for line in rows)
        facts = [[f"  {fact}" for fact in result.facts] for result in self.results]
        title = f"\n== {self.phase}"
        while (most := max(facts, key=len, default=[])) and sum(
            len(fact) + 1 for some in facts for fact in some
        ) > room:
            most.pop()  # of the step that has the most to say
            title = f"\n== {self.phase}: not all figures fit here, {self.phase}.json has them"
        return "\n".join([title, *(fact for some in facts for fact in some), *rows])


def row(result: Result) -> str:
    note = result.note if len(result.note) <= 150 else result.note[:147] + "..."
    return f"{result.name:<30} {result.status:<8} {result.seconds:6.1f} s  {note}".rstrip()


def step(name: str, seconds: float, *arguments: str, backend: str = "", **more: Any) -> Step:
    """A step of `bench.gpu_steps`."""
    return Step(name, (sys.executable, "-m", "bench.gpu_steps", *arguments), seconds, backend, **more)


def batches(phase: str, folder: Path, ptxas: Sequence[str] = ()) -> Iterator[list[Step]]:
    """The steps of a phase; those of a list run at the same time."""
    yield [step("library", 180, "library")]
    yield [step("facts", 40, "facts")]
    # Before anything that takes long, also where only speed is asked for: who hangs here is out.
    kinds = ("fwd bfloat16", "full bfloat16", "full float32") if phase == "correctness" else ("full bfloat16",)
    for backend in BACKENDS:
        yield [
            step(f"smoke {backend} {kind}", COLD, "smoke", backend, *kind.split(), backend=backend) for kind in kinds
        ]
    yield from {"correctness": correctness, "speed": speed, "doubt": doubt}[phase](folder, ptxas)


def correctness(folder: Path, ptxas: Sequence[str]) -> Iterator[list[Step]]:
    for backend in BACKENDS:
        yield [step(f"first call captured {backend}", COLD, "first_capture", backend, backend=backend)]
    yield [step("smoke composed full bfloat16", COLD, "smoke", "composed", "full", "bfloat16")]
    for backend, shards, seconds, silence in (("cuda", 8, 120, 60), ("triton", 14, 230, 120)):
        yield [
            step(
                f"tests {backend} {shard + 1}/{shards}", seconds, "tests", backend, str(shard), str(shards),
                backend=backend, silence=silence,
            )
            for shard in range(shards)
        ]  # fmt: skip
        yield [step(f"races {backend}", 120, "races", backend, backend=backend, silence=silence)]


CELLS = {
    "main": "--batch=16 --seq-len=512,1k,4k --proj-dim=128,256 --op=fwd,bwd,full",
    "long": "--batch=1 --seq-len=4k,32k --proj-dim=256 --op=fwd,full",
    "waves": "--batch=9,17 --seq-len=4k --proj-dim=128 --op=fwd,bwd",
    "small": "--batch=8 --heads=12 --seq-len=512 --proj-dim=128 --op=fwd,full",
    "odd N": "--batch=64 --heads=12 --seq-len=197,200 --proj-dim=64 --op=fwd,full",
    "wide": "--batch=16 --head-dim=128 --seq-len=4k --proj-dim=256 --op=fwd,bwd",
    "float32": "--batch=4 --dtype=fp32 --seq-len=4k --proj-dim=256 --op=fwd,bwd",
}


def speed(folder: Path, ptxas: Sequence[str]) -> Iterator[list[Step]]:
    yield [step("pieces of PyTorch", 60, "pieces", "torch", "graph", silence=COLD)]
    for backend in BACKENDS:
        yield [step(f"pieces {backend}", 60, "pieces", backend, "graph", backend=backend, silence=COLD)]
    yield [step("host composed", COLD, "host", "composed")]
    for backend in BACKENDS:
        yield [step(f"host {backend}", COLD, "host", backend, backend=backend)]
    for name in CELLS:
        for backend in BACKENDS:
            yield [cells(name, backend, "graph", folder)]
    for backend in BACKENDS:
        yield [step(f"masked and packed {backend}", COLD, "others", backend, backend=backend)]
    for backend in BACKENDS:
        yield [step(f"profiler {backend}", 60, "profiler", backend, backend=backend, silence=SLOW)]
    for name in ("main", "long", "small"):
        for backend in BACKENDS:
            yield [cells(name, backend, "events", folder)]


def cells(name: str, backend: str, timing: str, folder: Path) -> Step:
    """Part of the grid of `python -m bench`, each cell with the rivals beside it; exact attention in one."""
    rivals = "bmm,sdpa_packed,sdpa_proj" + (",exact" if name == "main" and timing == "graph" else "")
    more = ("--dtype=bf16", "--cell-time=1", "--repeats=8", "--min-time=0.01", f"--timing={timing}")
    arguments = ("cells", str(folder / "cells.jsonl"), f"--backend={backend}", f"--rivals={rivals}", *more)
    return step(f"{name}: {backend}, {timing}", 90, *arguments, *CELLS[name].split(), backend=backend, silence=COLD)


def doubt(folder: Path, ptxas: Sequence[str]) -> Iterator[list[Step]]:
    uncached = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)  # each tensor its own allocation, so that strays show
    for backend in BACKENDS:
        name, more = f"memcheck {backend}", {"environment": uncached, "silence": SLOW}
        yield [step(name, 100, "sanitizer", "memcheck", backend, backend=backend, **more)]
    for tool in ("racecheck", "synccheck", "initcheck"):
        yield [step(f"{tool} cuda", 60, "sanitizer", tool, "cuda", backend="cuda", silence=SLOW)]
    yield [step("bits of ptxas", 150, "ptxas", *ptxas, backend="triton", silence=SLOW)]
    for backend in BACKENDS:
        yield [step(f"20,000 forwards {backend}", 60, "many", backend, "20000", backend=backend, silence=COLD)]
    for backend in BACKENDS:
        yield [step(f"over 2^31 elements {backend}", COLD, "tests", backend, "0", "1", "slow", backend=backend)]
    for k in ("128", "256"):
        yield [step(f"tune K = {k}", 200, "tune", k, backend="triton", silence=COLD)]


def chosen(batches: Iterable[Sequence[Step]], text: str) -> Iterator[list[Step]]:
    for number, batch in enumerate(batches):
        yield [one for one in batch if number < 2 or text in one.name]


def dry_run(phase: str, batches: Iterable[Sequence[Step]]) -> str:
    lines = [f"{phase}: at most {LIMIT:g} s; steps of a group run at the same time"]
    for number, batch in enumerate(batches, 1):
        for one in batch:
            silence = "" if one.silence == math.inf else f", {one.silence:g} s of silence"
            variables = " ".join(f"{name}={value} " for name, value in one.environment)
            lines.append(f"{number:3} {one.name}: at most {one.seconds:g} s{silence}")
            lines.append(f"      {variables}python {shlex.join(one.command[1:])}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_day", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("phase", choices=PHASES)
    out = Path(os.environ.get("OUT") or ROOT / "build" / "gpu_day")
    parser.add_argument("--out", type=Path, default=out, help="folder to write (default: $OUT, else build/gpu_day)")
    parser.add_argument("--seconds", type=float, default=LIMIT, help="of the whole phase (default: %(default)g)")
    parser.add_argument("--ptxas", action="append", default=[], metavar="PATH", help="doubt: another ptxas to compare")
    parser.add_argument("--only", default="", metavar="TEXT", help="steps with this in their names, and the first two")
    parser.add_argument("--dry-run", action="store_true", help="show the steps, run nothing")
    options = parser.parse_args(arguments)
    steps = chosen(batches(options.phase, options.out, options.ptxas), options.only)
    if options.dry_run:
        print(dry_run(options.phase, steps))
        return 0
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash with a GPU's memory mapped would write for minutes
    return run(options.phase, steps, options.out, options.seconds)


def run(phase: str, steps: Iterable[Sequence[Step]], folder: Path, seconds: float) -> int:
    """Run the steps of a phase and print its summary; 0 if every one was ok."""

    day = Day(phase, folder, seconds)

    def stop(*_: object) -> None:
        day.interrupted = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        day.run(steps)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        print(day.summary(), flush=True)
        day.log.close()
    return 0 if day.good else 1


if __name__ == "__main__":
    sys.exit(main())
