"""Brings a captured graph into canonical form, which patterns match: :mod:`moefx.rewriting.canonicalize`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moefx.ir.plan import Plan
from moefx.ir.program import Function
from moefx.rewriting.canonicalize import canonicalize
from moefx.rewriting.pipeline import Changes


@dataclass(frozen=True)
class Canonicalize:
    """Drops assertions, copies and redundant casts. Bitwise."""

    name: ClassVar[str] = "canonicalize"

    def run(self, function: Function, plan: Plan | None = None) -> Changes:
        """Canonicalizes the function's graph."""
        return canonicalize(function.graph)
