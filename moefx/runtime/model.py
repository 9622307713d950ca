"""The forwards of an optimized model and of the models inside it: what is done once a step rather than once a block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moefx import ops
from moefx.distributed import aux_loss, checkpoint_hf, expert_sharding, rank_monitor
from moefx.errors import MoefxError
from moefx.frontend.lazy_logits import LazyLogits
from moefx.integrations import fsdp
from moefx.integrations import transformers as hf
from moefx.runtime.head import take_head
from moefx.runtime.state import Optimized
from moefx.runtime.tracing import TRANSFORMED, only_graphs, refuse_replica, untraced, warn_compiled


def run_model(model: Any, plain: Callable, args: tuple, kwargs: dict) -> Any:
    """The forward of an optimized model, around its own class's (``plain``)."""
    state: Optimized = model._moefx
    if hf.is_traced():
        if only_graphs(state, model._moefx_router_state, model.training):
            return untraced(_run_here, model, plain, args, kwargs)
        if hf.is_transformed():
            state.report.fell_back("the model", TRANSFORMED, warn=model.training)
        elif model.training:
            warn_compiled()
        return plain(*args, **kwargs)
    if getattr(model, "_is_replica", False):
        refuse_replica(state, model._moefx_router_state, model.training)
        return plain(*args, **kwargs)
    return _run_here(model, plain, args, kwargs)


def _run_here(model: Any, plain: Callable, args: tuple, kwargs: dict) -> Any:
    state: Optimized = model._moefx
    model._moefx_router_state.start(model, state)
    if state.shards_experts and state.plan.mesh is not None and torch.is_grad_enabled():
        expert_sharding.average_over_replicas(model, expert_sharding.replicas_of(state.plan.mesh))
    mean = kwargs.get("num_items_in_batch") is None
    everywhere = state.global_aux_loss and model.training and not state.bypass

    def total(x: Tensor) -> Tensor:
        return aux_loss.SumOverRanks.apply(x, aux_loss.gradient_scale(mean))  # type: ignore[no-untyped-call]

    with rank_monitor.named(), state.masks(model), _aux_loss(model, state, mean, everywhere):
        out = _run(model, plain, args, kwargs)
        given = total if everywhere else lambda x: x
        return model._moefx_router_state.finish(state, out, kwargs.get("attention_mask"), given)


def _run(model: Any, plain: Callable, args: tuple, kwargs: dict) -> Any:
    state: Optimized = model._moefx
    if not state.bypass:
        kwargs = hf.count_as_tensor(args, kwargs)
    training = kwargs.get("labels") is not None or (model.training and torch.is_grad_enabled())
    ignores_packing = False
    reads_cache = model._moefx_router_state.blocks.share_cache and _fills_a_cache(model)
    if training and not state.bypass and kwargs.get("use_cache") is None and not reads_cache:
        positions = len(args) > 1 or kwargs.get("position_ids") is not None
        beside_cache, packs = positions and _fills_a_cache(model), state.program.packs_beside_cache
        if not beside_cache or packs is not None:  # else the model fills its cache, and the report says so
            kwargs["use_cache"] = False  # nothing reads the cache of a training step
            ignores_packing = beside_cache and not packs
        if ignores_packing:
            state.report.ignored_packing(kwargs.get("position_ids"))
    head = None if state.bypass else vars(model).get("_moefx_head")
    unasked = not state.bypass and all(kwargs.get(k) is None for k in ("use_cache", "past_key_values", "cache"))
    lm_head = None if head is None else model.get_output_embeddings()
    if head is not None and not hasattr(lm_head, "_moefx_head"):
        take_head(lm_head, head)
    numbered = len(args) <= 1 and kwargs.get("position_ids") is None and kwargs.get("past_key_values") is None
    with hf.unpacked() if (numbered and training) or ignores_packing else contextlib.nullcontext():
        if head is not None and kwargs.get("labels") is not None and hasattr(lm_head, "_moefx_head"):
            with head.lazily(lm_head):
                return plain(*args, **kwargs)
        out = plain(*args, **kwargs)
        if unasked and any(getattr(out, k, None) is not None for k in ("past_key_values", "cache")):
            state.report.filled_a_cache()
        return out


def _aux_loss(model: Any, state: Optimized, mean_of_ranks: bool, everywhere: bool) -> contextlib.AbstractContextManager:
    """Context in which the auxiliary loss is that of all ranks, or a backend's kernel, or the model's own function."""
    if everywhere:
        return aux_loss.over_all_ranks(model, mean_of_ranks)
    found = next((b.kernel(ops.load_balancing_loss) for b in state.plan.backends if b.kernel(ops.load_balancing_loss)), None)
    if state.bypass or found is None or found.fn is ops.load_balancing_loss:
        return contextlib.nullcontext()  # the operation's body is what the model's own function computes
    return aux_loss.by_kernel(model, found.fn)


def _fills_a_cache(model: Any) -> bool:
    """Would the original model fill a cache in a call without ``use_cache``? Most then do not look for packed sequences."""
    recomputes = model.training and torch.is_grad_enabled() and hf.drops_cache(model)
    return bool(getattr(model.config.get_text_config(), "use_cache", False)) and not recomputes


def run_part(model: Any, plain: Callable, args: tuple, kwargs: dict) -> Any:
    """The forward of a model inside the model: called directly, it makes the same lazy masks for its graphs."""
    if hf.is_traced():
        return plain(*args, **kwargs)
    with model._moefx_state.masks(model):
        return plain(*args, **kwargs)


def sharded_save_pretrained(base: type) -> Callable:
    """``save_pretrained`` of an optimized model: of a sharded one, each rank writes its part."""

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, **kwargs):
        plain = base.save_pretrained  # type: ignore[attr-defined]
        if state_dict is not None or not fsdp.is_sharded(self) or kwargs.get("distributed_checkpoint"):
            return plain(self, save_directory, is_main_process, state_dict, **kwargs)
        unknown = set(kwargs) - {"max_shard_size", "save_original_format"}
        if unknown:
            raise MoefxError(
                f"save_pretrained of a sharded model does not take {sorted(unknown)[0]}: save without it, then load the folder "
                "in one process"
            )
        return checkpoint_hf.save_pretrained(self, save_directory, **kwargs)

    return save_pretrained


def reshard_without_backward(model: Any, args: Any, out: Any) -> None:
    """Forward hook of an FSDP root, after FSDP's own: without gradients no backward will reshard the parameters."""
    if torch.is_grad_enabled():
        return
    for logits in out if isinstance(out, tuple) else (getattr(out, "logits", None),):
        if isinstance(logits, LazyLogits):
            logits.materialize()  # lm_head's weight is resharded next
    fsdp.reshard(model)
