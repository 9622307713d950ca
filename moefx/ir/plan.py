"""What the caller asked for, checked once before anything is touched, and the plan that passes read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moefx.errors import MoefxError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from moefx.backends import Backend
    from moefx.rewriting.pipeline import Pipeline


@dataclass(frozen=True)
class Tune:
    """Sequences and tokens a sequence of a rank's micro-batch, in training."""

    batch: int = 1
    sequence: int = 4096

    @staticmethod
    def of(given: Any) -> Tune | None:
        """From ``optimize``'s argument; raises MoefxError if it is none."""
        if isinstance(given, bool):
            return Tune() if given else None
        if isinstance(given, (tuple, list)) and len(given) == 2 and all(type(n) is int and n > 0 for n in given):
            return Tune(*given)
        raise MoefxError(f"tune={given!r} is not a size: pass (sequences, tokens a sequence) of a rank's micro-batch, or True")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of :func:`moefx.optimize`, which says what each means. Raises MoefxError for values that mean nothing."""

    ep_size: int = 1
    mesh: DeviceMesh | None = None
    example: Mapping[str, Any] | None = None
    pipeline: Pipeline | None = None
    backends: Sequence[str | Backend] | None = None
    compile: bool | str = True
    strict: bool = False
    verify: bool = False
    router_z_loss: float = 0.0
    balanced_routing: bool = False
    check_numerics: bool = False
    dispatch_capacity: int = 0
    tune: bool | tuple[int, int] = False
    dispatch_dtype: str | None = None

    def __post_init__(self) -> None:
        z, capacity, dtype = self.router_z_loss, self.dispatch_capacity, self.dispatch_dtype
        if not isinstance(z, (int, float)) or not 0 <= z < float("inf"):
            raise MoefxError(f"router_z_loss={z!r} is not a coefficient: pass a number of 0 or more (1e-3 is usual)")
        if not isinstance(capacity, int) or capacity < 0:
            raise MoefxError(f"dispatch_capacity={capacity!r} is not a number of tokens: pass the most that a rank has, or 0")
        if dtype not in (None, "fp8"):
            raise MoefxError(f'dispatch_dtype={dtype!r} is not known: pass "fp8", or None for the dtype of the model')
        Tune.of(self.tune)
        names = getattr(self.mesh, "mesh_dim_names", None) or ()
        if "efsdp" in names:
            raise MoefxError(
                f'the mesh has the dimensions {names}; "efsdp" spreads the dense parameters too, which optimize does not: '
                "call moefx.parallelize(model, ep_size=..., dp_replicate=...), which makes its own meshes"
            )


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
