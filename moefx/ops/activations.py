"""What an expert applies between its two projections: each activation with its derivative, written out.

The derivatives are explicit because they run inside opaque operations, where autograd does not record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moefx.ops.registry import op


def split(h: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Gate and up halves of h [..., 2I]: one after the other, or alternating."""
    if interleaved:
        return h[..., ::2], h[..., 1::2]
    gate, up = h.chunk(2, dim=-1)
    return gate, up


def join(gate: Tensor, up: Tensor, interleaved: bool) -> Tensor:
    """The inverse of :func:`split`."""
    if interleaved:
        return torch.stack((gate, up), dim=-1).flatten(-2)
    return torch.cat((gate, up), dim=-1)


@dataclass(frozen=True)
class Activation:
    """``forward(h, alpha, limit, interleaved) -> a`` and ``backward(h, grad_a, alpha, limit, interleaved) -> grad_h``.

    h [R, 2I] if ``gated``, else [R, I]; a [R, I]. ``alpha`` and ``limit`` are read by those that have them.
    """

    name: str
    gated: bool
    forward: Callable[[Tensor, float, float, bool], Tensor]
    backward: Callable[[Tensor, Tensor, float, float, bool], Tensor]


def _gated(name: str, act: Callable[[Tensor], Tensor], derivative: Callable[[Tensor, Tensor], Tensor]) -> Activation:
    """``act(gate) * up``; ``derivative(grad, gate)`` is grad times act's derivative."""

    def forward(h: Tensor, alpha: float, limit: float, interleaved: bool) -> Tensor:
        gate, up = split(h, interleaved)
        return act(gate) * up

    def backward(h: Tensor, grad: Tensor, alpha: float, limit: float, interleaved: bool) -> Tensor:
        gate, up = split(h, interleaved)
        return join(derivative(grad * up, gate), grad * act(gate), interleaved)

    return Activation(name, True, forward, backward)


def _plain(name: str, act: Callable[[Tensor], Tensor], derivative: Callable[[Tensor, Tensor], Tensor]) -> Activation:
    return Activation(name, False, lambda h, a, limit, i: act(h), lambda h, grad, a, limit, i: derivative(grad, h))


def _silu_derivative(grad: Tensor, x: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(x)
    return grad * (sigmoid * (1 + x * (1 - sigmoid)))


def _relu_derivative(grad: Tensor, x: Tensor) -> Tensor:
    return grad * (x > 0)


def _gelu(approximate: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    def derivative(grad: Tensor, x: Tensor) -> Tensor:
        return torch.ops.aten.gelu_backward(grad, x, approximate=approximate)

    return lambda x: F.gelu(x, approximate=approximate), derivative


def _clamped_forward(h: Tensor, alpha: float, limit: float, interleaved: bool) -> Tensor:
    gate, up = split(h, interleaved)
    return F.silu(gate.clamp(max=limit)) * up.clamp(min=-limit, max=limit)


def _clamped_backward(h: Tensor, grad: Tensor, alpha: float, limit: float, interleaved: bool) -> Tensor:
    gate, up = split(h, interleaved)
    low, mid = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    to_gate = _silu_derivative(grad * mid, low) * (gate <= limit)
    return join(to_gate, grad * F.silu(low) * (up.abs() <= limit), interleaved)


def _oai_forward(h: Tensor, alpha: float, limit: float, interleaved: bool) -> Tensor:
    gate, up = split(h, interleaved)
    gate, up = gate.clamp(min=None, max=limit), up.clamp(min=-limit, max=limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


def _oai_backward(h: Tensor, grad: Tensor, alpha: float, limit: float, interleaved: bool) -> Tensor:
    gate, up = split(h, interleaved)
    low, mid = gate.clamp(min=None, max=limit), up.clamp(min=-limit, max=limit)
    sigmoid = torch.sigmoid(low * alpha)
    to_gate = grad * (mid + 1) * (sigmoid * (1 + alpha * low * (1 - sigmoid))) * (gate <= limit)
    return join(to_gate, grad * (low * sigmoid) * (up.abs() <= limit), interleaved)


def _softcapped(h: Tensor, alpha: float, limit: float, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    """tanh of the gate by its cap and of up by its own, and the gate's sigmoid, in fp32 at least, as the model has them."""
    gate, up = split(h.float() if h.dtype.itemsize < 4 else h, interleaved)
    return torch.tanh(gate / alpha), torch.tanh(up / limit), torch.sigmoid(gate)


def _softcapped_forward(h: Tensor, alpha: float, limit: float, interleaved: bool) -> Tensor:
    if not alpha or not limit:
        raise ValueError(f"softcapped_swiglu divides by its caps, they are {alpha} and {limit}: give both")
    low, mid, sigmoid = _softcapped(h, alpha, limit, interleaved)
    return (low * alpha * sigmoid * (mid * limit)).to(h.dtype)


def _softcapped_backward(h: Tensor, grad: Tensor, alpha: float, limit: float, interleaved: bool) -> Tensor:
    low, mid, sigmoid = _softcapped(h, alpha, limit, interleaved)
    to_gate = grad * (mid * limit) * sigmoid * (1 - low * low + alpha * low * (1 - sigmoid))
    return join(to_gate, grad * (alpha * low * sigmoid) * (1 - mid * mid), interleaved).to(h.dtype)


#: By name. Gated: SwiGLU and its clamped forms (DeepSeek-V4; GPT-OSS's "oai", with alpha), SwiGLU between the caps alpha of the
#: gate and limit of up (Inkling 2), GeGLU; ungated: relu2 (Nemotron).
ACTIVATIONS: dict[str, Activation] = {
    a.name: a
    for a in (
        _gated("swiglu", F.silu, _silu_derivative),
        _gated("geglu_tanh", *_gelu("tanh")),
        _gated("geglu", *_gelu("none")),
        _gated("reglu", F.relu, _relu_derivative),
        Activation("clamped_swiglu", True, _clamped_forward, _clamped_backward),
        Activation("oai_swiglu", True, _oai_forward, _oai_backward),
        Activation("softcapped_swiglu", True, _softcapped_forward, _softcapped_backward),
        _plain("relu2", lambda x: torch.square(F.relu(x)), lambda grad, x: grad * (2 * F.relu(x))),
        _plain("silu", F.silu, _silu_derivative),
        _plain("gelu", *_gelu("none")),
        _plain("gelu_tanh", *_gelu("tanh")),
        _plain("relu", F.relu, _relu_derivative),
    )
}


@op("swiglu(Tensor gate, Tensor up) -> Tensor")
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` (arXiv 2002.05202), elementwise."""
    return F.silu(gate) * up
