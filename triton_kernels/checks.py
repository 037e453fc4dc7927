"""What memory safety needs of the arguments of an op, which can be called without its public function.

On a GPU nobody reads offsets before the kernels do: they hold them inside their tensor (common.sequence).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Arguments of an op that `check` takes by name, and not among its tensors.
CHECKED_APART = (
    "cu_seqlens_q", "cu_seqlens_k", "key_padding_mask", "rng_state", "dropout_p", "key_bias", "segments", "count",
    "num_segments",
)  # fmt: skip
_PACKED_BY = {"query": "q", "grad_out": "q", "key": "k", "value": "k"}


def check(
    tensors: dict[str, Tensor | None],
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    rng_state: Tensor | None = None,
    dropout_p: float = 0.0,
    key_bias: Tensor | None = None,
    segments: Tensor | None = None,
    count: Tensor | None = None,
    num_segments: int = 1,
) -> None:
    """Raises ValueError unless the tensors, by the names of the ops, fit each other."""
    packed = {"q": cu_seqlens_q, "k": cu_seqlens_k}
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    like_name, like = next(iter(given.items()))
    known = {"1": 1}

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(f"linformer_kernels: {what}")

    def fit(name: str, shape: tuple[int, ...], letters: str) -> None:
        """Each letter stands for one size, wherever it comes."""
        require(len(shape) == len(letters), f"{name} has {len(shape)} dimensions, expected {len(letters)}")
        for letter, size in zip(letters, shape, strict=True):
            expected = known.setdefault(letter, size)
            require(size == expected, f"{name} has shape {tuple(shape)}, which does not fit the other tensors")

    for side, offsets in packed.items():
        if offsets is not None:
            good = offsets.dim() == 1 and len(offsets) >= 1 and offsets.dtype == torch.int64 and offsets.is_contiguous()
            require(good, f"cu_seqlens_{side} must be a contiguous int64 tensor of batch + 1 offsets")
            require(offsets.device == like.device, f"cu_seqlens_{side} is on another device than {like_name}")
            require(known.setdefault("b", len(offsets) - 1) == len(offsets) - 1, "cu_seqlens_q and _k differ in length")
    letters = {
        "query": "bhqd", "grad_out": "bhqv", "key": "bgnd", "value": "bgnv", "key_proj": "bgkd", "value_proj": "bgkv",
        "grad_key_proj": "bgkd", "grad_value_proj": "bgkv", "proj_key": "km", "proj_value": "km",
    }  # fmt: skip
    before_k = ""
    if (proj_key := tensors.get("proj_key")) is not None and proj_key.dim() > 2:
        before_k = "g" if proj_key.dim() == 3 else "b1" if proj_key.size(1) == 1 else "bg"
    require(
        like.dtype in (torch.float32, torch.float16, torch.bfloat16), "tensors must be float32, float16 or bfloat16"
    )
    for name, tensor in given.items():
        require(tensor.device == like.device, f"{name} is on another device than {like_name}")
        require(tensor.dtype == like.dtype, f"{name} differs in dtype from {like_name}")
        sizes = letters[name]
        if name in _PACKED_BY and packed[_PACKED_BY[name]] is not None:
            sizes = sizes[2] + sizes[1] + sizes[3]
        elif name in ("proj_key", "proj_value"):
            sizes = before_k + sizes
        fit(name, tensor.shape, sizes)
        adjacent = tensor.numel() == 0 or tensor.size(-1) <= 1 or tensor.stride(-1) == 1
        require(adjacent, f"{name} needs adjacent elements in its last dimension")
    for letter, name in (("k", "proj_dim"), ("d", "head_dim"), ("v", "the width of value")):
        require(known.get(letter, 1) >= 1, f"{name} must be at least 1")
    if "h" in known:
        heads, heads_kv = known["h"], known["g"]
        require(heads % heads_kv == 0 if heads_kv else heads == 0, "query heads must be a multiple of key heads")
    if "m" in known and cu_seqlens_k is None:
        require(known["n"] <= known["m"], "a sequence is longer than proj_key has columns")
    if key_padding_mask is not None:
        good = key_padding_mask.dtype == torch.bool and key_padding_mask.device == like.device
        require(good and cu_seqlens_k is None, "key_padding_mask must be a bool tensor, for padded tensors")
        fit("key_padding_mask", key_padding_mask.shape, "bn")
    for name, numbers in (("key_bias", key_bias), ("count", count)):
        if numbers is not None:
            good = numbers.dtype == torch.float32 and numbers.device == like.device
            require(good, f"{name} must be a float32 tensor on the device of {like_name}")
            fit(name, numbers.shape, "bgk")
            require(numbers.size(-1) == 1 or numbers.stride(-1) == 1, f"{name} needs adjacent elements in a row")
    require(1 <= num_segments < 2**31, "num_segments must be at least 1 and below 2^31")
    require(count is None or count.is_contiguous(), "count must be as pool returns it")
    if segments is not None:
        good = segments.dtype == torch.int32 and segments.device == like.device
        require(good, f"segments must be an int32 tensor on the device of {like_name}")
        of_heads = "1" if segments.dim() > 1 and segments.size(1) == 1 else "g"
        fit("segments", segments.shape, f"b{of_heads}n" if cu_seqlens_k is None else f"n{of_heads}")
    require(0.0 <= dropout_p < 1.0, "dropout_p must be in [0, 1)")
    if dropout_p > 0:
        good = rng_state is not None and rng_state.dtype == torch.int64 and rng_state.numel() == 2
        require(
            good and rng_state.is_contiguous() and rng_state.device == like.device,  # type: ignore[union-attr]
            "dropout needs rng_state, an int64 tensor (seed, offset)",
        )
