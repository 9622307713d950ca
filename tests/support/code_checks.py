"""Runs the code that reports print, and compares it with the graph that it shows."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from moefx.analysis.report import Report
from moefx.ir.code import Listing, code_of
from moefx.rewriting.certify import Sizes, _sample

#: What no line may have: numbered outputs and inputs, fx's own notation, lines of moefx, unquoted constants.
_FORBIDDEN = r"getitem_?\d*|tensors_\d|%|_default\b|(capture|head|export|runtime_assert)\.py|[=(, ](device\(|bfloat16|float32)"


def check_code(report: Report) -> int:
    """The code after every stage, run and read; returns how many functions of stages were looked at."""
    seen: dict[str, str] = {}
    for stage in report.passes:
        assert stage.code.count("\ndef ") == len(stage.after)
        for name, listing in stage.after.items():
            if str(listing) != seen.get(name):
                check_listing(listing)
                seen[name] = str(listing)
    for function in report.program:
        exec(function.code, {})
    return len(seen)


def defined(listing: Listing) -> Callable[..., Any]:
    """The function that the code defines."""
    code = code_of([listing])
    found = re.search(_FORBIDDEN, code)
    assert found is None, f"{found[0]!r} in\n{code}"
    names: dict[str, Any] = {}
    exec(code, names)
    return names[listing.name]


def check_listing(listing: Listing) -> None:
    function = defined(listing)
    sizes, generator = Sizes(shrink=False), torch.Generator().manual_seed(0)
    given = [_sample(val, sizes, generator) for n, *_, val in listing.nodes if n.op == "placeholder"]
    with torch.no_grad():
        torch.manual_seed(1)
        theirs = function(*given)
        torch.manual_seed(1)
        ours = interpreted(listing, given)
    torch.testing.assert_close(theirs, ours, equal_nan=True)  # sums depend on where tensors lie


def interpreted(listing: Listing, given: list[Any]) -> Any:
    """What the graph computes, node by node."""
    env: dict[fx.Node, Any] = {}
    inputs = iter(given)
    for n, target, args, kwargs, _ in listing.nodes:
        args, kwargs = fx.node.map_arg((args, kwargs), env.__getitem__)
        if n.op == "output":
            return args[0]
        env[n] = next(inputs) if n.op == "placeholder" else target(*args, **kwargs)
