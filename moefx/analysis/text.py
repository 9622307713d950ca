"""Text of 100 columns."""

from __future__ import annotations

import io

from rich.console import Console

WIDTH = 100


def render(*parts: object) -> str:
    """Renders rich's tables and strings as plain text of ``WIDTH`` columns."""
    out = io.StringIO()
    console = Console(file=out, width=WIDTH, color_system=None, highlight=False, markup=False)
    for p in parts:
        console.print(p)
    return out.getvalue().rstrip() + "\n"
