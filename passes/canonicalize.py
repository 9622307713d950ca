"""Writes one thing one way, so that patterns have one form to match: :mod:`moefx.rewriting.canonicalize`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moefx.rewriting.canonicalize import canonicalize
from moefx.rewriting.pipeline import Changes


@dataclass(frozen=True)
class Canonicalize:
    """Keeps numerics bitwise."""

    name: ClassVar[str] = "canonicalize"

    def run(self, function, plan=None) -> Changes:
        return canonicalize(function.graph)
