"""What the steps of `bench.gpu_day` do: `python -m bench.gpu_steps NAME ARGUMENTS`, each in a process of its own.

A line that begins with ">> " goes into the summary of the day; "!! cuda: why" takes that backend out of the phase.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import options
from bench.candidates import Candidate, make_inputs, ours, sdpa_proj
from bench.check import Checker
from bench.gpu_day import CONDEMN, FACT, ROOT
from bench.report import duration

DEVICE = "cuda"
NATIVE = ROOT / "linformer_kernels" / "_native.so"


def say(text: str) -> None:
    print(FACT + text, flush=True)


def condemn(backend: str, why: str) -> None:
    print(f"{CONDEMN}{backend}: {why}", flush=True)


def output_of(*command: str) -> str | None:
    """What a program prints, or None where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def facts() -> None:
    """The machine, the versions, the backends."""
    from linformer_kernels import info

    report = info.collect()
    smi = output_of("nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader")
    say(f"GPU: {smi or 'no nvidia-smi'}")
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    say(f"{versions}, CUDA of torch {torch.version.cuda}, {platform.machine()}, {os.cpu_count()} cores")
    for name, compiler in compilers().items():
        say(f"ptxas of {name}: {version_of(compiler)}")
    for name, backend in report["backends"].items():
        print(f"backend {name}: {'available' if backend['available'] else backend['reason']}", flush=True)
        if backend["note"]:
            say(f"{name}: {backend['note']}")
    if report["backends"]["triton"]["reason"]:
        condemn("triton", report["backends"]["triton"]["reason"])


def compilers() -> dict[str, str]:
    """The ptxas of Triton, and the one on PATH."""
    found = {}
    try:
        found["Triton"] = importlib.import_module("triton.backends.nvidia.compiler").get_ptxas(capability()).path
    except Exception as error:  # a Triton that is missing, broken, or has another function for it
        print(f"Triton's ptxas: {type(error).__name__}: {error}")
    if path := shutil.which("ptxas"):
        found["PATH"] = path
    return found


def version_of(compiler: str) -> str:
    return next(iter(re.findall(r"V[\d.]+", output_of(compiler, "--version") or "")), "does not run")


def capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def cuda_refusal() -> str | None:
    """Why the CUDA kernels would not serve a call here, without calling them."""
    from linformer_kernels import _backends
    from linformer_kernels._validation import check_attention

    x = torch.zeros(1, 1, 16, 16, device=DEVICE)
    call = check_attention(x, x, x, x[0, 0], None, None, None, None, None, 0.0, None, False, False)
    return _backends.BACKENDS["cuda"].supports(call)


def asked_elsewhere() -> str | None:
    """`cuda_refusal` of a new process: one that has failed to load a library does not try again."""
    code = "from bench.gpu_steps import cuda_refusal; print('reason:', cuda_refusal() or '')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    found = re.search(r"^reason: ?(.*)$", done.stdout, re.MULTILINE)
    return (found[1] or None) if found else f"asking failed: {(done.stderr.strip() or 'no output').splitlines()[-1]}"


def build_command() -> tuple[list[str], dict[str, str]]:
    environment = {"LINFORMER_CUDA": "ON", "LINFORMER_CUDA_ARCHS": str(capability())}
    return [sys.executable, "setup.py", "build_ext", "--inplace"], environment


def library() -> None:
    """The native library: the one that is there if it serves this GPU, else one that is built here."""
    if not torch.cuda.is_available():
        condemn("all", f"torch {torch.__version__} sees no GPU")
        return
    if importlib.util.find_spec("linformer_kernels.triton_kernels") is None:  # a source tree that was never installed
        (ROOT / "linformer_kernels" / "triton_kernels").symlink_to(Path("..") / "triton_kernels")
    reason = asked_elsewhere()
    if reason is None:
        say("native library: the one that was there")
        return
    say(f"native library: {reason}; building")
    command, environment = build_command()
    start, before = time.monotonic(), NATIVE.read_bytes() if NATIVE.exists() else None
    NATIVE.unlink(missing_ok=True)  # not written over: this process may have it loaded
    built = subprocess.run(command, cwd=ROOT, env=os.environ | environment).returncode == 0
    if before is not None and not NATIVE.exists():
        NATIVE.write_bytes(before)
    reason = asked_elsewhere()
    if reason is not None:
        condemn("cuda", reason if built else f"{reason}; and the build failed")
        sys.exit(1)
    say(f"native library: built here in {time.monotonic() - start:.0f} s")


def smoke(backend: str, op: str, dtype: str) -> None:
    """One small call against float64."""
    cell = options.Cell(op, dtype, 2, 4, 128, 64, "headwise", 300, "bnhd")
    verdicts = Checker(cell, make_inputs(cell, DEVICE), False)(Candidate(backend, partial(ours, backend), "ours"))
    worst = max(verdicts, key=lambda verdict: verdict.error / verdict.limit if verdict.error == verdict.error else 1e9)
    wrong = [str(verdict) for verdict in verdicts if not verdict.right]
    say(f"{backend} {op} {dtype}: {'; '.join(wrong) or f'right; closest to its limit: {worst}'}")
    sys.exit(bool(wrong))


class Problem:
    """Inputs that require gradients, and a call of them."""

    def __init__(self, backend: str | None, b: int, h: int, n: int, k: int, d: int, dtype: str) -> None:
        self.inputs = make_inputs(options.Cell("full", dtype, b, h, k, d, "headwise", n, "bnhd"), DEVICE)
        self.backend = backend
        self.name = f"B={b} H={h} N={n} K={k} D={d} {dtype}"

    def forward(self) -> Tensor:
        return ours(self.backend, *self.inputs.tensors)

    def run(self) -> list[Tensor]:
        out = self.forward()
        return [out.detach(), *torch.autograd.grad(out, self.inputs.leaves(False), self.inputs.grad_out)]


def differ(got: list[Tensor], want: list[Tensor]) -> Tensor:
    """How many of the tensors have other bits, as a tensor: nobody waits for the GPU."""
    return sum((a != b).any() for a, b in zip(got, want, strict=True))  # type: ignore[return-value]


def on(stream: Any) -> AbstractContextManager[Any]:
    return torch.cuda.stream(stream) if stream is not None else nullcontext()


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def new_stream() -> Any:
    return torch.cuda.Stream() if DEVICE == "cuda" else None


def first_capture(backend: str) -> None:
    """The first call of a process, forward and backward, within the capture of a graph."""
    problem = Problem(backend, 2, 4, 300, 64, 64, "bfloat16")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = problem.run()
    for tensor in got:
        tensor.fill_(float("nan"))
    graph.replay()
    bad = int(differ(got, problem.run()))
    say(f"{backend}: first call captured, {'same bits as eagerly' if not bad else f'{bad} tensors DIFFER'}")
    sys.exit(bool(bad))


def tests(backend: str, shard: str, of: str, which: str = "not slow") -> None:
    """A part of tests/test_gpu.py: every `of`-th test of a backend, those in bfloat16 first."""
    import pytest

    class Part:
        @pytest.hookimpl(trylast=True)
        def pytest_collection_modifyitems(self, items: list[Any]) -> None:
            mine = [
                item for item in items if getattr(item, "callspec", None) and backend in item.callspec.params.values()
            ]
            items[:] = sorted(mine, key=lambda item: "bf16" not in item.name)[int(shard) :: int(of)]

        def pytest_runtest_logstart(self, nodeid: str) -> None:
            print(f"\n{nodeid}", flush=True)  # if it hangs, this is the last line

        def pytest_terminal_summary(self, terminalreporter: Any) -> None:
            self.stats = {
                name: terminalreporter.stats.get(name, []) for name in ("passed", "failed", "error", "skipped")
            }

    part = Part()
    code = pytest.main(["tests/test_gpu.py", "-q", "-m", which, "--seed", "1", "-p", "no:cacheprovider"], [part])
    counts = ", ".join(f"{len(reports)} {name}" for name, reports in part.stats.items() if reports)
    failed = [report.nodeid.split("::")[-1] for name in ("failed", "error") for report in part.stats[name]]
    say(
        f"tests of {backend}, part {int(shard) + 1}/{of}: {counts or 'none'}"
        + "".join(f"; {name}" for name in failed[:5])
    )
    sys.exit(int(code) or not part.stats["passed"])


KINDS = ((128, 64, "bfloat16"), (256, 64, "bfloat16"), (64, 128, "float16"), (100, 64, "float32"))  # K, D
SIZES = ((1, 1, 64), (1, 8, 4096), (2, 4, 300), (3, 5, 1000), (16, 8, 512), (9, 8, 777), (1, 2, 8192), (64, 12, 197))
REPEATS = 100
SAMPLES, CALLS = 10, 200  # of the host's time


@contextmanager
def copies_beside() -> Iterator[Callable[[], None]]:
    """A function that gives another stream something to do."""
    stream, source = new_stream(), torch.ones(4 << 20, device=DEVICE)
    target = torch.empty_like(source)

    def copy() -> None:
        with on(stream):
            target.copy_(source)

    yield copy
    synchronize()


def repeated(backend: str, k: int, d: int, dtype: str) -> int:
    """The same call again and again, beside copies."""
    bad = 0
    for b, h, n in SIZES:
        problem = Problem(backend, b, h, n, k, d, dtype)
        want = problem.run()
        total = torch.zeros((), dtype=torch.int64, device=DEVICE)
        with copies_beside() as copy:
            for _ in range(REPEATS):
                copy()
                total += differ(problem.run(), want)
        if int(total):
            say(f"{backend} {problem.name}: {int(total)} tensors of {REPEATS} runs DIFFER")
        bad += int(total)
    return bad


def on_streams(problems: list[Problem], threads: bool) -> int:
    """Each problem on a stream of its own, from one thread or from one each; memory is made and freed meanwhile."""
    wants = [problem.run() for problem in problems]
    streams = [new_stream() for _ in problems]
    totals = [torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in problems]
    synchronize()

    def once(index: int) -> None:
        with on(streams[index]):
            garbage = torch.full((1 << 16,), float("nan"), device=DEVICE)
            totals[index] += differ(problems[index].run(), wants[index])
            del garbage

    def many(index: int) -> None:
        for _ in range(REPEATS):
            once(index)

    if threads:
        workers = [threading.Thread(target=many, args=(index,)) for index in range(len(problems))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    else:
        for _ in range(REPEATS):
            for index in range(len(problems)):
                once(index)
    synchronize()
    return sum(int(total) for total in totals)


def replayed(problem: Problem) -> int:
    want = problem.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = problem.run()
    total = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(2 * REPEATS):
        graph.replay()
        total += differ(got, want)
    return int(total)


def races(backend: str) -> None:
    """The same bits, however often and beside whatever."""
    small = partial(Problem, backend, 2, 4, 300)
    checks: dict[str, Callable[[], int]] = {
        f"{len(SIZES)} shapes x {REPEATS}, K={k} D={d} {dtype}": partial(repeated, backend, k, d, dtype)
        for k, d, dtype in KINDS
    }
    checks["two streams"] = lambda: on_streams([small(128, 64, "bfloat16"), small(64, 64, "bfloat16")], False)
    # Different amounts of shared memory for one kernel, from several threads.
    checks["8 threads"] = lambda: on_streams([small(64 * i, 64, "bfloat16") for i in range(1, 9)], True)
    if DEVICE == "cuda":
        checks[f"{2 * REPEATS} replays"] = lambda: replayed(small(128, 64, "bfloat16"))
    bad = 0
    for name, check in checks.items():
        start = time.monotonic()
        found = check()
        told = "same bits" if not found else f"{found} tensors DIFFER"
        say(f"{backend} {name}: {told}, {time.monotonic() - start:.1f} s")
        bad += found
    sys.exit(bool(bad))


def cells(path: str, *arguments: str) -> None:
    """Cells of `python -m bench`, told one by one; all of a row goes to a file of JSON lines."""
    from bench.__main__ import run_cell
    from bench.report import Progress

    settings = options.parse([*arguments, f"--device={DEVICE}"])
    todo = options.cells(settings)
    progress, bad = Progress(len(todo)), False
    for cell in todo:
        progress.start(cell)
        rows = run_cell(cell, settings, progress)
        told = []
        for row in rows:
            text = duration(row["p50_s"]) if row["status"] == "ok" else f"{row['status']}: {row['note'][:80]}"
            if row["kind"] == "ours" and "vs_best_rival" in row:
                text += f" ({row['vs_best_rival']:.2f}x)"
            told.append(f"{row['candidate']} {text}")
            bad = bad or (row["kind"] == "ours" and row["status"] != "ok")
        sizes = f"B={cell.batch} H={cell.heads} N={cell.seq_len} K={cell.proj_dim} D={cell.head_dim}"
        say(f"{cell.op} {cell.dtype} {sizes} {settings.timing}: {' | '.join(told)}")
        with open(path, "a") as file:
            for row in rows:
                file.write(json.dumps(row | {"cell": asdict(row["cell"]), "timing": settings.timing}) + "\n")
    sys.exit(bad)


def pieces(backend: str, timing: str) -> None:
    from bench import pieces as program

    named = "" if backend == "torch" else backend
    bad = False
    for line in program.lines(program.parse([f"--backend={named}", f"--timing={timing}", "--cell-time=1.5"])):
        say(line)
        bad = bad or "WRONG" in line
    sys.exit(bad)


def host(backend: str) -> None:
    """Calls that are not waited for: what they take is the host's part, as long as the GPU keeps up."""
    problem = Problem(backend, 1, 8, 64, 64, 64, "bfloat16")
    runs: dict[str, Callable[[], Any]] = {
        f"{backend} forward": torch.no_grad()(problem.forward),
        f"{backend} forward + backward": problem.run,
        "sdpa_proj forward": torch.no_grad()(lambda: sdpa_proj(*problem.inputs.tensors)),  # type: ignore[arg-type]
    }
    for name, run in runs.items():
        best = float("inf")
        for _ in range(SAMPLES):
            synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):
                run()
            best = min(best, (time.perf_counter() - start) / CALLS)
        say(f"host, {name}: {best * 1e6:.1f} us a call, the best of {SAMPLES} x {CALLS}")


class Alone:
    """A call as `measure.GraphStopwatch` takes it."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call

    def prepare(self) -> None:
        return None

    def run(self, _: None, keep: bool = False) -> None:
        with torch.no_grad():
            self.call()


def others(backend: str) -> None:
    """Padding masks and packed sequences, beside the same rows without either."""
    from bench.measure import GraphStopwatch, Stopwatch
    from linformer_kernels import linformer_attention, linformer_attention_varlen

    settings = options.parse([f"--device={DEVICE}"])
    stopwatch = (GraphStopwatch if DEVICE == "cuda" else Stopwatch)(settings)
    b, h, n, k, d = (16, 8, 4096, 128, 64) if DEVICE == "cuda" else (1, 2, 64, 16, 16)
    cell = options.Cell("fwd", "bfloat16", b, h, k, d, "headwise", n, "bnhd")
    tensors = make_inputs(cell, DEVICE).tensors
    mask = torch.arange(n, device=DEVICE) < torch.linspace(n // 2, n, b, device=DEVICE)[:, None]
    sequences = b * n // 64
    rows = [tensor.transpose(1, 2).reshape(b * n, h, d) for tensor in tensors[:3] if tensor is not None]
    offsets = torch.arange(sequences + 1, device=DEVICE) * 64
    padded = [tensor.view(sequences, 64, h, d).transpose(1, 2) for tensor in rows]
    calls = {
        "unmasked": lambda: linformer_attention(*tensors, backend=backend),
        "masked": lambda: linformer_attention(*tensors, key_padding_mask=mask, backend=backend),
        f"{sequences} of 64, padded": lambda: linformer_attention(*padded, *tensors[3:], backend=backend),
        f"{sequences} of 64, packed": lambda: linformer_attention_varlen(
            *rows, *tensors[3:], cu_seqlens_q=offsets, cu_seqlens_k=offsets, backend=backend
        ),
    }
    told = []
    for name, call in calls.items():
        runner = Alone(call)
        runner.run(None)
        told.append(f"{name} {duration(min(stopwatch.sample(runner, CALLS) for _ in range(SAMPLES)))}")  # type: ignore[arg-type]
    say(f"{backend} fwd B={b} H={h} N={n} K={k}: {' | '.join(told)}")


def once(backend: str, k: str, n: str, batch: str = "16") -> None:
    """For a profiler or a sanitizer: three times forward and backward."""
    problem = Problem(backend, int(batch), 8, int(n), int(k), 64, "bfloat16")
    for _ in range(3):
        problem.run()
    synchronize()


METRICS = (
    "gpu__time_duration.sum", "sm__inst_executed_pipe_tensor.sum",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "dram__bytes.sum", "lts__t_bytes.sum", "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_mio_throttle_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_math_pipe_throttle_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_membar_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_sleeping_per_issue_active.ratio",
    "sm__warps_active.avg.pct_of_peak_sustained_active", "launch__registers_per_thread",
)  # fmt: skip


def profiler(backend: str) -> None:
    """Nsight Compute on a forward and a backward pass. It puts memory back between its passes, counters included."""
    program = shutil.which("ncu")
    if program is None:
        say("no ncu on PATH: no profile")
        return
    bad = False
    for k in ("128", "256"):
        command = [
            program, "--clock-control", "none", "--kernel-name-base", "function", "-k",
            "regex:linformer|^forward$|^backward$|^project_backward$", "-s", "3", "-c", "3", "--csv", "--page", "raw",
            "--metrics", ",".join(METRICS), sys.executable, "-m", "bench.gpu_steps", "once", backend, k, "4096",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        print(done.stdout, flush=True)
        for line in profile(done.stdout):
            say(f"ncu {backend} K={k}: {line}")
        bad = bad or done.returncode != 0
    sys.exit(bad)


def profile(text: str) -> list[str]:
    """A line for each kernel, of ncu's raw page as CSV: a row of names, one of units, then one for each launch."""
    rows = list(csv.reader(line for line in text.splitlines() if line.startswith('"')))
    if len(rows) < 3:
        return []
    names, units, *launches = rows
    lines = []
    for launch in launches:
        values = dict(zip(names, launch, strict=False))
        unit = dict(zip(names, units, strict=False))
        short = {
            name: re.sub(r"\.(sum|ratio|avg\.pct_of_peak_sustained_active)$|_per_issue_active", "", name)
            for name in METRICS
        }
        figures = ", ".join(f"{short[name]} {values[name]} {unit[name]}".rstrip() for name in METRICS if name in values)
        lines.append(f"{values.get('Kernel Name', '?').split('(')[0]}: {figures}")
    return lines


def sanitizer(tool: str, backend: str) -> None:
    program = shutil.which("compute-sanitizer")
    if program is None:
        say("no compute-sanitizer on PATH")
        return
    for k, n in (("64", "200"), ("130", "77")):
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "bench.gpu_steps", "once"]
        done = subprocess.run([*command, backend, k, n, "1"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        print(done.stdout, flush=True)
        ends = [line.strip("= ") for line in done.stdout.splitlines() if "SUMMARY" in line]
        say(f"{tool}, {backend} K={k} N={n}: {ends[-1] if ends else f'exit {done.returncode}'}")
        if done.returncode:
            sys.exit(1)


def bits(backend: str) -> None:
    """A number for all bits of some results, and the time of the largest problem."""
    digest = hashlib.sha256()
    for k, d, dtype in KINDS[:2]:
        problem = Problem(backend, 2, 8, 1000, k, d, dtype)
        for tensor in problem.run():
            digest.update(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    problem = Problem(backend, 4, 8, 4096, 128, 64, "bfloat16")
    problem.run()
    synchronize()
    start = time.perf_counter()
    for _ in range(20):
        problem.run()
    synchronize()
    print(f"bits: {digest.hexdigest()[:16]}, {(time.perf_counter() - start) / 20 * 1e6:.0f} us", flush=True)


def ptxas(*paths: str) -> None:
    """Whether Triton's kernels give the same bits by other versions of ptxas: one that miscompiles would not."""
    found = set()
    known = compilers()
    for compiler in [known.get("Triton"), known.get("PATH"), *paths]:
        if compiler is None:
            continue
        variables = {name: compiler for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")}
        with tempfile.TemporaryDirectory() as cache:
            done = subprocess.run(
                [sys.executable, "-m", "bench.gpu_steps", "bits", "triton"], cwd=ROOT, text=True,
                stdout=subprocess.PIPE, env=os.environ | variables | {"TRITON_CACHE_DIR": cache},
            )  # fmt: skip
        told = re.search(r"^bits: (\w+), .*$", done.stdout, re.MULTILINE)
        say(f"ptxas {version_of(compiler)}: {told[0] if told else f'exit {done.returncode}'}")
        found.add(told[1] if told else None)
    say(f"ptxas: {'same bits' if len(found) == 1 and None not in found else 'bits DIFFER, or a run failed'}")
    sys.exit(len(found) != 1 or None in found)


def many(backend: str, count: str) -> None:
    """One forward again and again: a fence that is missing shows itself rarely."""
    problem = Problem(backend, 8, 8, 1024, 128, 64, "bfloat16")
    total = torch.zeros((), dtype=torch.int64, device=DEVICE)
    with torch.no_grad():
        want = problem.forward()
        for done in range(int(count)):
            total += (problem.forward() != want).any()
            if done % 1000 == 999:
                print(done + 1, int(total), flush=True)
    say(f"{backend} {problem.name}: {int(total)} of {count} forwards differ")
    sys.exit(bool(total))


def tune(k: str) -> None:
    """`linformer_kernels.tune`, with every trial in the log; what it finds is not kept."""
    import linformer_kernels

    with tempfile.TemporaryDirectory() as folder:
        os.environ["LINFORMER_TUNED"] = str(Path(folder) / "tuned.json")
        problem = Problem(None, 16, 8, 4096, int(k), 64, "bfloat16")
        found = linformer_kernels.tune(*problem.inputs.tensors, verbose=True)  # type: ignore[arg-type]
    for name, (before, after) in found.items():
        say(f"tune K={k}, {name}: {duration(before)} before, {duration(after)} after")


STEPS = {
    function.__name__: function
    for function in (
        facts, library, smoke, first_capture, tests, races, cells, pieces, host, others, once, profiler, sanitizer,
        bits, ptxas, many, tune,
    )
}  # fmt: skip

if __name__ == "__main__":
    STEPS[sys.argv[1]](*sys.argv[2:])  # type: ignore[operator]
