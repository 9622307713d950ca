"""Modes that the caller has switched on around a call of moefx."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def disabled() -> Iterator[None]:
    """Context without a default device (``with torch.device("meta")``) and without inference mode.

    Graphs, their constants and the tensors that they are tested on outlive the call, and each names its device itself.
    """
    with ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        yield
