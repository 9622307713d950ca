"""The examples run as they stand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]


@pytest.mark.parametrize(
    "command,text",
    [
        (["examples/inspect_graph.py"], "moefx.route"),
        (["examples/custom_pass.py"], "gated_linear: 2 made, 0 missed"),
        (["examples/custom_backend.py"], "four lines of my own"),
        ([*TORCHRUN, "examples/train_ep.py", "--steps", "3"], "last loss"),
        (["examples/quickstart.py", "--steps", "32", "--no-compile", "--out", "{tmp}"], "as it should be"),
    ],
    ids=["inspect_graph", "custom_pass", "custom_backend", "train_ep", "quickstart"],
)  # fmt: skip
def test_example(command, text, tmp_path):
    done = subprocess.run(
        [sys.executable, *(a.format(tmp=tmp_path) for a in command)], cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert text in done.stdout
