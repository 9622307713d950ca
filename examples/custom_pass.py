"""A custom pass: a pattern in the captured graph becomes one operation, after a numerical comparison of both.

python examples/custom_pass.py
"""

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, DeepseekV3Config

import moefx
from moefx import f64


@moefx.op("gated_linear(Tensor x, Tensor gate, Tensor up) -> Tensor")
def gated_linear(x, gate, up):
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


fuse = moefx.Raise("gated_linear", gated_linear, {"x": f64(4, 8), "gate": f64(6, 8), "up": f64(6, 8)})
pipeline = moefx.passes.default().before("swiglu", fuse)

config = DeepseekV3Config(
    vocab_size=256,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    intermediate_size=96,
    moe_intermediate_size=32,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    first_k_dense_replace=1,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=16,
)
model = moefx.optimize(AutoModelForCausalLM.from_config(config), pipeline=pipeline, compile=False)
print(moefx.report(model)["gated_linear"])
print(moefx.explain(model, "model.layers.1.mlp.shared_experts"))

ids = torch.randint(0, 256, (2, 16))
print(moefx.verify(model, {"input_ids": ids, "labels": ids}).worst)
