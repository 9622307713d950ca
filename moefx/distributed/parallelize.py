"""The sharded model of a model or of a checkpoint folder: the first half of :func:`moefx.parallelize`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from moefx.distributed import expert_sharding, fsdp_sharding, load_sharded
from moefx.distributed.initialize import initialize
from moefx.distributed.layout import Layout, make_meshes
from moefx.errors import MoefxError
from moefx.integrations import fsdp
from moefx.integrations import transformers as hf
from moefx.integrations.peft import unwrap_peft


def shard(model: Any, layout: Layout, dtype: torch.dtype | None = None) -> Any:
    """Shards ``model`` across all ranks in place, or loads a folder sharded; ``dtype`` is for a folder."""
    if isinstance(model, (str, os.PathLike)):
        return load_sharded.load(Path(model), layout, dtype)
    if dtype is not None:
        raise MoefxError(f"dtype={dtype} is for a checkpoint folder, but a {type(model).__name__} was given: convert it before")
    unwrapped: Any = unwrap_peft(model)
    hf.check(unwrapped)
    if fsdp.is_sharded(unwrapped) or getattr(unwrapped, "_moefx", None) is not None:
        raise MoefxError(f"{type(unwrapped).__name__} is optimized or sharded already: call parallelize first")
    if layout.ep_size > 1:
        expert_sharding.check_experts(unwrapped, layout.ep_size)
    on_meta = next(unwrapped.parameters()).is_meta
    fsdp_sharding.shard(unwrapped, layout, make_meshes(layout))
    if on_meta:
        initialize(unwrapped, layout.device)
    return model
