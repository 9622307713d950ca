"""Inspect a model without weights: capture it on the meta device, run the passes, print graph, report and cost.

python examples/inspect_graph.py
"""

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import moefx

config = Qwen3MoeConfig(num_hidden_layers=4, hidden_size=1024, num_experts=64, moe_intermediate_size=384)
with torch.device("meta"):  # shapes only: no memory, however large the model
    model = AutoModelForCausalLM.from_config(config)

program = moefx.capture(model)
print(program["Qwen3MoeDecoderLayer"])  # the captured graph, each line with the model's source line

plan = moefx.Plan(moefx.resolve(None))
report = moefx.rewrite(program, plan, moefx.passes.default(), model)
print(report)
print(report["route"].diff())  # what one pass changed
print(program["Qwen3MoeDecoderLayer"])  # the graph that will run
print(report.cost(B=1, S=4096))
