"""The fa4 backend: causal attention by FlashAttention 4 (flash-attn-4, CuTe DSL), on Hopper.

On an H200 it takes 0.98 and 2.73 ms forward and backward where cuDNN takes 1.02 and 3.22 (four sequences of 4,096 tokens, 32
heads of 128 numbers, 4 of keys), 1.20 and 3.14 instead of 1.33 and 3.80 (64 heads of 64, 8 of keys).
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version
from torch import Tensor, fx

from moefx import ops
from moefx.backends import Backend, Kernel
from moefx.backends.torch import by_position, refuses_flash
from moefx.ir.graph import arguments, value
from moefx.kernels import attention as flash
from moefx.kernels.requirements import requires
from moefx.ops import AttentionSpec, takes_spec

#: The first version whose results were compared with float32's.
LEAST = "4.0.0b36"
#: (D, Dv) of the heads that were timed, and whose results and gradients were compared with float32
#: (tests/gpu/test_attention.py). With 80 numbers 4.0.0b36 gives wrong gradients of q.
SIZES = ((64, 64), (128, 128), (192, 128))


@takes_spec
def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, *, spec: AttentionSpec) -> Tensor:
    """The kernel of ``moefx.attention`` by FlashAttention 4."""
    return flash.flash_attention(*map(by_position, (q, k, v)), sinks, spec.scale, spec.window, None, "fa4")[0]


def _refuses(node: fx.Node) -> str | None:
    given = arguments(node)
    q, k, v = (value(given[name]) for name in "qkv")
    if given["mask"] is not None or not given["is_causal"]:
        return f"FlashAttention 4 is used for causal attention without a mask, is_causal is {given['is_causal']}, the mask " + (
            "None" if given["mask"] is None else "a tensor"
        )
    if given["softcap"]:
        return f"FlashAttention 4 is used without a softcap, this attention has {given['softcap']}"
    if str(q.shape[2]) != str(k.shape[2]):
        return f"FlashAttention 4 is used with one length, q has {q.shape[2]}, k {k.shape[2]}"
    if (q.shape[3], v.shape[3]) not in SIZES:
        known = ", ".join(f"{size} ({of_values})" for size, of_values in SIZES)
        return f"FlashAttention 4 is used with heads of {known} numbers, these have {q.shape[3]} ({v.shape[3]})"
    if q.shape[3] != v.shape[3] and q.shape[1] != k.shape[1]:
        return (
            f"FlashAttention 4's backward wants one size where heads share keys: {q.shape[1]} of {q.shape[3]} numbers share "
            f"{k.shape[1]}, whose values have {v.shape[3]}"
        )
    if flash.is_short(given["window"], q.shape[3]):
        return f"moefx's own kernels are faster with a window of {given['window']} keys of {q.shape[3]} numbers"
    if flash.another_is_registered():
        return "an implementation that was registered with torch.nn.attention.activate_flash_attention_impl goes first"
    return refuses_flash(q, q, given["dropout"])


_INSTALL = "pip install 'moefx[fa4]'"
_of_machine = requires("cutlass", package="nvidia-cutlass-dsl, which flash-attn-4 needs,", install=_INSTALL, measured=9)


def _available() -> str | None:
    # by its metadata: looking for the module would import FlashAttention 2 where that is installed
    try:
        have = version("flash-attn-4")
    except PackageNotFoundError:
        return f"the package flash-attn-4 is not installed: {_INSTALL}"
    if Version(have) < Version(LEAST):
        return f"flash-attn-4 {have} is installed, {LEAST} or newer is needed: {_INSTALL}"
    return _of_machine()


BACKEND = Backend("fa4", {ops.attention: Kernel(attention, _refuses, "FlashAttention 4")}, _available)
