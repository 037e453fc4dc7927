"""The Triton kernels, installed as linformer_kernels.triton_kernels: see forward.py, backward.py, project_backward.py.

Importing this needs Triton; `linformer_kernels` works without.
"""
