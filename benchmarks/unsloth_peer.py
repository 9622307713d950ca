"""Unsloth as a peer of ``lora.py``: its own loading of a checkpoint and its own adapters, by its public functions.

    pip install unsloth

It changes Transformers, PEFT and torch while it is imported: import it after everything else was measured.
"""

from __future__ import annotations

import importlib.util
import tempfile
from typing import Any

import adapters
import common
import models
import torch


def installed() -> bool:
    return importlib.util.find_spec("unsloth") is not None


def load(name: str, layers: int, which: str, rank: int, seq: int, checkpointing: bool, device: torch.device) -> Any:
    """Unsloth's model with the weights of ``models.build`` and with adapters, by way of a checkpoint in a temporary folder."""
    from unsloth import FastLanguageModel

    model = models.build(name, layers, torch.bfloat16, device)
    wanted = adapters.targets(model, which)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        common.free(device)
        model, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=seq, dtype=torch.bfloat16, load_in_4bit=False)
    return FastLanguageModel.get_peft_model(
        model,
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        bias="none",
        target_modules=wanted.get("target_modules", []),
        # None would let it add the experts by itself
        target_parameters=wanted.get("target_parameters", []),
        use_gradient_checkpointing="unsloth" if checkpointing else False,
    ).train()
