"""What was captured so far, found again for modules of equal state: a graph of one block serves all that are like it."""

from __future__ import annotations

from typing import Any

from torch import nn

from moefx.errors import CaptureError
from moefx.frontend.call_signature import Call
from moefx.frontend.module_state import own_classes
from moefx.frontend.reads import Reads, State
from moefx.ir.program import Function


class Captured:
    """Functions, and the reasons why there are none, by call and by the state of the module."""

    def __init__(self) -> None:
        self._found: dict[tuple, list[tuple[Reads, State, Function | CaptureError]]] = {}

    def find(self, module: nn.Module, call: Call, sharded: bool = False) -> Function | CaptureError | None:
        """What was added for a module whose state is the same, as far as the capture read it; None if nothing was."""
        for reads, state, result in self._found.get(self._key(module, call), ()):
            if state.difference(reads.state(module), sharded) is None:
                return result
        return None

    def add(self, module: nn.Module, call: Call, result: Function | CaptureError) -> Function | CaptureError:
        """Adds the result of a capture of ``module``, and returns it."""
        reads = result.reads or Reads()
        state = reads.state(module)
        if isinstance(result, Function):
            result.state = state
        else:
            result = result.again()
        self._found.setdefault(self._key(module, call), []).append((reads, state, result))
        return result

    @staticmethod
    def _key(module: nn.Module, call: Call) -> tuple[Any, ...]:
        return own_classes(type(module))[0], call
