"""The package ``deep_ep``: is it there, does it import, is it recent enough, and what to do if not."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import inspect
from typing import Any

import torch

INSTALL = (
    "build it from https://github.com/deepseek-ai/DeepEP with the CUDA that torch has: `TORCH_CUDA_ARCH_LIST=9.0 pip install "
    "--no-build-isolation .` (NVSHMEM >= 3.3 adds RDMA, 2.x also needs NCCL >= 2.30.4; 1.2.1 without NVSHMEM serves one node, "
    "if '-rdc=true' is taken out of its setup.py)"
)
CUDA = (12, 3)  #: the first version with what DeepEP's kernels for Hopper use


@functools.cache
def load() -> Any:
    """The module ``deep_ep``, imported when it is first needed."""
    import deep_ep

    return deep_ep


def available() -> str | None:
    """Why DeepEP cannot be used here, and what to do; None if it can."""
    if importlib.util.find_spec("deep_ep") is None:
        return f"deep_ep is not installed: {INSTALL}"
    if not torch.cuda.is_available():
        return "DeepEP needs a CUDA device, and there is none"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"DeepEP needs compute capability 8.0 or more, this device has {capability[0]}.{capability[1]}"
    if tuple(map(int, (torch.version.cuda or "0.0").split("."))) < CUDA:
        wanted = ".".join(map(str, CUDA))
        return f"DeepEP needs CUDA {wanted} or later, torch was built with {torch.version.cuda}: install a newer torch"
    try:
        library = load()
    except Exception as error:
        return import_problem(error)
    return too_old(library)


def import_problem(error: Exception) -> str:
    """Why the import of deep_ep failed with ``error``, and what to do."""
    text = str(error).splitlines()[0]
    if "cudaRegisterLinkedBinary" in text:
        return (
            "deep_ep does not import: it was compiled with -rdc=true and its device code was never linked, as 1.2.1's setup.py "
            "does without NVSHMEM: take '-rdc=true' out of setup.py, or install nvidia-nvshmem-cu13 (or -cu12), and build again"
        )
    if "undefined symbol" in text:
        return f"deep_ep was built for another torch or CUDA than {torch.__version__} ({text}): {INSTALL}"
    return f"deep_ep does not import ({type(error).__name__}: {text}): {INSTALL}"


def too_old(library: Any) -> str | None:
    """What this backend calls and this version of the package lacks, or None."""
    buffer = getattr(library, "Buffer", None)
    if buffer is None:
        return f"deep_ep {version()} has no Buffer: {INSTALL}"
    if "num_worst_tokens" not in inspect.signature(buffer.dispatch).parameters:
        return f"deep_ep {version()} is too old, its dispatch has no num_worst_tokens (1.2 and later have): {INSTALL}"
    return None


def version() -> str:
    """The installed version of deep_ep."""
    try:
        return importlib.metadata.version("deep_ep")
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(load(), "__version__", "of unknown version"))
