"""What moefx replaces in PyTorch, all of it: the versions in which each was seen to work, the symptom when it breaks.

``@assumed`` functions beside the uses try the first two in each process, ``dtensor_ops.install`` tries the third.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.function import BackwardCFunction
from torch.distributed.tensor import DTensor

from moefx.internals.patches import Patch

#: C++ makes an instance for each ``Function.apply``, however that was bound (``op = Fn.apply``), before its forward runs, with
#: gradients or without.
AUTOGRAD_FUNCTION = Patch(
    BackwardCFunction,
    "__init__",
    seen="torch 2.11 to 2.14",
    symptom="optimize raises CaptureError for every block: an autograd.Function is not seen",
)

#: Python takes the truth of a symbolic comparison.
SYMBOLIC_TRUTH = Patch(
    torch.SymBool,
    "__bool__",
    seen="torch 2.11 to 2.14",
    symptom="optimize raises CaptureError for every block: a question about a length is not seen",
)

# --- attributes ------------------------------------------------------------------------------------------------------

_GETATTR = nn.Module.__getattr__.__code__


@contextmanager
def module_reads(seen: Callable[[nn.Module, str], None]) -> Iterator[None]:
    """Context in which ``seen(module, name)`` is told each attribute that this thread looks up on any module.

    The name "__dict__" means that Python asked for all attributes at once. Only while the context lasts, as it makes every
    look-up slower: the class gets a ``__getattribute__`` that it otherwise inherits. One thread at a time.

    Seen in torch 2.11 to 2.14. Symptom: optimize raises CaptureError for every block: reads of attributes are not seen.
    """
    here, plain = threading.get_ident(), nn.Module.__getattribute__

    def __getattribute__(self: nn.Module, name: str) -> Any:
        # parameters and submodules are found through __dict__, by name: the name itself was told before
        if threading.get_ident() == here and not (name == "__dict__" and sys._getframe(1).f_code is _GETATTR):
            seen(self, name)
        return plain(self, name)

    nn.Module.__getattribute__ = __getattribute__  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del nn.Module.__getattribute__


# --- fake tensors without a GPU --------------------------------------------------------------------------------------

_guard_lock = threading.Lock()
_guard_thread: threading.Thread | None = None


def keep_fake_device_guard() -> None:
    """Lets threads that end make fake tensors, where PyTorch was built for CUDA and sees no device.

    The first thread that enters a FakeTensorMode there leaves a pointer to an object of its own (``tls_fake_device_guard`` of
    c10/core/impl/DeviceGuardImplInterface.cpp); after its end the next one reads freed memory. So a thread that does not end
    comes first. Seen in torch 2.11, no longer in 2.14. Symptom: ``optimize`` ends in a segmentation fault.
    """
    global _guard_thread
    ensure = getattr(torch._C, "_ensureCUDADeviceGuardSet", None)
    if ensure is None or not torch.backends.cuda.is_built() or torch.cuda.device_count():
        return
    with _guard_lock:
        if _guard_thread is not None:
            return
        done = threading.Event()

        def hold() -> None:
            try:
                ensure()
            finally:
                done.set()
            threading.Event().wait()

        _guard_thread = threading.Thread(target=hold, name="moefx-device-guard", daemon=True)
        _guard_thread.start()
        done.wait()


# --- DTensor ---------------------------------------------------------------------------------------------------------

Handler = Callable[[Any, tuple, dict[str, Any]], Any]

_thread = threading.local()


def extend_dtensor(handlers: Mapping[Any, Handler], set_data: Callable[[DTensor, Any], None]) -> Callable[[], None]:
    """Registers ``handlers`` of operations with DTensor's dispatcher, and ``set_data`` as the setter of ``DTensor.data``.

    Returns what undoes it. Seen in torch 2.11 to 2.13. Symptom: ``optimize`` warns that torch "treats DTensors otherwise than
    moefx knows", and optimizers with ``foreach=True`` fail on parameters of several meshes.

    Raises:
        AttributeError: the dispatcher has no table of handlers.
    """
    dispatcher: Any = DTensor._op_dispatcher
    before, registered = type(dispatcher), dispatcher._custom_op_handlers
    own = dict(registered)

    def undo() -> None:
        dispatcher.__class__ = before
        if "data" in vars(DTensor):
            del DTensor.data
        for op in handlers:
            if op in own:
                registered[op] = own[op]
            else:
                registered.pop(op, None)

    try:
        registered.update(handlers)
        dispatcher.__class__ = _dispatcher(before, handlers, own)
        data: Any = torch._C.TensorBase.data  # the descriptor that all tensors share
        DTensor.data = property(data.__get__, set_data)  # type: ignore[assignment]
    except Exception:
        undo()
        raise
    return undo


def _dispatcher(base: type, handlers: Mapping[Any, Handler], own: Mapping[Any, Handler]) -> type:
    """DTensor's dispatcher, without ``handlers`` within ``dtensors_own_handlers``."""

    class Dispatcher(base):  # type: ignore[misc,valid-type]
        @property
        def _custom_op_handlers(self) -> dict[Any, Handler]:
            registered: dict[Any, Handler] = vars(self)["_custom_op_handlers"]
            if not getattr(_thread, "own_handlers", False):
                return registered
            theirs = {op: handler for op, handler in registered.items() if op not in handlers}
            return {**theirs, **{op: own[op] for op in handlers if op in own}}

        @_custom_op_handlers.setter
        def _custom_op_handlers(self, handlers: dict[Any, Handler]) -> None:
            self.__dict__["_custom_op_handlers"] = handlers

    return Dispatcher


@contextmanager
def dtensors_own_handlers() -> Iterator[None]:
    """Context, of this thread (others may be in the middle of a step), in which DTensor does what it did before."""
    before, _thread.own_handlers = getattr(_thread, "own_handlers", False), True
    try:
        yield
    finally:
        _thread.own_handlers = before
