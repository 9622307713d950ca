"""Which GPU a rank uses, with CUDA and NCCL mocked."""

from __future__ import annotations

import os
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist

from moefx.distributed import devices
from moefx.errors import MoefxError
from tests.support.spawn import run


def taken(count, current, environment, backend="cpu:gloo,cuda:nccl", shown=None, nccl=(2, 28, 9)):
    """The device that this process takes on a machine with ``count`` GPUs, or the error; ``shown``: uuids of the GPUs."""
    where = SimpleNamespace(device=current)
    properties = lambda device: SimpleNamespace(uuid=(shown or range(count))[device.index])  # noqa: E731
    faked = {
        "is_available": lambda: count > 0,
        "device_count": lambda: count,
        "current_device": lambda: where.device,
        "set_device": lambda i: setattr(where, "device", i),
        "get_device_properties": properties,
    }
    with (
        mock.patch.multiple(torch.cuda, **faked),
        mock.patch.object(torch.cuda.nccl, "version", return_value=nccl),
        mock.patch.dict(os.environ, environment),
        mock.patch.object(dist, "get_backend_config", return_value=backend),
    ):
        try:
            device = devices.of_rank()
        except MoefxError as error:
            return str(error)
        assert device.type == "cpu" or where.device == device.index  # it is the current one too
        return str(device)


def cases(rank, world_size):
    local = {"LOCAL_RANK": str(rank)}
    return {
        "no GPU": taken(0, 0, local),
        "nobody has chosen": taken(2, 0, local),
        "Slurm": taken(2, 0, {"SLURM_LOCALID": str(rank)}),
        "chosen": taken(4, rank + 2, local),
        "each sees its own": taken(1, 0, local, shown=[f"uuid {rank}"]),
        "gloo": taken(2, 0, local, backend="cpu:gloo,cuda:gloo"),
        "one GPU": taken(1, 0, local),
        "one GPU, NCCL shares": taken(1, 0, {**local, "NCCL_MULTI_RANK_GPU_ENABLE": "1"}, nccl=(2, 30, 4)),
        "one GPU, NCCL too old": taken(1, 0, {**local, "NCCL_MULTI_RANK_GPU_ENABLE": "1"}),
    }


def test_each_rank_takes_its_own_gpu():
    first, second = run(cases, 2)
    for name in ("nobody has chosen", "Slurm"):
        assert (first[name], second[name]) == ("cuda:0", "cuda:1"), name
    assert (first["chosen"], second["chosen"]) == ("cuda:2", "cuda:3")
    for name in ("each sees its own", "one GPU, NCCL shares"):
        assert first[name] == second[name] == "cuda:0"
    for name in ("no GPU", "gloo"):
        assert first[name] == second[name] == "cpu"
    for name in ("one GPU", "one GPU, NCCL too old"):
        assert first[name] == second[name] and first[name].startswith("ranks 0 and 1 both use cuda:0 of "), first[name]
        assert "shows 1 GPU(s)" in first[name] and "torch.cuda.set_device" in first[name]


def test_one_process_takes_the_current_gpu():
    assert taken(2, 1, {}) == "cuda:1"  # there is no process group
    assert taken(0, 0, {}) == "cpu"
