"""Triton's compiler accepts every kernel, and a kept launch passes the arguments that Triton would; needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    cache = {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "CUDA_VISIBLE_DEVICES": ""}
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | cache
    script = Path(__file__).with_name("launched_twice.py")
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_compiles_for_hopper(said):
    assert len(said["compiled"]) > 15, said
    assert not {kernel: problem for kernel, problem in said["compiled"].items() if problem is not None}


def test_each_kernel_is_handed_what_triton_would_hand_it(said):
    assert len(said["same"]) == 26 and all(said["same"].values()), said["same"]
