"""The pictures: time and memory, or work counted, against N; a line a candidate, a row of panels for each setting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

MAX_SETTINGS = 6
STYLES = {
    "eager": ("#8c8c8c", "s", "eager formula"),
    "sdpa_proj": ("#1b9e77", "^", "matmul + SDPA on K', V'"),
    "eager_packed": ("#bdbdbd", "<", "eager, one product for all heads"),
    "sdpa_packed": ("#00a6a6", ">", "matmul + SDPA, one product for all heads"),
    "upcast": ("#66a61e", "v", "the same in float32"),
    "compile": ("#7570b3", "D", "torch.compile of eager"),
    "exact": ("#1f4e79", "x", "exact attention (SDPA)"),
    "flash": ("#4ea8de", "+", "exact attention (flash_attn)"),
}
OURS = ("#d1495b", "#edae49", "#b5179e", "#e07a1f", "#6d2e46")


def draw(path: str, rows: list[dict[str, Any]], machine: dict[str, Any]) -> str | None:
    """Writes the picture; returns a remark if something is not in it."""
    plt = pyplot()
    from matplotlib.ticker import LogLocator, NullLocator

    timed = [row for row in rows if "p50_s" in row]
    settings = list(dict.fromkeys(replace(row["cell"], seq_len=0) for row in timed))
    if not settings:
        return "nothing was timed, so there is no picture"
    shown = settings[:MAX_SETTINGS]
    ours = list(dict.fromkeys(row["candidate"] for row in timed if row["kind"] == "ours"))
    figure, axes = plt.subplots(
        len(shown), 2, figsize=(11, 0.9 + 4.0 * len(shown)), squeeze=False, layout="constrained"
    )
    handles: dict[str, Any] = {}
    for setting, (left, right) in zip(shown, axes, strict=True):
        here = [row for row in timed if replace(row["cell"], seq_len=0) == setting]
        lengths = sorted({row["cell"].seq_len for row in here})
        for name in dict.fromkeys(row["candidate"] for row in here):
            mine = sorted((row for row in here if row["candidate"] == name), key=lambda row: row["cell"].seq_len)
            n = [row["cell"].seq_len for row in mine]
            if name in STYLES:
                color, marker, label = STYLES[name]
                line = {"lw": 1.4, "ls": "--" if name in ("exact", "flash") else "-", "ms": 5, "zorder": 2}
            else:
                color, marker, label = OURS[ours.index(name) % len(OURS)], "o", f"linformer_kernels ({name[5:]})"
                line = {"lw": 2.6, "ms": 6.5, "zorder": 3}
            (handles[label],) = left.plot(
                n, [row["p50_s"] for row in mine], color=color, marker=marker, label=label, **line
            )
            left.fill_between(n, [r["p20_s"] for r in mine], [r["p80_s"] for r in mine], color=color, alpha=0.15, lw=0)
            # A logarithmic axis has no zero.
            right.plot(n, [max(row["extra_bytes"], 1024) for row in mine], color=color, marker=marker, **line)
        for axis, what, form in (
            (left, "time a call, p50 (band: p20 to p80)", seconds),
            (right, "extra memory a call", size),
        ):
            dress(axis, what, lengths, form)
        low, high = left.get_ylim()
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 500 * low else (1,), numticks=12))
        right.yaxis.set_major_locator(LogLocator(base=2, numticks=8))
        right.yaxis.set_minor_locator(NullLocator())
        left.set_ylabel(describe(setting), fontsize=9, labelpad=10)
    title = f"Linformer attention, {machine['device']}, {machine['threads']} thread(s), PyTorch {machine['torch']}"
    return finish(path, figure, title, handles, settings)


def draw_counts(path: str, rows: list[dict[str, Any]], gpu: str) -> str | None:
    """The rows of `python -m bench.counts` that are of all launches; returns a remark if something is not in it."""
    plt = pyplot()
    from matplotlib.ticker import LogLocator, NullLocator

    totals = [row for row in rows if row["kernel"] == "all"]
    settings = list(dict.fromkeys(replace(row["cell"], seq_len=0) for row in totals))
    if not settings:
        return "nothing was counted, so there is no picture"
    shown = settings[:MAX_SETTINGS]
    figure, axes = plt.subplots(
        len(shown), len(PANELS), figsize=(17, 0.9 + 3.6 * len(shown)), squeeze=False, layout="constrained"
    )
    handles: dict[str, Any] = {}
    for setting, panels in zip(shown, axes, strict=True):
        here = [row for row in totals if replace(row["cell"], seq_len=0) == setting]
        lengths = sorted({row["cell"].seq_len for row in here})
        for (key, what, form), axis in zip(PANELS, panels, strict=True):
            for name in dict.fromkeys(row["backend"] for row in here):
                mine = sorted((row for row in here if row["backend"] == name), key=lambda row: row["cell"].seq_len)
                color, marker, style, label = COUNTED[name]
                (handles[label],) = axis.plot(
                    [row["cell"].seq_len for row in mine], [row[key] for row in mine], color=color, marker=marker,
                    ls=style, label=label, lw=2, ms=6,
                )  # fmt: skip
            dress(axis, what, lengths, form)
            low, high = axis.get_ylim()
            decimal = LogLocator(subs=(1, 2, 5) if high < 500 * low else (1,), numticks=12)
            axis.yaxis.set_major_locator(LogLocator(base=2, numticks=8) if form is size else decimal)
            axis.yaxis.set_minor_locator(NullLocator())
        panels[0].set_ylabel(describe(setting), fontsize=9, labelpad=10)
    title = f"Linformer attention: work counted in an emulator, bounds at the published rates of an {gpu}; no times"
    return finish(path, figure, title, handles, settings)


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def dress(axis: Any, what: str, lengths: list[int], form: Callable[..., str]) -> None:
    """A panel's title, scales and ticks."""
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    axis.set(xscale="log", yscale="log", xlabel="sequence length N")
    axis.set_title(what, loc="left", fontsize=10)
    axis.set_xticks(lengths, [f"{x // 1024}k" if x % 1024 == 0 else str(x) for x in lengths])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(form))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(True, which="major", color="#dddddd", lw=0.7)
    axis.spines[["top", "right"]].set_visible(False)


def finish(path: str, figure: Any, title: str, handles: dict[str, Any], settings: list[Any]) -> str | None:
    """Write the picture; a remark if not all settings are in it."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot().close(figure)
    if len(settings) > MAX_SETTINGS:
        return f"the picture shows the first {MAX_SETTINGS} of {len(settings)} settings; give fewer for the others"
    return None


def describe(setting: Any) -> str:
    op = {"fwd": "forward", "bwd": "backward", "full": "forward + backward"}[setting.op]
    sizes = f"B={setting.batch} H={setting.heads} K={setting.proj_dim} D={setting.head_dim}"
    return f"{op}, {setting.dtype}\n{sizes}, {setting.sharing}, {setting.layout}"


def seconds(value: float, _: object = None) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if value * factor >= 0.9999:
            return f"{value * factor:g} {unit}"
    return f"{value * 1e6:g} µs"


def size(value: float, _: object = None) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value / 1024:.3g} KiB"


def amount(value: float, _: object = None) -> str:
    for unit, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9999 * factor:
            return f"{value / factor:g} {unit}"
    return f"{value:g}"


COUNTED = {
    "cuda": ("#d1495b", "o", "-", "linformer_kernels (cuda)"),
    "triton": ("#edae49", "^", "-", "linformer_kernels (triton)"),
    "exact": ("#1f4e79", "x", "--", "exact attention (Triton)"),
}
PANELS = (
    ("tensor_flop", "FLOP on tensor cores", amount),
    ("l2_bytes", "bytes between L2 and multiprocessors", size),
    ("warp_instructions", "warp instructions of PTX", amount),
    ("bound_us", "bound: no GPU of this kind is faster", lambda us, _: seconds(us / 1e6)),
)
