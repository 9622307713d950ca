"""NCCL EP as Transformer Engine's functions describe it, over gloo: what the transport ``te_ep`` is tested against.

The handle holds every rank's routing (what ``ep_prepare`` gathers); all else follows from it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


class StandIn:
    def __init__(self, group: dist.ProcessGroup, experts: int, capacity: int):
        self.group, self.rank, self.ep, self.capacity = group, group.rank(), group.size(), capacity
        self.local = experts // self.ep

    def _gather(self, mine: torch.Tensor, fill: float) -> torch.Tensor:
        """[T, ...] -> [ep, capacity, ...]"""
        padded = mine.new_full((self.capacity, *mine.shape[1:]), fill)
        padded[: mine.shape[0]] = mine
        parts = [torch.empty_like(padded) for _ in range(self.ep)]
        dist.all_gather(parts, padded, group=self.group)
        return torch.stack(parts)

    def ep_handle_mem_size(self, top_k: int, alignment: int) -> int:
        return 8 * self.ep * self.capacity * top_k

    def ep_prepare(self, handle, index, counts, top_k, alignment, total_recv_tokens):
        handle.view(torch.int64).copy_(self._gather(index, -1).reshape(-1))
        local = handle.view(torch.int64) - self.rank * self.local
        counts.copy_(torch.stack([(local == e).sum() for e in range(self.local)]))
        total_recv_tokens.fill_(int(counts.sum()))

    def _rows(self, handle):
        """For each row of this rank, expert by expert: which flattened (rank, token, k) it is."""
        local = handle.view(torch.int64) - self.rank * self.local
        return torch.cat([(local == e).nonzero().flatten() for e in range(self.local)])

    def ep_dispatch(self, handle, index, tokens, weights, got, got_weights):
        at, top_k = self._rows(handle), index.shape[1]
        everyone = self._gather(tokens, 0).flatten(0, 1)
        got.fill_(float("nan")), got_weights.fill_(float("nan"))  # rows after the last mean nothing
        got[: len(at)] = everyone[at // top_k]
        got_weights[: len(at)] = self._gather(weights, 0).reshape(-1)[at]

    def _to_owners(self, handle, rows, width: int):
        """Sums of each (rank, token)'s rows over all ranks; this rank's [capacity, width]."""
        at = self._rows(handle)
        top_k = handle.numel() // 8 // self.ep // self.capacity
        total = torch.zeros(self.ep * self.capacity, width)
        total.index_add_(0, at // top_k, rows[: len(at)].float())
        dist.all_reduce(total, group=self.group)
        return total.view(self.ep, self.capacity, width)[self.rank]

    def ep_combine(self, handle, rows, result):
        result.copy_(self._to_owners(handle, rows, rows.shape[1])[: len(result)])

    def ep_dispatch_bwd(self, handle, grad, grad_weights, to_tokens, to_weights):
        self.ep_combine(handle, grad, to_tokens)
        at = self._rows(handle)
        total = torch.zeros(handle.numel() // 8)
        total[at] = grad_weights[: len(at)]
        dist.all_reduce(total, group=self.group)
        to_weights.copy_(total.view(self.ep, self.capacity, -1)[self.rank][: len(to_weights)])

    def ep_combine_bwd(self, handle, grad, got):
        at = self._rows(handle)
        top_k = handle.numel() // 8 // self.ep // self.capacity
        got.fill_(float("nan"))
        got[: len(at)] = self._gather(grad, 0).flatten(0, 1)[at // top_k]
