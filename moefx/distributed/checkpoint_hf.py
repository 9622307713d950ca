"""Hugging Face checkpoints of models that are sharded across ranks: the files that plain Transformers writes and reads."""

from __future__ import annotations

import copy
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter, revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from moefx.distributed import rank_monitor
from moefx.distributed.process_group import barrier, rank_and_world
from moefx.errors import MoefxError
from moefx.integrations import fsdp
from moefx.integrations import transformers as hf

_WEIGHTS, _INDEX = "model{suffix}.safetensors", "model.safetensors.index.json"
_CONFIG, _NEW = "config.json", ".incomplete"


@rank_monitor.named()
def save_pretrained(
    model: Any, folder: str | os.PathLike, *, max_shard_size: int | str = "50GB", save_original_format: bool = True
) -> None:
    """Writes the files that plain Transformers would write for ``model``, bit for bit. All ranks call it.

    Each rank writes a share of the files and holds at most the tensors of one file and of one block, never the model. Files are
    renamed when all are written: an interrupted save leaves the previous one in ``folder`` as it was. During the renames
    ``folder`` has no config.json, so that files of two saves are never read together; if the save is interrupted just then, the
    next save into ``folder``, or ``moefx.parallelize`` when it loads it, completes it (:func:`finish_save`).

    Args:
        model: a Transformers model, sharded or not.
        folder: is made if it does not exist.
        max_shard_size: the most bytes of a file, as in ``PreTrainedModel.save_pretrained``.
        save_original_format: write the checkpoint's own names and layout where the model was loaded with others, as there.
    """
    rank, world = rank_and_world()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    finish_save(folder)
    sharded = model.state_dict()
    whole = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in sharded.items()}
    whole = remove_tied_weights_from_state_dict(whole, model)
    written = _checkpoint_format(model, dict(whole)) if save_original_format else whole
    plan = _plan(written, max_shard_size)
    owner = {file: i % world for i, file in enumerate(plan.filename_to_tensors)}
    waiting: dict[str, dict[str, Tensor]] = {file: {} for file, r in owner.items() if r == rank}
    groups = list(_groups(model, list(whole)))
    for names in tqdm(groups, desc="saving", disable=rank > 0):
        here = {name: _gathered(sharded[name]) for name in names}  # on every rank: gathering is collective
        for name, t in (_checkpoint_format(model, here) if save_original_format else here).items():
            file = plan.tensor_to_filename[name]
            if owner[file] == rank:
                waiting[file][name] = t.cpu().contiguous().clone()
                if len(waiting[file]) == len(plan.filename_to_tensors[file]):
                    save_file(waiting.pop(file), folder / (file + _NEW), metadata={"format": "pt"})
        del here
    if waiting:
        file, found = next(iter(waiting.items()))
        missing = sorted(set(plan.filename_to_tensors[file]) - set(found))
        raise MoefxError(f"{folder / file} was not written: no block of the model has {missing[0]} (a bug of moefx): report it")
    barrier()
    if rank == 0:
        _write_index_and_configuration(model, folder, plan)
        (folder / _CONFIG).unlink(missing_ok=True)  # from here on the new files count
        _rename_files(folder)
    barrier()


def _checkpoint_format(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the names and layouts of the model's checkpoints."""
    with fsdp.own_classes(model, PreTrainedModel):
        return revert_weight_conversion(model, tensors)


def _plan(written: dict[str, Tensor], max_shard_size: int | str) -> Any:
    """Which tensor goes into which file, as huggingface_hub decides; views of one tensor stay together."""
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
    """Names that a weight conversion may need together: those of a block; all others alone."""
    blocks = [f"{p}." for p in hf.blocks(model)]
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(next((b for b in blocks if name.startswith(b)), name), []).append(name)
    yield from found.values()


def _write_index_and_configuration(model: Any, folder: Path, plan: Any) -> None:
    """Writes them beside the weights, under temporary names. The configuration comes last: it marks the save as complete."""
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


def _rename_files(folder: Path) -> None:
    """Renames the new files and removes those that they replace; can be repeated from wherever it was interrupted."""
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
    """Completes a :func:`save_pretrained` that was interrupted after all files were written. All ranks call it."""
    folder = Path(folder)
    if rank_and_world()[0] == 0 and (folder / (_CONFIG + _NEW)).exists() and not (folder / _CONFIG).exists():
        _rename_files(folder)
    barrier()


def check_files(folder: Path, model: Any) -> None:
    """Compares the shapes in a folder's safetensors headers with those that ``model`` (on meta) would save.

    Transformers names no tensor when shapes differ, and under expert parallelism silently takes its part of too many experts. A
    checkpoint in another layout than the model's own is left to Transformers' loading.

    Raises:
        MoefxError: the first tensor, by name, that is missing, unexpected or of another shape.
    """
    found = _shapes(folder)
    whole = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in model.state_dict().items()}
    own = {name: tuple(t.shape) for name, t in whole.items()}
    written = _checkpoint_format(model, remove_tied_weights_from_state_dict(whole, model))
    wanted = {name: tuple(t.shape) for name, t in written.items()}
    # Transformers also takes the model's own names, and either without the prefix of the base model
    prefix = f"{model.base_model_prefix}."
    readable = {**_without(prefix, own), **_without(prefix, wanted), **own, **wanted}
    kinds = {_kind(name) for name in wanted.keys() & found.keys()}  # in the model's own layout
    ignored = [re.compile(p) for p in (getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])]
    for name in sorted(readable.keys() | found.keys()):
        if name in readable and name in found:
            if readable[name] != found[name] and not _is_transposed(model, name, found[name], readable[name]):
                raise MoefxError(f"{folder} has {name} of shape {found[name]}, the model of {readable[name]}: {_ADVICE}")
        elif (name in wanted or name in found) and _kind(name) in kinds and not any(p.search(name) for p in ignored):
            problem = f"{folder} lacks {name}" if name in wanted else f"{folder} has {name}, which the model lacks"
            raise MoefxError(f"{problem}: {_ADVICE}")


def _conversions(model: Any) -> list[Any]:
    with fsdp.own_classes(model, PreTrainedModel):
        return get_model_conversion_mapping(model)


def _is_transposed(model: Any, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Does Transformers' loading transpose a tensor of shape ``found``, unless it has the shape ``wanted`` already?"""

    def transposed(op: Transpose) -> tuple[int, ...]:
        return tuple(torch.empty(found, device="meta").transpose(op.dim0, op.dim1).shape)

    return any(
        isinstance(op, Transpose) and op.check_dims and transposed(op) == wanted
        for c in _conversions(model)
        if isinstance(c, WeightConverter) and any(re.search(pattern, name) for pattern in c.source_patterns)
        for op in c.operations
    )


def _without(prefix: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items()}


_ADVICE = "load a checkpoint that matches this configuration"


def _kind(name: str) -> str:
    """The name without the indices of layers and experts."""
    return re.sub(r"\.\d+\.", ".*.", name)


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a folder; empty for a format that only Transformers reads."""
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
