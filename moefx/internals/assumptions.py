"""What moefx relies on beyond what PyTorch and Transformers promise: each is tried once, on a small case, before it is used.

An internal that has changed raises no error: a net is no longer asked, a name is no longer used, and a graph is wrong without a
word. So each stands beside its use as ``@assumed(what, seen)`` over a function that tries it, and is called before the use.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers

from moefx.errors import CaptureError


@dataclass(eq=False)
class Assumption:
    """Call it before what it says is relied on; raises CaptureError if it does not hold here."""

    what: str
    seen: str  #: the versions in which it was seen to hold
    tried: Callable[[], bool]
    reason: str | None = field(default=None, init=False)  #: why it does not hold, "" if it does, None: not tried yet

    def holds(self) -> bool:
        if self.reason is None:
            # in a thread of its own: nothing of the modes, hooks and contexts around this call reaches it
            trial = threading.Thread(target=self._try, name="moefx-trial")
            trial.start()
            trial.join()
        return not self.reason

    def _try(self) -> None:
        try:
            self.reason = "" if self.tried() else "it did not"
        except Exception as error:
            self.reason = f"{type(error).__name__}: {(str(error).strip() or 'no reason').splitlines()[0]}"

    def __call__(self) -> None:
        if not self.holds():
            raise CaptureError(
                f"moefx relies on this, that {self.what}; tried with torch {torch.__version__} and transformers "
                f"{transformers.__version__}, it does not hold ({self.reason}); use {self.seen}"
            )


#: All of them, in the order in which their modules are imported.
ALL: list[Assumption] = []


def assumed(what: str, seen: str) -> Callable[[Callable[[], bool]], Assumption]:
    """Makes an :class:`Assumption` of the decorated function, which says whether it holds."""

    def make(tried: Callable[[], bool]) -> Assumption:
        ALL.append(Assumption(what, seen, tried))
        return ALL[-1]

    return make


def exported(function: Callable[[torch.Tensor], torch.Tensor]) -> torch.export.ExportedProgram:
    """``function`` of a float32 tensor [n, 3], for any n, exported as capture exports a block: where nets are relied on."""

    class Tried(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x)

    return torch.export.export(Tried(), (torch.ones(7, 3),), dynamic_shapes=({0: torch.export.Dim("n")},), strict=False)
