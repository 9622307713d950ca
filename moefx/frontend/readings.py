"""What the sizes of a call's tensors count: batch, sequence, their product, or something of the tensor's own.

A size does not say. At batch 1 the labels are [1, S], and so are positions that every sequence shares; a batch of 4 may meet 4
heads. Each reading with which a module exports gives an exact graph: the likely ones come first, so that few graphs are made.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence, Set

from torch import Tensor

#: A number, or a letter: see :class:`moefx.frontend.call_signature.Call`.
Sizes = tuple[int | str, ...]
#: Letters for the lengths of lists of integers that are neither batch nor sequence: where packed sequences begin, say.
OWN = ("s", "t", "u", "v", "w")
#: So many readings are tried of one call. Each that does not export costs about a second.
MOST = 8


def leading(first: Tensor, known: Set[int]) -> Sizes:
    """The sizes of a call's first tensor: letters for the leading ones. After two, one that is in ``known``, a size of the
    module, is no length: the streams of hyper-connections [B, S, streams, H].
    """
    lead = tuple(map(int, first.shape[:-1] if first.dim() > 1 else first.shape))
    names = (x if i < 2 or n not in known else n for i, (x, n) in enumerate(zip("abcdefg", lead)))
    return (*names, *map(int, first.shape[len(lead) :]))


def readings(
    tensors: Sequence[Tensor], known: Set[int], names: Mapping[int, str], before: Mapping[str, Sequence[Sizes]]
) -> Iterator[tuple[Sizes, ...]]:
    """Of each tensor its sizes, likeliest reading of all together first, at most ``MOST``. ``names``: what the call names its
    tensors, by position; ``before``: how tensors of these names were read in other calls of the module.
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
    if any(int(n) == 1 for n in tensors[0].shape[: len(first) - 1]):  # the last: a graph for lengths of 1 only
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
    """The readings of one tensor, given what the letters stand for; likeliest first. ``own``: a letter for its length."""
    shape = tuple(map(int, tensor.shape))
    again = [s for s in before if tuple(values.get(n, 0) if isinstance(n, str) else n for n in s) == shape]
    # the last size of a table (cos, sin, or both as complex numbers) counts features, whatever the sequence length is
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
        # a mask is [B, 1, S, S]; a lone number, of items say, stays one
        usual = "" if dimensions == 1 else "a" if at == 0 else "b" if (at > 1 if dimensions == 4 else at == 1) else ""
        return [*(x for x in same if x == usual), 1, *(x for x in same if x != usual), *product]
    if at:
        same.reverse()  # batch before sequence, where they are equal
    return [*same, *product, n]
