"""Which experts the tokens visit: as the random routers say, in turn, or by Zipf's law; the same for all contenders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROUTINGS = ("real", "balanced", "zipf")


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """The routers by path. Each gives (logits, weights [T, K], index [T, K]), or, of Llama 4, (scores [T, E], logits)."""
    return {p: m for p, m in model.named_modules() if type(m).__name__.endswith(("TopKRouter", "TopkRouter", "Llama4Router"))}


def load(index: Tensor, experts: int) -> Tensor:
    """Rows of each expert; index [T, K] -> [E]."""
    return torch.bincount(index.flatten(), minlength=experts)


# --- in turn ---------------------------------------------------------------------------------------------------------


def balanced_index(tokens: int, top_k: int, experts: int, device: Any = None) -> Tensor:
    """[T, K]: row after row the next expert. The same that ``moefx.optimize(balanced_routing=True)`` takes."""
    return torch.arange(tokens * top_k, device=device).remainder(experts).view(tokens, top_k)


def balance(model: nn.Module) -> None:
    """Makes the routers of a Transformers model send tokens to experts in turn. Everything else is done as they do it:
    logits, and the weights of the experts that are not chosen but given.
    """
    for router in routers(model).values():
        # by the class that Transformers wrote: FSDP2 makes a subclass of it
        name = next(c.__name__ for c in type(router).__mro__ if c.__name__ in _BALANCED)
        router.forward = MethodType(_BALANCED[name], router)  # type: ignore[method-assign]


def _qwen3(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
    index = balanced_index(len(logits), self.top_k, self.num_experts, logits.device)
    weights = logits.softmax(-1, dtype=torch.float32).gather(1, index)
    if self.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return logits, weights.to(logits.dtype), index


def _sigmoid(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = F.linear(hidden_states.view(-1, self.hidden_dim).float(), self.weight.float())
    index = balanced_index(len(logits), self.top_k, self.num_experts, logits.device)
    weights = logits.sigmoid().gather(1, index)
    if self.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return logits, weights * self.routed_scaling_factor, index


def _gpt_oss(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = F.linear(hidden_states, self.weight, self.bias)
    index = balanced_index(len(logits), self.top_k, self.num_experts, logits.device)
    return logits, logits.gather(1, index).softmax(1, dtype=logits.dtype), index


def _llama4(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden_states, self.weight)
    index = balanced_index(len(logits), self.top_k, self.num_experts, logits.device)
    scores = torch.full_like(logits, float("-inf")).scatter(1, index, logits.gather(1, index))
    return scores.float().sigmoid().to(logits.dtype), logits


_BALANCED = {
    "Qwen3MoeTopKRouter": _qwen3, "NemotronHTopkRouter": _sigmoid, "DeepseekV3TopkRouter": _sigmoid,
    "GptOssTopKRouter": _gpt_oss, "Llama4Router": _llama4,
}  # fmt: skip


# --- by Zipf's law ---------------------------------------------------------------------------------------------------


def zipf_load(tokens: int, top_k: int, experts: int) -> Tensor:
    """Rows of each expert [E] (float64, sums to T x K) when expert i is visited as often as c / (i + 1).

    Zipf(1), but a token visits an expert once: what an expert would get above T rows goes to the others by the same law.
    """
    law = 1 / torch.arange(1, experts + 1, dtype=torch.float64)
    full = 0
    while True:  # the first ``full`` experts have a row of every token
        rest = law[full:] * (tokens * (top_k - full) / law[full:].sum())
        if full == top_k or rest[0] <= tokens:
            return torch.cat([torch.full((full,), float(tokens), dtype=torch.float64), rest])
        full += 1


def bias_for(scores: Tensor, top_k: int, wanted: Tensor, rounds: int = 200) -> Tensor:
    """b [E] such that the ``top_k`` largest of scores [T, E] + b visit the experts as often as ``wanted`` [E] says.

    Found by steps: an expert that has too few rows goes up, and the steps shrink. The order of experts is theirs, 0 first.
    """
    scores = scores.float()
    tokens, experts = scores.shape
    wanted = wanted.to(scores.device, torch.float32)
    bias = torch.zeros(experts, device=scores.device)
    spread = scores.std().clamp(min=1e-6)
    for i in range(rounds):
        found = load((scores + bias).topk(top_k, dim=-1).indices, experts).float()
        short = ((wanted + 1) / (found + 1)).log().clamp(-2, 2)
        # one that every token visits cannot be visited more often, whatever the rest does
        short[(wanted >= tokens) & (found >= tokens)] = 0
        bias += spread * short * (0.5 if i < rounds // 2 else 0.1)
    return bias


#: This channel of the hidden states is made a constant, for routers that have no bias of their own.
CHANNEL = 0


@torch.no_grad()
def skew(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Changes the weights of ``model`` so that its experts' load on ``batch`` is that of :func:`zipf_load`.

    A router's own bias is set where it has one (gpt_oss: of the logits; nemotron_h: ``e_score_correction_bias``). Qwen3's
    has none: there one channel of the embedding is made constant, no layer writes to it, and the router's weight on it is
    the bias. Weights are changed and nothing else, so any contender that takes them has the same load.

    Returns per router the load of the busiest expert over the mean, found and wanted, and half the sum of the absolute
    differences of load (the share of rows that are with another expert than wanted).
    """
    found = {}
    if any(not _has_bias(r) for r in routers(model).values()):
        _make_constant(model)

    def before(path: str) -> Callable:
        # one forward does all: what a router sees already comes from the skewed layers before it
        def hook(router: Any, args: tuple) -> None:
            found[path] = _skew_router(router, args[0].reshape(-1, args[0].shape[-1]))

        return hook

    handles = [r.register_forward_pre_hook(before(p)) for p, r in routers(model).items()]
    try:
        model.base_model(input_ids=batch["input_ids"], use_cache=False)
    finally:
        for h in handles:
            h.remove()
    return found


def _has_bias(router: Any) -> bool:
    return hasattr(router, "e_score_correction_bias") or getattr(router, "bias", None) is not None


def _make_constant(model: Any) -> None:
    table = model.get_input_embeddings().weight
    table[:, CHANNEL] = table.std()
    for name, p in model.named_parameters():
        if name.endswith("o_proj.weight"):
            p[CHANNEL] = 0
        elif name.endswith("experts.down_proj"):
            p[:, CHANNEL] = 0


def _skew_router(router: Any, x: Tensor) -> dict[str, float]:
    correction = getattr(router, "e_score_correction_bias", None)
    if correction is not None:
        scores = F.linear(x.float(), router.weight.float()).sigmoid()
    else:
        scores = F.linear(x, router.weight, getattr(router, "bias", None))
    wanted = zipf_load(len(x), router.top_k, router.num_experts)
    bias = bias_for(scores, router.top_k, wanted)
    if correction is not None:
        correction += bias
    elif _has_bias(router):
        router.bias += bias.to(router.bias.dtype)
    else:
        router.weight[:, CHANNEL] += (bias / x[:, CHANNEL].float().mean()).to(router.weight.dtype)
    index = router.forward(x)[2]  # with the new weights; calling the module would call the hook again
    rows = load(index, router.num_experts).double().cpu()
    return {
        "busiest": float(rows.max() / rows.mean()),
        "busiest_wanted": float(wanted.max() / wanted.mean()),
        "misplaced": float((rows - wanted).abs().sum() / 2 / rows.sum()),
    }


@contextmanager
def observed(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Within: a forward of a Transformers model leaves each router's choice [T, K] here."""
    seen: dict[str, Tensor] = {}

    def after(path: str) -> Callable:
        def hook(_: Any, __: Any, out: tuple) -> None:
            # Llama 4's says no index: the scores of all experts, zeros but for those that were chosen
            seen[path] = out[2].detach() if len(out) == 3 else out[0].detach().topk(int((out[0] != 0).sum(1).max())).indices

        return hook

    handles = [r.register_forward_hook(after(p)) for p, r in routers(model).items()]
    try:
        yield seen
    finally:
        for h in handles:
            h.remove()
