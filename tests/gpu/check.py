"""``make gpu-check``: what a machine with GPUs must pass before a change to kernels, parallelism, examples or README is done.

Runs tests/gpu (every command of the README and generated trainings among them) and tests/kernels on the GPUs, over several
processes, and writes benchmarks/results/first_contact-<gpu>x<n>.json: commit, versions, what passed. Exit code 1
if anything failed. Outside of a git repository, COMMIT names the commit.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import torch

from moefx.internals import nccl

ROOT = Path(__file__).parent.parent.parent
#: What belongs to which part of the report, by the beginning of a test's name.
SUITES = {
    "README, docs and examples": "tests.gpu.test_readme",
    "what people do first": "tests.gpu.test_first_contact",
    "GPU tests": "tests.gpu",
    "kernels": "tests.kernels",
}
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "peft",
    "trl",
    "transformer-engine",
    "quack-kernels",
    "flash-attn-4",
    "deep_ep",
)


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    named = os.environ.get("COMMIT")
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return named or found.stdout.strip() or "unknown"


def run(processes: int) -> tuple[int, list[ElementTree.Element]]:
    """Two pytests side by side, whose long tests run beside the many short ones; the worse exit code and all cases. A step that
    cannot be recorded, which some tests of tests/gpu provoke, may leave a process that no other test should run in."""
    with tempfile.TemporaryDirectory() as folder:
        shares = {"tests/gpu": processes - processes // 3, "tests/kernels": processes // 3}
        reports = {part: Path(folder, f"{Path(part).name}.xml") for part in shares}
        options = ["--dist", "loadgroup", "--durations", "10"]
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "pytest", part, "-n", str(n), *options, f"--junit-xml={reports[part]}"], cwd=ROOT
            )
            for part, n in shares.items()
        ]
        codes = [p.wait() for p in started]
        return max(codes), [c for r in reports.values() if r.exists() for c in ElementTree.parse(r).iter("testcase")]


def sorted_out(cases: list[ElementTree.Element]) -> dict[str, dict]:
    """Of each part what passed, failed, and was skipped, with the reasons."""
    found: dict[str, dict] = {name: {"passed": 0, "failed": [], "skipped": Counter()} for name in SUITES}
    for case in cases:
        part = found[next(name for name, start in SUITES.items() if (case.get("classname") or "").startswith(start))]
        outcome = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        if outcome is None:
            part["passed"] += 1
        elif outcome.tag == "skipped":
            part["skipped"][re.sub(r".*: ", "", outcome.get("message") or "")] += 1
        else:
            part["failed"].append(f"{case.get('classname')}::{case.get('name')}")
    return found


def main() -> int:
    if not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA device: run it on a machine with a GPU", file=sys.stderr)
        return 1
    started, gpu = time.monotonic(), re.sub(r"\W+", "-", torch.cuda.get_device_name().lower())
    code, cases = run(max(3, min(15, (os.cpu_count() or 2) // 2)))
    results = sorted_out(cases)
    summary = {
        "commit": commit(), "gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count(),
        "cuda": torch.version.cuda, "nccl": ".".join(map(str, nccl.version())),
        "python": sys.version.split()[0], "versions": {p: v for p in PACKAGES if (v := version(p))}, "seconds": round(time.monotonic() - started),
        "exit_code": code, "results": results,
    }  # fmt: skip
    path = ROOT / f"benchmarks/results/first_contact-{gpu}x{torch.cuda.device_count()}.json"
    path.write_text(json.dumps(summary, indent=1) + "\n")
    print(f"written: {path.relative_to(ROOT)}")
    for name, part in results.items():
        print(f"{name}: {part['passed']} passed, {len(part['failed'])} failed, {sum(part['skipped'].values())} skipped")
    return code


if __name__ == "__main__":
    sys.exit(main())
