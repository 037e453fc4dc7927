"""Modules of the package `linformer-pytorch` (0.19.3).

It adds a bias to each row of K' and V'. Our E has none: a `BiasedProjection` adds it, between the two halves of the
operation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...functional import project_kv
from ...modules import LinformerAttention
from ...projections import LinformerProjection
from ._common import LinearWithDropout, checked, made_like, make_attention, make_layer, take


class BiasedProjection(LinformerProjection):
    """E and F with biases: K' = E[:, :N] @ key + b 1^T, with a number of b for each of the K rows.

    Neither a mask nor a sequence shorter than seq_len changes what b adds, and column n of E meets position n, whatever
    is masked, as in linformer-pytorch.

    Args:
        seq_len, proj_dim, num_heads: as in `LinformerProjection`; with num_heads each head has a b of its own.
        share_kv: E = F, with one b.
    """

    bias_key: Tensor
    bias_value: Tensor | None

    def __init__(
        self,
        seq_len: int,
        proj_dim: int,
        *,
        num_heads: int | None = None,
        share_kv: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(seq_len, proj_dim, num_heads=num_heads, share_kv=share_kv, from_first=False, **factory)
        self.kind = "biased"
        shape = (proj_dim,) if num_heads is None else (num_heads, proj_dim)
        self.bias_key = nn.Parameter(torch.zeros(shape, **factory))
        self.register_parameter("bias_value", None if share_kv else nn.Parameter(torch.zeros(shape, **factory)))

    def reset_parameters(self) -> None:
        """Draw E and F anew; biases start as zero."""
        super().reset_parameters()
        for name, parameter in self.named_parameters():
            if name.startswith("bias"):
                nn.init.zeros_(parameter)

    def compress(
        self, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, cu_seqlens_k: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """K' and V', with the biases."""
        assert self.proj_key is not None  # for mypy
        options: dict[str, Any] = {"key_padding_mask": key_padding_mask, "cu_seqlens_k": cu_seqlens_k}
        keys, values = project_kv(key, value, self.proj_key, self.proj_value, **options)
        bias_value = self.bias_key if self.bias_value is None else self.bias_value
        return keys + self.bias_key[..., None], values + bias_value[..., None]


@torch.enable_grad()  # to tell which weights are trained
def projection_from_linformer_pytorch(peer: nn.Module) -> LinformerProjection:
    """E and F of a `linformer_pytorch.LinearAttentionHead`: all the weights it has.

    Args:
        peer: with a learnable E and F (the result is a BiasedProjection) or with method="no_params" (kind "fixed").

    Returns:
        `new` with which `projected_attention(query, *new(key, value), scale=peer.dim**-0.5)` of tensors (B, 1, N, D)
        is peer's output of the same without their dimension of heads.

    Raises:
        TypeError: peer is something else.
        NotImplementedError: causal, full_attention, method="convolution".
    """
    return _projection([_checked_head(peer)], {}).train(peer.training)


@torch.enable_grad()  # to tell which weights are trained
def attention_from_linformer_pytorch(peer: nn.Module) -> LinformerAttention:
    """`linformer_pytorch.MHAttention` as LinformerAttention.

    Args:
        peer: of any parameter_sharing and checkpoint_level. Checkpointing is a way to run it and is not copied.

    Returns:
        A module whose `new(x, key_padding_mask=~mask)[0]` is `peer(x, input_mask=mask)`, for a peer in decoder_mode
        `new(x, embeddings)[0]` is `peer(x, embeddings=embeddings)`. Its out_proj drops elements of the output in
        training.

    Raises:
        TypeError: peer is something else.
        NotImplementedError: causal, full_attention, method="convolution", w_o_intermediate_dim, E and F shared by
            some heads and not by others.
    """
    attention = _attention_from_linformer_pytorch(peer, {})
    dropout: Any = peer.mh_dropout
    if dropout.p > 0:
        attention.out_proj = LinearWithDropout(attention.out_proj, dropout.p)
    return attention.train(peer.training)


@torch.enable_grad()  # to tell which weights are trained
def encoder_from_linformer_pytorch(peer: nn.Module) -> nn.Sequential:
    """`linformer_pytorch.Linformer` as a sequence of LinformerEncoderLayer.

    Args:
        peer: of any parameter_sharing and depth. With "layerwise" all layers of the result have one projection.

    Raises:
        TypeError: peer is something else.
        NotImplementedError: decoder_mode, include_ff=False, ff_intermediate, and what attention_from_linformer_pytorch
            refuses.
    """
    theirs = checked(peer, "a Linformer of linformer_pytorch; of a LinformerLM: its .linformer", "seq", "decoder_mode")
    blocks = list(theirs.seq)
    for option, used in (
        ("decoder_mode=True", theirs.decoder_mode),
        ("include_ff=False", any(not hasattr(block.fn, "w_1") for block in blocks[1::2]) or len(blocks) % 2 == 1),
        ("ff_intermediate", any(block.resample is not None for block in blocks)),
    ):
        if used:
            raise NotImplementedError(
                f"peer has {option}, and no LinformerEncoderLayer is like its layers; wanted: a peer without it, or "
                "attention_from_linformer_pytorch for each MHAttention in it"
            )
    layers = []
    made: dict[Any, LinformerProjection] = {}
    for attend, feed_forward in zip(blocks[::2], blocks[1::2], strict=True):
        ff = feed_forward.fn
        parts = ff.w_1, ff.w_2, attend.norm, feed_forward.norm
        attention = _attention_from_linformer_pytorch(attend.fn, made)
        layer = make_layer(attention, *parts, activation=ff.activation, norm_first=False)
        layer.dropout1.p, layer.dropout.p, layer.dropout2.p = attend.fn.mh_dropout.p, ff.dropout.p, ff.dropout2.p
        layers.append(layer)
    return nn.Sequential(*layers).train(peer.training)


def _attention_from_linformer_pytorch(peer: nn.Module, made: dict[Any, LinformerProjection]) -> LinformerAttention:
    """Without the dropout of the output. `made` holds the projections of the layers before, by the identity of E, F."""
    wanted = "an MHAttention of linformer_pytorch; for a Linformer: encoder_from_linformer_pytorch"
    theirs = checked(peer, wanted, "heads", "to_q", "to_k", "to_v", "mh_dropout", "w_o_intermediate_dim")
    if theirs.w_o_intermediate_dim is not None:
        raise NotImplementedError(
            f"peer has w_o_intermediate_dim={theirs.w_o_intermediate_dim}, two linear layers for out_proj; wanted: "
            "their product as peer.w_o, and peer.w_o_intermediate_dim = None"
        )
    heads = [_checked_head(head) for head in theirs.heads]
    projection = _projection(heads, made, theirs.to_q[0].weight)
    q, k, v = (torch.cat([linear.weight for linear in part]) for part in (theirs.to_q, theirs.to_k, theirs.to_v))
    return make_attention(len(heads), projection, q, k, v, theirs.w_o, heads[0].dropout.p)


def _checked_head(peer: nn.Module) -> Any:
    wanted = "a LinearAttentionHead of linformer_pytorch"
    head = checked(peer, wanted, "E", "F", "dim", "causal_mask", "full_attention")
    if head.causal_mask is not None:
        raise NotImplementedError(
            "peer has causal=True; wanted: causal=False. Each row of K' mixes all positions, so its mask on the (N, K) "
            "scores hides no future; for causal models use torch.nn.functional.scaled_dot_product_attention"
        )
    if head.full_attention:
        raise NotImplementedError(
            "peer has full_attention=True and so no use for E and F; wanted: full_attention=False, or "
            "torch.nn.MultiheadAttention"
        )
    for name, matrix in (("E", head.E), ("F", head.F)):
        if not isinstance(matrix, (nn.Linear, Tensor)):
            raise NotImplementedError(
                f'{name} of peer is a {type(matrix).__name__}; wanted: method="learnable" or "no_params". The peer\'s '
                "convolution mixes the features of a head, that of a LinformerProjection does not"
            )
    return head


def _projection(
    heads: list[Any], made: dict[Any, LinformerProjection], like: Tensor | None = None
) -> LinformerProjection:
    """E and F of all heads, shared by whom they are shared there; on the device of `like`, as the peer's fixed E and F
    are plain tensors that `.to` leaves where they are."""
    keys, values = [head.E for head in heads], [head.F for head in heads]
    identity = tuple(id(matrix) for matrix in keys + values)
    if identity in made:
        return made[identity]
    key_is_value = {key is value for key, value in zip(keys, values, strict=True)}
    distinct = {len({id(matrix) for matrix in matrices}) for matrices in (keys, values)}
    if len(key_is_value) > 1 or distinct not in ({1}, {len(heads)}):
        raise NotImplementedError("some heads of peer share E or F and some do not; wanted: all of them or none")
    num_heads, share_kv = None if distinct == {1} else len(heads), key_is_value == {True}

    def stacked(tensors: list[Tensor]) -> Tensor:
        return tensors[0] if num_heads is None else torch.stack(tensors)

    matrices = {"key": keys} if share_kv else {"key": keys, "value": values}
    state = {f"proj_{name}": stacked([_matrix(e) for e in given]) for name, given in matrices.items()}
    proj_dim, seq_len = state["proj_key"].shape[-2:]
    options = {"num_heads": num_heads, "share_kv": share_kv, **made_like(state["proj_key"] if like is None else like)}
    if any(getattr(e, "bias", None) is not None for e in keys + values):
        state |= {f"bias_{name}": stacked([e.bias for e in given]) for name, given in matrices.items()}
        projection: LinformerProjection = BiasedProjection(seq_len, proj_dim, **options)
    else:
        kind = "fixed" if isinstance(keys[0], Tensor) else "learned"
        projection = LinformerProjection(seq_len, proj_dim, kind=kind, from_first=False, **options)
    take(projection, state)
    made[identity] = projection
    return projection


def _matrix(e: nn.Linear | Tensor) -> Tensor:
    """(K, seq_len)."""
    return e.T if isinstance(e, Tensor) else e.weight
