"""Without a CUDA device Triton's kernels run in its interpreter: the same numbers, slowly, so shapes are small."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: before moefx.kernels is imported
