"""Expert parallelism over gloo: loss and every gradient of every rank against the original model."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.support.spawn import run


def families_agree(rank: int, world: int, names: list[str], ep_size: int) -> list[str]:
    """Runs in each rank: lengths that differ by rank, one token, a rank's experts without a token."""

    import moefx
    from tests.support.families import batch, build

    wrong = []
    for name in names:
        model = moefx.optimize(build(name), ep_size=ep_size, compile=False, strict=True)
        for shape in ((2, 9 + rank), (1, 1 + rank)):
            result = moefx.verify(model, batch(*shape, seed=rank, labels=shape[1] > 1))
            if not result.ok:
                wrong.append(f"{name} {shape} rank {rank}: {result.worst}")
        first = next(p for n, p in model.named_parameters() if "experts" in n)
        if first.to_local().shape[0] * ep_size != 8:
            wrong.append(f"{name}: {first.to_local().shape[0]} local experts")
        moefx.restore(model)
        again = build(name)
        if any(not torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)):
            wrong.append(f"{name}: restore did not bring all experts back")
    dist.barrier()
    return wrong


ALL = ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "glm4_moe", "gpt_oss", "gemma4_text", "nemotron_h"]

#: Group-limited routing and shared experts; biases, sinks and transposed weights; ungated experts and Mamba blocks; experts that
#: the model runs on every token.
KINDS = ["deepseek_v3", "gpt_oss", "nemotron_h", "llama4_text"]


@pytest.mark.parametrize(
    ("world", "ep_size", "names"), [(4, 4, ALL), (2, 2, KINDS), (8, 8, ["gpt_oss"]), (4, 2, ["qwen3_moe"])]
)
def test_families_over_ranks(world, ep_size, names):
    assert [w for wrong in run(families_agree, world, names, ep_size, timeout=900) for w in wrong] == []
