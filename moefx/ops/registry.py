"""How an operation with a body of its own is defined, and where its body is found again."""

from __future__ import annotations

from collections.abc import Callable

import torch

#: Where all operations of moefx are defined.
LIBRARY = torch.library.Library("moefx", "FRAGMENT")
#: The body of each composite operation, by overload: what patterns are traced from.
BODIES: dict[torch._ops.OpOverload, Callable] = {}


def op(schema: str, library: torch.library.Library = LIBRARY) -> Callable[[Callable], torch._ops.OpOverload]:
    """Defines a composite operation ``moefx::<name>`` whose body is the decorated function; returns its overload.

    The body must be functional (no in-place writes to its arguments) and made of torch operations, so that it
    differentiates, runs on any device and can be traced as a pattern. Example::

        @moefx.op("scale_silu(Tensor x, float scale) -> Tensor")
        def scale_silu(x, scale):
            return torch.nn.functional.silu(x) * scale
    """

    def define(body: Callable) -> torch._ops.OpOverload:
        name = schema.split("(", 1)[0]
        library.define(schema)
        library.impl(name, body, "CompositeImplicitAutograd")
        overload = getattr(getattr(torch.ops, library.ns), name).default
        BODIES[overload] = body
        return overload

    return define
