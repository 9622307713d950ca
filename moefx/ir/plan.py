"""The plan that passes read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moefx.errors import MoefxError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from moefx.backends import Backend


@dataclass(frozen=True)
class Tune:
    """The size at which kernels are timed: sequences and tokens per sequence of a rank's micro-batch."""

    batch: int = 1
    sequence: int = 4096

    @staticmethod
    def of(given: Any) -> Tune | None:
        """From the argument of ``optimize``. Raises MoefxError if it is not valid."""
        if isinstance(given, bool):
            return Tune() if given else None
        if isinstance(given, (tuple, list)) and len(given) == 2 and all(type(n) is int and n > 0 for n in given):
            return Tune(*given)
        raise MoefxError(
            f"tune={given!r} is not a size: pass (sequences, tokens per sequence) of a rank's micro-batch, or True"
        )


@dataclass(frozen=True)
class Plan:
    """What passes read: how experts are sharded, which kernels may be used, what numerics are asked for."""

    backends: tuple[Backend, ...]
    ep_size: int = 1  #: ranks that share the experts
    ep_group: str = ""  #: the name of their process group
    ep_rank: int = 0  #: this rank in that group
    mesh: DeviceMesh | None = None  #: one dimension "ep", or "dp_replicate" and "ep"
    compile: bool | str = True
    strict: bool = False
    experts_gradient_scale: float = 1.0  #: makes the experts' gradients the mean over all ranks' losses
    balanced_routing: bool = False  #: experts get equal numbers of tokens: for benchmarks only
    router_z_loss: float = 0.0
    check_numerics: bool = False
    dispatch_capacity: int = 0  #: maximum of tokens per rank, so that the CPU never waits for counts; 0: it waits
    tune: Tune | None = None  #: choose kernels by their times at this size; None: by the order of the backends
    dispatch_dtype: str = ""  #: "fp8": tokens are quantized before they are dispatched; numerics change
