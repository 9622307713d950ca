"""Opt-in: products of 16-bit numbers that a model computes in float32, routers' above all, on tensor cores.

    pipeline = moefx.passes.default().before("lower", moefx.passes.LinearToFP32())
    model = moefx.optimize(model, pipeline=pipeline)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from moefx import ops
from moefx.certify import certify
from moefx.graph import arguments, aten, dtype_of, inherit, insert, is_call, value
from moefx.pipeline import Changes


@dataclass(frozen=True)
class LinearToFP32:
    """``linear(x.float(), weight.float())`` of bfloat16 x and weight becomes ``linear_to_fp32(x, weight)``.

    DeepSeek-V3 (arXiv 2412.19437), GLM and Nemotron-H route by such logits: on a GPU they are the slowest kind of product, and
    everything in them is a bfloat16 number. Numerics: the sums of the forward are those of float32 in another order; gradients
    lose what is 2**-16 of the logits' gradient, before they are rounded to bfloat16. Not in the default pipeline: no GPU has
    measured it yet.
    """

    name: ClassVar[str] = "linear_to_fp32"

    def run(self, function, plan=None) -> Changes:
        changes = Changes()
        for node in list(function.graph.nodes):
            if not is_call(node, aten.linear.default):
                continue
            given = arguments(node)
            casts = given["input"], given["weight"]
            if given["bias"] is not None or not all(map(self._widens, casts)):
                continue
            args = tuple(cast.args[0] for cast in casts)
            agrees, how = certify((*casts, node), (node,), ops.linear_to_fp32, args, {})
            if not agrees:
                changes.miss(node, f"it looks like moefx.linear_to_fp32 but {how}")
                continue
            new = insert(function.graph, node, ops.linear_to_fp32, args, {}, val=value(node))
            inherit(new, [*casts, node], self.name)
            node.replace_all_uses_with(new)
            changes.did(new, f"moefx.linear_to_fp32, {how}")
        return changes

    @staticmethod
    def _widens(x: fx.Node) -> bool:
        """Is ``x`` a float32 copy of bfloat16 numbers?"""
        cast = is_call(x, aten._to_copy.default) and dtype_of(x) == torch.float32
        return cast and dtype_of(x.args[0]) == torch.bfloat16  # type: ignore[arg-type]
