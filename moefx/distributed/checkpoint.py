"""Checkpoints of models that are spread over ranks: in Hugging Face layout for everybody, and by DCP for resuming."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter, revert_weight_conversion
from transformers.distributed.checkpoint import _redistribute_state_dict
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from moefx.distributed import rank_monitor
from moefx.errors import MoefxError
from moefx.integrations import transformers as hf

_WEIGHTS, _INDEX = "model{suffix}.safetensors", "model.safetensors.index.json"
_CONFIG, _NEW = "config.json", ".incomplete"


# --- Hugging Face layout ---------------------------------------------------------------------------------------------


@rank_monitor.named()
def save_pretrained(
    model: Any, folder: str | os.PathLike, *, max_shard_size: int | str = "50GB", save_original_format: bool = True
) -> None:
    """Writes ``model`` as plain Transformers would, files and tensors alike; every rank calls it.

    The files are dealt out to the ranks; a rank holds the tensors of one file and of one block besides, never the model. Files
    get their names when all are written: a save that is interrupted leaves the previous one in ``folder`` as it was. In the
    moment of the renames ``folder`` has no config.json, so that nobody reads files of two saves; if the save ends just then,
    the next to save into ``folder`` or to load it by ``moefx.parallelize`` does the rest (:func:`finish_save`).
    """
    rank, world = _rank_and_world()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    finish_save(folder)
    spread = model.state_dict()
    whole = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in spread.items()}
    whole = remove_tied_weights_from_state_dict(whole, model)
    written = revert_weight_conversion(model, dict(whole)) if save_original_format else whole
    plan = _plan(written, max_shard_size)
    owner = {file: i % world for i, file in enumerate(plan.filename_to_tensors)}
    waiting: dict[str, dict[str, Tensor]] = {file: {} for file, r in owner.items() if r == rank}
    groups = list(_groups(model, list(whole)))
    for names in tqdm(groups, desc="saving", disable=rank > 0):
        here = {name: _gathered(spread[name]) for name in names}  # every rank: gathering is collective
        for name, t in (revert_weight_conversion(model, here) if save_original_format else here).items():
            file = plan.tensor_to_filename[name]
            if owner[file] == rank:
                waiting[file][name] = t.cpu().contiguous().clone()
                if len(waiting[file]) == len(plan.filename_to_tensors[file]):
                    save_file(waiting.pop(file), folder / (file + _NEW), metadata={"format": "pt"})
        del here
    if waiting:
        file, found = next(iter(waiting.items()))
        missing = sorted(set(plan.filename_to_tensors[file]) - set(found))
        raise MoefxError(f"{folder / file} was not written: {missing[0]} came out of no block of the model; report this")
    _barrier()
    if rank == 0:
        _write_index_and_configuration(model, folder, plan)
        (folder / _CONFIG).unlink(missing_ok=True)  # from here on the new files count
        _put_in_place(folder)
    _barrier()


def _plan(written: dict[str, Tensor], max_shard_size: int | str) -> Any:
    """Which tensor goes into which file, as huggingface_hub deals them out: what are views of one tensor stay together."""
    views: dict[int, list[str]] = {}
    for name, t in written.items():
        views.setdefault(t.untyped_storage()._cdata, []).append(name)
    first = {names[0]: written[names[0]] for names in views.values()}
    plan = split_torch_state_dict_into_shards(first, filename_pattern=_WEIGHTS, max_shard_size=max_shard_size)
    others = {names[0]: names for names in views.values()}
    for file, names in plan.filename_to_tensors.items():
        plan.filename_to_tensors[file] = [n for name in names for n in others[name]]
        plan.tensor_to_filename.update(dict.fromkeys(plan.filename_to_tensors[file], file))
    return plan


def _gathered(t: Tensor) -> Tensor:
    return t.full_tensor().detach() if isinstance(t, DTensor) else t.detach()


def _groups(model: Any, names: list[str]) -> Iterator[list[str]]:
    """Names that a conversion may need together: those of a block; the others alone."""
    blocks = [f"{p}." for p in hf.blocks(model)]
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(next((b for b in blocks if name.startswith(b)), name), []).append(name)
    yield from found.values()


def _write_index_and_configuration(model: Any, folder: Path, plan: Any) -> None:
    """Besides the weights, under names that nobody reads; the configuration last: it says that all is there."""
    for left in folder.glob(f"model*{_NEW}"):  # of a save that was interrupted while it wrote
        if left.name.removesuffix(_NEW) not in plan.filename_to_tensors:
            left.unlink()
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / (_INDEX + _NEW)).write_text(text, encoding="utf-8")
    config = copy.deepcopy(model.config)
    vars(config).pop("distributed_config", None)
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.dtype = str(model.dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as written:
        config.save_pretrained(written)
        if model.can_generate():
            model.generation_config.save_pretrained(written)
        for path in sorted(Path(written).iterdir(), key=lambda p: p.name == _CONFIG):
            (folder / (path.name + _NEW)).write_bytes(path.read_bytes())


def _put_in_place(folder: Path) -> None:
    """Gives the new files their names, and removes what they replace; can be done again from wherever it was interrupted."""
    index, single = folder / _INDEX, _WEIGHTS.format(suffix="")
    if (folder / (single + _NEW)).exists():
        index.unlink(missing_ok=True)
    elif (folder / (_INDEX + _NEW)).exists():
        os.replace(folder / (_INDEX + _NEW), index)
    new = _in_index(index) if index.exists() else {single}
    for file in new:
        if (folder / (file + _NEW)).exists():
            os.replace(folder / (file + _NEW), folder / file)
    for old in folder.glob("model*.safetensors"):
        if old.name not in new:
            old.unlink()
    for path in sorted(folder.glob(f"*.json{_NEW}"), key=lambda p: p.name == _CONFIG + _NEW):
        os.replace(path, path.with_name(path.name.removesuffix(_NEW)))


def _in_index(index: Path) -> set[str]:
    return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())


def finish_save(folder: str | os.PathLike) -> None:
    """Does the rest of a :func:`save_pretrained` that was interrupted when all was written. Every rank calls it."""
    folder = Path(folder)
    if _rank_and_world()[0] == 0 and (folder / (_CONFIG + _NEW)).exists() and not (folder / _CONFIG).exists():
        _put_in_place(folder)
    _barrier()


def _rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def check_files(folder: Path, model: Any) -> None:
    """Compares the shapes in a folder's safetensors headers with those that ``model`` (on meta) would save.

    Transformers names no tensor when shapes differ, and under expert parallelism cuts experts out of too many without a word.
    A checkpoint in another layout than the model's own is left to Transformers' loading.

    Raises:
        MoefxError: the first tensor, by name, of another shape, too many or missing.
    """
    there = _shapes(folder)
    whole = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in model.state_dict().items()}
    own = {name: tuple(t.shape) for name, t in whole.items()}
    written = revert_weight_conversion(model, remove_tied_weights_from_state_dict(whole, model))
    wanted = {name: tuple(t.shape) for name, t in written.items()}
    # Transformers also takes the model's own names, and either without the prefix of the base model
    prefix = f"{model.base_model_prefix}."
    readable = {**_without(prefix, own), **_without(prefix, wanted), **own, **wanted}
    kinds = {_kind(name) for name in wanted.keys() & there.keys()}  # laid out in the way of the model
    ignored = [re.compile(p) for p in (getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])]
    for name in sorted(readable.keys() | there.keys()):
        if name in readable and name in there:
            if readable[name] != there[name] and not _turns(model, name, there[name], readable[name]):
                raise MoefxError(f"{folder} has {name} of shape {there[name]}, the model of {readable[name]}: {_BELONGS}")
        elif (name in wanted or name in there) and _kind(name) in kinds and not any(p.search(name) for p in ignored):
            said = "lacks" if name in wanted else "has, and the model has not,"
            raise MoefxError(f"{folder} {said} {name}: {_BELONGS}")


def _turns(model: Any, name: str, there: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Does Transformers' loading turn a tensor of this shape into the wanted one, which it also takes as it is?"""

    def turned(op: Transpose) -> tuple[int, ...]:
        return tuple(torch.empty(there, device="meta").transpose(op.dim0, op.dim1).shape)

    return any(
        isinstance(op, Transpose) and op.check_dims and turned(op) == wanted
        for c in get_model_conversion_mapping(model)
        if isinstance(c, WeightConverter) and any(re.search(pattern, name) for pattern in c.source_patterns)
        for op in c.operations
    )


def _without(prefix: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items()}


_BELONGS = "load the checkpoint that belongs to this configuration"


def _kind(name: str) -> str:
    """The name without the numbers of layers and experts."""
    return re.sub(r"\.\d+\.", ".*.", name)


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of the tensors in a folder; nothing for a folder in a format that Transformers alone reads."""
    for single, index, shapes in (
        (_WEIGHTS.format(suffix=""), _INDEX, _safetensors_shapes),
        ("pytorch_model.bin", "pytorch_model.bin.index.json", _pickled_shapes),
    ):
        if (folder / single).is_file():
            files = {single}
        elif (folder / index).is_file():
            files = _in_index(folder / index)
        else:
            continue
        found: dict[str, tuple[int, ...]] = {}
        for file in sorted(files):
            if not (folder / file).is_file():
                raise MoefxError(f"{folder} lacks {file}, which {index} names: download it again")
            try:
                found |= shapes(folder / file)
            except (SafetensorError, EOFError, RuntimeError) as error:
                raise MoefxError(f"{folder / file} cannot be read ({error}): download it again") from error
        return found
    return {}


def _safetensors_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(file, framework="pt") as f:
        return {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118


def _pickled_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    found = torch.load(file, map_location="meta", mmap=True, weights_only=True)
    return {name: tuple(t.shape) for name, t in found.items()}


# --- resuming --------------------------------------------------------------------------------------------------------

_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)  # by parameter name: groups may differ at another ep_size


def _state(model: Any, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    found: dict[str, Any] = {"model": model.state_dict()}
    if optimizer is not None:
        with _without_empty_groups(optimizer):
            found["optimizer"] = get_optimizer_state_dict(model, optimizer, options=_OPTIONS)
    return found


@contextmanager
def _without_empty_groups(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """PyTorch names a group by its first parameter; the Trainer makes groups that have none (LoRA trains no bias, no norm)."""
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
    """Model, optimizer, random states and ``extra`` (step, scheduler.state_dict(), ...), each rank its shards, by DCP.

    Every rank calls it. ``folder`` appears when all is written; one that was there is replaced, and survives an interruption.
    ``extra`` is pickled on rank 0.
    """
    folder, rank = Path(folder), _rank_and_world()[0]
    new = folder.with_name(folder.name + _NEW)
    if rank == 0:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    _barrier()
    # DCP takes a tensor's part for one rectangle, which a strided shard is not: it goes out as plain shards
    dcp.save(_redistribute_state_dict(_state(model, optimizer)), checkpoint_id=str(new))
    torch.save(_random_state(), new / f"random-{rank}.pt")
    if rank == 0:
        torch.save(extra, new / "extra.pt")
    _barrier()
    if rank == 0:
        old = folder.with_name(folder.name + ".old")
        if folder.exists():  # else this old one is the previous checkpoint
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(new, folder)
        shutil.rmtree(old, ignore_errors=True)
    _barrier()


@rank_monitor.named()
def load_checkpoint(folder: str | os.PathLike, model: Any, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Reads what ``save_checkpoint`` wrote, at any ``ep_size`` and number of ranks; returns ``extra``.

    Random states come back where the number of ranks is the same.

    Raises:
        MoefxError: there is no complete checkpoint, or it lacks a tensor of the model or has it in another shape.
    """
    folder = _complete(Path(folder))
    load_state(folder, model, optimizer)
    rank, world = _rank_and_world()
    mine = folder / f"random-{rank}.pt"
    if len(list(folder.glob("random-*.pt"))) == world and mine.is_file():
        _set_random_state(torch.load(mine, weights_only=False))
    return torch.load(folder / "extra.pt", weights_only=False)


def _complete(folder: Path) -> Path:
    old = folder.with_name(folder.name + ".old")
    if not folder.exists() and old.exists():  # interrupted between two renames: the previous one is whole
        folder = old
    if not (folder / ".metadata").is_file():
        raise MoefxError(f"there is no complete checkpoint in {folder}: pass a folder that save_checkpoint wrote")
    return folder


@rank_monitor.named()
def load_state(folder: Path, model: Any, optimizer: torch.optim.Optimizer | None = None) -> None:
    """What :func:`load_checkpoint` reads of model and optimizer, without the random states."""
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
    """Names the first tensor that disagrees: DCP itself would say less."""
    there: dict[str, Any] = dcp.FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    for name, t in state["model"].items():
        found = there.get(f"model.{name}")
        if found is None:
            raise MoefxError(f"{folder} lacks {name}: it is a checkpoint of another model")
        if tuple(found.size) != tuple(t.shape):
            raise MoefxError(f"{folder} has {name} of shape {tuple(found.size)}, the model of {tuple(t.shape)}")
    extra = sorted(n for n in there if n.startswith("model.") and n.removeprefix("model.") not in state["model"])
    if extra:
        raise MoefxError(f"{folder} has {extra[0].removeprefix('model.')}, which the model has not")
    if "optimizer" in state:
        _check_optimizer(folder, state["optimizer"], there)


def _check_optimizer(folder: Path, state: dict[str, Any], there: dict[str, Any]) -> None:
    if not any(n.startswith("optimizer.") for n in there):
        raise MoefxError(f"{folder} has no optimizer state: it was saved without one; load it without optimizer")
    wanted = {n for n in state if n.startswith("state.")}
    found = {m for n in there if (m := n.removeprefix("optimizer.")).startswith("state.") and m != n}
    for name in sorted(wanted ^ found):
        said, else_ = ("lacks", "has") if name in wanted else ("has", "lacks")
        raise MoefxError(
            f"{folder} {said} the optimizer's {name}, which this optimizer {else_}: resume with the same kind of optimizer "
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
