"""``moefx inspect``: what would be captured and rewritten of a model, on the meta device."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, PreTrainedConfig

from moefx import backends, passes
from moefx.analysis.report import Report
from moefx.api import rewrite
from moefx.distributed import expert_sharding
from moefx.errors import MoefxError
from moefx.frontend.capture import capture
from moefx.integrations import transformers as hf
from moefx.integrations.transformers.auto import LANGUAGE_MODELS, auto_class
from moefx.integrations.transformers.tiny_config import tiny_config
from moefx.options import Options


def read_config(model: str, tiny: bool) -> PreTrainedConfig:
    """Reads the configuration of a model_type, a config.json or a checkpoint folder; ``tiny``: a small one of the family."""
    path = Path(model)
    if path.suffix == ".json" or path.exists() or "/" in model:
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise MoefxError(f"there is no {file}: pass a model_type, a config.json or a folder that holds one")
        try:
            found = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise MoefxError(f"{file} is not readable as JSON ({error}): pass a valid config.json") from error
        if not isinstance(found, dict) or "model_type" not in found:
            raise MoefxError(f"{file} has no model_type: it is not a Transformers config.json")
        return (
            tiny_config(known_type(found["model_type"]))
            if tiny
            else AutoConfig.for_model(known_type(found.pop("model_type")), **found)
        )
    return tiny_config(known_type(model)) if tiny else AutoConfig.for_model(known_type(model))


def known_type(model_type: str) -> str:
    """Returns ``model_type``; raises MoefxError, with similar names, if Transformers has no such language model."""
    if model_type not in LANGUAGE_MODELS:
        near = difflib.get_close_matches(model_type, LANGUAGE_MODELS, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`moefx models` lists the families"
        raise MoefxError(f"Transformers {transformers.__version__} has no language model of type {model_type!r}: {hint}")
    return model_type


@contextlib.contextmanager
def ranks(ep_size: int) -> Iterator[Any]:
    """A fake process group of ``ep_size`` ranks, enough to see the structure; yields its mesh, or None for one rank."""
    if ep_size == 1:
        yield None
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore  # not part of every build of torch

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ep_size)
    try:
        yield init_device_mesh("cpu", (ep_size,), mesh_dim_names=("ep",))
    finally:
        dist.destroy_process_group()


def inspect(config: PreTrainedConfig, ep_size: int, device: str = "meta") -> Report:
    """Captures and rewrites a model of ``config`` on ``device``, without weights and without installing anything."""
    with torch.device(device):
        model = auto_class(config).from_config(config)
    hf.check(model)
    with ranks(ep_size) as mesh:
        ep_size, mesh = expert_sharding.make_mesh(model, ep_size, mesh)
        plan = expert_sharding.plan(model, Options(), backends.resolve(None), ep_size, mesh)
        return rewrite(capture(model), plan, passes.default(), model)


def run(args: argparse.Namespace) -> None:
    """Prints the report and costs of a model, or the part that ``args`` name."""
    if args.pass_name:
        passes.default()[args.pass_name]  # an unknown name, before a minute of work
    report = inspect(read_config(args.model, args.tiny), args.ep_size)
    if args.json:
        found = report.to_dict()
        found["cost"] = {n: [str(p) for p in c.parts] for n, (c, _) in report.cost().functions.items()}
        print(json.dumps(found, indent=1))
    elif args.diagram:
        print(report.diagram(after=args.pass_name), end="")
    elif args.pass_name:
        print(report[args.pass_name].diff() if args.diff else f"{report[args.pass_name]}\n{report[args.pass_name].code}")
    elif args.diff:
        for p in report.passes:
            print(f"# {p.name}\n{p.diff()}")
    else:
        print(report)
        print(report.cost())
