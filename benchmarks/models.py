"""The models that are measured, with random weights: nothing is downloaded."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    Llama4TextConfig,
    NemotronHConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)
from transformers.models.nemotron_h import modeling_nemotron_h


@dataclass(frozen=True)
class Model:
    """What is built, how deep, and how its parts add up to the whole."""

    make: Callable[[int], PreTrainedConfig]  #: the configuration with that many layers
    whole: Counter[str]  #: the published model, in units: a unit is what a depth holds a whole number of
    units: Callable[[int], Counter[str]]  #: a depth in the same units
    layers: int  #: of the published model
    depths: tuple[int, ...] = (2, 4)  #: measured by default: they fit one 80 GB device and determine the units
    attention: str = "sdpa"  #: Transformers' fastest attention that needs no download
    #: What differs in the check against fp32, which keeps the weights and their gradients in fp32 beside those in bf16.
    check_seq: int | None = None  #: shorter sequences (None: the timed ones)
    check_attention: str | None = None  #: for Transformers, where the timed one is not the model's definition
    check_model: str | None = None  #: another of MODELS, which lora.py checks where one layer in fp32 does not fit


_QWEN3 = dict(norm_topk_prob=True, rope_theta=1e6, tie_word_embeddings=False)


def _qwen3(**widths: Any) -> Callable[[int], PreTrainedConfig]:
    return lambda layers: Qwen3MoeConfig(num_hidden_layers=layers, **widths)


def _alike(layers: int) -> Counter[str]:
    return Counter({"layer": layers})


#: NVIDIA-Nemotron-3-Nano-30B-A3B: M is Mamba-2, E a mixture of experts, * attention; 23, 23 and 6 of them. The pattern and
#: the sizes are those of the checkpoint's config.json (nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16) and of Megatron-LM's
#: examples/post_training/modelopt/conf/nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16.sh, which agree.
NEMOTRON_PATTERN = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
#: Depths that determine "a pair of M and E" and "attention", each a run of layers of the pattern. The longest has the
#: pattern's own proportion, 4 : 4 : 1.
NEMOTRON_RUNS = {2: "EM", 3: "EM*", 9: "EMEMEMEM*", 52: NEMOTRON_PATTERN}


def _nemotron_pattern(layers: int) -> str:
    if layers not in NEMOTRON_RUNS:
        raise SystemExit(f"nemotron_nano has no run of {layers} layers of its pattern: take some of {sorted(NEMOTRON_RUNS)}")
    return NEMOTRON_RUNS[layers]


def _nemotron(**widths: Any) -> Callable[[int], PreTrainedConfig]:
    return lambda layers: NemotronHConfig(
        hybrid_override_pattern=_nemotron_pattern(layers),
        num_hidden_layers=layers,
        conv_kernel=4,
        expand=2,
        n_shared_experts=1,
        routed_scaling_factor=2.5,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        mlp_hidden_act="relu2",
        tie_word_embeddings=False,
        **widths,
    )


def _nemotron_units(layers: int) -> Counter[str]:
    kinds = Counter(_nemotron_pattern(layers))
    if kinds["M"] != kinds["E"]:
        raise ValueError(f"{kinds['M']} Mamba and {kinds['E']} MoE layers make no pairs")
    return Counter({"Mamba + MoE": kinds["M"], "attention": kinds["*"]})


def _gpt_oss(**widths: Any) -> Callable[[int], PreTrainedConfig]:
    # rotary scaling, biases, and the window in every other layer are the configuration's defaults
    return lambda layers: GptOssConfig(num_hidden_layers=layers, tie_word_embeddings=False, **widths)


def _gpt_oss_units(layers: int) -> Counter[str]:
    if layers % 2:
        raise SystemExit(f"gpt_oss_20b alternates sliding and full attention: {layers} layers are no whole number of pairs")
    return Counter({"sliding + full": layers // 2})


def _llama4(**widths: Any) -> Callable[[int], PreTrainedConfig]:
    return lambda layers: Llama4TextConfig(num_hidden_layers=layers, interleave_moe_layer_step=1, **widths)


#: The first layers of DeepSeek-V3 have a dense MLP instead of experts: three in the whole, one in any other depth that has room.
_DEEPSEEK_LAYERS = 61


def _deepseek_dense(layers: int) -> int:
    return 3 if layers == _DEEPSEEK_LAYERS else int(layers > 1)


def _deepseek(**widths: Any) -> Callable[[int], PreTrainedConfig]:
    # without the module that predicts a second token
    return lambda layers: DeepseekV3Config(
        num_hidden_layers=layers, first_k_dense_replace=_deepseek_dense(layers), num_mtp_layers=0, **widths
    )


_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32,
    "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip


def _deepseek_units(layers: int) -> Counter[str]:
    dense = _deepseek_dense(layers)
    return Counter({"dense": dense, "MoE": layers - dense})


MODELS = {
    # Qwen/Qwen3-30B-A3B: config.json. Its 48 layers are alike.
    "qwen3_30b": Model(
        _qwen3(
            hidden_size=2048, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, intermediate_size=6144,
            num_attention_heads=32, num_key_value_heads=4, head_dim=128, vocab_size=151936, max_position_embeddings=40960,
            **_QWEN3,
        ),
        _alike(48), _alike, 48, depths=(2, 6),
    ),
    "nemotron_nano": Model(
        _nemotron(
            vocab_size=131072, hidden_size=2688, intermediate_size=1856, num_attention_heads=32, num_key_value_heads=2,
            head_dim=128, mamba_num_heads=64, mamba_head_dim=64, ssm_state_size=128, n_groups=8, chunk_size=128,
            n_routed_experts=128, num_experts_per_tok=6, moe_intermediate_size=1856,
            moe_shared_expert_intermediate_size=3712, max_position_embeddings=262144,
        ),
        _nemotron_units(52), _nemotron_units, 52, depths=(2, 3, 9), check_seq=1024,
    ),
    # openai/gpt-oss-20b: config.json. No SDPA, because of its sinks; flex_attention is the fastest that Transformers has
    # without a download. It adds the sinks to sums that it has rounded to bf16, so the check takes eager attention, the
    # model's definition, for which the scores of 4096 tokens in fp32 would not fit.
    "gpt_oss_20b": Model(
        _gpt_oss(
            hidden_size=2880, intermediate_size=2880, num_local_experts=32, num_experts_per_tok=4, num_attention_heads=64,
            num_key_value_heads=8, head_dim=64, sliding_window=128, vocab_size=201088, max_position_embeddings=131072,
        ),
        _gpt_oss_units(24), _gpt_oss_units, 24, attention="flex_attention", check_seq=1024, check_attention="eager",
    ),
    # meta-llama/Llama-4-Scout-17B-16E: the text part of config.json, whose other sizes are the class's defaults. Every fourth layer
    # has no positions; up to 8,192 tokens that is all in which its layers differ.
    "llama4_scout": Model(
        _llama4(hidden_size=5120, intermediate_size=8192, intermediate_size_mlp=16384, num_local_experts=16),
        _alike(48), _alike, 48, depths=(1, 3), check_seq=1024,
    ),
    # deepseek-ai/DeepSeek-V3: config.json, whose widths are the class's defaults, and its longer rotary embedding.
    "deepseek_v3": Model(
        _deepseek(max_position_embeddings=163840, rope_parameters=_YARN),
        _deepseek_units(_DEEPSEEK_LAYERS), _deepseek_units, _DEEPSEEK_LAYERS, depths=(1, 2, 3), check_seq=1024,
        check_model="deepseek_v3_32_experts",
    ),
    # the same widths with an eighth of the experts, of which a token still visits 8
    "deepseek_v3_32_experts": Model(
        _deepseek(max_position_embeddings=163840, rope_parameters=_YARN, n_routed_experts=32),
        _deepseek_units(_DEEPSEEK_LAYERS), _deepseek_units, _DEEPSEEK_LAYERS, depths=(1, 2, 3), check_seq=1024,
    ),
    # the same classes in sizes that run anywhere: do the benchmarks run?
    "tiny": Model(
        _qwen3(
            hidden_size=64, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, intermediate_size=128,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=500, **_QWEN3,
        ),
        _alike(4), _alike, 4,
    ),
    "tiny_nemotron": Model(
        _nemotron(
            vocab_size=500, hidden_size=64, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=16, n_groups=2, chunk_size=16, n_routed_experts=8,
            num_experts_per_tok=2, moe_intermediate_size=32, moe_shared_expert_intermediate_size=48,
        ),
        _nemotron_units(52), _nemotron_units, 52, depths=(2, 3, 9), check_seq=32,
    ),
    "tiny_gpt_oss": Model(
        _gpt_oss(
            hidden_size=64, intermediate_size=32, num_local_experts=8, num_experts_per_tok=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, sliding_window=8, vocab_size=500,
        ),
        _gpt_oss_units(24), _gpt_oss_units, 24, attention="eager", check_seq=32,
    ),
    "tiny_llama4": Model(
        _llama4(
            hidden_size=64, intermediate_size=64, intermediate_size_mlp=128, num_local_experts=16, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, vocab_size=500, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        ),
        _alike(4), _alike, 4,
    ),
    "tiny_deepseek_v3": Model(
        _deepseek(
            hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_attention_heads=4, num_key_value_heads=4,
            n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2, q_lora_rank=24, kv_lora_rank=16,
            qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, vocab_size=500, max_position_embeddings=163840,
            rope_parameters=_YARN,
        ),
        _deepseek_units(_DEEPSEEK_LAYERS), _deepseek_units, _DEEPSEEK_LAYERS, depths=(1, 2, 3),
    ),
    "demo": Model(
        _qwen3(
            hidden_size=192, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True, moe_intermediate_size=256,
            intermediate_size=256, num_attention_heads=6, num_key_value_heads=2, head_dim=32, vocab_size=256,
            tie_word_embeddings=False,
        ),
        _alike(4), _alike, 4,
    ),
}  # fmt: skip


def config(name: str, layers: int) -> PreTrainedConfig:
    return MODELS[name].make(layers)


def build(
    name: str,
    layers: int,
    dtype: torch.dtype,
    device: str | torch.device,
    *,
    experts: str = "grouped_mm",
    attention: str | None = None,
) -> nn.Module:
    """A model with random weights, the same for the same arguments; by default with Transformers' fastest own attention."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config(name, layers), dtype=dtype, attn_implementation=attention or MODELS[name].attention
        )
    if model._can_set_experts_implementation():
        model.set_experts_implementation(experts)
    return model.to(device)


def tokens(name: str, batch: int, seq: int, device: str | torch.device, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random input_ids [batch, seq], and labels alike."""
    vocabulary = config(name, MODELS[name].layers).vocab_size
    ids = torch.randint(0, vocabulary, (batch, seq), generator=torch.Generator().manual_seed(seed)).to(device)
    return {"input_ids": ids, "labels": ids}


@contextmanager
def mamba_in_torch() -> Iterator[None]:
    """Within: nemotron_h computes its Mamba layers by Transformers' own torch code even where the packages' kernels are
    installed, whose products of fp32 numbers are rounded to TF32.
    """
    names = ("causal_conv1d_fn", "mamba2_split_conv1d_scan_combined", "mamba2_chunk_scan")
    kept = {n: getattr(modeling_nemotron_h, n) for n in names}
    for n, function in kept.items():
        setattr(modeling_nemotron_h, n, inspect.unwrap(function))
    try:
        yield
    finally:
        for n, function in kept.items():
            setattr(modeling_nemotron_h, n, function)
