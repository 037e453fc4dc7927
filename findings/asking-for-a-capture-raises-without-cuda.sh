#!/usr/bin/env bash
# torch.cuda: whether a graph is being captured cannot be asked of a PyTorch that was built without CUDA.
#
# Where: torch 2.13.0+cpu, any machine. (A build with CUDA on a machine without a GPU was not tried.)
#
# What one would guess: torch.cuda.is_current_stream_capturing() is a question like is_available(), device_count() and
# is_initialized(), which builds without CUDA answer with False or 0; nothing is captured there, so False. Code for
# several devices, a launcher say, may ask first and look at the device later.
#
# What happens: RuntimeError, "Tried to instantiate dummy base class _cuda_isCurrentStreamCapturing": the function that
# it is imported from is replaced by a class that only raises. `torch.version.cuda is None` has to be asked before.
#
# Output seen:
#   is_available: False
#   is_initialized: False
#   device_count: 0
#   is_current_stream_capturing: RuntimeError, Tried to instantiate dummy base class _cuda_isCurrentStreamCapturing
#
# Exits 0 where that is so, 1 where it has changed, 2 where the PyTorch that was installed has CUDA.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6
cat > "$folder/ask.py" <<'P'
import sys

import torch

if torch.version.cuda is not None:
    print(f"torch {torch.__version__} was built with CUDA")
    sys.exit(2)
said = {}
for name in ("is_available", "is_initialized", "device_count", "is_current_stream_capturing"):
    try:
        said[name] = str(getattr(torch.cuda, name)())
    except Exception as error:
        said[name] = f"{type(error).__name__}, {error}"
    print(f"{name}: {said[name]}")
*others, capturing = said.values()
sys.exit(not (set(others) == {"False", "0"} and capturing.startswith("RuntimeError, Tried to instantiate dummy")))
P
"$folder/venv/bin/python" -W ignore "$folder/ask.py"
