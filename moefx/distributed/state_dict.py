"""``load_state_dict`` of whole tensors, as a checkpoint file holds them, into a model that is sharded across ranks.

Each rank takes its parts of the tensors that it is given, without communication.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.utils.hooks import RemovableHandle

from moefx.errors import MoefxError
from moefx.integrations import fsdp


def take_whole_tensors(model: nn.Module) -> list[RemovableHandle]:
    """Lets ``load_state_dict`` of ``model``, of modules around it and within it, take whole tensors too."""
    shardings = {p: _Sharding.of(p) for p in model.parameters() if isinstance(p, DTensor)}
    handles = []
    for module in model.modules():
        # with those of its submodules, so that an error is raised before anything is loaded
        inside = {n: shardings[p] for n, p in module.named_parameters(remove_duplicate=False) if p in shardings}  # type: ignore[index]
        if inside:
            handles.append(module.register_load_state_dict_pre_hook(_Hook(inside)))
    return handles


@dataclass(frozen=True)
class _Sharding:
    """How a parameter is sharded. (Not the parameter: FSDP replaces it by the gathered one, and the hooks hold no memory.)"""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    part: tuple[slice, ...]

    @classmethod
    def of(cls, p: DTensor) -> _Sharding:
        return cls(p.device_mesh, p.placements, p.shape, p.stride(), fsdp.local_slices(p))

    def __call__(self, whole: Tensor) -> DTensor:
        how: dict[str, Any] = {"shape": self.shape, "stride": self.stride}
        return DTensor.from_local(whole[self.part], self.mesh, self.placements, run_check=False, **how)


@dataclass(frozen=True)
class _Hook:
    shardings: dict[str, _Sharding]

    def __deepcopy__(self, memo: dict) -> _Hook:
        return self  # a copied model is sharded across the same ranks

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], *_: Any) -> None:
        for name, sharding in self.shardings.items():
            whole = state_dict.get(prefix + name)
            if not isinstance(whole, Tensor) or isinstance(whole, DTensor) or whole.shape != sharding.shape:
                continue  # PyTorch raises for what is missing or of another shape
            if metadata.get("assign_to_params_buffers"):
                raise MoefxError(
                    f"load_state_dict(assign=True) would replace {prefix + name}, whose gradients are averaged over ranks and "
                    "which an optimizer may hold: leave assign out"
                )
            state_dict[prefix + name] = sharding(whole)
