"""Where a model's blocks are now: layers are added, removed and exchanged after ``optimize``."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedModel

from moefx.frontend.module_state import foreign_hooks
from moefx.integrations import transformers as hf

if TYPE_CHECKING:
    from moefx.runtime.block import BlockForward
    from moefx.runtime.router_state import RouterState


class Blocks:
    """The blocks of one model, each told its path and the state of the model's routers."""

    def __init__(self) -> None:
        #: of the modules above the blocks: the path if it is a list, the children, and what these were
        self._above: list[tuple[str | None, dict[str, nn.Module | None], list[weakref.ref | None]]] = []
        self.share_cache = False  #: does a block of a step read what another one wrote to the cache in that step?

    def update(self, model: nn.Module, router_state: RouterState) -> list[str] | None:
        """Looks for the blocks if the modules above them have other children than before.

        Returns:
            None if they have not, else the paths of new layers that are no blocks, beside others that are.
        """
        if self._above and all(_are(children, before) for _, children, before in self._above):
            return None
        found = list(blocks_of(model))
        for path, _, block in found:
            block.path, block.router_state = path, router_state
        added = [
            f"{path}.{name}"
            for path, children, before in self._above
            for name, m in children.items()
            if path is not None
            and m is not None
            and not any(r is not None and r() is m for r in before)
            and not any(blocks_of(m))
        ]
        above = dict.fromkeys(path.rpartition(".")[0] for path, _, _ in found)
        for path in [*above]:
            while path:
                path = path.rpartition(".")[0]
                above[path] = None
        modules = [(path, model.get_submodule(path)) for path in above]
        self._above = [
            (
                path if isinstance(m, nn.ModuleList) else None,
                m._modules,
                [None if child is None else weakref.ref(child) for child in m._modules.values()],
            )
            for path, m in modules
        ]
        self.share_cache = hf.share_cache(model)
        return added


def _are(children: dict[str, nn.Module | None], before: list[weakref.ref | None]) -> bool:
    return len(children) == len(before) and all(m is (r and r()) for m, r in zip(children.values(), before, strict=True))


def blocks_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, BlockForward]]:
    """(path, module, its block's forward) in the order of the model."""
    for path, module in model.named_modules():
        block = vars(module).get("_moefx_forward")
        if block is not None:
            yield path, module, block


def masks_are_seen(model: nn.Module) -> bool:
    """Does a hook of the user, or a ``forward`` set by the user, see the masks that a layer of the model is called with?"""
    return any("forward" in vars(m) or not all(backward for _, backward in foreign_hooks(m)) for m in _layers(model))


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    for m in model._modules.values():
        if isinstance(m, nn.ModuleList):
            yield from (layer for layer in m._modules.values() if layer is not None)
        elif isinstance(m, PreTrainedModel):
            yield from _layers(m)
