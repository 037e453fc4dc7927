"""Modules of other packages with Linformer attention as modules of this one, with their weights and output.

The results keep the contract of torch.nn, as all modules here: an attention returns a pair, and its masks are True
where a position is IGNORED, where the peers' are True where it takes part. Inputs are (B, N, width), as the peers'.

Theirs are known by their attributes; none of the packages is imported. The result is a copy: device, dtype, training
mode and probabilities of dropout are those of the original, and all weights are trained. Biases that the peers lack are
zero and frozen. Checkpoints that become models of transformers: `linformer_kernels.integrations.roberta`.
"""

from .linformer import attention_from_linformer, encoder_from_linformer, encoder_from_vision_xformer
from .linformer_pytorch import (
    BiasedProjection,
    attention_from_linformer_pytorch,
    encoder_from_linformer_pytorch,
    projection_from_linformer_pytorch,
)
from .xformers import attention_from_xformers, projection_from_xformers

__all__ = [
    "BiasedProjection",
    "attention_from_linformer",
    "attention_from_linformer_pytorch",
    "attention_from_xformers",
    "encoder_from_linformer",
    "encoder_from_linformer_pytorch",
    "encoder_from_vision_xformer",
    "projection_from_linformer_pytorch",
    "projection_from_xformers",
]
