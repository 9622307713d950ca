"""The pass 'overlap' over gloo: values and all gradients of the original model, whatever runs in between, also recomputed."""

from __future__ import annotations

from tests.support.spawn import run


def cases(rank: int, world: int) -> list[str]:
    import torch

    import moefx
    from moefx.ops import exchange
    from moefx.passes import Overlap, default
    from tests.support.families import batch, build

    wrong = []
    for name, chunks, compile, options in (
        ("deepseek_v3", 1, False, {}),
        ("deepseek_v3", 2, False, {}),
        ("gpt_oss", 3, False, {}),
        ("qwen3_moe", 2, "aot_eager", {}),
        ("deepseek_v3", 2, False, {"dispatch_capacity": 22}),
    ):
        what = f"{name} in {chunks}, {options}, rank {rank}"
        pipeline = default().replace("overlap", Overlap(chunks=chunks))
        model = moefx.optimize(build(name), ep_size=world, compile=compile, strict=True, pipeline=pipeline, **options)
        # two chunks: of odd lengths, of one token (a chunk is empty), and with recomputation
        for shape in ((2, 9 + 2 * rank), (1, 1)) if not compile else ((2, 9 + 2 * rank),):
            result = moefx.verify(model, batch(*shape, seed=rank, labels=shape[1] > 1))
            if not result.ok:
                wrong.append(f"{what}, {shape}: {result.worst}")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        result = moefx.verify(model, batch(2, 7 + rank, seed=rank))
        if not result.ok:
            wrong.append(f"{what}, recomputed: {result.worst}")
        moefx.restore(model)
        torch._dynamo.reset()
    if exchange.num_in_flight():
        wrong.append(f"rank {rank}: {exchange.num_in_flight()} exchanges were never waited for")
    return wrong


def test_overlapped_is_the_original():
    assert [w for wrong in run(cases, 2, timeout=600) for w in wrong] == []
