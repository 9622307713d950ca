"""The command line in process: what it prints, its exit codes, its sentences."""

from __future__ import annotations

import json

import pytest

from moefx.cli import main


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
    assert "+    route_default = moefx.route" in capsys.readouterr().out


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


@pytest.mark.parametrize(
    "argv,text",
    [
        (["inspect", "qwen3_mo"], "no causal language model of type 'qwen3_mo': did you mean qwen3_moe"),
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
