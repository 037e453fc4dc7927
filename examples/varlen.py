"""Sequences of different lengths, packed one after the other instead of padded to the longest."""

from itertools import pairwise

import torch

from linformer_kernels import linformer_attention, linformer_attention_varlen

torch.manual_seed(0)
lengths = [100, 2048, 37]
ends = torch.tensor([0, *lengths]).cumsum(0)  # where each sequence starts, and the total
query, key, value = (torch.randn(sum(lengths), 8, 64) for _ in range(3))
proj = torch.randn(128, max(lengths)) / max(lengths) ** 0.5  # a shorter sequence uses the first columns

out = linformer_attention_varlen(query, key, value, proj, cu_seqlens_q=ends, cu_seqlens_k=ends)
for start, end in pairwise(ends):
    alone = linformer_attention(*(x[start:end].transpose(0, 1)[None] for x in (query, key, value)), proj)
    difference = (out[start:end] - alone[0].transpose(0, 1)).abs().max().item()
    print(f"{end - start:>5} rows: difference from the sequence alone {difference:.1e}")
