"""The example of the README: the function and the layer."""

import torch

from linformer_kernels import LinformerEncoderLayer, linformer_attention

query, key, value = (torch.randn(2, 8, 4096, 64) for _ in range(3))  # batch, heads, length N, width of a head
proj = torch.nn.Parameter(torch.randn(256, 4096) / 4096**0.5)  # (K, N), learned; here it projects key and value
out = linformer_attention(query, key, value, proj)
out.sum().backward()
print(out.shape, proj.grad.shape)

layer = LinformerEncoderLayer(512, 8, batch_first=True, seq_len=4096, proj_dim=256)
print(layer(torch.randn(2, 4096, 512)).shape)
