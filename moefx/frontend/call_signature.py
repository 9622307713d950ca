"""Which calls of a module a captured graph covers: a call template, and of each tensor its dtype, device and sizes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moefx.errors import CaptureError
from moefx.frontend.call_template import Template
from moefx.frontend.readings import OWN, Sizes, readings
from moefx.integrations import transformers as hf


@dataclass(frozen=True)
class Call:
    """The calls that a captured graph covers: the template, and dtype, device and sizes of each tensor.

    A size is an int or a letter: "a", "b", ... are the leading sizes of the first tensor (batch, sequence), "ab" is their
    product, "s", "t", ... are lengths of other tensors. A graph captured with a letter covers all numbers, 1 included; one
    captured with 1 covers only 1.
    """

    template: Template
    dtypes: tuple[torch.dtype, ...]
    device: torch.device
    sizes: tuple[Sizes, ...]
    training: bool
    outputs: Template | None = None  #: what the module returns
    routers: tuple[tuple[str, Template], ...] = ()  #: path inside the block, its output
    written: tuple[tuple[int | str, Template], ...] = ()  #: argument, the items that the module leaves in it

    @staticmethod
    def of(tensors: list[Tensor], template: Template, training: bool, known: Set[int] = frozenset()) -> Call:
        """The likeliest of ``Call.readings``; the only one if no two sizes are equal and none is 1."""
        return next(Call.readings(tensors, template, training, known))

    @staticmethod
    def readings(
        tensors: list[Tensor], template: Template, training: bool, known: Set[int] = frozenset(), others: Iterable[Call] = ()
    ) -> Iterator[Call]:
        """The kinds of calls that this one can be, the likeliest first: see :mod:`moefx.frontend.readings`.

        Args:
            tensors: of the call, as :func:`flatten` returns them.
            template: of the call.
            training: whether the module is in training mode.
            known: sizes of the module.
            others: other kinds of calls of the module.

        Raises:
            CaptureError: the call has no tensors.
        """
        if not tensors:
            raise CaptureError("it is called without tensors")
        before: dict[str, list[Sizes]] = {}
        for other in others:
            for i, name in other.template.names().items():
                before.setdefault(name, []).append(other.sizes[i])
        dtypes = tuple(t.dtype for t in tensors)
        for sizes in readings(tensors, known, template.names(), before):
            yield Call(template, dtypes, tensors[0].device, sizes, training)

    def covers(self, tensors: list[Tensor], template: Template, training: bool) -> bool:
        """Does a graph captured for this call hold for another one?"""
        if (
            not self.template.covers(template)
            or training != self.training
            or len(tensors) != len(self.dtypes)
            or tensors[0].device != self.device
        ):
            return False
        known: dict[str, int] = {}
        for t, dtype, sizes in zip(tensors, self.dtypes, self.sizes, strict=True):
            if t.dtype != dtype or len(sizes) != t.dim():
                return False
            for n, s in zip(t.shape, sizes, strict=True):
                if s == "ab":
                    s_value = known["a"] * known["b"]
                elif isinstance(s, str):
                    s_value = known.setdefault(s, n)
                else:
                    s_value = s
                if n != s_value:
                    return False
        return True

    def example(self, taken: set[int]) -> list[Tensor]:
        """Tensors for this call whose lettered sizes differ from each other, from its numbers and from ``taken``."""
        sizes = distinct_sizes(taken | {n for shape in self.sizes for n in shape if isinstance(n, int)})
        letters = {"a": sizes[0], "b": sizes[1], "ab": sizes[0] * sizes[1], "c": sizes[1] + 2, "d": sizes[1] + 4}
        unlike = (n for n in itertools.count(sizes[1] + 6) if n not in taken and n != letters["ab"])
        letters |= dict(zip(OWN, unlike))
        shapes = [[letters[n] if isinstance(n, str) else n for n in shape] for shape in self.sizes]
        return [torch.zeros(shape, dtype=d, device=self.device) for shape, d in zip(shapes, self.dtypes, strict=True)]


def distinct_sizes(taken: set[int]) -> tuple[int, int]:
    """A batch size and a sequence length that differ from all sizes of the model, so that each size can be recognized."""
    for batch, sequence in itertools.product((3, 5, 7, 11, 13), (17, 19, 23, 29, 31, 37, 41)):
        if not {batch, sequence, batch * sequence} & taken:
            return batch, sequence
    raise CaptureError("no batch size and sequence length differ from all sizes of the model")


def sizes_of(module: nn.Module) -> set[int]:
    """The sizes of the parameters and buffers of a module, its integer attributes, and 1 and 2."""
    found = {int(n) for p in itertools.chain(module.parameters(), module.buffers()) for n in p.shape}
    for m in module.modules():
        found |= {v for k, v in vars(m).items() if type(v) is int and k not in hf.INDEX_NAMES}
    return found | {1, 2}
