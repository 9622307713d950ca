"""DDP around expert parallelism: four ranks against one process on all their batches."""

from __future__ import annotations

import pytest
import torch

from tests.support.spawn import run


def gradients_agree(rank: int, world: int, ep_size: int) -> list[str]:
    """Runs in each rank: two accumulated backwards; every gradient is the mean over ranks of what one process gets."""

    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    import moefx
    from tests.support.families import batch, build

    original = build("qwen3_moe")
    model = DistributedDataParallel(moefx.optimize(build("qwen3_moe", seed=rank), ep_size=ep_size, compile=False))
    # ranks built from other seeds have the first rank's weights now: DDP's for dense ones, optimize's for the experts
    for step in range(2):
        with model.no_sync() if step == 0 else torch.enable_grad():
            model(**batch(2, 7, seed=10 * step + rank)).loss.backward()
        for r in range(world):
            (original(**batch(2, 7, seed=10 * step + r)).loss / world).backward()
    wrong = []
    for (name, p), w in zip(model.module.named_parameters(), original.parameters(), strict=True):
        found = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        far = float((found - w.grad).abs().max() / w.grad.abs().max())
        if not far < 1e-4:
            wrong.append(f"rank {rank}: {name}: {far:.1e}")
    return wrong


@pytest.mark.parametrize("ep_size", [2, 4])
def test_ddp(ep_size):
    assert [w for wrong in run(gradients_agree, 4, ep_size, timeout=300) for w in wrong] == []
