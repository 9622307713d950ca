"""With NCCL a lost rank breaks no collective, the others' kernels wait: they are ended, and name the lost rank."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moefx.internals import nccl

ROOT = Path(__file__).parent.parent.parent


def job() -> None:
    """One of two ranks: trains; rank 1 is killed in the backward of its third step."""
    import signal
    from datetime import timedelta

    import torch.distributed as dist

    sys.path.insert(0, str(ROOT))
    import moefx
    from tests.support.families import batch, build

    rank = int(sys.argv[1])
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    torch.zeros(1, device=device)
    address = f"tcp://127.0.0.1:{sys.argv[2]}"
    dist.init_process_group("nccl", init_method=address, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    model = moefx.parallelize(build("qwen3_moe").to(device), ep_size=2, compile=False, lost_after=5.0)
    for step in range(4):
        b = {k: v.to(device) for k, v in batch(2, 16, seed=10 * step + rank).items()}
        if step == 2 and rank == 1:
            kill = lambda grad: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
            model.get_input_embeddings().register_forward_hook(lambda m, a, out, kill=kill: out.register_hook(kill) and None)
        loss = model(**b).loss
        loss.backward()
        moefx.clip_grad_norm_(model, 1.0)
        print("loss", step, float(loss.detach()), flush=True)


def several_ranks() -> bool:
    return torch.cuda.device_count() > 1 or (torch.cuda.is_available() and nccl.version() >= (2, 30))


@pytest.mark.skipif(not several_ranks(), reason="needs two GPUs, or NCCL 2.30 for two ranks on one")
def test_a_killed_rank_is_named():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(r), port], stdout=-1, stderr=subprocess.STDOUT, text=True, env=env)
        for r in (0, 1)
    ]
    try:
        said = [p.communicate(timeout=110)[0] for p in ranks]  # less than the group's timeout
    finally:
        for p in ranks:
            p.kill()
    assert ranks[1].returncode == -9 and "loss 1" in said[1]
    assert ranks[0].returncode != 0, said[0]
    assert re.search(r"rank 1 is lost: no sign of life for \d+ s", said[0]), said[0]
    assert f'{Path(__file__).name}", line' in said[0] and " in job" in said[0]  # where it waited: what waits first differs


if __name__ == "__main__":
    job()
