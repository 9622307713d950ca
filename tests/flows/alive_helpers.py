"""What the walks of alive.py call: plain torch, Transformers and PEFT, written so that a printed script can contain it."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import io
import pickle
import tempfile
import types
import zlib
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoConfig, AutoModelForCausalLM

__all__ = [
    "LoraConfig", "contextlib", "copy", "functools", "get_peft_model", "io", "mock", "nn", "parametrize", "pickle", "tempfile",
    "torch", "types", "SEEN", "Extra", "First", "Scaled", "Wrapped", "at", "bare", "batch", "edit_layers", "fill", "fresh", "loss_of", "modeling",
    "note", "probe", "scaled", "scaled_forward", "see", "steered", "with_forward",
]  # fmt: skip

#: What hooks and reads of the model have seen, in order: (name, value).
SEEN: list[tuple[str, Any]] = []


def fresh(family: str, **sizes: Any) -> Any:
    """A small model with random weights, larger than a new model's so that routing is not near ties."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and "conv" not in name:
                p.mul_(2)
    return model.train()


def bare(model: Any) -> Any:
    """The Transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def at(model: Any, path: str) -> Any:
    """The module ``path`` of the Transformers model."""
    return bare(model).get_submodule(path)


def edit_layers(model: Any, what: str) -> None:
    """Exchanges the first layer and the last one, puts the first one or a copy of it in the last one's place, or deletes it."""
    layers: Any = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
    if what == "swap":
        layers[0], layers[len(layers) - 1] = layers[len(layers) - 1], layers[0]
    elif what == "delete":
        del layers[0]
        for i, m in ((i, m) for i, layer in enumerate(layers) for m in layer.modules() if hasattr(m, "layer_idx")):
            m.layer_idx = i
        model.config.num_hidden_layers -= 1
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[1:]
    else:
        layers[len(layers) - 1] = layers[0] if what == "repeat" else copy.deepcopy(layers[0])


def modeling(model: Any) -> Any:
    """The module that defines the model's class."""
    return importlib.import_module(type(bare(model)).__module__)


def batch(rows: int, length: int, form: str = "labels", seed: int = 0) -> dict[str, torch.Tensor]:
    """Keyword arguments of a forward."""
    ids = torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))
    place, gap = torch.arange(length).unsqueeze(0), torch.arange(rows).clamp(max=length - 1).unsqueeze(1)
    if form == "no labels":
        return {"input_ids": ids}
    if form == "ignored":
        return {"input_ids": ids, "labels": ids.masked_fill(ids % 3 == 0, -100)}
    if form in ("padded left", "padded right"):
        mask = place >= gap if form == "padded left" else place < length - gap
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}
    if form == "packed":
        return {"input_ids": ids, "labels": ids, "position_ids": (place % max(length // 2, 1)).expand(ids.shape).clone()}
    return {"input_ids": ids, "labels": ids}


def see(name: str, value: Any) -> None:
    """Keeps a value that both models must have."""
    SEEN.append((name, value.detach().clone() if isinstance(value, torch.Tensor) else value))


def loss_of(model: Any, data: dict[str, Any], **given: Any) -> torch.Tensor:
    """The loss of a call with the same random numbers as the other model's."""
    torch.manual_seed(1)
    return model(**data, **given).loss


def probe(
    model: Any, rows: int = 2, length: int = 9, form: str = "labels", autocast: bool = False, logits: str = "", **given: Any
) -> dict[str, torch.Tensor]:
    """Loss, outputs and all gradients of one batch. ``logits``: read "before" or "after" the backward."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext():
        out = model(**batch(rows, length, form), **given)
        found = {"loss": out.loss.detach().clone()}
        if logits == "before":
            found["logits"] = out.logits.detach().clone()
    for name in ("router_logits", "hidden_states", "attentions"):
        for n, x in enumerate(getattr(out, name, None) or ()):
            found[f"{name}[{n}]"] = x.detach().clone()
    if out.loss.requires_grad:
        out.loss.backward()
    if logits == "after":
        found["logits"] = out.logits.detach().clone()
    return {**found, **{f"gradient of {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def fill(model: Any, adapter: str) -> None:
    """Random weights for a LoRA adapter: PEFT's own B is zero."""
    for name, p in model.named_parameters():
        if "lora_" in name and f".{adapter}." in name:
            values = torch.randn(p.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            p.data = (values * (0.05 if "experts" in name else 0.2)).to(p.dtype)


def scaled(value: Any, factor: Any) -> Any:
    """``value`` times ``factor``; of a tuple or a model's output its first element."""
    if isinstance(value, tuple):
        return (scaled(value[0], factor), *value[1:])
    if isinstance(value, dict):
        first = next(iter(value))
        return type(value)(**{**value, first: scaled(value[first], factor)})
    return value * factor


def note(name: str, factor: float, module: Any, *given: Any) -> Any:
    """A hook of any kind: keeps the sizes of the tensors that it gets, and changes the last ones if ``factor`` is not 1."""
    tensors = [t for x in given for t in (x if isinstance(x, tuple) else (x,)) if isinstance(t, torch.Tensor)]
    see(name, [float(t.detach().float().norm()) for t in tensors if t.is_floating_point()])
    if factor == 1:
        return None
    last = given[-1]
    return scaled(last, factor) if not isinstance(last, tuple) or (last and isinstance(last[0], torch.Tensor)) else None


def with_forward(module: Any, factor: float) -> None:
    """Gives a module another forward, as a closure."""
    plain = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return scaled(plain(*args, **kwargs), factor)

    module.forward = forward


def scaled_forward(plain: Any, factor: float) -> Any:
    """A forward for a class."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return scaled(plain(self, *args, **kwargs), factor)

    return forward


class Extra:
    """What a patched forward reads, as a plain object."""

    def __init__(self, factor: float):
        self.factor = factor


def steered(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A forward that reads ``self._factor``: a number, or one in a list, a dict, a plain object or a plain tensor."""
    found = self._factor
    if isinstance(found, list):
        found = found[0]
    elif isinstance(found, dict):
        found = found["factor"]
    elif isinstance(found, Extra):
        found = found.factor
    return scaled(type(self).forward(self, *args, **kwargs), found)


class Scaled(nn.Module):
    """A parametrization."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.factor


class First(nn.Module):
    """Returns its first argument."""

    def forward(self, first: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return first


class Wrapped(nn.Module):
    """A module in place of another."""

    def __init__(self, inner: nn.Module, factor: float):
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return scaled(self.inner(*args, **kwargs), self.factor)
