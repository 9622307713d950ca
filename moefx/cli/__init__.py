"""The command line: ``moefx inspect`` (what would be rewritten), ``moefx models`` (which families), ``moefx doctor``.

Only the command that runs is imported: ``moefx --help`` and ``moefx --version`` load neither torch nor Transformers.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import logging
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import moefx
from moefx.errors import MoefxError


class _Version(argparse.Action):
    """Prints the versions that a bug report needs, from the metadata of the installed packages."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any):
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        found = ", ".join(f"{package} {_version(package)}" for package in ("torch", "transformers"))
        print(f"moefx {moefx.__version__} ({found}, Python {platform.python_version()})")
        parser.exit()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 1, with one sentence on stderr, if an argument is wrong."""
    parser = argparse.ArgumentParser(
        prog="moefx", description="Captures Hugging Face mixtures of experts and rewrites their graphs."
    )
    parser.add_argument("--version", action=_Version, help="the versions of moefx, torch and Transformers")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser(
        "inspect", help="what would be captured and rewritten of a model, and what it costs; nothing is downloaded"
    )
    p.add_argument("model", metavar="MODEL", help="a model_type (qwen3_moe), a config.json or a checkpoint folder")
    p.add_argument("--tiny", action="store_true", help="a small configuration of the same family")
    p.add_argument("--ep-size", type=int, default=1, metavar="N")
    p.add_argument("--pass", dest="pass_name", metavar="NAME", help="the graph after one pass")
    p.add_argument("--diff", action="store_true", help="what the pass (or each) changed")
    p.add_argument("--diagram", action="store_true", help="the graphs as a Mermaid flowchart (after the pass, if one is named)")
    p = commands.add_parser("models", help="the families of Transformers: what was captured and raised of each")
    p.add_argument("families", nargs="*", metavar="FAMILY")
    p.add_argument("--verify", action="store_true", help="compare a training step with the original model's")
    p.add_argument("--device", default="cpu", help="where these steps run: cuda for the kernels that training uses there")
    p.add_argument("--width", type=int, default=160, metavar="N", help="characters shown of each reason (--json has all)")
    commands.add_parser("doctor", help="which backends are usable here, and why the others are not")
    for p in commands.choices.values():
        p.add_argument("--json", action="store_true", help="machine-readable output")
    args = parser.parse_args(argv)
    run = importlib.import_module(f"moefx.cli.{args.command}").run
    logging.getLogger("transformers").setLevel(logging.ERROR)  # after the import, which sets it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(args)
        sys.stdout.flush()
    except MoefxError as error:
        print(f"moefx: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # who reads it has seen enough: `moefx inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes there, at exit
    return 0
