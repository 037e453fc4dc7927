"""Linformer attention: fused kernels behind plain functions and modules. Importing never fails and never prints."""

from importlib.metadata import PackageNotFoundError, version

from ._backends import use_backend
from .functional import linformer_attention, linformer_attention_varlen, project_kv, projected_attention
from .modules import LinformerAttention, LinformerEncoderLayer, LinformerProjection
from .tuning import tune

try:
    __version__ = version("linformer_kernels")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "LinformerAttention",
    "LinformerEncoderLayer",
    "LinformerProjection",
    "__version__",
    "linformer_attention",
    "linformer_attention_varlen",
    "project_kv",
    "projected_attention",
    "tune",
    "use_backend",
]
