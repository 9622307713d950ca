"""Assumptions about internals of PyTorch and Transformers: each is tested once a process, on a small case, before it is used.

An internal that changes raises no error: a hook is no longer called, a name is no longer read, and a graph is silently wrong.
So beside each use stands ``@assumed(what, seen)`` on a function that tests it, and the use calls it first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers

from moefx.errors import CaptureError
from moefx.internals import torch_patches


@dataclass(eq=False)
class Assumption:
    """Call it before the use that relies on it; raises CaptureError if it does not hold in this process."""

    what: str
    seen: str  #: the versions in which it was seen to hold
    tried: Callable[[], bool]
    reason: str | None = field(default=None, init=False)  #: why it does not hold; "" if it does, None before it was tested

    def holds(self) -> bool:
        """Tests the assumption, the first time, and returns whether it holds."""
        if self.reason is None:
            torch_patches.keep_fake_device_guard()
            # in a thread of its own, which the modes, hooks and contexts around this call do not reach
            trial = threading.Thread(target=self._try, name="moefx-trial")
            trial.start()
            trial.join()
        return not self.reason

    def _try(self) -> None:
        try:
            self.reason = "" if self.tried() else "its test failed"
        except Exception as error:
            self.reason = f"{type(error).__name__}: {(str(error).strip() or 'no reason').splitlines()[0]}"

    def __call__(self) -> None:
        """Raises CaptureError if the assumption does not hold."""
        if not self.holds():
            raise CaptureError(
                f"moefx assumes that {self.what}; with torch {torch.__version__} and transformers {transformers.__version__} "
                f"it does not hold ({self.reason}): use {self.seen}"
            )


#: All of them, in the order in which their modules are imported.
ALL: list[Assumption] = []


def assumed(what: str, seen: str) -> Callable[[Callable[[], bool]], Assumption]:
    """Decorator: makes an :class:`Assumption` of a function that returns whether it holds."""

    def make(tried: Callable[[], bool]) -> Assumption:
        ALL.append(Assumption(what, seen, tried))
        return ALL[-1]

    return make


def exported(function: Callable[..., torch.Tensor], *weights: torch.nn.Parameter) -> torch.export.ExportedProgram:
    """``function`` of a float32 tensor [n, 3], n dynamic, exported as a block is: the conditions in which checks must work.

    ``weights``: parameters of that block, which the function gets too.
    """

    class Tried(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = torch.nn.ParameterList(weights)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x, *self.weights)

    return torch.export.export(Tried(), (torch.ones(7, 3),), dynamic_shapes=({0: torch.export.Dim("n")},), strict=False)
