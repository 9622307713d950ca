"""Byte-level training batches of text that comes with Python: the help topics of the standard library."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def corpus() -> Tensor:
    """All help topics, concatenated, as bytes: int64 [about 700,000]."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    return torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8).long()


def batches(batch: int, sequence: int, *, rank: int = 0, ranks: int = 1, seed: int = 0) -> Iterator[dict[str, Tensor]]:
    """Yields batches of random windows forever; the ranks' batches together are the batch of a single process.

    Args:
        batch: sequences of a step over all ranks; a multiple of ``ranks``.
        sequence: bytes per sequence.
        rank: which part of each batch to yield.
        ranks: number of parts.
        seed: of the random windows.
    """
    if batch % ranks:
        raise ValueError(f"a batch of {batch} sequences cannot be split across {ranks} ranks")
    data, generator = corpus(), torch.Generator().manual_seed(seed)
    mine = slice(rank * batch // ranks, (rank + 1) * batch // ranks)
    while True:
        starts = torch.randint(0, len(data) - sequence, (batch,), generator=generator)
        ids = torch.stack([data[s : s + sequence] for s in starts.tolist()])[mine]
        yield {"input_ids": ids, "labels": ids}
