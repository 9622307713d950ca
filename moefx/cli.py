"""The command line: ``moefx inspect`` (what would be rewritten), ``moefx models`` (which families), ``moefx doctor``."""

from __future__ import annotations

import argparse
import contextlib
import copy
import difflib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedConfig

from moefx import backends, passes
from moefx.analysis.report import Report
from moefx.analysis.text import render
from moefx.api import optimize, rewrite
from moefx.api import report as report_of
from moefx.backends import deepep
from moefx.distributed import expert_sharding
from moefx.errors import MoefxError
from moefx.frontend.capture import capture
from moefx.integrations import transformers as hf
from moefx.integrations.transformers.auto import LANGUAGE_MODELS, auto_class
from moefx.integrations.transformers.tiny_config import tiny_config
from moefx.ir.plan import Options
from moefx.runtime.verify import against


def read_config(model: str, tiny: bool) -> PreTrainedConfig:
    """The configuration of a model_type, a config.json or a checkpoint folder."""
    path = Path(model)
    if path.suffix == ".json" or path.exists() or "/" in model:
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise MoefxError(f"there is no {file}: pass a model_type, a config.json or a folder that holds one")
        try:
            found = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise MoefxError(f"{file} is not readable as JSON ({error}): pass an intact config.json") from error
        if not isinstance(found, dict) or "model_type" not in found:
            raise MoefxError(f"{file} has no model_type: it is not a Transformers config.json")
        return (
            tiny_config(known_type(found["model_type"]))
            if tiny
            else AutoConfig.for_model(known_type(found.pop("model_type")), **found)
        )
    return tiny_config(known_type(model)) if tiny else AutoConfig.for_model(known_type(model))


def known_type(model_type: str) -> str:
    if model_type not in LANGUAGE_MODELS:
        near = difflib.get_close_matches(model_type, LANGUAGE_MODELS, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`moefx models` lists the families"
        raise MoefxError(f"Transformers {transformers.__version__} has no language model of type {model_type!r}: {hint}")
    return model_type


@contextlib.contextmanager
def ranks(ep_size: int) -> Iterator[Any]:
    """A process group that only pretends to have ``ep_size`` ranks: enough to see the structure."""
    if ep_size == 1:
        yield None
        return
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ep_size)
    try:
        yield init_device_mesh("cpu", (ep_size,), mesh_dim_names=("ep",))
    finally:
        dist.destroy_process_group()


def inspect(config: PreTrainedConfig, ep_size: int, device: str = "meta") -> Report:
    """Captures and rewrites a model of ``config`` without installing anything."""
    with torch.device(device):
        model = auto_class(config).from_config(config)
    hf.check(model)
    with ranks(ep_size) as mesh:
        ep_size, mesh = expert_sharding.make_mesh(model, ep_size, mesh)
        plan = expert_sharding.plan(model, Options(), backends.resolve(None), ep_size, mesh)
        return rewrite(capture(model), plan, passes.default(), model)


def run_inspect(args: argparse.Namespace) -> None:
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


def moe_families() -> list[str]:
    """The language models of Transformers, with images or without, whose small configuration names experts."""
    found = []
    for name in LANGUAGE_MODELS:
        with contextlib.suppress(Exception):
            if hf.experts_in(tiny_config(name)) > 1:
                found.append(name)
    return found


#: Parameters that a small configuration may have to be tried with real memory: some models look at values, which meta has not.
FITS = 150_000_000


def _parameters(config: PreTrainedConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in auto_class(config).from_config(config).parameters())


#: Batch and sequence of the batches that a family is verified with.
VERIFIED = ((1, 1), (2, 13), (1, 70))


def verified(plain: Any, model: Any) -> str:
    """What was compared of a training step of ``model`` with one of the untouched model; the worst, if it differs."""
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
    """What is captured and raised of a family's small configuration; the reasons for all that is not. ``device`` runs the steps
    that are compared.
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
    left = [f"{x.module}: {x.reason}" for x in report.left if not any(x.reason in s for s in short)]
    row["notes"] = list(dict.fromkeys([*short, *left]))


def run_models(args: argparse.Namespace) -> None:
    families = [known_type(f) for f in args.families] or moe_families()
    check_device(args.device)
    rows = [family_row(f, args.verify, args.device) for f in tqdm(families, file=sys.stderr, disable=None)]
    wrong = [r["family"] for r in rows if r.get("verified", "").startswith("WRONG")]
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        _show_families(rows, args)
    if wrong:
        raise MoefxError(f"the optimized model is not the untouched one: {', '.join(wrong)}")
    failed = {r["family"]: r["failed"] for r in rows if "failed" in r}
    if failed:
        raise MoefxError("could not be tried: " + "; ".join(f"{family}: {why}" for family, why in failed.items()))


def check_device(name: str) -> None:
    """Raises MoefxError if there is no device of this name here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise MoefxError(f"--device {name} is no name of a device: pass cpu, cuda or cuda:1, say") from error
    if device.type != "cuda":
        return
    if not torch.cuda.is_available():
        raise MoefxError(f"--device {name}, but torch {torch.__version__} sees no CUDA device: `moefx doctor` says more")
    if (device.index or 0) >= torch.cuda.device_count():
        raise MoefxError(f"--device {name}, but the last of the CUDA devices here is cuda:{torch.cuda.device_count() - 1}")


def _show_families(rows: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> None:
    table = Table(
        "family",
        "captured",
        "raised of promised",
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
    return text if len(text) <= most else text[: max(most, 20) - 4].rsplit(" ", 1)[0] + " ..."


def cuda_lacks(version: str | None) -> str:
    """What cannot run with this CUDA, and what to do."""
    if tuple(map(int, (version or "0.0").split("."))) >= deepep.CUDA:
        return ""
    wanted = ".".join(map(str, deepep.CUDA))
    return f"; DeepEP needs CUDA {wanted} or later: install a torch that was built with it (torch.version.cuda)"


def nccl_state() -> str:
    """NCCL's version, and what an older one lacks."""
    if not torch.cuda.is_available() or not torch.distributed.is_nccl_available():
        return "not used: no CUDA device"
    found = torch.cuda.nccl.version()
    lacks = f"; DeepEP's ElasticBuffer and NCCL EP need 2.30.4: pip install -U nvidia-nccl-cu{(torch.version.cuda or '13')[:2]}"
    return ".".join(map(str, found)) + (lacks if found < (2, 30, 4) else "")


def diagnose() -> list[dict[str, str]]:
    """What is here: name, version or state, and what to do where something is missing."""

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
        {"what": "moefx", "state": f"{version('moefx') or 'not installed'}, {Path(__file__).parent}"},
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


def run_doctor(args: argparse.Namespace) -> None:
    rows = diagnose()
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("what", "state")
    for r in rows:
        table.add_row(r["what"], r["state"])
    print(render(table), end="")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1, with one sentence on stderr, for bad input."""
    parser = argparse.ArgumentParser(prog="moefx", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("inspect", help="what would be captured and rewritten, and what it costs; nothing is downloaded")
    p.add_argument("model", metavar="MODEL", help="a model_type (qwen3_moe), a config.json or a checkpoint folder")
    p.add_argument("--tiny", action="store_true", help="a small configuration of the same family")
    p.add_argument("--ep-size", type=int, default=1, metavar="N")
    p.add_argument("--pass", dest="pass_name", metavar="NAME", help="the graph after one pass")
    p.add_argument("--diff", action="store_true", help="what the pass (or each) changed")
    p.add_argument("--diagram", action="store_true", help="the graphs as a Mermaid flowchart (after the pass, if one is named)")
    p.set_defaults(run=run_inspect)
    p = commands.add_parser("models", help="the families of Transformers: what was captured and raised of each")
    p.add_argument("families", nargs="*", metavar="FAMILY")
    p.add_argument("--verify", action="store_true", help="compare a training step with the untouched model's")
    p.add_argument("--device", default="cpu", help="that runs these steps: cuda for the kernels that training would take there")
    p.add_argument("--width", type=int, default=160, metavar="N", help="letters of each reason (--json has all)")
    p.set_defaults(run=run_models)
    p = commands.add_parser("doctor", help="what is usable here, and why the rest is not")
    p.set_defaults(run=run_doctor)
    for p in commands.choices.values():
        p.add_argument("--json", action="store_true", help="for programs")
    args = parser.parse_args(argv)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            args.run(args)
        sys.stdout.flush()
    except MoefxError as error:
        print(f"moefx: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # who reads it has seen enough: `moefx inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes there, at exit
    return 0


if __name__ == "__main__":
    sys.exit(main())
