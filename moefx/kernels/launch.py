"""Launches of Triton kernels that take little of the host's time.

For each launch Triton looks at every argument and every constant anew to find what it compiled for them: 14 us for 20 of them
(Triton 3.9, two shared cores of an EPYC). What a launch of certain sizes does not change is bound once here, and only what
Triton compiles differently for is looked at again: where tensors are aligned, and their dtypes. That takes 5 us.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

#: Of launches that a function keeps, for the sizes that it met last.
KEPT = 1024
#: Of combinations of dtypes, alignments and devices that a launch keeps.
_MANY = 64


def cdiv(n: int, size: int) -> int:
    """Blocks of ``size`` that cover n; ``triton.cdiv`` takes 2 us, to be callable in kernels too."""
    return -(-n // size)


class Launch:
    """``kernel`` with all arguments bound but the tensors, which come first.

    ``numbers`` follow them, then ``constants`` by name (and Triton's options, such as ``num_warps``). Called with a grid, which
    may depend on data, and the tensors; it runs on the device of the first one.
    """

    def __init__(self, kernel: Any, *numbers: int | float, **constants: Any):
        self.kernel, self.numbers, self.constants = kernel, numbers, constants
        self.rest: tuple[Any, ...] = ()  #: what follows the tensors, in the kernel's order
        self.ready: dict[tuple, CompiledKernel] = {}

    def __call__(self, grid: tuple[int, int, int], *tensors: Tensor) -> None:
        """Launches the kernel on the current stream."""
        device = tensors[0].get_device()
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(grid, *tensors)
        key = (device, *[(t.data_ptr() % 16, t.dtype) for t in tensors])
        ready = self.ready.get(key)
        if ready is None:
            return self._first(key, grid, tensors)
        ready[grid](*tensors, *self.rest, stream=driver.active.get_current_stream(device))

    def _first(self, key: tuple, grid: tuple[int, int, int], tensors: tuple[Tensor, ...]) -> None:
        compiled = self.kernel[grid](*tensors, *self.numbers, **self.constants)
        if not isinstance(compiled, CompiledKernel):
            return  # the interpreter compiles nothing
        named = self.kernel.arg_names[len(tensors) + len(self.numbers) :]
        self.rest = (*self.numbers, *[self.constants[name] for name in named])
        if len(self.ready) >= _MANY:
            self.ready.clear()
        self.ready[key] = compiled
