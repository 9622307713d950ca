"""A cache of captured graphs of small models: an equal capture is a copy.

Most of the tests' time would go into capturing the same few models, and in every rank. The ranks' server (spawn.py) captures before
it forks the ranks, which capture themselves what is missing; tests in one process use the fixture ``cached_captures``, unless
they test capture itself.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch

#: Entries of a configuration that no forward reads, and that only a model from a checkpoint has.
_IGNORED = {"architectures", "transformers_version", "_name_or_path", "dtype"}
_captured: dict[tuple, Any] = {}
#: Family -> whether `prepare` had ``all_calls``.
_prepared: dict[str, bool] = {}
#: Modules of moefx that call capture_module.
_CALLERS = [import_module(f"moefx.{name}") for name in ("frontend.capture", "frontend.head", "runtime.block")]
_original = _CALLERS[0].capture_module
#: Gives equal keys to modules whose captures are equal; None: this one is captured each time.
_key: Callable[[Any], Hashable | None]


def _cached(module: Any, call: Any, routers: dict[str, Any], name: str) -> Any:
    state = _key(module)
    if state is None:
        return _original(module, call, routers, name)
    key = (state, call, tuple(routers))
    if key not in _captured:
        _captured[key] = _original(module, call, routers, name)
    copy = _captured[key].copy()
    return replace(copy, name=name, module_class=type(module).__name__, captured=copy.captured and copy.copy())


def start(key: Callable[[Any], Hashable | None] | None = None) -> None:
    """Makes captures look in the cache first. ``key``: of a module; the default is for models that no test changes."""
    global _key
    _key = key or _structure
    for place in _CALLERS:
        place.capture_module = _cached  # type: ignore[attr-defined]


def stop() -> None:
    """Undoes :func:`start`; what is cached stays."""
    for place in _CALLERS:
        place.capture_module = _original  # type: ignore[attr-defined]


def _structure(module: Any) -> tuple:
    """A key for equal blocks, also of different models: configurations are compared by value, devices too."""
    from moefx.frontend.module_state import everything
    from moefx.integrations import transformers as hf

    parts = [found[:-1] for found in everything(module, hf.without_index)], [p.device for p in module.parameters()]
    configs = {id(m.config): m.config.to_dict() for m in module.modules() if hasattr(m, "config")}
    values = sorted(
        json.dumps({k: v for k, v in c.items() if k not in _IGNORED}, sort_keys=True, default=str) for c in configs.values()
    )
    return (tuple(parts[0]), tuple(parts[1]), *values)


def prepare(names: set[str], *, all_calls: bool = False) -> None:
    """Captures models of tests/support/families.py for a training step, and with ``all_calls`` for the other calls that tests make.

    No backward runs here: a torch built for CUDA starts threads for it, and a process forked after that cannot run one.
    """
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
        place.certify = lambda *_: (True, "not certified: this model is not used")  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for place in places:
            place.certify = certify.certify  # type: ignore[attr-defined]
