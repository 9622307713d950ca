"""The tensors of experts: matrices, biases, and low-rank updates of the matrices that stay factors."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from moefx.errors import MoefxError


class LowRank(NamedTuple):
    """An update of experts' matrices: h = x W' + (x A') B' in place of h = x (W + B A)' (LoRA, arXiv 2106.09685).

    The scale of an adapter is part of B, and several adapters stand one after the other along the rank: their sum.
    """

    a: Tensor  #: [E, r, in]
    b: Tensor  #: [E, out, r]

    def padded(self, multiple: int) -> LowRank:
        """The same with zeros up to a rank that is a multiple of ``multiple``."""
        missing = -self.a.shape[1] % multiple
        return LowRank(F.pad(self.a, (0, 0, 0, missing)), F.pad(self.b, (0, missing))) if missing else self


class ExpertWeights(NamedTuple):
    """Those of ``moefx.experts`` and ``moefx.grouped_mlp``, in the order of their arguments."""

    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    gate_up_lora_a: Tensor | None = None
    gate_up_lora_b: Tensor | None = None
    down_lora_a: Tensor | None = None
    down_lora_b: Tensor | None = None

    @property
    def gate_up_lora(self) -> LowRank | None:
        """The update of gate_up."""
        return _low_rank("gate_up", self.gate_up_lora_a, self.gate_up_lora_b)

    @property
    def down_lora(self) -> LowRank | None:
        """The update of down."""
        return _low_rank("down", self.down_lora_a, self.down_lora_b)

    def padded(self, multiple: int) -> ExpertWeights:
        """The same with updates of ranks that are multiples of ``multiple``."""
        updates = [None if u is None else u.padded(multiple) for u in (self.gate_up_lora, self.down_lora)]
        return ExpertWeights(*self[:4], *[t for u in updates for t in (u or (None, None))])


def _low_rank(name: str, a: Tensor | None, b: Tensor | None) -> LowRank | None:
    if a is None and b is None:
        return None
    if a is None or b is None:
        given, missing = ("lora_a", "lora_b") if b is None else ("lora_b", "lora_a")
        raise MoefxError(f"{name}_{given} is given without {name}_{missing}: pass both factors of the update, or none")
    if a.shape[0] != b.shape[0] or a.shape[1] != b.shape[2]:
        raise MoefxError(
            f"{name}_lora_a is {tuple(a.shape)} and {name}_lora_b {tuple(b.shape)}: pass [E, r, in] and [E, out, r], with the "
            "same E and r"
        )
    return LowRank(a, b)
