"""Cross-attention to a long memory that does not change: project it once, attend to it at every step."""

import torch

from linformer_kernels import linformer_attention, project_kv, projected_attention

torch.manual_seed(0)
memory_len, proj_dim, steps = 8192, 128, 4
key, value = (torch.randn(1, 8, memory_len, 64) for _ in range(2))
proj_key, proj_value = (torch.randn(proj_dim, memory_len) / memory_len**0.5 for _ in range(2))

key_proj, value_proj = project_kv(key, value, proj_key, proj_value)  # (1, 8, proj_dim, 64) each: all that is kept
for step in range(steps):
    query = torch.randn(1, 8, 1, 64)
    out = projected_attention(query, key_proj, value_proj)
    whole = linformer_attention(query, key, value, proj_key, proj_value)
    print(f"step {step}: difference from attending to the memory itself {(out - whole).abs().max().item():.1e}")
