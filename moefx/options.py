"""The options of ``optimize``, checked once, before the model is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moefx.errors import MoefxError
from moefx.ir.plan import Tune

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from moefx.backends import Backend
    from moefx.rewriting.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of :func:`moefx.optimize`, which documents them. Raises MoefxError if one is not valid."""

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
            raise MoefxError(f"dispatch_capacity={capacity!r} is not a number of tokens: pass the maximum per rank, or 0")
        if dtype not in (None, "fp8"):
            raise MoefxError(f'dispatch_dtype={dtype!r} is not supported: pass "fp8", or None for the dtype of the model')
        Tune.of(self.tune)
        names = getattr(self.mesh, "mesh_dim_names", None) or ()
        if "efsdp" in names:
            raise MoefxError(
                f'the mesh has the dimensions {names}; "efsdp" shards the dense parameters too, which optimize does not do: '
                "call moefx.parallelize(model, ep_size=..., dp_replicate=...), which makes its own meshes"
            )
