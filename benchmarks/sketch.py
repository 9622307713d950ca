"""Gradients of a model that is spread over ranks, small enough to keep: to compare contenders that cut it differently.

A parameter's gradient is seen as a matrix g [rows, n]: its last dimensions, as many as give :data:`LEAST` numbers, are n. The
sketch is ``signs @ g`` [DRAWS, n] with random signs [DRAWS, rows], independent and of mean 0, so that E |s|^2 = DRAWS |g|^2; and
it is linear, so |s_a - s_b| estimates the distance of two gradients. How well depends on these: a difference of full rank is known
within 1 / sqrt(2 WIDTH DRAWS), one of rank 1 (a few tokens that went elsewhere) within 1 / sqrt(2 DRAWS), since all its columns are
multiples of one random number in each draw. (AMS sketch: Alon, Matias, Szegedy, "The space complexity of approximating the
frequency moments", 1996.) The signs depend on the parameter's name and the row, not on who holds it: each rank adds up its own
rows, one all-reduce adds up the ranks. Columns are then added up to :data:`WIDTH` of them, with signs of their own: what is kept
of a model is a few MB. Smaller parameters are kept whole.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moefx.integrations import fsdp

LEAST = 1024
DRAWS = 32
WIDTH = 256


def cut(shape: tuple[int, ...]) -> int:
    """The dimension where the rows of a tensor end and what is kept of each begins."""
    fits = [d for d in range(len(shape)) if math.prod(shape[d:]) >= LEAST]
    return max(fits, default=0)


def signs(name: str, rows: tuple[int, ...], device: torch.device, draws: int = DRAWS) -> Tensor:
    """+1 or -1 for each row of a parameter, int8 [draws, *rows]; the same on all devices of a kind."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.randint(0, 2, (draws, *rows), generator=generator, dtype=torch.int8, device=device) * 2 - 1


def part(name: str, local: Tensor, where: tuple[slice, ...], shape: tuple[int, ...], draws: int = DRAWS) -> Tensor:
    """The sketch of the part of a tensor of ``shape`` that lies at ``where``, float32; 0 where others have to add theirs."""
    d = cut(shape)
    out = torch.zeros((draws, *shape[d:]) if d else shape, device=local.device)
    if not local.numel():
        return out.new_zeros(draws * WIDTH) if d else out.flatten()
    if not d:
        out[where] = local.float()
        return out.flatten()
    mine = signs(name, shape[:d], local.device, draws)[(slice(None), *where[:d])].reshape(draws, -1)
    flat = local.reshape(mine.shape[1], -1)
    total = torch.zeros(draws, flat.shape[1], device=local.device)
    for some, sign in zip(flat.split(2**14), mine.split(2**14, dim=1)):  # no second copy of all experts in float32
        total += sign.float() @ some.float()
    out[(slice(None), *where[d:])] = total.view(draws, *local.shape[d:])
    out = out.flatten(1) * signs(f"columns of {name}", (out[0].numel(),), local.device, draws)
    return nn.functional.pad(out, (0, -out.shape[1] % WIDTH)).view(draws, -1, WIDTH).sum(1).flatten()


def _part(name: str, tensor: Tensor, draws: int = DRAWS) -> Tensor:
    """What this rank has to add: a DTensor's parts are each held once, anything else whole and the same everywhere."""
    if isinstance(tensor, DTensor):
        return part(name, tensor.to_local(), fsdp.local_slices(tensor), tuple(tensor.shape), draws)
    whole = tuple(slice(0, n) for n in tensor.shape)
    return part(name, tensor, whole, tuple(tensor.shape), draws) / dist.get_world_size()


def _square(tensor: Tensor) -> Tensor:
    """This rank's share of the sum of squares."""
    local, shares = (tensor.to_local(), 1) if isinstance(tensor, DTensor) else (tensor, dist.get_world_size())
    return local.float().square().sum(dtype=torch.float64) / shares


def _added(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    flat = torch.cat(list(parts.values()))
    dist.all_reduce(flat)
    return dict(zip(parts, flat.cpu().split([len(s) for s in parts.values()])))


def sketch(model: nn.Module, of: Callable[[Any], Tensor | None], draws: int = DRAWS) -> dict[str, Tensor]:
    """By parameter, the sketch of the whole tensor ``of(parameter)``, float32 on the CPU; the same on all ranks.

    A parameter without one (None) has the sketch of zeros.
    """
    found = ((name, of(p), p) for name, p in model.named_parameters())
    return _added({name: _part(name, torch.zeros_like(p) if t is None else t, draws) for name, t, p in found})


def norm(model: nn.Module) -> float:
    """The L2 norm of all gradients of all ranks."""
    square = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
    for p in model.parameters():
        if p.grad is not None:
            square += _square(p.grad)
    dist.all_reduce(square)
    return float(square.sqrt())


class Arriving:
    """Sketches gradients as the backward brings them, and drops them: a reference in fp32 then has room for its weights alone.

    Used around one backward; afterwards :meth:`sketch` and :meth:`norm` say what those of this module would have said.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.parts: dict[str, Tensor] = {}
        self.square = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)

    def __enter__(self) -> Arriving:
        self.hooks = [p.register_post_accumulate_grad_hook(partial(self._arrived, n)) for n, p in self.model.named_parameters()]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _arrived(self, name: str, p: Tensor) -> None:
        assert p.grad is not None and name not in self.parts, f"{name}: one gradient a backward"
        self.parts[name] = _part(name, p.grad)
        self.square += _square(p.grad)
        p.grad = None

    def sketch(self) -> dict[str, Tensor]:
        names = dict(self.model.named_parameters())
        return _added({n: self.parts[n] if n in self.parts else _part(n, torch.zeros_like(p)) for n, p in names.items()})

    def norm(self) -> float:
        dist.all_reduce(self.square)
        return float(self.square.sqrt())
