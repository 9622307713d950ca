"""How a module of Transformers' experts interface lays out its parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moefx.integrations import peft as adapters


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
        """The names of the module's parameters."""
        names = [self.up, self.down]
        return names + [f"{n}_bias" for n in names] if self.biased else names

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of ``moefx.experts``."""
        return {
            "activation": self.activation,
            "alpha": self.alpha,
            "limit": self.limit,
            "transposed": self.transposed,
            "interleaved": self.interleaved,
        }

    def weights(self, module: nn.Module) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """The module's weights and biases, with the updates of LoRA adapters."""
        up, down = adapters.weight(module, self.up), adapters.weight(module, self.down)
        if not self.biased:
            return up, None, down, None
        return up, adapters.weight(module, f"{self.up}_bias"), down, adapters.weight(module, f"{self.down}_bias")
