"""What moefx asks of Transformers: its experts and attention interfaces, which modules are blocks, what a model promises."""

from __future__ import annotations

import ast
import contextlib
import inspect
import sys
import textwrap
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils
from transformers.activations import ACT2FN
from transformers.integrations import hub_kernels
from transformers.integrations.moe import ExpertsInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.output_capturing import OutputRecorder, _active_collector

from . import adapters, loops, ops
from .activations import ACTIVATIONS
from .errors import CaptureError, MoefxError


class _Callers(list[tuple[str, nn.Module]]):
    """Who called what; ``lenient``: a call that no operation can express runs as it is."""

    lenient = False


#: Set while a model is recorded or captured: the interfaces below then emit semantic operations and note who called.
_emitting: ContextVar[_Callers | None] = ContextVar("moefx_emitting", default=None)


@contextmanager
def emitting(lenient: bool = False) -> Iterator[list[tuple[str, nn.Module]]]:
    """Within: experts and attention calls become ``moefx.experts`` and ``moefx.attention``; yields who called what.

    A call that these cannot express raises CaptureError, or runs as the model wrote it if ``lenient`` (while recording).
    """
    callers = _Callers()
    callers.lenient = lenient
    token = _emitting.set(callers)
    collecting = _active_collector.set(None)  # type: ignore[func-returns-value]  # nothing traced belongs to the user's outputs
    try:
        yield callers
    finally:
        _active_collector.reset(collecting)
        _emitting.reset(token)


@contextmanager
def unpacked_on_meta() -> Iterator[None]:
    """Within: Transformers does not look at the values of position ids on the meta device for packed sequences."""
    look = masking_utils.find_packed_sequence_indices
    with _looking_for_packing(lambda position_ids: None if position_ids.is_meta else look(position_ids)):
        yield


@contextmanager
def without_packages() -> Iterator[None]:
    """Within: what Transformers takes from other packages where they are installed (Mamba's scan, causal convolutions) is its
    own PyTorch code, as in an export: their kernels read memory, which there is none of on the meta device."""
    before = hub_kernels.is_torchdynamo_exporting
    hub_kernels.is_torchdynamo_exporting = lambda: True
    try:
        yield
    finally:
        hub_kernels.is_torchdynamo_exporting = before


def unpacked() -> AbstractContextManager[None]:
    """Within: no packed sequences are looked for. For a call without position ids, whose positions the model numbers
    itself: reading them back would make the host wait, once a step, until the device has done all that is queued."""
    return _looking_for_packing(lambda position_ids: None)


def packed() -> AbstractContextManager[None]:
    """Within: position ids that a call has are taken to be those of packed sequences, without reading them back to see."""

    def number(position_ids: Tensor) -> Tensor:
        return (torch.diff(position_ids, prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)

    return _looking_for_packing(number)


@contextmanager
def _looking_for_packing(look: Callable) -> Iterator[None]:
    before = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = look
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = before


class OwnAttention(CaptureError):
    """Attention of the model's own kind: what it gives Transformers' interface is not all that it says."""

    def __init__(self, reason: str, module: nn.Module):
        super().__init__(reason)
        self.module = module


def is_emitting() -> bool:
    return _emitting.get() is not None


# --- experts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExpertsLayout:
    """The flags of Transformers' experts interface, as arguments of ``moefx.experts``."""

    up: str
    down: str
    biased: bool
    activation: str
    alpha: float
    limit: float
    transposed: bool
    interleaved: bool

    @property
    def parameters(self) -> list[str]:
        names = [self.up, self.down]
        return names + [f"{n}_bias" for n in names] if self.biased else names

    @property
    def options(self) -> dict[str, Any]:
        return {
            "activation": self.activation, "alpha": self.alpha, "limit": self.limit,
            "transposed": self.transposed, "interleaved": self.interleaved,
        }  # fmt: skip

    def weights(self, module: nn.Module) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        up, down = adapters.weight(module, self.up), adapters.weight(module, self.down)
        if not self.biased:
            return up, None, down, None
        return up, adapters.weight(module, f"{self.up}_bias"), down, adapters.weight(module, f"{self.down}_bias")


def is_experts(module: nn.Module) -> bool:
    """Made by Transformers' ``use_experts_implementation``, or run on every token."""
    flags = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")
    return all(hasattr(module, a) for a in flags) or is_dense_experts(module)


def is_dense_experts(module: nn.Module) -> bool:
    """Experts that a model multiplies with all tokens at once (Llama 4): see ``passes/dense_experts.py``. They are given rows
    and nothing of who chose them, and hold gate_up_proj [E, H, 2I] and down_proj [E, I, H]."""
    up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if not (isinstance(up, Tensor) and isinstance(down, Tensor) and up.dim() == down.dim() == 3 and hasattr(module, "act_fn")):
        return False
    fits = up.shape == (down.shape[0], down.shape[2], 2 * down.shape[1])
    return fits and list(inspect.signature(type(module).forward).parameters) == ["self", "hidden_states"]


def experts_layout(module: nn.Module) -> ExpertsLayout:
    """Reads a module's flags; raises CaptureError with the reason where ``moefx.experts`` cannot say what it computes."""
    if "_moefx_layout" not in module.__dict__:  # before it is exported, when numbers can be looked at
        try:
            found: ExpertsLayout | str = _experts_layout(module)
        except CaptureError as error:
            found = str(error)
        module.__dict__["_moefx_layout"] = found
    found = module.__dict__["_moefx_layout"]
    if isinstance(found, str):
        raise CaptureError(found)
    return found


def _experts_layout(module: nn.Module) -> ExpertsLayout:
    name = type(module).__name__
    if is_dense_experts(module):
        if not isinstance(module.act_fn, nn.SiLU | type(ACT2FN["silu"])):
            raise CaptureError(f"{name} runs on every token with {type(module.act_fn).__name__}: only SiLU is known here")
        return ExpertsLayout("gate_up_proj", "down_proj", False, "swiglu", 0.0, 0.0, True, False)
    if module.has_post_expert_norm:
        raise CaptureError(f"{name} normalises after each expert (has_post_expert_norm): moefx.experts has no such form")
    up = "gate_up_proj" if module.has_gate else "up_proj"
    missing = [p for p in (up, "down_proj") if not isinstance(getattr(module, p, None), nn.Parameter)]
    if missing:
        raise CaptureError(f"{name} has no parameter {missing[0]}: not the layout of Transformers' experts interface")
    interleaved = bool(module.has_gate and not module.is_concatenated)
    activation, alpha, limit = _activation(module, interleaved)
    return ExpertsLayout(
        up, "down_proj", bool(module.has_bias), activation, alpha, limit, bool(module.is_transposed), interleaved
    )


def _activation(module: nn.Module, interleaved: bool) -> tuple[str, float, float]:
    """Which activation the module applies, found by running it in fp64 over six decades of magnitudes; in fp32, if it computes
    in fp32 whatever it is given."""
    generator = torch.Generator().manual_seed(0)
    magnitude = 10 ** (torch.rand(64, 64, generator=generator, dtype=torch.float64) * 6 - 3)
    h = torch.where(torch.rand(64, 64, generator=generator) < 0.5, -magnitude, magnitude)
    wanted = module._apply_gate(h) if module.has_gate else module.act_fn(h)  # type: ignore[operator]
    near = 1e-12
    if torch.equal(wanted, wanted.float().double()):
        h, wanted, near = h.float(), wanted.float(), 1e-5
    parts = [vars(m).items() for m in module.modules()]
    numbers = sorted({float(v) for part in parts for k, v in part if type(v) is float and not k.startswith("_")} | {0.0})
    for name, candidate in ACTIVATIONS.items():
        if candidate.gated != bool(module.has_gate):
            continue
        for alpha in numbers:
            for limit in numbers:
                with contextlib.suppress(ValueError):  # it has no meaning with these numbers
                    found = candidate.forward(h, alpha, limit, interleaved)
                    if found.shape == wanted.shape and torch.allclose(found, wanted, rtol=near, atol=1e-14):
                        return name, alpha, limit
    kind = "_apply_gate" if module.has_gate else "act_fn"
    raise CaptureError(
        f"{type(module).__name__}.{kind} is none of the activations that moefx.experts knows ({', '.join(ACTIVATIONS)})"
    )


def _expressible(module: nn.Module) -> bool:
    try:
        experts_layout(module)
    except CaptureError:
        return False
    return True


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The "moefx" entry of Transformers' experts interface.

    Emits ``moefx.experts`` while capturing. Otherwise this is a call that no captured graph covers (generation with a
    cache, say): the implementation that the model had before, or, where experts are spread over ranks, the exchange.
    """
    callers = _emitting.get()
    if callers is not None and callers.lenient and not _expressible(self):
        callers = None
    layout = experts_layout(self) if callers is not None or isinstance(next(self.parameters()), DTensor) else None
    if callers is not None and layout is not None:
        callers.append(("experts", self))
        return ops.experts(hidden_states, top_k_index, top_k_weights, *layout.weights(self), **layout.options)
    if layout is not None:
        from .parallel import experts_over_ranks

        return experts_over_ranks(hidden_states, top_k_index, top_k_weights, self, layout)
    previous = self.__dict__.get("_moefx_previous") or "grouped_mm"
    own = inspect.unwrap(type(self).forward)
    return ExpertsInterface().get(previous, own)(self, hidden_states, top_k_index, top_k_weights)


def _activation_of_loop(module: nn.Module) -> tuple[str, float, float] | str:
    """Which activation the experts of :mod:`loops` apply; a sentence if it is unknown."""
    applied = loops.LOOPS[type(module).__name__].activation
    try:
        return _activation(loops.Gated(applied(module)), False) if applied else ("", 0.0, 0.0)
    except CaptureError as error:
        return f"{type(module).__name__}: {error}"


def _emitter(module: nn.Module) -> Callable[..., Tensor] | None:
    """While capturing: emits ``moefx.experts`` for a module of :mod:`loops`."""
    callers, known = _emitting.get(), module.__dict__.get("_moefx_layout")
    if callers is None or known is None or isinstance(known, str) and callers.lenient:
        return None
    if isinstance(known, str):
        raise CaptureError(known)
    activation, alpha, limit = known

    def emit(x: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor, transposed: bool) -> Tensor:
        callers.append(("experts", module))
        options = {"activation": activation, "alpha": alpha, "limit": limit, "transposed": transposed}
        return ops.experts(x, index, weights, up, None, down, None, **options)

    return emit


# --- attention -------------------------------------------------------------------------------------------------------


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The "moefx" entry of Transformers' attention interface; query [B, A, S, D] -> [B, S, A, Dv]."""
    callers = _emitting.get()
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    indices = kwargs.pop("indices", None)
    if indices is not None:
        attention_mask = _only(indices, attention_mask, query, key, causal)
    unknown = [k for k in ("position_bias", "cache", "block_indices") if kwargs.get(k) is not None]
    if callers is not None and callers.lenient and "block_indices" in unknown:
        raise OwnAttention("it attends to blocks of keys that it chose: only the model's own attention knows how", module)
    if callers is not None and callers.lenient and causal and query.shape[2] != key.shape[2]:
        # DeepSeek-V4 appends compressed keys: with a boolean mask, or none, they would be seen by the wrong queries
        raise OwnAttention(
            f"it attends {query.shape[2]} queries to {key.shape[2]} keys: who may see which only the model's own attention "
            "knows",
            module,
        )
    if callers is not None and not (unknown and callers.lenient):
        if unknown:
            raise CaptureError(f"{type(module).__name__} passes {unknown[0]} to attention: moefx.attention has no such input")
        callers.append(("attention", module))
        known, packed = _known_window.get(), None if attention_mask is None else packed_of(attention_mask)
        if packed is not None and causal and query.shape[2] == key.shape[2]:
            attention_mask, sliding_window = packed  # together they say everything, as boolean masks do
        elif attention_mask is None and known is not None:
            if sliding_window not in (None, known):
                raise CaptureError(f"{type(module).__name__} has a sliding window of {sliding_window}, its mask one of {known}")
            sliding_window = known
        out = ops.attention(
            query, key, value, attention_mask, s_aux,
            scale=float(query.shape[-1] ** -0.5 if scaling is None else scaling),
            is_causal=causal,
            window=sliding_window, softcap=float(softcap or 0.0), dropout=float(dropout),
        )  # fmt: skip
        return out, None
    given = dict(
        dropout=dropout, scaling=scaling, is_causal=is_causal, sliding_window=sliding_window, s_aux=s_aux,
        softcap=softcap, **kwargs,
    )  # fmt: skip
    given = {k: v for k, v in given.items() if v is not None}
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if module.__dict__.get("_moefx_previous") != "eager" and s_aux is None and softcap is None or own is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **given)
    return own(module, query, key, value, _additive(attention_mask, query, key, causal), **given)


def _only(indices: Tensor, mask: Tensor | None, query: Tensor, key: Tensor, causal: bool) -> Tensor:
    """The mask with no keys but those of ``indices`` [B, S, n], which sparse attention chose (DeepSeek-V3.2, arXiv 2512.02556).

    Its models say so in the mask themselves, but only to the implementations "eager" and "sdpa", by name.
    """
    none = torch.zeros(*indices.shape[:2], key.shape[2], dtype=torch.bool, device=indices.device)
    chosen = none.scatter(-1, indices.long(), True).unsqueeze(1)
    if mask is None and causal:
        mask = _causal(query, key)
    if mask is None:
        return chosen
    return mask & chosen if mask.dtype == torch.bool else mask.masked_fill(~chosen, torch.finfo(mask.dtype).min)


def _causal(query: Tensor, key: Tensor) -> Tensor:
    """[1, 1, S, T]: the last query sees all keys."""
    queries, keys = query.shape[2], key.shape[2]
    return torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)[None, None]


def _additive(mask: Tensor | None, query: Tensor, key: Tensor, causal: bool) -> Tensor | None:
    """The mask as eager attention of Transformers wants it: added to the scores; causal where SDPA would take it as said."""
    if mask is None:
        if query.shape[2] == 1 or not causal:
            return None
        mask = _causal(query, key)
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)


#: Set while a block is captured whose mask says nothing but this causal sliding window: attention says it instead.
_known_window: ContextVar[int | None] = ContextVar("moefx_known_window", default=None)


@contextmanager
def windowed(window: int | None) -> Iterator[None]:
    """Within: attention without a mask is limited to ``window`` positions, itself included (None: to nothing)."""
    token = _known_window.set(window)
    try:
        yield
    finally:
        _known_window.reset(token)


def window_of(mask: Tensor) -> int | None:
    """The window of a mask that says nothing but a causal sliding window."""
    return getattr(mask, "_moefx_window", None)


def packed_of(mask: Tensor) -> tuple[Tensor, int | None] | None:
    """Of a mask that says nothing but causal attention within packed sequences: where each position's sequence begins [B, S]
    (int32), and the sliding window."""
    return getattr(mask, "_moefx_packed", None)


def packed_mask(starts: Tensor, window: int | None) -> Tensor:
    """The mask that says so, boolean [B, 1, S, S]. In a graph it is dead code where nobody but attention reads it."""
    length = starts.shape[1]
    mask = ops.visible(length, length, window, starts, starts.device)
    mask._moefx_packed = starts, window  # type: ignore[attr-defined]
    return mask


def attention_mask(
    *,
    mask_function: Callable = masking_utils.causal_mask_function,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """The "moefx" entry of Transformers' mask interface: SDPA's boolean mask, which notes if it is only a sliding window, or
    only that of packed sequences."""
    said = _said(mask_function)
    sliding, packed = said.pop(_SLIDING, None), said.pop(_PACKED, None)
    plain = (
        said.keys() == {_CAUSAL} and (sliding is None) == (local_size is None) and kwargs["q_length"] == kwargs["kv_length"]
        and (sliding or packed) and (packed or allow_is_causal_skip)
        and (kwargs.get("attention_mask") is None or bool(kwargs["attention_mask"].all()))
    )  # fmt: skip
    # a sequence shorter than its window needs no mask, but would be another kind of call than a longer one
    skip = allow_is_causal_skip and not plain
    mask = sdpa_mask(mask_function=mask_function, local_size=local_size, allow_is_causal_skip=skip, **kwargs)
    if plain and mask is not None:
        if packed:
            mask._moefx_packed = _starts(packed["packed_sequence_mask"]), local_size  # type: ignore[attr-defined]
        else:
            mask._moefx_window = local_size  # type: ignore[attr-defined]
    return mask


_CAUSAL = "causal_mask_function"
_SLIDING = "sliding_window_overlay.<locals>.inner_mask"
_PACKED = "packed_sequence_mask_function.<locals>.inner_mask"


def _said(mask_function: Callable) -> dict[str, dict[str, Any]]:
    """What Transformers' mask says: the names of the functions that it joins by "and", and what each knows."""
    if not inspect.isfunction(mask_function):  # a partial, an object: something of the user's
        return {repr(mask_function): {}}
    name, known = mask_function.__qualname__, dict(inspect.getclosurevars(mask_function).nonlocals)
    if name == "and_masks.<locals>.and_mask":
        return {n: what for part in known["mask_functions"] for n, what in _said(part).items()}
    if name == "remap_positions_for_packed_sequence.<locals>.inner_mask":
        return _said(known["mask_function"])  # of positions that begin anew, which differ within a sequence as those of the row
    return {name: known}


def _starts(sequence: Tensor) -> Tensor:
    """The number [B, S] of each position's sequence, ascending -> where that sequence begins [B, S] (int32)."""
    position = torch.arange(sequence.shape[1], device=sequence.device)
    begins = torch.diff(sequence, prepend=sequence[:, :1] - 1) != 0
    return torch.where(begins, position, 0).cummax(1).values.to(torch.int32)


AttentionInterface.register("moefx", attention_forward)
AttentionMaskInterface.register("moefx", attention_mask)
ExpertsInterface.register("moefx", experts_forward)


@contextmanager
def implementations(model: PreTrainedModel, attention: bool = True) -> Iterator[None]:
    """Within: the model calls moefx for its experts and attention; what it called before comes back afterwards."""
    before = _names(model)
    use(model, attention)
    try:
        yield
    finally:
        restore(model, before)


#: Implementations that configurations named before moefx came, by id: models built from one configuration share it.
_named_before: dict[int, tuple[str | None, str | None]] = {}


def previous(model: PreTrainedModel) -> tuple[str | None, str | None]:
    """What the model calls for its attention and experts; where its configuration says "moefx", for this model or another that
    shares it, what it said before."""
    before = _named_before.get(id(model.config), (None, None))
    return tuple(b if n == "moefx" else n for n, b in zip(_names(model), before, strict=True))  # type: ignore[return-value]


def _names(model: PreTrainedModel) -> tuple[str | None, str | None]:
    return model.config._attn_implementation, model.config._experts_implementation


def use(model: PreTrainedModel, attention: bool = True) -> None:
    """Makes the model call moefx for its experts, and for its attention if ``attention``."""
    attention_before, experts = names = previous(model)
    if id(model.config) not in _named_before:
        weakref.finalize(model.config, _named_before.pop, id(model.config), None)
    _named_before[id(model.config)] = names
    for module in model.modules():
        if is_experts(module):
            module.__dict__.setdefault("_moefx_previous", experts)
            with contextlib.suppress(CaptureError):  # said again, with its reason, where the module is called
                experts_layout(module)  # found on numbers: not while tracing
        elif hasattr(module, "is_causal"):
            module.__dict__.setdefault("_moefx_previous", attention_before)
        elif loops.is_loop(module) and not hasattr(type(module), "_moefx_base"):
            module.__dict__["_moefx_layout"] = _activation_of_loop(module)
            module.__class__ = loops.saying(type(module), _emitter)  # type: ignore[arg-type]
        elif adapters.is_wrapper(module) and not hasattr(type(module), "_moefx_base"):
            module.__class__ = adapters.adapting(type(module), is_emitting)  # type: ignore[arg-type]
    if attention:
        model.set_attn_implementation("moefx")
    model.set_experts_implementation("moefx")


def restore(model: PreTrainedModel, before: tuple[str | None, str | None]) -> None:
    for module in model.modules():
        module.__dict__.pop("_moefx_previous", None)
        module.__dict__.pop("_moefx_layout", None)
        if adapters.is_wrapper(module) or loops.is_loop(module):
            module.__class__ = getattr(type(module), "_moefx_base", type(module))
    _name(model, before)


def _name(model: PreTrainedModel, names: tuple[str | None, str | None]) -> None:
    # not through set_attn_implementation: it checks again that, say, flash attention can be imported
    for module in model.modules():
        config = getattr(module, "config", None) if isinstance(module, PreTrainedModel) else None
        if config is not None:
            config._attn_implementation_internal, config._experts_implementation_internal = names


@contextmanager
def named(model: PreTrainedModel, names: tuple[str | None, str | None]) -> Iterator[None]:
    """Within: the model's implementations of attention and experts go by these names, which models look at."""
    before = _names(model)
    _name(model, names)
    try:
        yield
    finally:
        _name(model, before)


# --- the model's structure -------------------------------------------------------------------------------------------


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder blocks by path: outermost ``GradientCheckpointingLayer``s, else the children of the longest ModuleList."""
    found: dict[str, nn.Module] = {}
    last = None
    for path, module in model.named_modules():  # what a block holds comes right after it
        if isinstance(module, GradientCheckpointingLayer) and not (last is not None and path.startswith(f"{last}.")):
            found[path], last = module, path
    if not found:
        lists = [(p, m) for p, m in model.named_modules() if isinstance(m, nn.ModuleList)]
        if lists:
            path, longest = max(lists, key=lambda item: len(item[1]))
            found = {f"{path}.{name}": child for name, child in longest.named_children()}
    return found


def routers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules whose output Transformers records as ``router_logits``, by path."""
    found = {}  # type: ignore[var-annotated]
    for module in model.modules():
        specs = (
            (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
            if isinstance(module, PreTrainedModel)
            else None
        )
        for spec in specs if isinstance(specs, list) else [specs] if specs is not None else []:
            target = spec.target_class if isinstance(spec, OutputRecorder) else spec
            if isinstance(target, type):
                found |= {p: m for p, m in model.named_modules() if isinstance(m, target)}
    return found


_RECURRENT_PARAMETERS = ("A_log", "dt_bias", "conv1d.weight", "slope_rate")
_RECURRENT_TYPES = ("linear_attention", "mamba", "mamba2", "recurrent", "lightning")


def is_recurrent(module: nn.Module) -> bool:
    """A mixer whose scan over the sequence would be unrolled by capture, with its length baked in."""
    names = [n for n, _ in module.named_parameters()] + [n for n, _ in module.named_buffers()]
    kind = getattr(module, "block_type", getattr(module, "layer_type", None))
    return kind in _RECURRENT_TYPES or any(n == r or n.endswith(f".{r}") for n in names for r in _RECURRENT_PARAMETERS)


def is_norm(module: nn.Module) -> bool:
    """A plain RMSNorm module, by its class's name (the gated ones of recurrent mixers are another operation)."""
    name = type(module).__name__
    return "RMSNorm" in name and "Gated" not in name and not _gives_a_factor(module)


_FACTORS: dict[type, bool] = {}


def _gives_a_factor(module: nn.Module) -> bool:
    """HY-V4's has no weight and gives one number a token, for something else to be multiplied by: no norm."""
    cls = type(module)
    if cls not in _FACTORS:
        _FACTORS[cls] = False
        if next(module.parameters(), None) is None:
            with torch.no_grad(), contextlib.suppress(Exception):  # one that knows its size takes no other: a norm
                _FACTORS[cls] = module(torch.ones(1, 8)).shape == (1, 1)
    return _FACTORS[cls]


def requested() -> set[str]:
    """Which outputs the running forward collects ("router_logits", "attentions", "hidden_states")."""
    return set(_active_collector.get() or ())


#: Attributes that number a block: no sizes.
INDEX_NAMES = {"layer_idx", "layer_id", "layer_number"}


@cache
def reads_layer_index(cls: type) -> bool:
    """Does the class compute with its layer index, other than to address a cache? Then equal blocks may differ."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return True
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            child.parent = node  # type: ignore[attr-defined]
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and node.attr in INDEX_NAMES and isinstance(node.ctx, ast.Load)):
            continue
        up: Any = node
        while not isinstance(up, (ast.Call, ast.stmt)):
            up = up.parent
        on_cache = isinstance(up, ast.Call) and any(w in ast.unparse(up.func) for w in ("past_key", "cache"))
        function = up
        while not isinstance(function, (ast.FunctionDef, ast.Module)):
            function = function.parent  # type: ignore[union-attr]
        if not on_cache and getattr(function, "name", "") not in ("__init__", "extra_repr"):
            return True
    return False


def count_as_tensor(args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """``kwargs`` of a call with ``num_items_in_batch`` as a tensor [], on the device of the call's first tensor. Transformers
    hands it to every block and to the loss; as a number, another one each step would be another kind of call."""
    count = kwargs.get("num_items_in_batch")
    if not isinstance(count, (int, float)):
        return dict(kwargs)
    device = next((v.device for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
    return {**kwargs, "num_items_in_batch": torch.full((), count, device=device)}


def structure(module: nn.Module) -> tuple:
    """Equal for two modules that compute the same function of their parameters and inputs."""
    found = []
    for path, m in module.named_modules():
        own = [
            (n, tuple(p.shape), p.dtype, p.device)
            for n, p in [*m.named_parameters(recurse=False), *m.named_buffers(recurse=False)]
        ]
        ignored = set() if reads_layer_index(type(m)) else INDEX_NAMES  # type: ignore[arg-type]
        simple = {
            k: v for k, v in vars(m).items()
            if not k.startswith("_") and k not in ("training", "gradient_checkpointing") and k not in ignored
            and isinstance(v, (int, float, str, bool, tuple, type(None)))
        }  # fmt: skip
        functions = {k: getattr(v, "__qualname__", type(v).__name__) for k, v in vars(m).items() if callable(v)}
        found.append(
            (
                path,
                type(m).__module__,
                type(m).__qualname__,
                tuple(own),
                repr(simple),
                repr(functions),
                id(getattr(m, "config", None)),
            )
        )
    return tuple(found)


def is_language_model(model: Any) -> bool:
    """Does it predict tokens, and not classes, say, or nothing?"""
    return model.get_output_embeddings() is not None


def experts_named(model: PreTrainedModel) -> int:
    """How many experts the configuration names; 0 if none."""
    return experts_in(model.config)


def experts_in(config: Any) -> int:
    """How many experts a configuration names, in its text's or its feed-forward's part (DBRX) too; 0 if none."""
    config = config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    parts = (config, getattr(config, "ffn_config", None))
    return next((v for part in parts for n in names if isinstance(v := getattr(part, n, None), int)), 0)


def check(model: Any) -> None:
    """Raises MoefxError, in one sentence, for a model that moefx cannot work on."""
    if not isinstance(model, PreTrainedModel):
        raise MoefxError(
            f"moefx works on a transformers PreTrainedModel, got {type(model).__name__}: pass the model itself, before DDP, "
            "FSDP or torch.compile wrap it"
        )
    if getattr(model, "hf_quantizer", None) is not None or getattr(model.config, "quantization_config", None) is not None:
        method = getattr(
            getattr(model.config, "quantization_config", None),
            "quant_method",
            type(getattr(model, "hf_quantizer", None)).__name__,
        )
        raise MoefxError(
            f"{type(model).__name__} is quantized ({method}): moefx trains parameters in fp32, bf16 or fp16; load the model "
            "without quantization_config"
        )
    devices: dict[str, str] = {}
    for name, p in model.named_parameters():
        devices.setdefault(str(p.device), name)
    if len(devices) > 1:
        (a, first), (b, second) = list(devices.items())[:2]
        raise MoefxError(
            f"{type(model).__name__} lies on two devices: {first} on {a}, {second} on {b}; move it to one "
            "(model.to(device), no device_map)"
        )
    if not any(is_experts(m) for m in model.modules()) and experts_named(model) < 2:
        raise MoefxError(
            f"{type(model).__name__} is dense: it has 0 experts modules, and {type(model.config).__name__} names no number of "
            "experts; moefx is for mixtures of experts (`moefx models` lists the families)"
        )


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {p: m for p, m in model.named_modules() if is_experts(m)}
