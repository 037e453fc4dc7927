"""Encoders of Hugging Face transformers with Linformer attention in place of their own: `linformerize` and `load`.

transformers (5.4 and later) sends every model's attention through a table of functions. `linformerize` gives the model
E and F, as `<base model>.linformer`, and chooses the function registered here, which calls that module with a layer's
query, key and value, padding mask, dropout and scale. Weights and layers of the model itself stay as they are, so that
`model.set_attn_implementation("sdpa")` is the way back. What it takes to make the same model again is in
`model.config.linformer`; `load` reads it back.
"""

import transformers

OLDEST = (5, 4)
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST:
    raise ImportError(
        f"transformers is {transformers.__version__}; wanted: {OLDEST[0]}.{OLDEST[1]} or later, as by: pip install "
        f'"transformers>={OLDEST[0]}.{OLDEST[1]}"'
    )

from .convert import linformerize  # noqa: E402
from .saved import load  # noqa: E402

__all__ = ["linformerize", "load"]
