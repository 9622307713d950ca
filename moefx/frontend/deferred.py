"""Deferred operations: the modes they must run in, and whether the tensors they will read are still what they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Modes:
    """The modes of autograd and autocast in which an operation runs."""

    grad: bool
    inference: bool
    autocast: tuple[bool, torch.dtype] | None  #: enabled, dtype; None: there is no autocast for the device
    cache: bool  #: of autocast

    @staticmethod
    def now(device: torch.device) -> Modes:
        """The modes of this thread."""
        kind = device.type
        there = torch.amp.is_autocast_available(kind)
        autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) if there else None
        return Modes(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, torch.is_autocast_cache_enabled())

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Context with these modes."""
        # inference_mode(False) switches gradients on, and inference_mode(True) off: the grad mode comes after it
        with torch.inference_mode(self.inference), torch.set_grad_enabled(self.grad):
            if self.autocast is None:
                yield
                return
            enabled, dtype = self.autocast
            with torch.autocast(device.type, dtype=dtype, enabled=enabled, cache_enabled=self.cache):
                yield

    def dtype_of(self, hidden: Tensor) -> torch.dtype:
        """The dtype of a linear layer's output for ``hidden``: autocast takes all floats but float64."""
        enabled, dtype = self.autocast or (False, hidden.dtype)
        return dtype if enabled and hidden.dtype != torch.float64 else hidden.dtype


class Stamp:
    """What tells whether a tensor still has the numbers that it had, as far as PyTorch lets one see."""

    def __init__(self, tensor: Tensor, checked: bool):
        """``checked``: compare the numbers too. Fused optimizers, and all that writes into ``.data``, change no version."""
        self.tensor, self.version, self.place = tensor, _version(tensor), _place(tensor)
        self.dtype, self.requires_grad = tensor.dtype, tensor.requires_grad
        self.sum = _sum_of_bits(tensor) if checked else None

    def change(self) -> str | None:
        """What has happened to the tensor since; None if it is as it was."""
        now = self.tensor
        if self.version != _version(now):
            return f"was changed in place (version {_version(now)}, it was {self.version})"
        if now.dtype != self.dtype:
            return f"was cast to {now.dtype} from {self.dtype}"
        if self.place != _place(now):
            return "was given other data"
        if self.requires_grad and not now.requires_grad:
            return "was frozen"
        if self.sum is not None and not _is_recording() and not torch.equal(self.sum, _sum_of_bits(now)):  # type: ignore[arg-type]
            return "was changed through .data or by a fused optimizer"
        return None


def _version(t: Tensor) -> int | None:
    return None if t.is_inference() else t._version


def _place(t: Tensor) -> tuple[torch.device, int] | None:
    return None if t.is_meta or isinstance(t, DTensor) else (t.device, t.data_ptr())


def _is_recording() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _sum_of_bits(t: Tensor) -> Tensor | None:
    """The sum of a tensor's bits as integers, exact in any order. None for a tensor without data of its own."""
    if t.is_meta or isinstance(t, DTensor) or _is_recording():
        return None
    with torch.no_grad():
        bits = t.detach()
        if bits.is_contiguous() and bits.shape[-1] * bits.itemsize % 8 == 0 and bits.data_ptr() % 8 == 0:
            return bits.view(torch.int64).sum()  # many times quicker than a sum that widens
        size = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.itemsize]
        return bits.view(size).sum(dtype=torch.int64)
