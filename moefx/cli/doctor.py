"""``moefx doctor``: what is usable on this machine, and what to do about the rest."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
from pathlib import Path

import torch
import transformers
from rich.table import Table

import moefx
from moefx import backends
from moefx.analysis.text import render
from moefx.backends import deepep
from moefx.internals import nccl


def cuda_lacks(version: str | None) -> str:
    """What does not run with this CUDA version, and what to do; empty if everything does."""
    if tuple(map(int, (version or "0.0").split("."))) >= deepep.CUDA:
        return ""
    wanted = ".".join(map(str, deepep.CUDA))
    return f"; DeepEP needs CUDA {wanted} or later: install a torch that was built with it (torch.version.cuda)"


def nccl_state() -> str:
    """NCCL's version, and what it lacks if it is an old one."""
    if not torch.cuda.is_available() or not torch.distributed.is_nccl_available():
        return "not used: no CUDA device"
    found = nccl.version()
    lacks = f"; DeepEP's ElasticBuffer and NCCL EP need 2.30.4: pip install -U nvidia-nccl-cu{(torch.version.cuda or '13')[:2]}"
    return ".".join(map(str, found)) + (lacks if found < (2, 30, 4) else "")


def diagnose() -> list[dict[str, str]]:
    """A row per component: its version or state, and what to do if it is missing."""

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return ""

    cuda = (
        f"{torch.version.cuda}, {torch.cuda.get_device_name()}{cuda_lacks(torch.version.cuda)}"
        if torch.cuda.is_available()
        else "no CUDA device: graphs run on the CPU"
    )
    rows = [
        {"what": "moefx", "state": f"{version('moefx') or 'not installed'}, {Path(moefx.__file__).parent}"},
        {"what": "python", "state": platform.python_version()},
        {"what": "torch", "state": torch.__version__},
        {"what": "CUDA", "state": cuda},
        {"what": "NCCL", "state": nccl_state()},
        {"what": "transformers", "state": transformers.__version__},
    ]
    for name, backend in backends.builtin().items():
        rows.append({"what": f"backend {name}", "state": backend.available() or "usable"})
    for package, module, how in (
        ("triton", "triton", "pip install moefx[gpu]"),
        ("transformer-engine", "transformer_engine", "pip install moefx[te]"),
        ("deep_ep", "deep_ep", deepep.INSTALL),
    ):
        there = importlib.util.find_spec(module) is not None
        rows.append({"what": package, "state": (version(package) or "installed") if there else f"not installed: {how}"})
    return rows


def run(args: argparse.Namespace) -> None:
    """Prints what :func:`diagnose` finds."""
    rows = diagnose()
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("what", "state")
    for r in rows:
        table.add_row(r["what"], r["state"])
    print(render(table), end="")
