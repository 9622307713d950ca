"""What the caller has switched on around a call of moefx."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def none_of_them() -> Iterator[None]:
    """Within: neither a default device (``with torch.device("meta")``) nor inference mode reaches what is made.

    Graphs, their constants and the numbers that they are tried on outlive the call, and say themselves where they lie.
    """
    with ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        yield
