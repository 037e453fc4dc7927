"""What every test gets: NaN-poisoned torch.empty, a fresh printed seed, the device, and the command-line options."""

from __future__ import annotations

import os
import sys
import time
import zlib
from pathlib import Path

import pytest

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses deterministic mode without it
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where nobody has chosen
sys.path.insert(0, str(Path(__file__).parent))

import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="seed of all random inputs (also LINFORMER_TEST_SEED)")
    parser.addoption("--update-snapshots", action="store_true", help="rewrite tests/snapshots from this run")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than about ten seconds; leave out with -m 'not slow'")
    seed = config.getoption("--seed")
    if seed is None:
        seed = int(os.environ.get("LINFORMER_TEST_SEED", time.time_ns() % 2**31))
    config.run_seed = seed


def pytest_report_header(config: pytest.Config) -> str:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return f"inputs: --seed {config.run_seed}, device {device}, torch {torch.__version__}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if report.failed:
        report.sections.append(("inputs", f"repeat with: pytest --seed {item.config.run_seed} '{item.nodeid}'"))
    return report


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The same for a test however it is selected: from the seed of the run and the name of the test."""
    return (request.config.run_seed + zlib.crc32(request.node.nodeid.encode())) % 2**31


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poisoned_empty(seed: int):
    """Every torch.empty is NaN, and so are the results of native ops (test_package.py); torch starts from `seed`."""
    torch.manual_seed(seed)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(scope="session")
def native(device: str) -> str | None:
    """The backend under test. Forced on a CPU, so that a library that does not load fails every test."""
    return "cpu" if device == "cpu" else None
