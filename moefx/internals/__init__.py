"""Patches of PyTorch and Transformers, assumptions about them, and other means that touch internals."""
