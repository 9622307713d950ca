"""Recording: one forward of the model on a small example, to see what each of its modules is called with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moefx.errors import CaptureError, MoefxError
from moefx.frontend.call_signature import distinct_sizes, sizes_of
from moefx.frontend.call_template import flatten
from moefx.frontend.head import watching_head
from moefx.frontend.module_state import HOOKS, everything, foreign_hooks
from moefx.integrations import fsdp
from moefx.integrations import transformers as hf
from moefx.integrations.unsharded_view import unsharded_view


@dataclass
class Recording:
    """The calls of one forward on an example."""

    calls: dict[str, tuple[tuple, dict]]
    head: tuple[Any, tuple, dict, tuple] | None
    device: torch.device  #: of the model's parameters (a sharded model is recorded on meta)
    head_reason: str = ""
    like: dict[str, str] = field(default_factory=dict)  #: a block that was not run -> the equal block that was
    packs_beside_cache: bool | None = None  #: see :func:`_packs_beside_cache`

    def call(self, path: str) -> tuple[tuple, dict] | None:
        """The arguments of the module's call; of a part of a block that was not run, those of the equal part that was."""
        block = next((up for up in above(path) if up in self.like), None)
        return self.calls.get(path if block is None else self.like[block] + path[len(block) :])


def default_example(model: nn.Module, batch: int, sequence: int) -> dict[str, Tensor]:
    """``input_ids`` [batch, sequence], and equal ``labels`` for a language model."""
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr,operator]
    ids = torch.arange(batch * sequence).remainder(vocabulary).view(batch, sequence).to(device)
    return {"input_ids": ids, "labels": ids} if hf.is_language_model(model) else {"input_ids": ids}


def resize(example: Mapping[str, Any], batch: int, sequence: int) -> dict[str, Any]:
    """The example at another batch size and sequence length: rows and columns are repeated or dropped.

    Raises:
        MoefxError: no tensor in it is [batch, sequence].
    """
    first = next((v for v in example.values() if isinstance(v, Tensor) and v.dim() >= 2), None)
    if first is None:
        raise MoefxError(f"example has no tensor [batch, sequence]: got {', '.join(example) or 'nothing'}; pass input_ids")
    b, s = first.shape[:2]

    def fit(v: Any) -> Any:
        if not isinstance(v, Tensor) or v.dim() < 2 or tuple(v.shape[:2]) not in ((b, s), (1, s)):
            return v
        rows = torch.arange(batch if v.shape[0] == b else 1, device=v.device) % v.shape[0]
        return v[rows][:, torch.arange(sequence, device=v.device) % s]

    return {k: fit(v) for k, v in example.items()}


def _besides_text(example: Mapping[str, Any]) -> str:
    """Advice for an example with images, for instance: its rows were resized, its images were not."""
    ids = example.get("input_ids")
    more = [k for k, v in example.items() if isinstance(v, Tensor) and isinstance(ids, Tensor) and v.shape[:2] != ids.shape]
    return f"; leave {', '.join(more)} out: calls with more than text are captured when they occur" if more else ""


def record(model: Any, example: Mapping[str, Any] | None) -> Recording:
    """Runs the model once, without gradients, at a batch size and sequence length that differ from all sizes of the model.

    Raises:
        MoefxError: the model rejects the example.
    """
    batch, sequence = distinct_sizes(sizes_of(model))
    if example is not None and not isinstance(example, Mapping):
        raise MoefxError(f"example is a {type(example).__name__}: pass the keyword arguments of the model's forward, as a dict")
    given = default_example(model, batch, sequence) if example is None else resize(example, batch, sequence)
    calls: dict[str, tuple[tuple, dict]] = {}
    handles = []

    def remember(path: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            calls.setdefault(path, (args, kwargs))

        return hook

    for path, module in model.named_modules():
        if path:
            handles.append(module.register_forward_pre_hook(remember(path), with_kwargs=True))
    recording = Recording(calls, None, next(model.parameters()).device)
    # a sharded model is recorded on meta with whole parameters: no rank holds them, and no rank waits for another
    meta = torch.device("meta") if fsdp.is_sharded(model) else None
    if meta is not None:
        given = {k: v.to(meta) if isinstance(v, Tensor) else v for k, v in given.items()}
    given.setdefault("use_cache", False)  # type: ignore[arg-type]
    given = hf.count_as_tensor((), given)
    if "labels" not in given and "input_ids" in given and hf.is_language_model(model):
        given["labels"] = given["input_ids"]
    try:
        with (
            torch.no_grad(),
            hf.emitting(lenient=True),
            hf.unpacked_on_meta(),
            unsharded_view(model, meta),
            hf.without_packages() if meta is not None else nullcontext(),
            watching_head(model) as head,
            _without_hooks(model),
            _once(model, recording),
        ):
            model(**given)
            recording.packs_beside_cache = _packs_beside_cache(model, given.get("input_ids"))
    except CaptureError:
        raise
    except Exception as error:
        what = "the default example" if example is None else "the example batch"
        raise MoefxError(
            f"{type(model).__name__} rejects {what} ({', '.join(given)}; resized to batch {batch}, sequence {sequence}): "
            f"{_first_sentence(error)}{_besides_text(example or {})}"
        ) from error
    finally:
        for h in handles:
            h.remove()
    recording.head, recording.head_reason = head.call, head.reason
    return recording


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Context without the hooks of others: the example is none of the calls that they wait for."""
    kept: list[tuple[dict, dict]] = []
    for module in model.modules():
        theirs = {id(hook) for hook, _ in foreign_hooks(module)}
        for hooks in (vars(module)[kind] for kind in HOOKS) if theirs else ():
            kept.append((hooks, dict(hooks)))
            for key in [k for k, hook in hooks.items() if id(hook) in theirs]:
                del hooks[key]
    try:
        yield
    finally:
        for hooks, before in kept:  # in place: their handles refer to the dictionaries
            hooks.clear()
            hooks.update(before)


def _first_sentence(error: BaseException) -> str:
    lines = [x.strip() for x in str(error).splitlines() if x.strip()] or [type(error).__name__]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:300]}"


class _Enough(Exception):
    """Ends a forward that is run only to see its beginning."""


def _packs_beside_cache(model: nn.Module, ids: Any) -> bool | None:
    """Does the model keep packed sequences apart in a call that fills a cache? None if it does not take such a call.

    Most models do not; Gemma 4's class with images makes its masks before there is a cache. Runs up to the first block.
    """
    asked: list[Tensor] = []

    def stop(*_: Any) -> None:
        raise _Enough

    handles = [block.register_forward_pre_hook(stop) for block in hf.blocks(model).values()]
    try:
        with hf.noticing_packing(asked), suppress(_Enough):
            model(input_ids=ids, position_ids=torch.arange(ids.shape[1], device=ids.device).expand(ids.shape), use_cache=True)
    except Exception:  # it takes no position_ids, for instance; runtime.model decides what None means
        return None
    finally:
        for handle in handles:
            handle.remove()
    return bool(asked)


@contextmanager
def _once(model: nn.Module, recording: Recording) -> Iterator[None]:
    """Context in which only one of several blocks with equal structure and calls runs, and the others return its output."""
    outputs: dict[tuple, tuple[str, Any]] = {}
    blocks = hf.blocks(model)

    def run(path: str, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        structure = everything(block, hf.without_index)
        try:
            tensors, template = flatten(args, kwargs)
        except CaptureError:
            return type(block).forward(block, *args, **kwargs)
        key = (structure, template, tuple((t.shape, t.dtype) for t in tensors))
        if key not in outputs:
            outputs[key] = path, type(block).forward(block, *args, **kwargs)
        else:
            recording.like[path] = outputs[key][0]
        return outputs[key][1]

    changed = {p: b for p, b in blocks.items() if "forward" not in vars(b)}
    for path, block in changed.items():
        block.forward = partial(run, path, block)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in changed.values():
            del block.forward


def above(path: str) -> list[str]:
    """The paths of the modules that hold a module: "model.layers", "model" for "model.layers.0"."""
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]
