"""Resumable training state of models that are sharded across ranks, by torch.distributed.checkpoint (DCP)."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from transformers.distributed.checkpoint import _redistribute_state_dict

from moefx.distributed import rank_monitor
from moefx.distributed.process_group import barrier, rank_and_world
from moefx.errors import MoefxError

_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)  # by parameter name: groups may differ at another ep_size


def _state(model: Any, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    found: dict[str, Any] = {"model": model.state_dict()}
    if optimizer is not None:
        with _without_empty_groups(optimizer):
            found["optimizer"] = get_optimizer_state_dict(model, optimizer, options=_OPTIONS)
    return found


@contextmanager
def _without_empty_groups(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """PyTorch names a group by its first parameter; the Trainer makes groups without any (LoRA trains no biases or norms)."""
    empty = [(i, g) for i, g in enumerate(optimizer.param_groups) if not g["params"]]
    optimizer.param_groups = [g for g in optimizer.param_groups if g["params"]]
    try:
        yield
    finally:
        for i, group in empty:
            optimizer.param_groups.insert(i, group)


@rank_monitor.named()
def save_checkpoint(
    folder: str | os.PathLike, model: Any, optimizer: torch.optim.Optimizer | None = None, **extra: Any
) -> None:
    """Saves model, optimizer, random states and ``extra`` (step, scheduler.state_dict(), ...); each rank writes its shards.

    All ranks call it. ``folder`` is replaced when everything is written: an interrupted save leaves the previous checkpoint.

    Args:
        folder: of the checkpoint, in DCP's format.
        model: optimized or not, sharded or not.
        optimizer: of ``torch.optim``, over the model's parameters.
        extra: is pickled on rank 0, and returned by :func:`load_checkpoint`.
    """
    folder, rank = Path(folder), rank_and_world()[0]
    new = folder.with_name(folder.name + ".incomplete")
    if rank == 0:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    barrier()
    # DCP expects a rank's part of a tensor to be one rectangle, which a strided shard is not: it is saved as plain shards
    dcp.save(_redistribute_state_dict(_state(model, optimizer)), checkpoint_id=str(new))
    torch.save(_random_state(), new / f"random-{rank}.pt")
    if rank == 0:
        torch.save(extra, new / "extra.pt")
    barrier()
    if rank == 0:
        old = folder.with_name(folder.name + ".old")
        if folder.exists():  # else the .old one is the previous checkpoint
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(new, folder)
        shutil.rmtree(old, ignore_errors=True)
    barrier()


@rank_monitor.named()
def load_checkpoint(folder: str | os.PathLike, model: Any, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Loads what :func:`save_checkpoint` wrote, at any ``ep_size`` and number of ranks; returns ``extra``.

    All ranks call it. Random states are restored if the number of ranks is the same.

    Raises:
        MoefxError: there is no complete checkpoint, or a tensor of the model or the optimizer is missing, unexpected or of
            another shape.
    """
    folder = _complete(Path(folder))
    load_state(folder, model, optimizer)
    rank, world = rank_and_world()
    mine = folder / f"random-{rank}.pt"
    if len(list(folder.glob("random-*.pt"))) == world and mine.is_file():
        _set_random_state(torch.load(mine, weights_only=False))
    return torch.load(folder / "extra.pt", weights_only=False)


def _complete(folder: Path) -> Path:
    old = folder.with_name(folder.name + ".old")
    if not folder.exists() and old.exists():  # interrupted between two renames: the previous one is complete
        folder = old
    if not (folder / ".metadata").is_file():
        raise MoefxError(f"there is no complete checkpoint in {folder}: pass a folder that save_checkpoint wrote")
    return folder


@rank_monitor.named()
def load_state(folder: Path, model: Any, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Loads model and optimizer of a checkpoint, without random states and extra."""
    state = _state(model, optimizer)
    _check(folder, state)
    even = _redistribute_state_dict(state)
    dcp.load(even, checkpoint_id=str(folder))
    state = _redistribute_state_dict(even, reference_state_dict=state)
    model.load_state_dict(state["model"])
    if optimizer is not None:
        with _without_empty_groups(optimizer):
            set_optimizer_state_dict(model, optimizer, state["optimizer"], options=_OPTIONS)


def _check(folder: Path, state: dict[str, Any]) -> None:
    """Raises MoefxError with the name of the first tensor that differs, which DCP's own errors lack."""
    there: dict[str, Any] = dcp.FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    for name, t in state["model"].items():
        found = there.get(f"model.{name}")
        if found is None:
            raise MoefxError(f"{folder} lacks {name}: it is a checkpoint of another model")
        if tuple(found.size) != tuple(t.shape):
            raise MoefxError(f"{folder} has {name} of shape {tuple(found.size)}, the model of {tuple(t.shape)}")
    extra = sorted(n for n in there if n.startswith("model.") and n.removeprefix("model.") not in state["model"])
    if extra:
        raise MoefxError(f"{folder} has {extra[0].removeprefix('model.')}, which the model lacks")
    if "optimizer" in state:
        _check_optimizer(folder, state["optimizer"], there)


def _check_optimizer(folder: Path, state: dict[str, Any], there: dict[str, Any]) -> None:
    if not any(n.startswith("optimizer.") for n in there):
        raise MoefxError(f"{folder} has no optimizer state: it was saved without one; load it without optimizer")
    wanted = {n for n in state if n.startswith("state.")}
    found = {m for n in there if (m := n.removeprefix("optimizer.")).startswith("state.") and m != n}
    for name in sorted(wanted ^ found):
        saved, here = ("lacks", "has") if name in wanted else ("has", "lacks")
        raise MoefxError(
            f"{folder} {saved} the optimizer's {name}, which this optimizer {here}: resume with the same kind of optimizer "
            "over the same parameters, or load without optimizer"
        )


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
