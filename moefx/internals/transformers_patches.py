"""What moefx replaces in Transformers, all of it: the versions in which each was seen to work, the symptom when it breaks."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel, masking_utils
from transformers.core_model_loading import Transpose
from transformers.integrations import hub_kernels
from transformers.integrations.moe import ExpertsInterface
from transformers.utils.generic import GeneralInterface

from moefx.internals.patches import Patch

#: Transformers asks it whether position ids are those of packed sequences.
PACKED_SEQUENCES = Patch(
    masking_utils,
    "find_packed_sequence_indices",
    seen="transformers 5.23 to 5.24",
    symptom="each training step waits for the device once more; a CUDA graph is refused (packing_is_looked_for)",
)

#: Transformers asks it whether to leave kernels of other packages (Mamba's scan, causal convolutions) alone, as in an export.
EXPORTING = Patch(
    hub_kernels,
    "is_torchdynamo_exporting",
    seen="transformers 5.23 to 5.24",
    symptom="optimize of a sharded model with Mamba layers fails in a kernel that reads memory on the meta device",
)


@functools.cache
def load_balancing_loss(modeling: Any) -> Patch:
    """``load_balancing_loss_func`` of the modeling file ``modeling``."""
    return Patch(
        modeling,
        LOAD_BALANCING_LOSS,
        seen="transformers 5.23 to 5.24",
        symptom="under expert parallelism aux_loss is that of each rank's own tokens (global_aux_loss has no effect)",
    )


#: What Transformers' modeling files call their auxiliary loss.
LOAD_BALANCING_LOSS = "load_balancing_loss_func"

# --- interfaces ------------------------------------------------------------------------------------------------------
#
# Models look their implementations up in each call, by the names in their configurations. Asked at the look-up, moefx never
# writes a name of its own there. A model that looks up in another way gets its own attention, in graphs too.


def intercept_attention(found: Callable[[str, Callable], Callable], eager: Callable[[Callable], Callable]) -> None:
    """Makes look-ups in ``AttentionInterface`` return ``found(name, implementation)``, or ``eager(function)`` of a model's own.

    Seen in transformers 5.23 to 5.24. Symptom: reports have no ``attention``, "0 of N" were raised.
    """
    own_get = AttentionInterface.get_interface

    def getitem(self: AttentionInterface, name: str) -> Callable:
        return found(name, GeneralInterface.__getitem__(self, name))

    @functools.wraps(own_get)
    def get_interface(self: AttentionInterface, attn_implementation: str, default: Callable) -> Callable:
        implementation = own_get(self, attn_implementation, default)
        return eager(implementation) if implementation is default else implementation

    AttentionInterface.__getitem__ = getitem  # type: ignore[method-assign]
    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign]


def intercept_experts(forward: Callable) -> None:
    """Gives ``forward``, registered in ``ExpertsInterface``, the forward that the class of the experts has: as ``own``.

    Someone may have replaced the class's forward since, by one that calls this one.

    Seen in transformers 5.23 to 5.24. Symptom: a RecursionError of experts whose class is patched, where no graph covers them.
    """
    own_get = ExpertsInterface.get_interface

    @functools.wraps(own_get)
    def get_interface(self: ExpertsInterface, experts_implementation: str, default: Callable) -> Callable:
        implementation = own_get(self, experts_implementation, default)
        return functools.partial(forward, own=default) if implementation is forward else implementation

    ExpertsInterface.get_interface = get_interface  # type: ignore[method-assign]


def intercept_masks(found: Callable[[str, Callable], Callable]) -> None:
    """Makes look-ups in ``AttentionMaskInterface`` return ``found(name, mask function)``.

    Seen in transformers 5.23 to 5.24. Symptom: graphs take masks as tensors, so attention runs without flash kernels and the
    report lists several kinds of calls a block.
    """

    def getitem(self: AttentionMaskInterface, name: str) -> Callable:
        return found(name, GeneralInterface.__getitem__(self, name))

    AttentionMaskInterface.__getitem__ = getitem  # type: ignore[method-assign]


# --- configurations --------------------------------------------------------------------------------------------------


@contextmanager
def config_reads(seen: Callable[[PreTrainedConfig, str], None]) -> Iterator[None]:
    """Context in which ``seen(config, name)`` is told each attribute that this thread looks up on any configuration.

    Names are those after ``attribute_map``. One thread at a time.

    Seen in transformers 5.23 to 5.24. Symptom: optimize raises CaptureError for every block: reads are not seen.
    """
    here, plain = threading.get_ident(), PreTrainedConfig.__getattribute__

    def __getattribute__(self: PreTrainedConfig, name: str) -> Any:
        if threading.get_ident() == here:
            renamed = plain(self, "attribute_map") if name != "attribute_map" else {}
            seen(self, renamed.get(name, name))
        return plain(self, name)

    PreTrainedConfig.__getattribute__ = __getattribute__  # type: ignore[method-assign]
    try:
        yield
    finally:
        PreTrainedConfig.__getattribute__ = plain  # type: ignore[method-assign]


# --- loading ---------------------------------------------------------------------------------------------------------


@contextmanager
def distributed_loading(prepare: Callable, distribute: Callable, transpose: Callable) -> Iterator[None]:
    """Context, of all threads since the loader has its own, in which ``from_pretrained`` distributes by other functions.

    ``prepare(cls, config, device_map)`` and ``distribute(cls, model, config, meshes)`` stand for ``prepare_distribute_model``
    and ``maybe_distribute_model`` of PreTrainedModel, ``transpose(original)`` for ``Transpose.convert``.

    Seen in transformers 5.23 to 5.24. Symptom: ``parallelize(folder)`` raises MoefxError that Transformers loaded the folder
    "without asking"; or a transposed checkpoint (Qwen3-VL-MoE) raises that a tensor has another shape.
    """
    with ExitStack() as undo:
        for name, ours in (("prepare_distribute_model", prepare), ("maybe_distribute_model", distribute)):
            if name in vars(PreTrainedModel):
                undo.callback(setattr, PreTrainedModel, name, vars(PreTrainedModel)[name])
            else:
                undo.callback(delattr, PreTrainedModel, name)
            setattr(PreTrainedModel, name, classmethod(ours))
        undo.callback(setattr, Transpose, "convert", Transpose.convert)
        Transpose.convert = transpose(Transpose.convert)  # type: ignore[method-assign]
        yield
