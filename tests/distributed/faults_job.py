"""Ranks that are killed, for test_faults: ``faults_job.py FOLDER PORT``, a script that the ranks' server (spawn.py) runs.

What each rank prints goes into FOLDER/<scenario>-<rank>, rank 0's exit code into FOLDER/<scenario>-code. The ranks of each scenario
are forked here, since they die.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import moefx
from moefx.distributed import checkpoint_dcp, checkpoint_hf, rank_monitor
from tests.support.families import batch, build

WORLD = 2
MANY = 4  #: ranks of the scenarios with more than one other


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def digests(folder: Path) -> dict[str, str]:
    """What is in the files that readers look at."""
    files = [p for p in folder.iterdir() if p.suffix != ".incomplete"]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def run(
    rank: int, folder: Path, first: int, last: int, *, resume: bool, killed_at: int = -1, save_at: int = -1, bad_at: int = -1
):
    """Trains steps first to last, printing losses; rank 1 dies in the backward of ``killed_at``."""
    model = moefx.parallelize(build("qwen3_moe"), ep_size=2, compile=False, check_numerics=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    if resume:
        assert moefx.load_checkpoint(folder / "resume", model, optimizer)["step"] == first - 1
    for step in range(first, last + 1):
        b = batch(2, 8 + rank, seed=10 * step + rank)
        if step == bad_at and rank == 1:
            model.get_input_embeddings().register_forward_hook(lambda m, a, out: out * float("nan"))
        if step == killed_at and rank == 1:
            model.get_input_embeddings().register_forward_hook(lambda m, a, out: out.register_hook(lambda g: die()) and None)
        loss = model(**b).loss
        loss.backward()
        moefx.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        noise = float(torch.rand(()))  # the random state is part of a run
        print(f"loss {step} {float(loss.detach()):.9f} {noise:.6f}", flush=True)
        if step == save_at:
            moefx.save_checkpoint(folder / "resume", model, optimizer, step=step)
            model.save_pretrained(folder / "hf", max_shard_size="60KB")
            if rank == 0:
                (folder / "before.json").write_text(json.dumps(digests(folder / "hf")))
    return model, optimizer


def killed_in_a_step(rank: int, folder: Path) -> None:
    run(rank, folder, 0, 5, resume=False, save_at=2, killed_at=5)


def killed_in_a_forward(rank: int, folder: Path) -> None:
    """Of four ranks one dies where the next layer's experts wait for its rows, or FSDP for its shards."""
    model = moefx.parallelize(build("qwen3_moe"), ep_size=2, compile=False)
    for step in range(2):
        if step == 1 and rank == 2:
            model.model.layers[0].register_forward_hook(lambda *_: die())
        model(**batch(1, 8, seed=step)).loss.backward()


def killed_in_a_checkpoint(rank: int, folder: Path) -> None:
    torch.manual_seed(99)  # the checkpoint brings back the other run's random state
    model, optimizer = run(rank, folder, 3, 4, resume=True)
    if rank == 1:
        checkpoint_dcp._random_state = die
    moefx.save_checkpoint(folder / "resume", model, optimizer, step=4)


def killed_in_save_pretrained(rank: int, folder: Path) -> None:
    model, _ = run(rank, folder, 3, 4, resume=True)
    if rank == 1:
        checkpoint_hf.save_file = lambda tensors, path, metadata: (Path(path).write_bytes(b"half"), die())
    model.save_pretrained(folder / "hf", max_shard_size="60KB")


def not_a_number(rank: int, folder: Path) -> None:
    run(rank, folder, 0, 3, resume=False, bad_at=1)


def stuck(rank: int, folder: Path) -> None:
    """Rank 1 stops without closing a connection, as a machine that freezes: the others wait in the collective."""
    dist.all_reduce(torch.ones(1))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.all_reduce(torch.ones(1))


def first_rank_fails(rank: int, folder: Path) -> None:
    """The cause is in a store that ends with rank 0."""
    dist.all_reduce(torch.ones(1))
    if rank == 0:
        raise ValueError("the tokenizer's 12 and the model's 10 tokens disagree")
    dist.all_reduce(torch.ones(1))


SCENARIOS = (
    killed_in_a_forward,
    killed_in_a_step,
    killed_in_a_checkpoint,
    killed_in_save_pretrained,
    not_a_number,
    stuck,
    first_rank_fails,
)


def world_of(scenario) -> int:
    return MANY if scenario in (killed_in_a_forward, first_rank_fails) else WORLD


def rank_of(scenario, rank: int, folder: Path, port: int) -> None:
    out = os.open(folder / f"{scenario.__name__}-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    torch.set_num_threads(1)
    # where moefx's own exception is waited for, a slow machine has the time to raise it
    rank_monitor._GRACE = 10 if scenario in (killed_in_a_forward, first_rank_fails) else 2
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_of(scenario), timeout=timedelta(seconds=60)
    )
    moefx.watch_ranks(4.0)
    try:
        scenario(rank, folder)
        dist.barrier()
    except moefx.RankLostError:
        dist.destroy_process_group()  # as programs do on the way out: the others still read the cause
        raise
    dist.destroy_process_group()


def as_a_process(function, *args) -> None:
    """Ends as a process ends whose program is the function, not as a fork of the test's."""
    code = 1
    try:
        function(*args)
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    folder, port = Path(sys.argv[1]), int(sys.argv[2])
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    for i, scenario in enumerate(SCENARIOS):
        ranks = []
        for rank in range(world_of(scenario)):
            pid = os.fork()
            if pid == 0:
                as_a_process(rank_of, scenario, rank, folder, port + i)
            ranks.append(pid)
        _, status = os.waitpid(ranks[0], 0)
        (folder / f"{scenario.__name__}-code").write_text(str(os.waitstatus_to_exitcode(status)))
        if scenario is stuck:
            os.kill(ranks[1], signal.SIGKILL)
        for pid in ranks[1:]:
            os.waitpid(pid, 0)
    (folder / "after.json").write_text(json.dumps(digests(folder / "hf")))


if __name__ == "__main__":
    main()
