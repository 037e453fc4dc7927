#!/usr/bin/env bash
# torch.export: a shape compared with one of another rank forbids lengths, if both are tuples; as lists it does not.
#
# Where: torch 2.13.0 and CPython 3.11, any machine.
#
# What one would guess: (B, N) == (B, H, N) is False because there are two numbers and three, and no number is looked at.
# So a check that tells tensors of two ranks apart by their shapes costs an exported model nothing.
#
# What happens: CPython compares tuples item by item until two differ, and their lengths only then; lists of different
# lengths it does not look into. With a length N that is exported as dynamic the second item is N == H, so the graph gets
# the guard N != H, and export fails: one of the lengths that were asked for equals the number of heads, here 8. The
# message names the guard, and no line of the model that made it. `len(shape)` first, or lists, and it exports.
#
# Output seen:
#   tuple: UserError, satisfy the generated guard L['rows'].size()[2] != 8
#   list: exported
#
# Exits 0 where that is so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6
cat > "$folder/compare.py" <<'P'
import sys

import torch


class Compare(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, rows, numbers):
        """rows (B, H, N, D); numbers (B, H, N), or (B, N) for all heads."""
        if self.kind(numbers.shape) == self.kind(rows.shape[:3]):
            return rows + numbers[..., None]
        return rows + numbers[:, None, :, None]


length = torch.export.Dim("length", min=2, max=4096)
inputs = torch.randn(2, 8, 100, 4), torch.randn(2, 100)
said = {}
for kind in (tuple, list):
    try:
        torch.export.export(Compare(kind), inputs, dynamic_shapes=({2: length}, {1: length}))
        said[kind] = "exported"
    except Exception as error:
        guard = "satisfy the generated guard L['rows'].size()[2] != 8"
        said[kind] = f"{type(error).__name__}, {guard if guard in str(error) else str(error)}"
    print(f"{kind.__name__}: {said[kind]}")
sys.exit(not ("!= 8" in said[tuple] and said[list] == "exported"))
P
"$folder/venv/bin/python" -W ignore "$folder/compare.py"
