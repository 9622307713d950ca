"""LoRA adapters by PEFT: on attention's linear layers, and on the parameters in which Transformers keeps a layer's experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

TARGETS = ("attention", "experts", "both")
#: Attention's linear layers by their names in Transformers; the last four are those of DeepSeek's latent attention.
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"}
#: Standard deviation of lora_B, which PEFT would leave zero: then lora_A would have no gradient.
STD = 0.01


def targets(model: nn.Module, which: str) -> dict[str, list[str]]:
    """PEFT's ``target_modules`` and ``target_parameters``, as far as the model has any of them."""
    last = {path: path.rpartition(".")[2] for path, _ in model.named_modules()}
    linear = {last[path] for path, m in model.named_modules() if isinstance(m, nn.Linear)} & ATTENTION
    experts = {
        f"experts.{name}"
        for path, m in model.named_modules()
        if last[path] == "experts"
        for name, p in m.named_parameters(recurse=False)
        if p.dim() == 3
    }
    found = {
        "target_modules": sorted(linear) if which != "experts" else [],
        "target_parameters": sorted(experts) if which != "attention" else [],
    }
    return {option: names for option, names in found.items() if names}


def adapt(model: nn.Module, which: str, rank: int, dtype: torch.dtype) -> Any:
    """A PEFT model around ``model``, whose own parameters are frozen. ``dtype`` is the adapters'."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, **targets(model, which))
    with torch.device(next(model.parameters()).device):  # the experts' adapters are large: drawing them on the CPU takes long
        return get_peft_model(model, lora, autocast_adapter_dtype=dtype == torch.float32).train()


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Random numbers for the adapters, the same in each call: contenders begin alike, and all gradients are non-zero."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    for name, p in model.named_parameters():
        if p.requires_grad and "lora_A" in name:
            p.uniform_(-(p.shape[-1] ** -0.5), p.shape[-1] ** -0.5, generator=generator)
        elif p.requires_grad:
            p.normal_(std=STD, generator=generator)
