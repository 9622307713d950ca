"""Flowcharts of functions: every operation has a box, every arrow two ends, and functions that cannot be drawn raise an error."""

from __future__ import annotations

import re

import pytest

from moefx.cli import main
from moefx.cli.inspect import inspect
from moefx.errors import MoefxError
from moefx.integrations.transformers.tiny_config import tiny_config
from moefx.ir.graph import is_call, op_name


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "nemotron_h", "longcat_flash", "gemma4_text"])
def test_every_operation_is_a_box_that_leads_from_the_inputs_to_the_results(family):
    report = inspect(tiny_config(family), 1, "cpu")
    for function in report.program:
        drawn = report.diagram(function.name)
        boxes = dict(re.findall(r"^    (f0n\d+)[\[(]+\"(.*)\"[\])]+:::\w+$", drawn, re.MULTILINE))
        arrows = re.findall(r"^    (f0n\d+) --> (f0n\d+)$", drawn, re.MULTILINE)
        assert len(drawn.splitlines()) == 3 + len(boxes) + len(arrows) + 5  # nothing else but its frame and the styles
        assert {end for arrow in arrows for end in arrow} <= set(boxes) and len(set(arrows)) == len(arrows)
        for node in function.graph.nodes:
            if is_call(node) and "semantic" in node.meta:
                name = op_name(node.meta["semantic"]).removeprefix("moefx.")
                assert any(label.startswith(f"<b>{name}</b>") for label in boxes.values()), name
        assert not any(re.match(r"<b>(reshape|view|transpose|getitem|sym_size)\b", label) for label in boxes.values())
        # whatever leads to the results is drawn: from each of these boxes one gets there
        (results,) = [box for box, label in boxes.items() if label == "results"]
        leads = {results}
        for source, target in reversed(arrows):
            leads |= {source} if target in leads else set()
        assert set(boxes) == leads


def test_the_exchange_and_the_parameters_that_a_box_reads():
    report = inspect(tiny_config("gpt_oss"), 2, "cpu")
    drawn = report.diagram("GptOssDecoderLayer", after="expert_parallel")
    assert re.search(r'\["<b>dispatch</b><br>f32\[R1, 64\].*"\]:::exchange', drawn)
    assert '["<b>linear</b><br>self_attn.q_proj<br>f32[B, S, 64]"]:::product' in drawn  # its bias goes without saying
    assert "mlp.experts.gate_up_proj<br>" in drawn and " by " not in drawn
    assert "<b>grouped_mlp</b> by " in report.diagram("GptOssDecoderLayer")


def test_names_that_there_are_not(capsys):
    report = inspect(tiny_config("qwen3_moe"), 1, "cpu")
    with pytest.raises(MoefxError, match="no function is named 'Layer'; the program has: Qwen3MoeDecoderLayer, "):
        report.diagram("Layer")
    with pytest.raises(MoefxError, match="no pass is named 'rout'"):
        report.diagram(after="rout")
    assert main(["inspect", "qwen3_moe", "--tiny", "--pass", "canonicalize", "--diagram"]) == 0
    said = capsys.readouterr().out
    assert said.count("subgraph ") == 3 and "<b>rsqrt</b>" in said and "<b>rms_norm</b>" not in said
