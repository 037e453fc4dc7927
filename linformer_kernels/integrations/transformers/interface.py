"""What transformers calls for a layer's attention and for a call's mask: in its tables they are "linformer".

A layer finds its projection in the model in every call (`Place`), whatever stands there then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function
from transformers.modeling_utils import AttentionInterface

from ..._masks import of_scores
from ..._validation import refuse_causal

NAME = "linformer"
PLACE = "linformer_place"
# Options that transformers hands to attention functions and that mean nothing to one without weights and cache.
HARMLESS = {
    "position_ids", "max_length_q", "max_length_k", "num_items_in_batch", "output_hidden_states",
    "output_router_logits", "return_dict", "use_cache", "cache_position", "deterministic",
}  # fmt: skip


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers' attention interface calls for each layer: (B, H, N, D) tensors to a (B, N, H, D) output."""
    refuse_causal(bool(is_causal))
    packed = {f"cu_seqlens_{side}": options.pop(f"cu_seq_lens_{side}", None) for side in "qk"}
    if packed["cu_seqlens_q"] is not None and "seq_idx" in options:
        del options["seq_idx"]  # says the same
    for name, given in options.items():
        if given is not None and given is not False and name not in HARMLESS:
            raise NotImplementedError(
                f"{name} came to Linformer attention, which has none; wanted: a model and a call without {name}"
            )
    if query.size(2) != key.size(2):
        raise NotImplementedError(
            f"query has {query.size(2)} positions and key {key.size(2)}; wanted: self-attention over one sequence"
        )
    place: Place | None = getattr(module, PLACE, None)
    if place is None:
        raise ValueError(
            f'attn_implementation is "{NAME}" but this model has no E and F; wanted: linformerize(model, ...), or '
            "linformer_kernels.integrations.transformers.load for a saved one"
        )
    projections, mask = getattr(place.owner, NAME), of_keys(attention_mask)
    if packed["cu_seqlens_q"] is None and packed["cu_seqlens_k"] is None:
        out = projections(place.index, key, value, mask, query=query, dropout_p=dropout, scale=scaling)
        return out.transpose(1, 2), None
    if any(ends is None for ends in packed.values()) or (mask is not None and not mask.all()):  # LayoutLM makes one
        raise ValueError(
            "cu_seq_lens_q or cu_seq_lens_k came by itself or with an attention_mask; wanted: the two of them without "
            "a mask, as DataCollatorWithFlattening(return_flash_attn_kwargs=True) makes them"
        )
    rows = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (key, value, query))
    key, value, packed["query"] = rows
    out = projections(place.index, key, value, dropout_p=dropout, scale=scaling, **packed)
    return out.unflatten(0, (query.size(0), query.size(2))), None


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = bidirectional_mask_function,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor | None:
    """What transformers' mask interface calls once a forward pass: the (B, N) padding mask, as it is."""
    if mask_function is not bidirectional_mask_function:
        raise NotImplementedError(
            "this model masks pairs of positions (causally, by windows, or by packed sequences); wanted: an encoder in "
            "which every position sees every other, as each row of K' mixes the whole sequence"
        )
    return attention_mask


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, padding_mask)


def of_keys(mask: Tensor | None) -> Tensor | None:
    """The (B, N) padding mask, True where a key takes part, of that or of what some models (LayoutLM) make of it:
    (B, 1, 1, N), added to the scores."""
    if mask is None or (mask.dim() == 2 and mask.dtype == torch.bool):
        return mask
    if mask.dim() != 4 or mask.shape[1:3] != (1, 1):
        raise NotImplementedError(
            f"attention_mask is {mask.dtype} of shape {tuple(mask.shape)}; wanted: the tokenizer's padding mask "
            "(B, N), as a mask between pairs of positions has no meaning in Linformer"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"attention_mask is {mask.dtype} of shape {tuple(mask.shape)}; wanted: the tokenizer's padding mask "
            "(B, N), or of four dimensions bool, True where a position takes part, or floating, 0 there and else -inf"
        )
    mask = mask[:, 0, 0]
    return mask if mask.dtype == torch.bool else of_scores("attention_mask", mask)


class Projections(nn.Sequential):
    """The projections of a model, one for each layer or one in all. Called, with the number of one, it calls that.

    A list to look at; no nn.ModuleList, which PEFT puts no wrapper around.
    """

    def forward(self, index: int, *arguments: Any, **options: Any) -> Any:  # type: ignore[override]
        return self[index](*arguments, **options)


class Place:
    """Where a layer's projection stands: under `owner.linformer`, looked up in every call, whatever stands there then.

    The layer does not own it: one that all layers share is in the model once, with one name.
    """

    def __init__(self, owner: nn.Module, index: int) -> None:
        self._owner, self.index, self._copies = owner, index, {}  # type: ignore[var-annotated]

    @property
    def owner(self) -> nn.Module:
        if self._copies:
            self._owner, self._copies = self._copies.get(id(self._owner), self._owner), {}
        return self._owner

    def __deepcopy__(self, memo: dict[int, Any]) -> Place:
        # Of a layer alone the copy belongs to the same model, and not to a hidden copy of it. Which of the two it is
        # may be known only when all is copied.
        place = Place(memo.get(id(self.owner), self.owner), self.index)
        place._copies = {} if place.owner is not self.owner else memo
        return place

    def __reduce__(self) -> Any:
        return Place, (self.owner, self.index)
