"""What Triton's autotuners chose, handed from one process to the next. Mamba's kernels are tuned anew by each process, a minute
and a half on an H200: Triton's own cache on disk leaves out tuners whose configurations have hooks.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def _tuners() -> Iterator[tuple[str, Any]]:
    """The autotuners of all modules that are imported, by the name of their kernel."""
    if importlib.util.find_spec("triton") is None:
        return
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import KernelInterface

    for module in list(sys.modules.values()):
        for found in list(getattr(module, "__dict__", {}).values()):
            while issubclass(type(found), KernelInterface):  # not isinstance, which asks objects what they are
                if isinstance(found, Autotuner):
                    yield f"{found.base_fn.__module__}.{found.base_fn.__qualname__}", found
                found = vars(found).get("fn")  # heuristics around it


def save(path: Path) -> int:
    """Writes the choices that this process made or took over, over those of others; how many."""
    kept = {}
    for name, tuner in _tuners():
        chosen = [[list(key), tuner.configs.index(config)] for key, config in tuner.cache.items() if config in tuner.configs]
        if chosen:
            kept[name] = chosen
    path.write_text(json.dumps(kept))
    return sum(map(len, kept.values()))


def load(path: Path) -> int:
    """Takes over the choices at ``path`` for the kernels that are imported by now; how many."""
    if not path.exists():
        return 0
    kept, taken = json.loads(path.read_text()), 0
    for name, tuner in _tuners():
        for key, index in kept.get(name, ()):
            if tuple(key) not in tuner.cache and index < len(tuner.configs):
                tuner.cache[tuple(key)] = tuner.configs[index]
                taken += 1
    return taken
