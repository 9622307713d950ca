"""The command line, called in this process: output, exit codes and error messages."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from moefx import backends, ops
from moefx.backends.deepep import library
from moefx.backends.experimental import te_ep
from moefx.cli import main, models
from moefx.cli.doctor import cuda_lacks


def test_inspect_as_json_over_fake_ranks(capsys):
    assert main(["inspect", "qwen3_moe", "--tiny", "--ep-size", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ep_size"] == 4 and found["shortfall"] == []
    assert {"dispatch", "combine", "grouped_mlp"} <= {k["op"] for k in found["kernels"]}
    assert "ep" in found["cost"]["Qwen3MoeDecoderLayer"][3]


def test_inspect_a_config_file_and_one_pass(capsys, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(
        json.dumps(
            {
                "model_type": "mixtral",
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
            }
        )
    )
    assert main(["inspect", str(tmp_path), "--pass", "route", "--diff"]) == 0
    assert "+    topk_weights, topk_ids = ops.route(" in capsys.readouterr().out


def test_inspect_fits_100_columns(capsys):
    assert main(["inspect", "qwen3_moe", "--tiny"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


def test_doctor(capsys):
    assert main(["doctor", "--json"]) == 0
    rows = {r["what"]: r["state"] for r in json.loads(capsys.readouterr().out)}
    assert rows["backend torch"] == "usable" and "deep_ep" in rows


def test_models(capsys):
    assert main(["models", "olmoe", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["raised"]["rms_norm"] == [9, 9] and row["raised"]["route"] == [2, 2] and row["notes"] == []


def test_models_are_verified(capsys, monkeypatch):
    assert main(["models", "olmoe", "--verify"]) == 0
    assert "verified: " in capsys.readouterr().out
    real = ops.rms_norm

    def off(x, weight, eps, **options):
        return real(x, weight, eps, **options) * 1.01

    monkeypatch.setitem(backends.builtin()["torch"].kernels, ops.rms_norm, backends.Kernel(off))
    assert main(["models", "olmoe", "--verify"]) == 1
    said = capsys.readouterr()
    assert "WRONG: " in said.out and said.err.endswith("the optimized model differs from the original: olmoe\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(capsys):
    assert main(["models", "olmoe", "--verify", "--device", "cuda"]) == 1
    assert "--device cuda, but torch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text"),
    [("gpu", "--device gpu is not a device"), ("cuda:2", "the last of the CUDA devices here is cuda:1")],
)
def test_other_devices_that_are_not_there(name, text, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main(["models", "olmoe", "--verify", "--device", name]) == 1
    assert text in capsys.readouterr().err


def test_a_device_that_is_there_runs_the_steps(capsys, monkeypatch):
    seen = []

    def row(family, verify, device):
        seen.append((family, verify, device))
        return {"family": family, "captured": 1, "raised": {}, "notes": [], "verified": "verified: 3 tensors"}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(models, "family_row", row)
    assert main(["models", "olmoe", "--verify", "--device", "cuda"]) == 0
    assert seen == [("olmoe", True, "cuda")] and "verified: 3 tensors" in capsys.readouterr().out


def test_a_family_that_cannot_be_tried_is_no_success(capsys, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(models, "optimize", fail)
    assert main(["models", "olmoe", "mixtral", "--verify"]) == 1
    said = capsys.readouterr()
    assert "out of luck" in said.out and said.err.endswith(
        "olmoe: RuntimeError: out of luck; mixtral: RuntimeError: out of luck\n"
    )


@pytest.mark.parametrize("build", ["13.0", "12.8", "12.1", "11.8", None])  # None: a torch for ROCm
@pytest.mark.parametrize("nccl", [(2, 31, 0), (2, 28, 9)])
@pytest.mark.parametrize("capability", [(9, 0), (7, 5), (12, 0)])
@pytest.mark.parametrize("as_json", [True, False])
def test_doctor_on_a_machine_with_cuda(capsys, monkeypatch, build, nccl, capability, as_json):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: nccl)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", build)
    assert main(["doctor", *["--json"] * as_json]) == 0
    said = capsys.readouterr().out
    assert "Some GPU" in said
    if as_json:
        rows = {r["what"]: r["state"] for r in json.loads(said)}
        old = build in ("12.1", "11.8", None)
        assert ("DeepEP needs CUDA 12.3 or later" in rows["CUDA"]) == old
        assert ("need 2.30.4" in rows["NCCL"]) == (nccl < (2, 30)) and rows["NCCL"].startswith(".".join(map(str, nccl)))
        assert rows["backend triton"] == "usable"


def test_doctor_by_itself_imports_what_it_asks():
    """In a process that has imported no backend yet."""
    code = (
        "import torch\ntorch.cuda.is_available = lambda: True\ntorch.cuda.get_device_name = lambda *_: 'Some GPU'\n"
        "torch.cuda.get_device_capability = lambda *_: (9, 0)\ntorch.cuda.nccl.version = lambda: (2, 28, 9)\n"
        "torch.version.cuda = '12.1'\nfrom moefx.cli.doctor import diagnose\nprint(diagnose()[3]['state'])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("12.1, Some GPU; DeepEP needs CUDA 12.3")


def test_blocks_that_look_at_values_are_left_and_nothing_else_is_said(capsys):
    """torch.export prints the whole graph of a block that branches on data."""
    assert main(["models", "qwen4_exp_text", "--json"]) == 0
    said = capsys.readouterr()
    (row,) = json.loads(said.out)
    assert row["raised"]["experts"][0] > 0 and any("data-dependent" in n for n in row["notes"])
    assert said.err == ""


def test_a_reader_that_has_seen_enough(monkeypatch, capfd):
    """``moefx doctor --json | true``: no traceback, here or when Python closes what it wrote to."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        assert main(["doctor", "--json"]) == 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["inspect", "qwen3_mo"], "no language model of type 'qwen3_mo': did you mean qwen3_moe"),
        (["inspect", "nowhere/config.json"], "there is no"),
        (["inspect", "qwen3_moe", "--tiny", "--pass", "rout"], "no pass is named 'rout'"),
        (["inspect", "qwen3_moe", "--tiny", "--ep-size", "3"], "ep_size=3 does not divide the 8 experts"),
        (["inspect", "llama", "--tiny"], "is dense"),
    ],
)
def test_bad_input(argv, text, capsys):
    assert main(argv) == 1
    err = capsys.readouterr().err
    assert text in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("content", ["{", "[1]", "{}"])
def test_corrupt_config(content, capsys, tmp_path):
    (tmp_path / "config.json").write_text(content)
    assert main(["inspect", str(tmp_path)]) == 1
    assert "config.json" in capsys.readouterr().err


class _Old:
    class Buffer:
        def dispatch(self, x, handle=None): ...


class _New:
    class Buffer:
        def dispatch(self, x, handle=None, num_worst_tokens=0): ...


def test_doctor_says_what_to_do_about_a_deep_ep_that_does_not_serve(monkeypatch):
    monkeypatch.setattr(library, "version", lambda: "1.1.0")
    assert library.too_old(_New) is None
    assert library.too_old(_Old).startswith(
        "deep_ep 1.1.0 is too old, its dispatch has no num_worst_tokens (1.2 and later have): build it"
    )
    linked = library.import_problem(ImportError("x.so: undefined symbol: __cudaRegisterLinkedBinary_6acb_runtime_cu"))
    assert "device code was never linked" in linked and "take '-rdc=true' out of setup.py" in linked
    other = library.import_problem(ImportError("x.so: undefined symbol: _ZN3c105ErrorC2E"))
    assert (
        other.startswith(f"deep_ep was built for another torch or CUDA than {torch.__version__}") and "build it from" in other
    )
    assert cuda_lacks("13.0") == "" and cuda_lacks("12.1").startswith("; DeepEP needs CUDA 12.3 or later: install a torch")


@pytest.mark.parametrize(
    ("te", "torch_version", "nccl", "text"),
    [
        (None, "2.12.0", (2, 31, 0), "transformer-engine is not installed: pip install moefx[te]"),
        ("2.19.0", "2.12.0", (2, 31, 0), "transformer-engine 2.19.0 has no NCCL EP, 2.20 and later have"),
        (
            "2.20.2",
            "2.12.0",
            (2, 28, 9),
            "NCCL EP needs NCCL 2.30.4 or later, this process has 2.28.9: pip install -U nvidia-nccl-cu13",
        ),
        (
            "2.20.2",
            "2.11.0+cu130",
            (2, 31, 0),
            "transformer-engine 2.20.2's EP operations raise IndexError (increment_version) on torch 2.11.0+cu130",
        ),
        ("2.20.2", "2.12.0", (2, 31, 0), None),
    ],
)
def test_doctor_says_why_nccl_ep_is_refused(monkeypatch, te, torch_version, nccl, text):
    def version(package):
        if te is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return te

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: nccl)
    monkeypatch.setattr(te_ep, "_library", lambda: SimpleNamespace(ep_initialize=None))
    problem = te_ep.available()
    assert problem is None if text is None else problem.startswith(text)
