"""What kernels need of a machine: packages, a CUDA device, its compute capability."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch


def requires(
    *modules: str, package: str = "", install: str, capability: tuple[int, int] | None = None, measured: int | None = None
) -> Callable[[], str | None]:
    """A backend's ``available``: says what is missing on this machine, and what to do, or returns None.

    Args:
        modules: what can be imported where the package is installed.
        package: its name, if not that of the first module.
        install: the command that installs it.
        capability: the least compute capability of the CUDA device.
        measured: the major compute capability of the devices that its kernels were measured on, if they are used there alone.
    """

    def available() -> str | None:
        if any(importlib.util.find_spec(module) is None for module in modules):
            return f"the package {package or modules[0]} is not installed: {install}"
        if not torch.cuda.is_available():
            return "there is no CUDA device"
        found = torch.cuda.get_device_capability()
        have = ".".join(map(str, found))
        if capability is not None and found < capability:
            return f"it needs compute capability {'.'.join(map(str, capability))}, this device has {have}"
        if measured is not None and found[0] != measured:
            return f"it was measured on compute capability {measured}.0, this device has {have}"
        return None

    return available
