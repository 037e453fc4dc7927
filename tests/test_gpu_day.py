"""bench.gpu_day without a GPU: its control flow with stand-ins for the steps, and what the steps do where a CPU can."""

import inspect
import itertools
import json
import os
import shutil
import signal
import sys
import threading
import time

import pytest
import torch
from test_package import ROOT, python, succeeded

sys.path.insert(0, str(ROOT))
from bench import gpu_day, gpu_steps, options, pieces
from bench.candidates import eager
from bench.gpu_day import Step

SLEEP = "import time; print('asleep', flush=True); time.sleep(60)"


def stand_in(name: str, code: str, seconds: float = 20, **more) -> Step:
    return Step(name, (sys.executable, "-S", "-c", code), seconds, **more)


def day(tmp_path, *batches, seconds: float = 60) -> tuple[int, dict[str, dict], dict]:
    code = gpu_day.run("correctness", batches, tmp_path, seconds)
    found = json.loads((tmp_path / "correctness.json").read_text())
    return code, {result["name"]: result for result in found["results"]}, found


def test_what_a_step_says_comes_into_log_summary_and_json(tmp_path, capsys):
    code, results, found = day(tmp_path, [stand_in("one", "print('>> 138 us'); print('more')")])
    assert code == 0 and found["condemned"] == {}
    assert results["one"]["status"] == "ok" and results["one"]["facts"] == ["138 us"]
    assert capsys.readouterr().out.rstrip().endswith("s")
    assert "one| more" in (tmp_path / "correctness.log").read_text()


def test_a_hang_takes_its_backend_out(tmp_path, capsys):
    code, results, found = day(
        tmp_path,
        [stand_in("hangs", SLEEP, 0.4, backend="cuda")],
        [stand_in("after", "", backend="cuda"), stand_in("other", "", backend="triton"), stand_in("none", "")],
    )
    assert code == 1
    assert {name: result["status"] for name, result in results.items()} == {
        "hangs": "HANG", "after": "skipped", "other": "ok", "none": "ok",
    }  # fmt: skip
    assert "asleep" in results["hangs"]["note"] and results["after"]["note"] == "cuda: hangs hung"
    assert found["condemned"] == {"cuda": "hangs hung"}
    summary = capsys.readouterr().out.split("\n== ")[1]
    assert "HANG" in summary and "not called any more: cuda: hangs hung" in summary
    assert '"<string>", line 1' in (tmp_path / "correctness.log").read_text()  # where it was, by Python's faulthandler


def test_silence_is_a_hang_and_slow_work_is_not(tmp_path):
    talks = "import time\nfor _ in range(40): print('still', flush=True); time.sleep(0.05)"
    _, results, found = day(
        tmp_path,
        [
            stand_in("silent", SLEEP, backend="cuda", silence=0.6),
            stand_in("slow", talks, 1.2, backend="triton", silence=0.6),
        ],
    )
    assert results["silent"]["status"] == "HANG" and "asleep" in results["silent"]["note"]
    assert results["slow"]["status"] == "CUT" and results["slow"]["seconds"] >= 1.2
    assert list(found["condemned"]) == ["cuda"]


def test_a_crash_and_a_failure_are_told_and_the_phase_goes_on(tmp_path):
    crash = "import os, signal; print('before', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"
    fail = "raise SystemExit('an illegal memory access was encountered')"
    code, results, _ = day(
        tmp_path,
        [stand_in("crash", crash, backend="cuda"), stand_in("fail", fail, backend="cuda")],
        [stand_in("after", "", backend="cuda")],
    )
    assert code == 1
    assert results["crash"]["status"] == "CRASH" and results["crash"]["note"].startswith("SIGSEGV")
    assert results["fail"]["status"] == "FAILED" and "illegal memory access" in results["fail"]["note"]
    assert results["after"]["status"] == "ok"


def test_the_phase_ends_in_time_and_blames_nobody_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_day, "LEAST", 0.2)
    before = time.monotonic()
    code, results, found = day(
        tmp_path,
        [stand_in("long", SLEEP, 30, backend="cuda")],
        [stand_in("after", "")],
        seconds=gpu_day.RESERVE + 0.6,
    )
    assert time.monotonic() - before < 5
    assert code == 1 and results["long"]["status"] == "CUT" and found["condemned"] == {}
    assert results["after"] == results["after"] | {"status": "skipped", "note": "no time left in this phase"}


def test_a_whole_batch_is_killed_at_once(tmp_path):
    """Each had a second for its last words, one after the other: fourteen shards would have outlasted the phase."""
    stubborn = "import signal, time; signal.signal(signal.SIGABRT, signal.SIG_IGN); time.sleep(60)"
    before = time.monotonic()
    _, results, _ = day(tmp_path, [stand_in(f"shard {i}", stubborn, 0.5) for i in range(5)])
    assert time.monotonic() - before < 5
    assert {result["status"] for result in results.values()} == {"HANG"}


def test_what_a_step_leaves_running_is_killed(tmp_path):
    child = f"import subprocess, sys\nprint('>>', subprocess.Popen([sys.executable, '-S', '-c', {SLEEP!r}]).pid)"
    _, results, _ = day(tmp_path, [stand_in("parent", child)])
    number = int(results["parent"]["facts"][0])
    stop = time.monotonic() + 10
    while alive(number) and time.monotonic() < stop:
        time.sleep(0.02)
    assert results["parent"]["status"] == "ok" and not alive(number)


def alive(number: int) -> bool:
    try:
        with open(f"/proc/{number}/stat") as file:
            return file.read().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_library_that_does_not_load_costs_the_cuda_backend_alone(tmp_path):
    _, results, found = day(
        tmp_path,
        [stand_in("library", "print('!! cuda: the native library did not load: no such symbol')")],
        [stand_in("smoke cuda", "", backend="cuda"), stand_in("smoke triton", "", backend="triton")],
    )
    assert results["smoke cuda"]["status"] == "skipped" and "no such symbol" in results["smoke cuda"]["note"]
    assert results["library"]["status"] == results["smoke triton"]["status"] == "ok"
    assert found["condemned"]["cuda"].startswith("the native library did not load")


def test_without_a_gpu_nothing_else_is_tried(tmp_path):
    _, results, _ = day(tmp_path, [stand_in("facts", "print('!! all: torch sees no GPU')")], [stand_in("rest", SLEEP)])
    assert results["rest"] == results["rest"] | {"status": "skipped", "note": "torch sees no GPU"}


def test_an_interrupted_phase_says_what_it_has(tmp_path, capsys):
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    code, results, _ = day(
        tmp_path, [stand_in("first", "print('>> 1')")], [stand_in("long", SLEEP)], [stand_in("z", "")]
    )
    assert code == 1 and results["first"]["facts"] == ["1"]
    assert results["long"]["status"] == "CUT" and results["z"]["note"] == "interrupted"
    assert "first" in capsys.readouterr().out.split("\n== ")[1]


def test_a_summary_fits_into_the_tail_that_is_kept(tmp_path, capsys):
    """And each step has its part of it."""
    _, results, _ = day(
        tmp_path,
        [stand_in("many", "for i in range(400): print('>>', i, 100 * 'x')")],
        [stand_in("few", "print('>> 138 us')")],
    )
    summary = capsys.readouterr().out.split("\n== ", 1)[1]
    assert 8_000 < len(summary) < 12_000 and "correctness.json" in summary and "138 us" in summary
    assert len(results["many"]["facts"]) == 400


@pytest.mark.parametrize("phase", gpu_day.PHASES)
def test_dry_run(phase, tmp_path):
    out = succeeded(python("-m", "bench.gpu_day", phase, "--dry-run", "--out", tmp_path / "new", cwd=ROOT))
    assert "bench.gpu_steps library" in out and not (tmp_path / "new").exists()
    only = succeeded(python("-m", "bench.gpu_day", phase, "--dry-run", "--only", "smoke cuda", cwd=ROOT))
    assert "library" in only and "smoke cuda" in only and "triton" not in only


def test_no_gpu_can_stop_the_program_itself():
    code = "import sys, bench.gpu_day; print('torch' in sys.modules)"
    assert succeeded(python("-c", code, cwd=ROOT)).strip() == "False"


def test_steps_have_names_of_their_own_and_a_backend_each(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(options, "free_bytes", lambda device: 2**37)
    for phase in gpu_day.PHASES:
        steps = list(itertools.chain(*gpu_day.batches(phase, ROOT)))
        assert len({one.name for one in steps}) == len(steps)
        for one in steps:
            named = {word for argument in one.command[3:] for word in argument.replace("=", " ").split()}
            assert named & {"cuda", "triton"} <= {one.backend}, one
            assert one.seconds < gpu_day.LIMIT
            name, *arguments = one.command[3:]
            inspect.signature(gpu_steps.STEPS[name]).bind(*arguments)
            if name == "cells":
                assert options.cells(options.parse([*arguments[1:], "--device=cuda"]))


@pytest.fixture
def on_cpu(monkeypatch):
    """The steps on CPU tensors, small."""
    monkeypatch.setattr(gpu_steps, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_steps, "SIZES", ((1, 2, 20), (2, 2, 33)))
    for name, count in (("REPEATS", 3), ("SAMPLES", 2), ("CALLS", 3)):
        monkeypatch.setattr(gpu_steps, name, count)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ends(step, *arguments) -> int:
    """What a step exits with."""
    try:
        return step(*arguments) or 0
    except SystemExit as end:
        return int(end.code)


def facts(capsys) -> list[str]:
    return [line[3:] for line in capsys.readouterr().out.splitlines() if line.startswith(gpu_day.FACT)]


def test_smoke_is_right_or_says_what_is_not(on_cpu, monkeypatch, capsys):
    assert ends(gpu_steps.smoke, "cpu", "full", "float32") == 0
    assert "cpu full float32: right" in facts(capsys)[0]
    monkeypatch.setattr(gpu_steps, "ours", lambda backend, query, *rest: eager(query * 1.001, *rest))
    assert ends(gpu_steps.smoke, "cpu", "fwd", "float32") == 1
    assert "OVER" in facts(capsys)[0]


def test_repetition_finds_a_bit(on_cpu, monkeypatch, capsys):
    assert ends(gpu_steps.races, "cpu") == 0
    told = facts(capsys)
    assert len(told) == len(gpu_steps.KINDS) + 2 and all("same bits" in line for line in told)
    usual, calls = gpu_steps.ours, itertools.count()

    def now_and_then(*arguments):
        out = usual(*arguments)
        return out * (1 + 2**-6) if next(calls) % 5 == 4 else out

    monkeypatch.setattr(gpu_steps, "ours", now_and_then)
    assert ends(gpu_steps.races, "cpu") == 1
    assert sum("DIFFER" in line for line in facts(capsys)) > len(gpu_steps.KINDS)
    assert ends(gpu_steps.many, "cpu", "6") == 1


def test_cells_are_told_one_by_one(on_cpu, tmp_path, capsys):
    grid = ("--seq-len=64,96", "--heads=2", "--proj-dim=8", "--head-dim=16", "--cell-time=0.01", "--min-time=1e-4")
    assert ends(gpu_steps.cells, str(tmp_path / "cells.jsonl"), "--backend=cpu", "--rivals=bmm", *grid) == 0
    told = facts(capsys)
    assert len(told) == 2 and "ours:cpu" in told[0] and "| bmm" in told[0] and "N=96" in told[1]
    rows = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert [row["candidate"] for row in rows] == ["ours:cpu", "bmm"] * 2 and all(row["samples"] for row in rows)
    assert ends(gpu_steps.cells, str(tmp_path / "cells.jsonl"), "--backend=triton", "--rivals=none", *grid) == 1


def test_pieces(on_cpu, monkeypatch):
    small = ("--device=cpu", "--batch=2", "--heads=2", "--seq-len=40", "--proj-dim=8", "--head-dim=16")
    settings = pieces.parse([*small, "--cell-time=0.001", "--backend=cpu,cuda"])
    settings.min_time, settings.probe = 1e-6, 0
    told = list(pieces.lines(settings))
    assert [line[:11] for line in told] == ["project fwd", "project bwd", "attend fwd ", "attend bwd ", "dE fwd bflo"]
    assert all("ours:cpu" in line and "ours:cuda failed" in line for line in told[:4])
    assert all(name in told[1] for name in ("matmul", "packed", "bmm")) and "WRONG" not in str(told)
    monkeypatch.setattr(pieces, "projected_attention", lambda *tensors, backend: pieces.attend(*tensors) * 1.1)
    assert str(list(pieces.lines(settings))).count("ours:cpu WRONG") == 2


def test_the_remaining_steps_run(on_cpu, monkeypatch, capsys):
    gpu_steps.host("cpu")
    gpu_steps.others("cpu")
    gpu_steps.once("cpu", "8", "20", "1")
    told = facts(capsys)
    assert sum("us a call" in line for line in told) == 3 and "packed" in told[-1] and "masked" in told[-1]
    gpu_steps.facts()
    assert torch.__version__ in str(facts(capsys))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu_steps.library()
    assert capsys.readouterr().out == f"!! all: torch {torch.__version__} sees no GPU\n"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    gpu_steps.profiler("cuda")
    gpu_steps.sanitizer("memcheck", "cuda")
    assert len(facts(capsys)) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: these tests run by themselves")
def test_tests_that_were_all_skipped_are_no_success(tmp_path):
    done = python("-m", "bench.gpu_steps", "tests", "cuda", "1", "8", cwd=ROOT)
    assert done.returncode == 1 and "skipped" in done.stdout and ">> tests of cuda, part 2/8" in done.stdout
    named = [line for line in done.stdout.splitlines() if line.startswith("tests/test_gpu.py::")]
    assert len(named) > 20 and all("cuda" in name for name in named)
    assert ["bf16" in name for name in named] == sorted(("bf16" in name for name in named), reverse=True)


@pytest.mark.parametrize(("before", "builds", "after", "code", "says"), [
    (None, True, None, 0, "the one that was there"),
    ("did not load", True, None, 0, "built here"),
    ("did not load", False, "did not load", 1, "!! cuda: did not load; and the build failed"),
    ("was built for 80", True, "this driver is for CUDA 12.8", 1, "!! cuda: this driver is for CUDA 12.8"),
])  # fmt: skip
def test_a_library_that_does_not_load_is_built(before, builds, after, code, says, tmp_path, monkeypatch, capsys):
    """And a build that fails leaves the one that was there."""
    answers, native = iter((before, after)), tmp_path / "_native.so"
    monkeypatch.setattr(gpu_steps, "asked_elsewhere", lambda: next(answers))
    monkeypatch.setattr(gpu_steps, "NATIVE", native)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    native.write_text("old")
    build = f"open({str(native)!r}, 'w').write('new')" if builds else "raise SystemExit(1)"
    monkeypatch.setattr(gpu_steps, "build_command", lambda: ([sys.executable, "-S", "-c", build], {}))
    assert ends(gpu_steps.library) == code
    assert says in capsys.readouterr().out
    assert native.read_text() == ("new" if before and builds else "old")


def test_the_library_is_asked_in_another_process(monkeypatch):
    reason = gpu_steps.asked_elsewhere()
    assert reason is None if torch.cuda.is_available() else "asking failed: " in reason, reason


NCU = """==PROF== Connected
"ID","Kernel Name","gpu__time_duration.sum","dram__bytes.sum"
"","","us","Mbyte"
"0","linformer_forward_bf16_d64_r128(Arguments)","138.5","300"
"1","backward","400","500"
"""


def test_profile_of_ncu():
    assert gpu_steps.profile(NCU) == [
        "linformer_forward_bf16_d64_r128: gpu__time_duration 138.5 us, dram__bytes 300 Mbyte",
        "backward: gpu__time_duration 400 us, dram__bytes 500 Mbyte",
    ]
    assert gpu_steps.profile("==ERROR== no permission") == []
