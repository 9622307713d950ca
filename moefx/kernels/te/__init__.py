"""Kernels of Transformer Engine (https://github.com/NVIDIA/TransformerEngine) as opaque operations: a file each.

Every operation saves tensors only, has a fake and a registered backward, and imports Transformer Engine when it first runs:
graphs that hold one compile whole, and this package imports where Transformer Engine is not installed. Written against 2.20.2.
"""

from __future__ import annotations

import functools
import importlib.metadata
from typing import Any

import torch

from moefx.kernels.requirements import requires

INSTALL = "pip install --no-build-isolation 'moefx[te]', built for the CUDA that torch has"
OLDEST = (2, 20)


@functools.cache
def extension() -> Any:
    """Transformer Engine's compiled bindings; importing the package first loads the libraries that they need."""
    import transformer_engine.pytorch  # noqa: F401
    import transformer_engine_torch

    return transformer_engine_torch


def te_dtype(dtype: torch.dtype) -> Any:
    """Transformer Engine's name of a dtype."""
    from transformer_engine.pytorch.constants import TE_DType

    return TE_DType[dtype]


_of_machine = requires("transformer_engine", package="transformer-engine", install=INSTALL, capability=(8, 0))


def available() -> str | None:
    """Why Transformer Engine cannot be used here, and what to do; None if it can."""
    return _of_machine() or _imports()


@functools.cache
def _imports() -> str | None:
    try:
        found = importlib.metadata.version("transformer-engine")
        if tuple(map(int, found.split(".")[:2])) < OLDEST:
            return f"Transformer Engine {'.'.join(map(str, OLDEST))} or later is needed, {found} is installed: {INSTALL}"
        extension()
    except Exception as error:  # a missing or older library is found when the bindings load
        return f"transformer_engine does not import ({type(error).__name__}: {str(error).splitlines()[0]}): {INSTALL}"
    return None
