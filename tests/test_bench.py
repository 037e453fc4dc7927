"""`python -m bench` and `bench.host`: right answers, the candidates, which samples count, builds side by side."""

import contextlib
import json
import sys
import threading
import types

import pytest
import torch
from test_package import ROOT, python, succeeded

sys.path.insert(0, str(ROOT))
from bench import host, host_gpu, machine, measure, options
from bench.candidates import Candidate, candidates, eager, make_inputs
from bench.check import Checker
from bench.measure import percentiles

TINY = ("--op=full", "--seq-len=96", "--heads=2", "--proj-dim=8", "--head-dim=16", "--rivals=eager,sdpa_proj")


def test_dry_run():
    out = succeeded(python("-m", "bench", *TINY, "--dry-run", cwd=ROOT))
    assert "96" in out


def test_refcheck(tmp_path):
    where = tmp_path / "rows.json"
    succeeded(python("-m", "bench", *TINY, "--dtype", "fp32,bf16", "--refcheck", "--json", str(where), cwd=ROOT))
    assert "ours:auto" in where.read_text() and "sdpa_proj" in where.read_text()


def test_rejects_a_wrong_answer():
    (cell,) = options.cells(options.parse([*TINY, "--device", "cpu"]))
    check = Checker(cell, make_inputs(cell, "cpu"), exact=False)
    assert all(verdict.right for verdict in check(Candidate("right", eager, "ours")))
    wrong = lambda query, *rest: eager(query * 1.001, *rest)  # noqa: E731
    assert not all(verdict.right for verdict in check(Candidate("wrong", wrong, "ours")))


def test_flash_has_the_layout_of_its_package(monkeypatch):
    transposed = lambda tensor: tensor.transpose(1, 2)  # noqa: E731
    sdpa = torch.nn.functional.scaled_dot_product_attention
    stub = types.SimpleNamespace(flash_attn_func=lambda *qkv: transposed(sdpa(*map(transposed, qkv))))
    monkeypatch.setitem(sys.modules, "flash_attn", stub)
    settings = options.parse([*TINY, "--device=cpu", "--dtype=bf16", "--rivals=flash"])
    (cell,) = options.cells(settings)
    _, flash = candidates(settings, cell)
    assert all(verdict.right for verdict in Checker(cell, make_inputs(cell, "cpu"), flash.exact)(flash))


def test_percentiles():
    assert percentiles([float(i) for i in range(100, -1, -1)]) == pytest.approx((20.0, 50.0, 80.0))
    assert percentiles([3.0, 3.0, 3.0]) == (3.0, 3.0, 3.0)


@pytest.mark.parametrize("layout", ["bnhd", "bhnd"])
@pytest.mark.parametrize("sharing", ["headwise", "key_value", "none"])
def test_rivals_give_the_answer(layout, sharing):
    """One product for all heads is no rival where each head has its own E."""
    rivals = "--rivals=eager,sdpa_proj,eager_packed,sdpa_packed,bmm"
    settings = options.parse([*TINY, "--device=cpu", f"--layout={layout}", f"--sharing={sharing}", rivals])
    (cell,) = options.cells(settings)
    inputs = make_inputs(cell, "cpu")
    assert {tensor.stride(1) < tensor.stride(2) for tensor in (*inputs.tensors[:3], inputs.grad_out)} == {
        layout == "bnhd"
    }
    check, found = Checker(cell, inputs, exact=False), candidates(settings, cell)
    assert [one.name for one in found][3:] == ([] if sharing == "none" else ["eager_packed", "sdpa_packed", "bmm"])
    for one in found:
        assert all(verdict.right for verdict in check(one)), one.name


def test_both_layouts_have_the_same_values():
    cells = options.cells(options.parse([*TINY, "--device=cpu", "--layout=bnhd,bhnd"]))
    for a, b in zip(*(make_inputs(cell, "cpu").tensors for cell in cells), strict=True):
        assert torch.equal(a, b)


class Scripted:
    """A probe that reads these rates, one after the other, and a runner that takes no time."""

    def __init__(self, rates):
        self.rates, self.best = iter(rates), 100.0

    def rate(self):
        return next(self.rates)

    quiet = machine.Probe.quiet
    active, share = True, 0.75

    def prepare(self):
        return None

    def run(self, _):
        return None


def samples_beside(rates, monkeypatch, repeats):
    script = Scripted(rates)
    monkeypatch.setattr(machine, "Probe", lambda share, device: script)
    arguments = [f"--repeats={repeats}", "--min-time=1e-9", "--cell-time=100", "--device=cpu"]
    settings = options.parse(arguments)
    return measure.take_samples({"one": script}, measure.Stopwatch(settings), settings, lambda done: None)["one"]


class FakeGraphs:
    """In the place of torch.cuda: a graph keeps what was called in its capture, a replay does it again."""

    def __init__(self, monkeypatch):
        self.clock, self.capturing, self.captures = 0.0, None, []
        for name in ("synchronize", "stream", "Stream", "CUDAGraph", "graph", "Event"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def synchronize(self):
        assert self.capturing is None, "a graph cannot be captured over that"

    def stream(self, stream):
        return contextlib.nullcontext()

    def Stream(self):
        return "side"

    def CUDAGraph(self):
        return types.SimpleNamespace(calls=0, replay=lambda: None)

    @contextlib.contextmanager
    def graph(self, graph, stream):
        assert stream == "side"
        self.capturing = graph
        yield
        self.capturing = None
        self.captures.append(graph.calls)

        def replay():
            self.clock += 2.0 * graph.calls

        graph.replay = replay

    def Event(self, enable_timing):
        event = types.SimpleNamespace(at=0.0)
        event.record = lambda: setattr(event, "at", self.clock)
        event.elapsed_time = lambda other: other.at - event.at
        return event

    def launch(self):
        if self.capturing is not None:
            self.capturing.calls += 1


def test_graphs_are_timed_without_the_host(monkeypatch):
    """Of stand-ins: a call takes 2 ms there, whatever it takes here, and one graph serves all samples."""
    cells = options.cells(options.parse([*TINY, "--device=cpu", "--op=bwd"]))
    graphs = FakeGraphs(monkeypatch)
    inputs = make_inputs(cells[0], "cpu")

    class Launching(torch.autograd.Function):
        @staticmethod
        def forward(ctx, out):
            return out.clone()

        @staticmethod
        def backward(ctx, grad):
            graphs.launch()
            return grad

    runner = measure.Runner(lambda *tensors: Launching.apply(eager(*tensors)), inputs, "bwd", exact=False)
    stopwatch = measure.GraphStopwatch(types.SimpleNamespace(device="cuda", clock="wall", flush=False))
    assert [stopwatch.sample(runner, calls) for calls in (1, 250, 250, 7)] == pytest.approx([0.002] * 4)
    assert graphs.captures == [1, 100, 7]


@pytest.mark.parametrize("more", [["--device=cpu"], ["--device=cuda", "--flush"]])
def test_graphs_are_of_a_gpu(more, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        options.parse([*TINY, "--timing=graph", *more])
    assert "--timing graph" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--csv", "--json", "--plot"])
@pytest.mark.parametrize("where", [".", "no/such/folder/file"])
def test_files_that_cannot_be_written_are_refused_at_once(option, where, capsys):
    """A folder was found out when all had been measured, and was lost."""
    with pytest.raises(SystemExit):
        options.parse([*TINY, "--device=cpu", option, where])
    assert f"cannot write {where}: " in capsys.readouterr().err
    if option == "--json":
        with pytest.raises(SystemExit):
            host.main([option, where])


def test_samples_beside_a_slow_phase_do_not_count(monkeypatch):
    """A probe before and one after each; rounds go on until enough count."""
    rates = [100, 100, 100, 70, 70, 100, 90, 76, 100, 100, 100, 100]
    found = samples_beside(rates, monkeypatch, repeats=4)
    assert (len(found.counted), len(found.slow), found.quiet) == (4, 2, True)
    assert found.seconds == found.counted


def test_on_a_machine_that_is_never_quiet_all_samples_count(monkeypatch):
    found = samples_beside([100, 50] * 12, monkeypatch, repeats=4)
    assert (len(found.counted), len(found.slow), found.quiet) == (0, 12, False)
    assert found.seconds == found.slow


def test_probe():
    probe = machine.Probe(0.75, "cpu")
    assert 0 < probe.rate() <= probe.best
    assert probe.quiet(probe.best, 0.76 * probe.best) and not probe.quiet(probe.best, 0.74 * probe.best)
    off = machine.Probe(0.0, "cpu")
    assert off.quiet(off.rate(), off.rate())


def test_builds_side_by_side(tmp_path):
    where = tmp_path / "rows.json"
    builds = "generic,emulate_avx512_bf16,abacus"
    quick = ("--device=cpu", "--repeats=3", "--cell-time=0.1", "--min-time=1e-4", "--threads=1", "--dtype=bf16")
    arguments = (*TINY[1:], *quick, f"--capability={builds}", f"--json={where}")
    done = python("-m", "bench", *arguments, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    rows = {row["candidate"]: row for row in json.loads(where.read_text())["results"]}
    assert rows["ours:abacus"]["status"] == "refused" and "abacus" in rows["ours:abacus"]["note"]
    for name in ("ours:generic", "ours:emulate_avx512_bf16", "sdpa_proj"):
        assert rows[name]["status"] == "ok" and len(rows[name]["samples"]) >= 3
    # Their answers differ in rounding, so each did run: pairs of bf16 are summed in another order.
    errors = [rows[f"ours:{name}"]["check"][1]["error"] for name in ("generic", "emulate_avx512_bf16")]
    assert errors[0] != errors[1]


def test_a_build_is_chosen_for_one_thread_and_given_back():
    before = torch.ops.linformer_kernels.cpu_capability()
    try:
        assert torch.ops.linformer_kernels.cpu_use_capability("generic") == "generic"
        assert torch.ops.linformer_kernels.cpu_capability() == "generic"
        others = []
        thread = threading.Thread(target=lambda: others.append(torch.ops.linformer_kernels.cpu_capability()))
        thread.start()
        thread.join()
        assert others == [before]
    finally:
        assert torch.ops.linformer_kernels.cpu_use_capability("") == before


def test_host(tmp_path, capsys):
    where = tmp_path / "host.json"
    threads = torch.get_num_threads()
    try:
        host.main(["--repeats=3", "--cell-time=0.001", f"--json={where}"])
    finally:
        torch.set_num_threads(threads)
    assert capsys.readouterr().out.count("ours") == len(host.PROBLEMS) * len(host.MODES)
    assert len(json.loads(where.read_text())["results"]) == 2 * len(host.PROBLEMS) * len(host.MODES)


def test_a_build_that_is_not_there_is_refused_every_time():
    for _ in range(2):
        with pytest.raises(NotImplementedError, match="abacus"):
            machine.use_capability("abacus")


def test_host_of_a_gpu(tmp_path):
    """In a process of its own, for the stub of a driver that it loads."""
    where = tmp_path / "host.json"
    arguments = ("--gpu", "--rounds=1", "--round-time=0.001", f"--json={where}")
    out = succeeded(python("-m", "bench.host", *arguments, cwd=ROOT))
    names = {result["name"] for result in json.loads(where.read_text())["results"]}
    for backend in ("cuda", "triton"):
        name = f"{backend}: linformer_attention"
        reason = host_gpu.why_not(backend)
        assert reason in out if reason else name in names and name in out
