"""Linformer attention: fused kernels behind plain functions and modules. Importing never fails and never prints."""

from importlib.metadata import PackageNotFoundError, version

from ._backends import use_backend
from .encoders import LinformerEncoder, LinformerEncoderLayer
from .functional import (
    linformer_attention,
    linformer_attention_varlen,
    pool_kv,
    pooled_attention,
    project_kv,
    projected_attention,
)
from .integrations.torch_nn import from_torch
from .modules import LinformerAttention
from .projections import LinformerProjection
from .tuning import tune

try:
    __version__ = version("linformer_kernels")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "LinformerAttention",
    "LinformerEncoder",
    "LinformerEncoderLayer",
    "LinformerProjection",
    "__version__",
    "from_torch",
    "linformer_attention",
    "linformer_attention_varlen",
    "pool_kv",
    "pooled_attention",
    "project_kv",
    "projected_attention",
    "tune",
    "use_backend",
]
