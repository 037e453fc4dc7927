"""Time and extra memory of one candidate: calls, samples, percentiles."""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench import cost, machine
from bench.candidates import Candidate, Inputs, eager, make_inputs, small_version
from bench.options import Cell

FLUSH_BYTES = 256 << 20
FEWEST = 3  # samples of which percentiles are made
PROBE_FLOP = 1e9


class Runner:
    """One candidate on one set of inputs: `prepare` is never timed, `run` always is."""

    def __init__(self, call: Callable[..., Tensor], inputs: Inputs, op: str, exact: bool, capability: str = "") -> None:
        self.call, self.inputs, self.op, self.capability = call, inputs, op, capability
        self.leaves = inputs.leaves(exact)

    def prepare(self) -> Tensor | None:
        machine.use_capability(self.capability)
        return self.call(*self.inputs.tensors) if self.op == "bwd" else None

    def run(self, out: Tensor | None, keep: bool = False) -> list[Tensor]:
        """With `keep` the backward pass of the same `out` can be run again."""
        if self.op == "fwd":
            with torch.no_grad():
                return [self.call(*self.inputs.tensors)]
        out = self.call(*self.inputs.tensors) if out is None else out
        return [out, *torch.autograd.grad(out, self.leaves, self.inputs.grad_out, retain_graph=keep)]


class Stopwatch:
    """Seconds a call, by wall clock, CPU time or CUDA events."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.cuda = options.device == "cuda"
        self.now: Callable[[], float] = time.process_time if options.clock == "cpu" else time.perf_counter
        self.junk = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=options.device) if options.flush else None

    def mark(self) -> Any:
        if not self.cuda:
            return self.now()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def sample(self, runner: Any, calls: int) -> float:
        marks = []
        for _ in range(calls):
            state = runner.prepare()
            if self.junk is not None:
                self.junk.zero_()
            start = self.mark()
            runner.run(state)
            marks.append((start, self.mark()))
        if self.cuda:
            torch.cuda.synchronize()
            return sum(start.elapsed_time(stop) for start, stop in marks) / 1e3 / calls
        return sum(stop - start for start, stop in marks) / calls


class GraphStopwatch(Stopwatch):
    """Seconds a call on a GPU alone, by replays of CUDA graphs: the host does its part at the capture."""

    MOST = 100  # calls in a graph

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.stream = torch.cuda.Stream()
        self.graphs: dict[tuple[Runner, int], tuple[Any, Any]] = {}

    def sample(self, runner: Runner, calls: int) -> float:
        inside = min(calls, self.MOST)
        replays = math.ceil(calls / inside)
        graph = self.captured(runner, inside)
        start = self.mark()
        for _ in range(replays):
            graph.replay()
        stop = self.mark()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3 / (inside * replays)

    def captured(self, runner: Runner, calls: int) -> Any:
        if (runner, calls) not in self.graphs:
            torch.cuda.synchronize()
            # A backward pass runs on the stream of its forward, which has to be the one that is captured.
            with torch.cuda.stream(self.stream):
                out = runner.prepare()
                runner.run(out, keep=True)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=self.stream):
                    for _ in range(calls):
                        runner.run(out, keep=True)
            graph.replay()
            torch.cuda.synchronize()
            self.graphs[runner, calls] = graph, out  # which holds what the backward pass reads
        return self.graphs[runner, calls][0]


@dataclass
class Samples:
    """Of one candidate: seconds a call."""

    counted: list[float] = field(default_factory=list)
    slow: list[float] = field(default_factory=list)  # a probe before or after found the processor slow

    @property
    def quiet(self) -> bool:
        return len(self.counted) >= FEWEST

    @property
    def seconds(self) -> list[float]:
        """Those that count; all of them where the machine was slow nearly all the time."""
        return self.counted if self.quiet else self.counted + self.slow


def take_samples(
    runners: dict[str, Any], stopwatch: Stopwatch, options: argparse.Namespace, progress: Callable[[float], None]
) -> dict[str, Samples]:
    """Samples in turn, A B C A B C, so that a noisy moment hits everyone; runners are warm already.

    Rounds go on until everyone has as many samples that count, at most three times as many rounds, within the time.
    """
    calls, round_seconds = {}, 0.0
    for name, runner in runners.items():
        start = time.perf_counter()
        calls[name] = max(1, math.ceil(options.min_time / max(stopwatch.sample(runner, 1), 1e-9)))
        round_seconds += (time.perf_counter() - start) * calls[name]
    rounds = max(FEWEST, min(options.repeats, int(options.cell_time / max(round_seconds, 1e-9))))
    probe = machine.Probe(options.probe, options.device)
    samples = {name: Samples() for name in runners}
    stop = time.perf_counter() + options.cell_time
    for done in range(3 * rounds):
        if done >= rounds and (
            time.perf_counter() > stop or min(len(one.counted) for one in samples.values()) >= rounds
        ):
            break
        for name, runner in runners.items():
            before = probe.rate()
            seconds = stopwatch.sample(runner, calls[name])
            quiet = probe.quiet(before, probe.rate())
            (samples[name].counted if quiet else samples[name].slow).append(seconds)
        progress(0.5 + 0.5 * min(1.0, (done + 1) / rounds))
    return samples


def percentiles(samples: list[float]) -> tuple[float, float, float]:
    """p20, p50, p80, interpolated."""
    fifths = statistics.quantiles(samples, n=10, method="inclusive")
    return fifths[1], fifths[4], fifths[7]


def extra_memory(runner: Runner, device: str) -> int:
    """Bytes that PyTorch's allocators held at the peak of a warm call beyond its inputs and outputs.

    For bwd the forward call is inside, since what it saves is held until then.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = runner.run(runner.prepare())
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            outputs = runner.run(runner.prepare())
        assert profile.kineto_results is not None
        events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
    return max(0, peak - sum(tensor.nbytes for tensor in outputs))


def predict(candidate: Candidate, cell: Cell, options: argparse.Namespace) -> tuple[float, float]:
    """Seconds and extra bytes a call, scaled up from a small cell; zeros where the cell is cheap anyway."""
    if cost.flop(cell, candidate.exact) < PROBE_FLOP:
        return 0.0, 0.0
    small = small_version(cell)
    # Compiling twice to predict would cost more than it saves: the compiled formula has the products of the plain one.
    call = eager if candidate.name == "compile" else candidate.call
    runner = Runner(call, make_inputs(small, options.device), small.op, candidate.exact, candidate.capability)
    runner.run(runner.prepare())
    # The least of three: on a busy machine a single call was seen to take ten times as long.
    seconds = min(Stopwatch(options).sample(runner, 1) for _ in range(3))
    extra = extra_memory(runner, options.device)
    longer = cell.seq_len / small.seq_len
    scale = cell.batch * cell.heads * longer / small.heads
    scores = small.heads * small.seq_len**2 * small.torch_dtype.itemsize
    stores_scores = candidate.exact and extra >= scores
    return seconds * scale * (longer if candidate.exact else 1), extra * scale * (longer if stores_scores else 1)
