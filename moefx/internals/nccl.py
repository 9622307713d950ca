"""The NCCL that this process runs. ``torch.cuda.nccl.version()`` names the one torch was built with (torch 2.11 to 2.14)."""

from __future__ import annotations

import ctypes
import functools
import os

import torch


@functools.cache
def loaded_version() -> tuple[int, ...] | None:
    """The version of the shared library in this process; None where torch has NCCL built in, or none at all."""
    try:
        library = ctypes.CDLL("libnccl.so.2", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return None
    code = ctypes.c_int()
    if library.ncclGetVersion(ctypes.byref(code)):
        return None
    return code.value // 10000, code.value // 100 % 100, code.value % 100


def version() -> tuple[int, ...]:
    """(major, minor, patch) of the NCCL that collectives run on, which ``pip install -U nvidia-nccl-cu13`` changes."""
    return loaded_version() or torch.cuda.nccl.version()
