#!/usr/bin/env bash
# torch.onnx.export: a tensor modulo a length that is dynamic cannot be exported; the same by comparison can.
#
# Where: torch 2.13.0, onnx 1.23.2, onnxscript 0.7.2, CPython 3.11, any machine.
#
# What one would guess: positions modulo the length (to turn rows, to wrap windows) are arithmetic on integers, which
# ONNX has as Mod, and `tensor + length` and `tensor < length` go through with the same dynamic length. torch.export
# takes the model.
#
# What happens: ConversionError; at its root a TypeError from int(): the translation of aten.remainder wants a number and
# gets the symbol that stands for the length. With torch.where(at < n, at, at - n) in its place the model is exported.
#
# Output seen:
#   remainder: ConversionError, for TypeError: int() argument must be a string, a bytes-like object or a real number, not
#     'SymbolicTensor'
#   where: exported
#
# Exits 0 where that is so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6 onnx==1.23.2 onnxscript==0.7.2
cat > "$folder/turn.py" <<'P'
import sys

import torch


class Turned(torch.nn.Module):
    """Each sequence begins at a position of its own."""

    def __init__(self, way):
        super().__init__()
        self.way = way

    def forward(self, rows, first):
        length = rows.size(1)
        at = torch.arange(length) + first[:, None]
        at = at % length if self.way == "remainder" else torch.where(at < length, at, at - length)
        return rows.gather(1, at)


length = torch.export.Dim("length", min=2, max=4096)
inputs = torch.randn(2, 100), torch.tensor([3, 50])
said = {}
for way in ("remainder", "where"):
    try:
        torch.onnx.export(Turned(way), inputs, dynamo=True, dynamic_shapes=({1: length}, None), verbose=False)
        said[way] = "exported"
    except Exception as error:
        root = error
        while root.__cause__ is not None:
            root = root.__cause__
        said[way] = f"{type(error).__name__}, for {type(root).__name__}: {root}"
    print(f"{way}: {said[way]}")
sys.exit(not ("SymbolicTensor" in said["remainder"] and said["where"] == "exported"))
P
"$folder/venv/bin/python" -W ignore "$folder/turn.py" 2> "$folder/log"
