"""Graphs that the ranks' server captured before it forked the ranks: a rank that would export the same again takes a copy.

All ranks of all jobs capture the same few small models, which was most of their time. Captures themselves are tested in one
process (tests/test_families.py and others); a rank still captures what it is called with beyond :func:`prepare`.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch

_made: dict[tuple, Any] = {}
_prepared: set[str] = set()


def start() -> None:
    """From now on, captures look here first."""
    from importlib import import_module

    places = [import_module(f"moefx.{name}") for name in ("capture", "head", "install")]  # moefx.capture is a function
    real = places[0].capture_module

    def remembered(module: Any, call: Any, routers: dict[str, Any], name: str) -> Any:
        key = (_structure(module), call, tuple(routers))
        if key not in _made:
            _made[key] = real(module, call, routers, name)
        made = _made[key].copy()
        return replace(made, name=name, module_class=type(module).__name__, captured=made.captured and made.copy())

    for place in places:
        place.capture_module = remembered  # type: ignore[attr-defined]


def _structure(module: Any) -> tuple:
    """As moefx knows equal blocks, between models too: by what their configurations say, not by which objects they are. FSDP gives
    a module a class of its own with the same forward."""
    from moefx import hf

    parts = [(path, name.removeprefix("FSDP"), *rest) for path, _, name, *rest, _ in hf.structure(module)]
    configs = sorted({m.config.to_json_string(use_diff=False) for m in module.modules() if hasattr(m, "config")})
    return (repr(parts), *configs)


def prepare(families: set[str], *, all_calls: bool = False) -> None:
    """Captures models of tests/families.py for a training step, and with ``all_calls`` for what else most tests call them with.
    No backward: a torch built for CUDA starts threads for it, and who is forked after that may run none."""
    import moefx
    from tests.families import FAMILIES, batch, build

    for name in sorted((families & FAMILIES.keys()) - _prepared):
        _prepared.add(name)
        with torch.random.fork_rng(devices=[]), _uncertified():
            model = moefx.optimize(build(name), compile=False)
            given = batch(2, 7)
            counted = {**given, "num_items_in_batch": 5}
            for kwargs in (counted, {**counted, "output_router_logits": True}) if all_calls else ():
                model(**kwargs)
            model.eval()
            with torch.no_grad():
                for kwargs in (given, {"input_ids": given["input_ids"]}) if all_calls else ():
                    model(**kwargs)


@contextlib.contextmanager
def _uncertified():  # noqa: ANN202
    import moefx

    places = (moefx.raising, moefx.passes.rotary)
    for place in places:
        place.certify = lambda *_: (True, "not certified: nobody uses this model")  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for place in places:
            place.certify = moefx.certify.certify  # type: ignore[attr-defined]
