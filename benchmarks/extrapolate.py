"""The whole model from a few depths: milliseconds of each unit that a depth holds, and of what every depth has once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

#: What every depth has once.
REST = "embedding, head and loss"


def solve(measured: Mapping[int, float], units: Mapping[int, Mapping[str, int]]) -> dict[str, float] | None:
    """Milliseconds of :data:`REST` and of each unit, by least squares; None where the depths do not determine them.

    Args:
        measured: milliseconds of a step, by depth.
        units: how many of each unit a depth holds, by depth.
    """
    names = sorted({u for depth in measured for u in units[depth]})
    rows = torch.tensor([[1.0, *(units[d].get(u, 0) for u in names)] for d in measured], dtype=torch.float64)
    if torch.linalg.matrix_rank(rows) < len(names) + 1:
        return None
    found = torch.linalg.lstsq(rows, torch.tensor([[ms] for ms in measured.values()], dtype=torch.float64)).solution
    return dict(zip([REST, *names], found.flatten().tolist()))


def whole(
    measured: Mapping[int, float], units: Mapping[int, Mapping[str, int]], wanted: Mapping[str, int], layers: int
) -> dict[str, Any] | None:
    """The step of a model of ``wanted`` units and ``layers`` layers.

    None where it is not determined, or where a part comes out negative: then the times are noise.

    ``ms_per_layer`` is the mean over the layers, ``ms_head`` that of :data:`REST`.
    """
    found = solve(measured, units)
    if found is None or any(u not in found for u in wanted) or min(found.values()) < 0:
        return None
    of_layers = sum(n * found[u] for u, n in wanted.items())
    return {
        "ms": found[REST] + of_layers,
        "ms_head": found[REST],
        "ms_per_layer": of_layers / layers,
        "layers": layers,
        "ms_per_unit": {u: found[u] for u in wanted},
    }
