"""Kernels in Triton: imported only where a CUDA device runs them, since Triton has no CPU build."""
