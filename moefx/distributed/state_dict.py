"""``model.load_state_dict`` of whole tensors, as a checkpoint in one file has them, into a model that is spread over ranks.

Each rank cuts its parts out of the tensors that it is given, and talks to no other.
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
    """From here on ``load_state_dict`` of ``model``, of what is around it and of its modules takes whole tensors too."""
    cuts = {p: _Cut.of(p) for p in model.parameters() if isinstance(p, DTensor)}
    handles = []
    for module in model.modules():
        # of what is below it too, so that what is refused is refused before anything is loaded
        inside = {n: cuts[p] for n, p in module.named_parameters(remove_duplicate=False) if p in cuts}  # type: ignore[index]
        if inside:
            handles.append(module.register_load_state_dict_pre_hook(_Hook(inside)))
    return handles


@dataclass(frozen=True)
class _Cut:
    """How a parameter is spread. (Not the parameter: FSDP shows whole ones for a while, and the hooks hold no memory.)"""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    part: tuple[slice, ...]

    @classmethod
    def of(cls, p: DTensor) -> _Cut:
        return cls(p.device_mesh, p.placements, p.shape, p.stride(), fsdp.local_slices(p))

    def __call__(self, whole: Tensor) -> DTensor:
        how: dict[str, Any] = {"shape": self.shape, "stride": self.stride}
        return DTensor.from_local(whole[self.part], self.mesh, self.placements, run_check=False, **how)


@dataclass(frozen=True)
class _Hook:
    cuts: dict[str, _Cut]

    def __deepcopy__(self, memo: dict) -> _Hook:
        return self  # a copied model is spread over the same ranks

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], *_: Any) -> None:
        for name, cut in self.cuts.items():
            whole = state_dict.get(prefix + name)
            if not isinstance(whole, Tensor) or isinstance(whole, DTensor) or whole.shape != cut.shape:
                continue  # torch says what is missing or of another shape
            if metadata.get("assign_to_params_buffers"):
                raise MoefxError(
                    f"load_state_dict(assign=True) would put another parameter in the place of {prefix + name}, whose "
                    "gradients are averaged over ranks and which an optimizer may hold: leave assign out"
                )
            state_dict[prefix + name] = cut(whole)
