"""Runs ``dispatch_ranks.py`` on two ranks, on two GPUs or on one that they share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moefx.internals import nccl
from tests.support.pages import error_of

HERE = Path(__file__).parent


@pytest.mark.skipif(
    torch.cuda.device_count() < 2 and (not torch.cuda.is_available() or nccl.version() < (2, 30)),
    reason="one GPU, and NCCL before 2.30 lets no two ranks share it",
)
def test_transports_agree_with_one_process_and_train():
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr",
        "127.0.0.1",
        "--nproc-per-node",
        "2",
    ]
    found = subprocess.run(
        [*launch, str(HERE / "dispatch_ranks.py"), "--steps", "20"],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "NCCL_MULTI_RANK_GPU_ENABLE": "1"},
    )
    assert found.returncode == 0, found.stdout[-1000:] + error_of(found.stderr)
