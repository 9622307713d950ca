"""Why torch.export failed, in one sentence about the sizes, arguments and lines of the module.

The message of torch.export, several lines about symbols and environment variables, is kept in ``CaptureError.detail``. Its kind
is recognized by the wording of torch 2.13; with another wording the general last sentence is used.
"""

from __future__ import annotations

import linecache
import re
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten

from moefx.errors import CaptureError
from moefx.frontend.readings import Sizes

_LENGTHS = {"a": "the batch size", "b": "the sequence length"}
_SIZE = re.compile(r"\[(\d+)\]\.(?:size\(\)|shape)\[(\d+)\]")
_OURS = ("torch", "moefx", "sympy")


def untraceable(error: BaseException, names: Mapping[int, str], sizes: Sequence[Sizes]) -> CaptureError:
    """The CaptureError for ``error`` of an export. ``names``, ``sizes``: of the tensors of the module's call."""
    detail = f"{type(error).__name__}: {error}"
    where = _where(error)
    kind, text = type(error).__name__, str(error)
    constants = [(int(i), int(at)) for i, at in _SIZE.findall(text)] if "onstraint" in text else []
    known = [(i, at) for i, at in dict.fromkeys(constants) if i < len(sizes) and at < len(sizes[i])]
    if "ata-dependent" in text or "DataDependent" in kind:
        reason = f"its control flow depends on values of its tensors, not only on their sizes (data-dependent){where}"
    elif known:
        of = " and ".join(dict.fromkeys(_of(i, at, names, sizes) for i, at in known))
        reason = f"its graph would hold for one value only of {of}"
    elif re.search(r"match|broadcast|invalid for input of size|shapes? cannot|size mismatch", text):
        reason = f"sizes do not fit together{where}, called with {_shapes(names, sizes)}"
    else:
        reason = f"torch.export cannot follow it{where} ({kind})"
    return CaptureError(reason, detail)


def _of(i: int, at: int, names: Mapping[int, str], sizes: Sequence[Sizes]) -> str:
    counted = _LENGTHS.get(str(sizes[i][at]), "a size")
    return f"{counted} (dimension {at} of {names.get(i, f'tensor {i}')})"


def _shapes(names: Mapping[int, str], sizes: Sequence[Sizes]) -> str:
    letters = {"a": "B", "b": "S", "ab": "B*S"}
    return ", ".join(
        f"{names.get(i, f'tensor {i}')} [{', '.join(letters.get(str(n), str(n)) for n in s)}]" for i, s in enumerate(sizes)
    )


def _where(error: BaseException) -> str:
    """The last line of the traceback that is neither PyTorch's nor moefx's, as " at file:line"."""
    found = ""
    seen: BaseException | None = error
    while seen is not None and not found:
        for frame, line in traceback.walk_tb(seen.__traceback__):
            written = not frame.f_code.co_filename.startswith("<")
            if written and frame.f_globals.get("__name__", "").partition(".")[0] not in _OURS:
                file = frame.f_code.co_filename
                code = shorten(linecache.getline(file, line), 80, placeholder=" ...")
                found = f" at {Path(file).name}:{line}" + (f", `{code}`" if code else "")
        seen = seen.__cause__ or seen.__context__
    return found
