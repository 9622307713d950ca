"""Loads a checkpoint folder into a sharded model: each rank reads its own shards, by Transformers' ``from_pretrained``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.distributed.tensor import DTensor
from transformers import AutoConfig
from transformers.distributed.utils import TransformersDeviceMesh
from transformers.utils import is_accelerate_available

from moefx.distributed import checkpoint_hf, fsdp_sharding
from moefx.distributed.layout import Layout, make_meshes
from moefx.errors import MoefxError
from moefx.integrations.transformers.auto import auto_class
from moefx.internals import transformers_patches


def load(folder: Path, layout: Layout, dtype: torch.dtype | None = None) -> Any:
    """The model of a folder in Hugging Face layout, sharded by ``layout``; ``dtype``: of the parameters.

    Conversions of the checkpoint's layout and the progress bar are Transformers' own.

    Raises:
        MoefxError: there is no configuration; a tensor is missing, unexpected or has another shape than the model's.
    """
    checkpoint_hf.finish_save(folder)
    if not (folder / "config.json").is_file():
        raise MoefxError(f"there is no {folder / 'config.json'}: pass a folder in Hugging Face layout, or a model")
    if not is_accelerate_available():
        raise MoefxError(f"loading {folder} over ranks needs accelerate, which is not installed: pip install moefx[train]")
    chosen: Mapping[str, Any] = {} if dtype is None else {"dtype": dtype}
    loader: Any = auto_class(AutoConfig.from_pretrained(folder)).from_pretrained
    with _sharding_by(layout, folder):
        model, info = loader(
            folder, distributed_config=layout.config, output_loading_info=True, ignore_mismatched_sizes=True, **chosen
        )
    for name, found, wanted in sorted(info["mismatched_keys"]):  # which Transformers' own error does not name
        raise MoefxError(f"{folder} has {name} of shape {tuple(found)}, the model of {tuple(wanted)} (of this rank's part)")
    for what, problem in (("missing_keys", "lacks {}"), ("unexpected_keys", "has {}, which the model lacks")):
        names = sorted(map(str, info[what]))
        if names:
            more = f" and {len(names) - 1} more" if names[1:] else ""
            problem = problem.format(names[0] + more)
            raise MoefxError(f"{folder} {problem}: load a checkpoint that matches this configuration")
    return model


@contextmanager
def _sharding_by(layout: Layout, folder: Path) -> Iterator[None]:
    """Within: ``from_pretrained`` checks the files and shards the empty model as ``parallelize`` does, before it reads any."""

    def prepare(cls: type, config: Any, device_map: Any = None) -> tuple[Any, Any, TransformersDeviceMesh | None]:
        return layout.config, layout.device, make_meshes(layout)

    called = []

    def distribute(cls: type, model: Any, config: Any, meshes: TransformersDeviceMesh | None) -> Any:
        called.append(model)
        checkpoint_hf.check_files(folder, model)
        return fsdp_sharding.shard(model, layout, meshes)

    with transformers_patches.distributed_loading(prepare, distribute, _transposing_shards):
        yield
    if not called:
        raise MoefxError(
            f"transformers {transformers.__version__} loaded {folder} without calling PreTrainedModel.maybe_distribute_model: "
            "use transformers 5.23 to 5.24"
        )


def _transposing_shards(convert: Callable[..., Any]) -> Callable[..., Any]:
    """Transformers' ``Transpose.convert``, for the part of a tensor that a rank has read.

    With ``check_dims`` it leaves a tensor alone that has the parameter's shape (Qwen3-VL-MoE's experts are published in one
    layout and saved in the other). Of a sharded parameter it compares the global shape, which no part has.
    """

    def convert_part(self: Any, input_dict: Any, source_patterns: list[str], target_patterns: list[str], **kwargs: Any) -> Any:
        parameter = kwargs["model"].get_parameter(kwargs["full_layer_name"]) if self.check_dims else None
        if isinstance(parameter, DTensor):
            (tensors,) = input_dict.values()
            part = tensors[0] if isinstance(tensors, list) else tensors
            if part.shape == parameter.to_local().shape:
                return {self.get_target_pattern(input_dict, source_patterns, target_patterns): part}
        return convert(self, input_dict, source_patterns, target_patterns, **kwargs)

    return convert_part
