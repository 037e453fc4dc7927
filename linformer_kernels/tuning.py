"""`tune`: measure other tile sizes of the Triton kernels on this GPU, once, for one model's shapes."""

from __future__ import annotations

from torch import Tensor

from ._backends import choose
from ._validation import check_attention


def tune(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    proj_key: Tensor,
    proj_value: Tensor | None = None,
    *,
    backward: bool = True,
) -> dict[str, tuple[float, float]]:
    """Try tile sizes for calls like linformer_attention(query, key, value, proj_key, proj_value), and keep the fastest.

    Without this call tiles follow a rule, and nothing is ever tried out. What is found serves every later call with the
    same GPU, element size, K, head widths and sharing, in this process and, through a file, in later ones:
    `python -m linformer_kernels.info` shows it and says where it is (environment variable LINFORMER_TUNED names another
    file; delete it to go back to the rule). Results may change in the last bits, as sums are ordered by tiles. Takes a
    minute or two, most of it compilation.

    Args:
        query, key, value, proj_key, proj_value: as in `linformer_attention`, of the sizes that matter to you.
        backward: tune the backward kernels as well.

    Returns:
        For each kernel the seconds of its operation before and after.

    Raises:
        As `linformer_attention` with backend="triton".
    """
    call = check_attention(query, key, value, proj_key, proj_value, None, None, None, None, 0.0, None, False, False)
    choose(call, "triton")
    from .triton_kernels import tune as tuner

    inputs = (call.query, call.key, call.value, call.proj_key, call.proj_value)
    return tuner.tune(tuple(None if tensor is None else tensor.detach() for tensor in inputs), backward)
