"""Scripts of several processes, which tests start, and the end of each of their processes."""

import os
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

import linformer_kernels


def start(script: Path, *arguments: object) -> None:
    """To its end, which has to be a good one. It finds the tests and this package."""
    paths = [Path(__file__).parent, Path(linformer_kernels.__file__).parent.parent]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]


def leave() -> None:
    """Not by the interpreter's end: under load that aborted now and then with torch 2.13 after all was done, "terminate
    called without an active exception". An assertion that failed has been raised before."""
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)
