"""Readings of a call's sizes: which count the batch, the sequence, their product, or something else.

A number alone does not tell. At batch 1 the labels are [1, S], and so are position ids that all sequences share; a batch of 4
may equal 4 heads. Each reading with which a module exports gives an exact graph. The likely ones come first, so that few
graphs are made.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence, Set

from torch import Tensor

#: A number, or a letter: see :class:`moefx.frontend.call_signature.Call`.
Sizes = tuple[int | str, ...]
#: Letters for the lengths of integer vectors that are neither batch nor sequence: the starts of packed sequences, for instance.
OWN = ("s", "t", "u", "v", "w")
#: At most this many readings of a call are tried. Each that does not export costs about a second.
MOST = 8


def leading(first: Tensor, known: Set[int]) -> Sizes:
    """The sizes of a call's first tensor, with letters for the leading ones.

    From the third on, a size that is in ``known``, the sizes of the module, stays a number: the streams of hyper-connections
    [B, S, streams, H].
    """
    lead = tuple(map(int, first.shape[:-1] if first.dim() > 1 else first.shape))
    names = (x if i < 2 or n not in known else n for i, (x, n) in enumerate(zip("abcdefg", lead)))
    return (*names, *map(int, first.shape[len(lead) :]))


def readings(
    tensors: Sequence[Tensor], known: Set[int], names: Mapping[int, str], before: Mapping[str, Sequence[Sizes]]
) -> Iterator[tuple[Sizes, ...]]:
    """At most ``MOST`` readings, the sizes of each tensor, the likeliest first.

    Args:
        tensors: of the call.
        known: sizes of the module.
        names: of the tensors in the call, by position.
        before: how tensors of these names were read in other calls of the module.
    """
    first, own = leading(tensors[0], known), iter(OWN)
    each = [
        _of_tensor(t, _values(first, tensors[0]), before.get(names.get(i, ""), ()), next(own, "") if _is_list(t) else "")
        for i, t in enumerate(tensors[1:], start=1)
    ]
    while math.prod(map(len, each)) > 1000:
        max(each, key=len).pop()
    ranked = sorted(itertools.product(*map(range, map(len, each))), key=sum)
    found = [(first, *(options[i] for options, i in zip(each, which, strict=True))) for which in ranked[:MOST]]
    if any(int(n) == 1 for n in tensors[0].shape[: len(first) - 1]):  # the last reading: a graph for sizes of 1 only
        ones = tuple(1 if int(n) == 1 else s for s, n in zip(first, tensors[0].shape, strict=True))
        found = [*found[: MOST - 1], (ones, *(_of_tensor(t, _values(ones, tensors[0]), ())[0] for t in tensors[1:]))]
    yield from dict.fromkeys(found)


def _values(first: Sizes, tensor: Tensor) -> dict[str, int]:
    values = {s: int(n) for s, n in zip(first, tensor.shape, strict=True) if isinstance(s, str)}
    if first[:2] == ("a", "b") and tensor.dim() == 3:
        values["ab"] = values["a"] * values["b"]
    return values


def _is_list(tensor: Tensor) -> bool:
    return tensor.dim() == 1 and len(tensor) > 1 and not (tensor.dtype.is_floating_point or tensor.dtype.is_complex)


def _of_tensor(tensor: Tensor, values: Mapping[str, int], before: Sequence[Sizes], own: str = "") -> list[Sizes]:
    """The readings of one tensor, the likeliest first. ``values``: of the letters; ``own``: a letter for its length."""
    shape = tuple(map(int, tensor.shape))
    again = [s for s in before if tuple(values.get(n, 0) if isinstance(n, str) else n for n in s) == shape]
    # the last size of a table (cos, sin, or both as complex numbers) counts features, also where it equals the length
    table = tensor.dim() in (2, 3) and (tensor.dtype.is_floating_point or tensor.dtype.is_complex)
    each: list[list[int | str]] = [
        [n] if table and i == tensor.dim() - 1 else _of_size(n, i, tensor.dim(), values) for i, n in enumerate(shape)
    ]
    if own:
        each[0].insert(len(each[0]) - 1, own)  # before the number itself
    ranked = sorted(itertools.product(*map(range, map(len, each))), key=sum)
    new = [tuple(options[i] for options, i in zip(each, which, strict=True)) for which in ranked]
    return list(dict.fromkeys([*again, *new]))


def _of_size(n: int, at: int, dimensions: int, values: Mapping[str, int]) -> list[int | str]:
    same = [x for x, value in values.items() if value == n and x != "ab"]
    product = ["ab"] if values.get("ab") == n else []
    if n == 1:
        # a mask is [B, 1, S, S]; a vector of one number stays one
        usual = "" if dimensions == 1 else "a" if at == 0 else "b" if (at > 1 if dimensions == 4 else at == 1) else ""
        return [*(x for x in same if x == usual), 1, *(x for x in same if x != usual), *product]
    if at:
        same.reverse()  # batch before sequence, where they are equal
    return [*same, *product, n]
