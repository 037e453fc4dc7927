"""Benchmarks of linformer_kernels against what PyTorch offers: `python -m bench --help`."""
