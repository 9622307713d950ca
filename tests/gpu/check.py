"""``make gpu-check``: what a machine with GPUs must pass before a change to kernels, parallelism, examples or README is done.

Runs tests/gpu (with every command of the README there), tests/kernels and the first-contact cases on the GPUs, each file's tests
over several processes, and writes benchmarks/results/first_contact-<gpu>x<n>.json: commit, versions, what passed. Exit code 1
if anything failed. COMMIT names the commit where the folder is no git repository.
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

ROOT = Path(__file__).parent.parent.parent
SUITES = {
    "README, docs and examples": ["tests/gpu/test_readme.py"],
    "GPU tests": ["tests/gpu", "--ignore", "tests/gpu/test_readme.py"],
    "kernels": ["tests/kernels"],
}
PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "trl", "transformer-engine", "quack-kernels", "flash-attn-4", "deep_ep")


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    named = os.environ.get("COMMIT")
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return named or found.stdout.strip() or "unknown"


def run(name: str, paths: list[str], processes: int) -> dict:
    """One pytest, its output shown as it comes; what passed, failed and was skipped, with the reasons."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", *paths, "-n", str(processes), "--dist", "loadgroup", f"--junit-xml={report}"]
        started = time.monotonic()
        code = subprocess.run([*command, "--durations", "10"], cwd=ROOT).returncode
        cases = [*ElementTree.parse(report).iter("testcase")] if report.exists() else []
    found = {"exit_code": code, "seconds": round(time.monotonic() - started), "passed": 0, "failed": [], "skipped": Counter()}
    for case in cases:
        outcome = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        if outcome is None:
            found["passed"] += 1
        elif outcome.tag == "skipped":
            found["skipped"][re.sub(r".*: ", "", outcome.get("message") or "")] += 1
        else:
            found["failed"].append(f"{case.get('classname')}::{case.get('name')}")
    print(f"{name}: {found['passed']} passed, {len(found['failed'])} failed, {found['seconds']} s", flush=True)
    return found


def main() -> int:
    if not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA device: run it on a machine with a GPU", file=sys.stderr)
        return 1
    processes = max(2, min(8, (os.cpu_count() or 2) // 2))
    gpu = re.sub(r"\W+", "-", torch.cuda.get_device_name().lower())
    results = {name: run(name, paths, processes) for name, paths in SUITES.items()}
    summary = {
        "commit": commit(), "gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count(),
        "cuda": torch.version.cuda, "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "python": sys.version.split()[0], "versions": {p: v for p in PACKAGES if (v := version(p))}, "results": results,
    }  # fmt: skip
    path = ROOT / f"benchmarks/results/first_contact-{gpu}x{torch.cuda.device_count()}.json"
    path.write_text(json.dumps(summary, indent=1) + "\n")
    print(f"written: {path.relative_to(ROOT)}")
    return int(any(r["exit_code"] not in (0, 5) for r in results.values()))  # 5: nothing to run


if __name__ == "__main__":
    sys.exit(main())
