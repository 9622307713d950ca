"""The structure of a model: its blocks, routers, norms and experts, and the experts that its configuration names."""

from __future__ import annotations

import ast
import contextlib
import inspect
import textwrap
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import OutputRecorder, _active_collector, capture_outputs

from moefx.errors import MoefxError
from moefx.integrations.transformers.experts import is_experts
from moefx.internals.assumptions import assumed


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder blocks by path: outermost ``GradientCheckpointingLayer``s, else the children of the longest ModuleList."""
    found: dict[str, nn.Module] = {}
    last = None
    for path, module in model.named_modules():  # the modules inside a block come right after it
        if isinstance(module, GradientCheckpointingLayer) and not (last is not None and path.startswith(f"{last}.")):
            found[path], last = module, path
    if not found:
        lists = [(p, m) for p, m in model.named_modules() if isinstance(m, nn.ModuleList)]
        if lists:
            path, longest = max(lists, key=lambda item: len(item[1]))
            found = {f"{path}.{name}": child for name, child in longest.named_children()}
    return found


def share_cache(model: nn.Module) -> bool:
    """Do layers of a stack have one address in the key-value cache, so that one reads what another one wrote in the same step?

    So it is with a layer that runs several times, and with copies of a layer whose ``layer_idx`` nobody changed.
    """
    for stack in model.modules():
        seen: set[tuple[str, str, int]] = set()
        for layer in stack if isinstance(stack, nn.ModuleList) else ():
            for path, m in layer.named_modules():
                for name in INDEX_NAMES & vars(m).keys():
                    address = path, name, vars(m)[name]
                    if address in seen:
                        return True
                    seen.add(address)
    return False


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
    """Is it HY-V4's, which has no weight and returns one factor per token instead of normalized values?"""
    cls = type(module)
    if cls not in _FACTORS:
        _FACTORS[cls] = False
        if next(module.parameters(), None) is None:
            with torch.no_grad(), contextlib.suppress(Exception):  # a norm of another size rejects this input
                _FACTORS[cls] = module(torch.ones(1, 8)).shape == (1, 1)
    return _FACTORS[cls]


def requested() -> set[str]:
    """The outputs that the running forward collects: "router_logits", "attentions", "hidden_states"."""
    return set(_active_collector.get() or ())


@assumed(
    "a forward's collected outputs are in output_capturing._active_collector, put there by output_capturing_hook",
    "transformers 5.23 to 5.24",
)
def outputs_are_collected() -> bool:
    """A model with one recorded output, with and without collecting it."""
    found = []

    class Tried(PreTrainedModel):
        config_class = PreTrainedConfig
        _can_record_outputs = {"router_logits": OutputRecorder(nn.Identity, index=0)}

        def __init__(self, config: Any):
            super().__init__(config)
            self.gate = nn.Identity()

        @capture_outputs
        def forward(self, x: Tensor, **kwargs: Any) -> Any:
            self.gate(x)
            found.append(requested())
            return ModelOutput(logits=x)

    x, model = torch.ones(1), Tried(PreTrainedConfig())
    collected = model(x, output_router_logits=True)["router_logits"]
    (hook,) = model.gate._forward_hooks.values()
    model(x)
    named = "output_capturing_hook" in getattr(hook, "__qualname__", "")
    return found == [{"router_logits"}, set()] and requested() == set() and collected[0] is x and named


#: Attributes that are the index of a block, not sizes.
INDEX_NAMES = {"layer_idx", "layer_id", "layer_number"}


@cache
def reads_layer_index(cls: type) -> bool:
    """Does the class use its layer index for more than to address a cache? Then blocks of equal structure may differ."""
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
    """``kwargs`` of a call with ``num_items_in_batch`` as a tensor [], on the device of the call's first tensor.

    Transformers passes it to every block and to the loss; as a number it would be another kind of call in each step.
    """
    count = kwargs.get("num_items_in_batch")
    if not isinstance(count, (int, float)):
        return dict(kwargs)
    device = next((v.device for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
    return {**kwargs, "num_items_in_batch": torch.full((), count, device=device)}


def without_index(cls: type) -> frozenset[str]:
    """The attributes of a class of modules that make no difference: its index, if that only addresses a cache."""
    return frozenset() if reads_layer_index(cls) else frozenset(INDEX_NAMES)


def drops_cache(model: nn.Module) -> bool:
    """Does the model leave its default cache out where activations are checkpointed?

    ``merge_with_config_defaults`` asks the model's own flag, which Nemotron-H's does not have: only its blocks do.
    """
    return any(isinstance(m, PreTrainedModel) and getattr(m, "gradient_checkpointing", False) for m in model.modules())


def is_language_model(model: Any) -> bool:
    """Does the model predict tokens? Classifiers and bare models do not."""
    return model.get_output_embeddings() is not None


def experts_named(model: PreTrainedModel) -> int:
    """How many experts the configuration names; 0 if none."""
    return experts_in(model.config)


def experts_in(config: Any) -> int:
    """How many experts a configuration names, also in its text or feed-forward part (DBRX); 0 if none."""
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
    """The experts modules of a model, by path."""
    return {p: m for p, m in model.named_modules() if is_experts(m)}
