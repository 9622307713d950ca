"""Refuses modules whose control flow depends on a length: a graph has one path, and is wrong where the module takes another.

``torch.export`` turns such a comparison into a guard, or into nothing for sizes that it assumes to be larger than one. So it is
caught where the truth of a symbolic comparison is taken by code that is neither PyTorch's nor moefx's.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import sympy
import torch

from moefx.errors import CaptureError
from moefx.internals.assumptions import assumed, exported
from moefx.internals.torch_patches import SYMBOLIC_TRUTH

#: Lengths at which a comparison is evaluated, besides those around the numbers in it.
LENGTHS = (1, 2, 3, 4, 5, 7, 8, 16, 17, 30, 61, 64, 97, 128, 1000, 1024, 4096, 2**20)
#: At most this many combinations of lengths, if a comparison has several.
MOST = 400
_OURS = ("torch", "moefx", "sympy")


@functools.lru_cache(maxsize=1000)
def depends(question: Any) -> bool:
    """Does the truth of a symbolic comparison depend on lengths?"""
    if not isinstance(question, sympy.Basic):
        return False
    symbols = sorted(question.free_symbols, key=str)
    around = {int(n) + d for n in question.atoms(sympy.Integer) for d in (-1, 0, 1) if int(n) + d >= 1}
    lengths = sorted({*LENGTHS, *around})
    while len(lengths) ** len(symbols) > MOST:
        lengths = lengths[::2]
    answers = {bool(question.subs(dict(zip(symbols, sizes)))) for sizes in itertools.product(lengths, repeat=len(symbols))}
    return len(answers) > 1


def _question(asked: torch.SymBool) -> Any:
    """The comparison, with one symbol for each size of the example.

    Different sizes of an example have different values, so symbols with equal values are one size, although torch.export gives
    each tensor symbols of its own at first.
    """
    expression = getattr(asked.node, "expr", None)  # constants have none
    if not isinstance(expression, sympy.Basic):
        return expression
    env = asked.node.shape_env
    here = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val
    symbols = sorted(expression.free_symbols, key=str)
    sizes = dict.fromkeys(here.get(s, s) for s in symbols)
    names = {size: sympy.Symbol(name, positive=True, integer=True) for size, name in zip(sizes, "nmklpqrstuvw")}
    return expression.subs({s: names[here.get(s, s)] for s in symbols})


def refuse_limits(exported: torch.export.ExportedProgram) -> None:
    """Raises CaptureError if the graph holds for some lengths only: it slices off more than short inputs have, for instance."""
    for allowed in exported.range_constraints.values():
        if allowed.lower > 2 or allowed.upper < 2**31:
            end = f"to {allowed.upper}" if allowed.upper < 2**31 else "on"
            raise CaptureError(f"its graph holds for lengths from {allowed.lower} {end} only")


def _truth(take: Callable[[torch.SymBool], bool], self: torch.SymBool) -> bool:
    frame = sys._getframe(2)  # after Patch's
    if frame.f_code is torch.SymInt.__bool__.__code__ and frame.f_back is not None:
        frame = frame.f_back  # ``if length % 2``
    asker = frame.f_globals.get("__name__", "")
    written = not frame.f_code.co_filename.startswith("<")  # generated code repeats the guards of torch.export
    if written and asker.partition(".")[0] not in _OURS and depends(question := _question(self)):
        raise CaptureError(
            f"whether {question}, for lengths, decides what its Python does "
            f"({Path(frame.f_code.co_filename).name}:{frame.f_lineno}): here it is {'so' if take(self) else 'not so'}"
        )
    return take(self)


def refusing_questions() -> AbstractContextManager[None]:
    """Context in which Python code that branches on a length raises CaptureError."""
    return SYMBOLIC_TRUTH.by(_truth)


@assumed("Python code that compares symbolic sizes calls SymBool.__bool__", "torch 2.11 to 2.14")
def questions_are_seen() -> bool:
    """A comparison, and the truth of a remainder."""

    def refuses(*questions: str) -> bool:
        def tries(x: torch.Tensor) -> torch.Tensor:
            for asks in questions:
                eval(compile(asks, "tried.py", "eval"), {"__name__": "tried"})(x.shape[0])
            return x * 1

        try:
            with refusing_questions():
                exported(tries)
        except CaptureError:
            return True
        return False

    return refuses("lambda n: 1 if n > 5 else 2") and refuses("lambda n: 1 if n % 2 else 2")
