"""``moefx models``: what is captured and rewritten of each family of Transformers, on its small configuration."""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.table import Table
from tqdm import tqdm
from transformers import PreTrainedConfig

from moefx.analysis.report import Report
from moefx.analysis.text import render
from moefx.api import optimize
from moefx.api import report as report_of
from moefx.cli.inspect import inspect, known_type
from moefx.errors import MoefxError
from moefx.integrations import transformers as hf
from moefx.integrations.transformers.auto import LANGUAGE_MODELS, auto_class
from moefx.integrations.transformers.tiny_config import tiny_config
from moefx.runtime.verify import against


def moe_families() -> list[str]:
    """The language models of Transformers, with images or without, whose small configuration has experts."""
    found = []
    for name in LANGUAGE_MODELS:
        with contextlib.suppress(Exception):
            if hf.experts_in(tiny_config(name)) > 1:
                found.append(name)
    return found


#: The most parameters for which a small configuration is tried in real memory: some models read values, which meta lacks.
FITS = 150_000_000


def _parameters(config: PreTrainedConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in auto_class(config).from_config(config).parameters())


#: Batch and sequence of the batches that a family is verified with.
VERIFIED = ((1, 1), (2, 13), (1, 70))


def verified(plain: Any, model: Any) -> str:
    """Compares a training step of ``model`` with one of the original: how many tensors agree, or the worst that differs."""
    found = []
    for shape in VERIFIED:
        ids = torch.randint(1, model.config.get_text_config().vocab_size, shape, generator=torch.Generator().manual_seed(0))
        ids = ids.to(model.device)
        found.append(against(plain, model, {"input_ids": ids, "labels": ids, "use_cache": False}))
    wrong = [f.worst for f in found if not f.ok]
    if wrong:
        return f"WRONG: {wrong[0].name}, {wrong[0].relative:.1e}"
    return f"verified: {len(found[0].rows)} tensors"


def family_row(family: str, verify: bool = False, device: str = "cpu") -> dict[str, Any]:
    """What is captured and raised of a family's small configuration, and why the rest is not.

    With ``verify``, a training step on ``device`` is compared with the original model's.
    """
    row: dict[str, Any] = {"family": family, "captured": 0, "raised": {}, "notes": []}
    try:
        config = tiny_config(family)
        fits = _parameters(config) < FITS
        if verify and fits:
            torch.manual_seed(0)
            plain = auto_class(config).from_config(config).train().to(device)
            model = optimize(copy.deepcopy(plain), compile=False)
            _describe(report_of(model), row)
            row["verified"] = verified(plain, model)
        else:
            _describe(inspect(config, 1, "cpu" if fits else "meta"), row)
    except Exception as error:  # one family must not hide the others
        name = "" if isinstance(error, MoefxError) else f"{type(error).__name__}: "
        row["failed"] = f"{name}{error}".splitlines()[0]
        row["notes"].append(row["failed"])
    return row


def _describe(report: Report, row: dict[str, Any]) -> None:
    for f in report.program:
        for op, n in f.expects.items():
            made, promised = row["raised"].get(op, (0, 0))
            many = len(f.instances)
            row["raised"][op] = made + min(n, report.made(op, f) or 0) * many, promised + n * many
    row["captured"] = sum(len(f.instances) for f in report.program)
    # a shortfall quotes what is left, where that is its reason
    short = report.shortfall()
    left = [f"{x.module}: {x.reason}" for x in report.not_captured if not any(x.reason in s for s in short)]
    row["notes"] = list(dict.fromkeys([*short, *left]))


def run(args: argparse.Namespace) -> None:
    """Prints a row per family; raises MoefxError if one differs from its original model or failed."""
    families = [known_type(f) for f in args.families] or moe_families()
    check_device(args.device)
    rows = [family_row(f, args.verify, args.device) for f in tqdm(families, file=sys.stderr, disable=None)]
    wrong = [r["family"] for r in rows if r.get("verified", "").startswith("WRONG")]
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        _show_families(rows, args)
    if wrong:
        raise MoefxError(f"the optimized model differs from the original: {', '.join(wrong)}")
    failed = {r["family"]: r["failed"] for r in rows if "failed" in r}
    if failed:
        raise MoefxError("could not be tried: " + "; ".join(f"{family}: {why}" for family, why in failed.items()))


def check_device(name: str) -> None:
    """Raises MoefxError if this machine has no device of this name."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise MoefxError(f"--device {name} is not a device: pass cpu, cuda or cuda:1") from error
    if device.type != "cuda":
        return
    if not torch.cuda.is_available():
        raise MoefxError(f"--device {name}, but torch {torch.__version__} finds no CUDA device: see `moefx doctor`")
    if (device.index or 0) >= torch.cuda.device_count():
        raise MoefxError(f"--device {name}, but the last of the CUDA devices here is cuda:{torch.cuda.device_count() - 1}")


def _show_families(rows: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> None:
    table = Table(
        "family",
        "captured",
        "raised of expected",
        "what is not, and why",
        title="small configurations of each family",
        title_justify="left",
        show_lines=True,
    )
    for r in rows:
        raised = "\n".join(f"{op} {made}/{promised}" for op, (made, promised) in r["raised"].items())
        raised += f"\n{r['verified']}" if "verified" in r else ""
        table.add_row(r["family"], str(r["captured"]), raised, "\n".join(shortened(n, args.width) for n in r["notes"]))
    print(render(table), end="")


def shortened(text: str, most: int) -> str:
    """``text`` cut at a word to at most ``most`` characters."""
    return text if len(text) <= most else text[: max(most, 20) - 4].rsplit(" ", 1)[0] + " ..."
