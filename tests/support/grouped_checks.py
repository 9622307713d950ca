"""Checks that every kernel of ``moefx.grouped_mlp`` must pass, for tests with and without a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moefx import transports
from moefx.transports import fp8_rows
from moefx.transports import permute as rows

EXPERTS, TOP_K, HIDDEN, INNER = 4, 2, 256, 64


def _random(*shape: int, seed: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(device, dtype) / shape[-1] ** 0.5


def check_rows_are_made_again(
    kernel: Callable,
    tokens: int,
    dispatch_dtype: str,
    spare: int,
    dtype: torch.dtype,
    device: str,
    plain: Callable | None = None,
) -> None:
    """Given what arrived, a kernel saves that for the backward instead of the rows, with bitwise equal results.

    ``dispatch_dtype``: how tokens were sent; "packed": in one tensor with other values. ``spare``: unused rows of a capacity. ``plain``: the
    kernel to compare with, by default the same one without what arrived.
    """
    x = _random(tokens, HIDDEN, seed=0, dtype=dtype, device=device)
    experts = torch.rand(tokens, EXPERTS + 2, generator=torch.Generator().manual_seed(1)).topk(TOP_K).indices.to(device)
    tokens_per_expert, row_id_map = rows.sort_by_expert(
        experts.int(), 1, EXPERTS
    )  # of the others' experts, 0 and 5, no row is here
    received = {"": lambda: x, "packed": lambda: torch.cat([x, x[:, :8]], dim=1), "fp8": lambda: fp8_rows.encode(x)}[
        dispatch_dtype
    ]()
    cpu_metadata = transports.make_header(transports.Header("all_to_all", fp8=dispatch_dtype == "fp8"), 1)
    arrived = rows.received_tokens(received, HIDDEN, cpu_metadata)
    many = int(tokens_per_expert.sum()) + spare
    given, permuted_probs = rows.permute(
        arrived, row_id_map, many, _random(tokens, TOP_K, seed=2, dtype=torch.float32, device=device)
    )
    weights = [
        _random(EXPERTS, *shape, seed=i, dtype=dtype, device=device)
        for i, shape in enumerate([(2 * INNER, HIDDEN), (2 * INNER,), (HIDDEN, INNER), (HIDDEN,)])
    ]
    leaves = [t.requires_grad_() for t in (given, permuted_probs, *weights)]
    named = int(tokens_per_expert.sum())

    def run(kernel: Callable, **options) -> tuple[list[torch.Tensor], set[int]]:
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = kernel(leaves[0], tokens_per_expert, *leaves[2:], activation="swiglu", permuted_probs=leaves[1], **options)
        to_rows, to_row_weights, *found = torch.autograd.grad(y[:named].square().sum() if named else y.sum() * 0, leaves)
        return [y[:named], to_rows[:named], to_row_weights[:named], *found], {t.data_ptr() for t in kept if t.numel()}

    wanted, kept = run(plain or kernel)
    assert not named or given.data_ptr() in kept
    found, kept = run(kernel, arrived=[received, row_id_map, cpu_metadata])
    assert given.data_ptr() not in kept or not many
    assert not tokens or received.data_ptr() in kept
    for f, w in zip(found, wanted, strict=True):
        assert f.dtype == w.dtype and torch.equal(f, w)


#: tokens, dispatch_dtype, spare rows
CASES = (
    (0, "", 0),
    (1, "", 0),
    (13, "", 0),
    (13, "", 9),
    (13, "packed", 0),
    (13, "packed", 9),
    (13, "fp8", 0),
    (0, "packed", 5),
)
