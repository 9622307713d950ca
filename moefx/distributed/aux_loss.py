"""Transformers' auxiliary load-balancing loss over the batch of all ranks, or by a backend's kernel.

The loss is a product of means (arXiv 2101.03961, equations 4 to 6), so the mean of the ranks' losses is not the loss of their
batch: it balances the few sequences of each rank instead of the batch (arXiv 2501.11873).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moefx.internals import transformers_patches


class SumOverRanks(torch.autograd.Function):
    """All-reduce (sum); the gradient of each rank's input is the output's gradient times ``scale``, without communication."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        """The sum over all ranks of x."""
        ctx.scale = scale
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        """The gradient of x, and None for ``scale``."""
        return grad * ctx.scale, None


def gradient_scale(mean_of_ranks: bool) -> float:
    """The scale of a gradient of :class:`SumOverRanks`, with which the averaged gradients are those of one process.

    ``mean_of_ranks``: gradients are averaged over ranks, and nothing else; if False, the caller also multiplies the loss by the
    number of ranks, as the Trainer does when it divides by ``num_items_in_batch``.
    """
    return float(dist.get_world_size()) if mean_of_ranks else 1.0


def load_balancing_loss(
    gate_logits: Any,
    num_experts: int | None = None,
    top_k: int = 2,
    attention_mask: Tensor | None = None,
    *,
    total: Callable[[Tensor], Tensor] = lambda x: x,
) -> Any:
    """Transformers' function of the same signature, with its sums over tokens, [2 E + 1] fp32, passed through ``total``.

    ``gate_logits``: a tuple of [tokens, E], one per layer. Returns ``E * sum_e(share of rows of e * mean probability of e)``.
    """
    if not isinstance(gate_logits, tuple):
        return 0
    assert num_experts is not None
    probability = torch.cat([torch.softmax(x, dim=-1) for x in gate_logits])
    chosen = torch.topk(probability, top_k, dim=-1).indices
    token = torch.ones(len(probability), device=probability.device)
    if attention_mask is not None:
        token = attention_mask.reshape(-1).to(probability.device, torch.float32).repeat(len(gate_logits))
    rows = torch.zeros(num_experts, device=token.device).scatter_add_(0, chosen.reshape(-1), token.repeat_interleave(top_k))
    sums = total(torch.cat((rows, (probability.float() * token.unsqueeze(-1)).sum(0), token.sum().view(1))))
    rows, probabilities, tokens = sums.split((num_experts, num_experts, 1))
    return (rows / tokens * probabilities / tokens).sum() * num_experts


@cache
def _is_equivalent(theirs: Callable) -> bool:
    """Does ``theirs`` compute what ``load_balancing_loss`` does? Compared on random logits, with and without padding."""
    generator = torch.Generator().manual_seed(0)
    logits = tuple(torch.randn(12, 6, generator=generator) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    try:
        return all(torch.allclose(theirs(logits, 6, 3, m), load_balancing_loss(logits, 6, 3, m)) for m in (None, mask))
    except Exception:  # another signature
        return False


@contextmanager
def over_all_ranks(model: Any, mean_of_ranks: bool) -> Iterator[None]:
    """Within: the model's forward computes its auxiliary loss over the tokens of all ranks.

    ``mean_of_ranks``: see :func:`gradient_scale`. A family with another loss keeps it, on each rank's own tokens.
    """
    scale = gradient_scale(mean_of_ranks)

    def ours(gate_logits: Any, num_experts: Any = None, top_k: Any = 2, attention_mask: Any = None) -> Any:
        return load_balancing_loss(
            gate_logits, num_experts, top_k, attention_mask, total=lambda x: SumOverRanks.apply(x, scale)
        )

    with _replaced(model, lambda theirs: ours):
        yield


@contextmanager
def by_kernel(model: Any, kernel: Callable[[Tensor, int], Tensor]) -> Iterator[None]:
    """Within: the model's forward computes its auxiliary loss by a kernel of ``moefx.load_balancing_loss``.

    With padding, or on another device than CUDA, the model's own function is called.
    """

    def instead_of(theirs: Callable) -> Callable:
        def ours(gate_logits: Any, num_experts: Any = None, top_k: Any = 2, attention_mask: Any = None) -> Any:
            if attention_mask is not None or not isinstance(gate_logits, tuple) or not all(map(_served, gate_logits)):
                return theirs(gate_logits, num_experts, top_k, attention_mask)
            return kernel(torch.cat(gate_logits), top_k)

        return ours

    with _replaced(model, instead_of):
        yield


def _served(logits: Tensor) -> bool:
    return logits.is_cuda and logits.numel() > 0


@contextmanager
def _replaced(model: Any, instead_of: Callable[[Callable], Callable]) -> Iterator[None]:
    """Within: the model's family calls ``instead_of(its function)``, if that function is equivalent to this file's."""
    name = transformers_patches.LOAD_BALANCING_LOSS
    modules = [sys.modules[c.__module__] for c in type(model).__mro__]  # FSDP's and moefx's classes come first
    module = next((m for m in modules if hasattr(m, name)), None)
    if module is None or not _is_equivalent(inspect.unwrap(getattr(module, name))):
        yield
        return
    patch = transformers_patches.load_balancing_loss(module)
    with patch.by(lambda theirs, *args, **kwargs: instead_of(theirs)(*args, **kwargs)):
        yield
