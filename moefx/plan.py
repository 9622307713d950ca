"""What the caller decided, checked once before anything is touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .backends import Backend
    from .tuning import Tune


@dataclass(frozen=True)
class Plan:
    """Read by passes: ``ep_size`` ranks hold the experts, ``ep_group`` names their process group."""

    backends: tuple[Backend, ...]
    ep_size: int = 1
    ep_group: str = ""
    ep_rank: int = 0  #: this rank's place in the group
    mesh: DeviceMesh | None = None  #: one dimension "ep", or "dp_replicate" and "ep"
    compile: bool | str = True
    strict: bool = False
    experts_gradient_scale: float = 1.0  #: makes the experts' gradients the mean over all ranks' tokens
    balanced_routing: bool = False  #: every expert gets the same number of tokens: for benchmarks only
    router_z_loss: float = 0.0
    check_numerics: bool = False
    dispatch_capacity: int = 0  #: the most tokens that a rank ever has: the host need not ask how many; 0: it asks
    tune: Tune | None = None  #: choose between kernels by their times at this size; None: by the order of the backends
    dispatch_dtype: str = ""  #: "fp8": tokens are quantized to be sent to their experts' ranks; numerics change
