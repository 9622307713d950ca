"""Captured graphs of small models, kept for whoever would export the same again: he takes a copy.

Most of what tests do is to capture the same few models, again and again, and in ranks each of them does. The ranks' server
(spawn.py) captures before it forks the ranks, what they lack they capture themselves; files of tests in one process ask for it
by the fixture ``cached_captures``, those that are about capture itself do not.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch

#: Entries of a configuration that no forward reads, and that a model from a checkpoint has.
_ABOUT = {"architectures", "transformers_version", "_name_or_path", "dtype"}
_made: dict[tuple, Any] = {}
_prepared: dict[str, bool] = {}  #: with all calls?


#: Modules of moefx that call capture_module.
_CALLERS = [import_module(f"moefx.{name}") for name in ("frontend.capture", "frontend.head", "runtime.block")]
_real = _CALLERS[0].capture_module


def _cached(module: Any, call: Any, routers: dict[str, Any], name: str) -> Any:
    key = (_structure(module), call, tuple(routers))
    if key not in _made:
        _made[key] = _real(module, call, routers, name)
    made = _made[key].copy()
    return replace(made, name=name, module_class=type(module).__name__, captured=made.captured and made.copy())


def start() -> None:
    """From now on, captures look here first."""
    for place in _CALLERS:
        place.capture_module = _cached  # type: ignore[attr-defined]


def stop() -> None:
    for place in _CALLERS:
        place.capture_module = _real  # type: ignore[attr-defined]


def _structure(module: Any) -> tuple:
    """As moefx knows equal blocks, between models too: by what their configurations say, not by which objects they are. FSDP gives
    a module a class of its own with the same forward."""
    from moefx.integrations import transformers as hf

    parts = [(path, name.removeprefix("FSDP"), *rest) for path, _, name, *rest, _ in hf.structure(module)]
    configs = {id(m.config): m.config.to_dict() for m in module.modules() if hasattr(m, "config")}
    said = sorted(
        json.dumps({k: v for k, v in c.items() if k not in _ABOUT}, sort_keys=True, default=str) for c in configs.values()
    )
    return (repr(parts), *said)


def prepare(names: set[str], *, all_calls: bool = False) -> None:
    """Captures models of tests/support/families.py for a training step, and with ``all_calls`` for what else most tests call them with.
    No backward: a torch built for CUDA starts threads for it, and who is forked after that may run none."""
    import moefx
    from tests.support.families import KNOWN, batch

    for name in sorted(names & KNOWN.keys()):
        if _prepared.get(name, -1) >= all_calls:
            continue
        _prepared[name] = all_calls
        with torch.random.fork_rng(devices=[]), _uncertified():
            model = moefx.optimize(KNOWN[name](), compile=False)
            if not all_calls:
                continue
            given = batch(2, 7)
            counted = {**given, "num_items_in_batch": 5}
            for kwargs in (counted, {**counted, "output_router_logits": True}):
                model(**kwargs)
            model.eval()
            with torch.no_grad():
                for kwargs in (given, {"input_ids": given["input_ids"]}):
                    model(**kwargs)


@contextlib.contextmanager
def _uncertified() -> Iterator[None]:
    from moefx.passes import rotary
    from moefx.rewriting import certify, raise_ops

    places = (raise_ops, rotary)
    for place in places:
        place.certify = lambda *_: (True, "not certified: nobody uses this model")  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for place in places:
            place.certify = certify.certify  # type: ignore[attr-defined]
