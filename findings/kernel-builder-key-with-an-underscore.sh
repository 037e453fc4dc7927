#!/usr/bin/env bash
# Hugging Face kernels: one key of build.toml is spelled with an underscore in one section, and with a dash in another.
#
# Where: kernels 0.17.2, whose parser of build.toml is that of kernel-builder; CPython 3.11, any machine.
#
# What one would guess: `cuda-capabilities`, the key by which a kernel says on which GPUs it runs, is spelled so in every
# section, like the other keys of two words there (cxx-flags, cuda-minver).
#
# What happens: in a section [kernel.NAME] it is spelled so, and with an underscore it is refused; in [torch-noarch], the
# section of kernels in Python and Triton, it is refused with the dash and taken with the underscore.
#
# Output seen:
#   kernel, cuda-capabilities: taken
#   kernel, cuda_capabilities: refused, unknown field
#   torch-noarch, cuda-capabilities: refused, unknown field
#   torch-noarch, cuda_capabilities: taken
#
# Exits 0 where that is so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps kernels==0.17.2
cat > "$folder/read.py" <<'P'
import importlib.util
import sys
from pathlib import Path

# The parser alone: the package around it wants PyTorch.
found = next(Path(sys.prefix).glob("lib/python*/site-packages/kernels/_rust*.so"))
spec = importlib.util.spec_from_file_location("kernels._rust", found)
parser = importlib.util.module_from_spec(spec)
spec.loader.exec_module(parser)

GENERAL = '[general]\nname = "mine"\nversion = 0\nedition = 5\nlicense = "MIT"\nbackends = ["cuda"]\n'
SECTIONS = {
    "kernel": '[torch]\nsrc = ["torch-ext/a.cpp"]\n[kernel.mine]\nbackend = "cuda"\ndepends = ["torch"]\nsrc = ["a.cu"]\n',
    "torch-noarch": '[torch-noarch]\npyext = ["py"]\n',
}
said = {}
for section, text in SECTIONS.items():
    for key in ("cuda-capabilities", "cuda_capabilities"):
        folder = Path(sys.argv[1]) / f"{section}-{key}"
        folder.mkdir()
        (folder / "build.toml").write_text(f'{GENERAL}{text}{key} = ["9.0"]\n')
        try:
            parser.Build.open(folder)
            said[section, key] = "taken"
        except Exception as error:
            said[section, key] = "refused, unknown field" if "unknown field" in str(error).lower() else f"refused: {error}"
        print(f"{section}, {key}: {said[section, key]}")
refused = "refused, unknown field"
wanted = ["taken", refused, refused, "taken"]
sys.exit(list(said.values()) != wanted)
P
"$folder/venv/bin/python" "$folder/read.py" "$folder"
