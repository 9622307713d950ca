"""TRL's trainers (DPO, reward, GRPO): the same losses with moefx and without."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

import moefx
from moefx.integrations.transformers.tiny_config import tiny_config

pytestmark = pytest.mark.usefixtures("cached_captures")

pytest.importorskip("trl")

PREFERENCES = [
    {"prompt": "abc", "chosen": "defgh", "rejected": "xyz"},
    {"prompt": "ab", "chosen": "c", "rejected": "pqrstuv"},
] * 8


@pytest.fixture(scope="module")
def tokenizer():
    """One token a letter."""
    letters = {chr(ord("a") + i): 3 + i for i in range(26)}
    made = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1, "<unk>": 2, **letters}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")


def build(auto):
    config = copy.deepcopy(tiny_config("qwen3_moe"))
    config.pad_token_id, config.eos_token_id, config.num_labels = 0, 1, 1
    torch.manual_seed(0)
    return auto.from_config(config)


def dpo(model, settings, tokenizer):
    from trl import DPOConfig, DPOTrainer

    other = None if hasattr(model, "peft_config") else copy.deepcopy(model)
    return DPOTrainer(model, other, args=DPOConfig(**settings), train_dataset=rows(PREFERENCES), processing_class=tokenizer)


def reward(model, settings, tokenizer):
    from trl import RewardConfig, RewardTrainer

    return RewardTrainer(model, args=RewardConfig(**settings), train_dataset=rows(PREFERENCES), processing_class=tokenizer)


def kto(model, settings, tokenizer):
    from trl import KTOConfig, KTOTrainer

    given = [
        {"prompt": r["prompt"], "completion": r[k], "label": k == "chosen"} for r in PREFERENCES for k in ("chosen", "rejected")
    ]
    return KTOTrainer(model, None, args=KTOConfig(**settings), train_dataset=rows(given), processing_class=tokenizer)


def grpo(model, settings, tokenizer):
    from trl import GRPOConfig, GRPOTrainer

    def letters(completions, **_):
        return [float(len(set(text))) for text in completions]

    beta = {"beta": 0.3} if hasattr(model, "peft_config") else {}
    args = GRPOConfig(**settings, **beta, num_generations=4, max_completion_length=6)
    return GRPOTrainer(model, letters, args=args, train_dataset=rows([{"prompt": "abc"}] * 8), processing_class=tokenizer)


def rows(given):
    from datasets import Dataset

    return Dataset.from_list(given)


@pytest.mark.parametrize(
    ("make", "auto"), [(dpo, AutoModelForCausalLM), (reward, AutoModelForSequenceClassification), (grpo, AutoModelForCausalLM)]
)
def test_losses_are_those_without_moefx(make, auto, tokenizer, tmp_path):
    compare(make, lambda: build(auto), tokenizer, tmp_path)


@pytest.mark.parametrize("make", [dpo, kto, grpo])
def test_adapters_are_their_own_reference(make, tokenizer, tmp_path):
    """The reference pass runs the model with its adapters disabled, or another adapter, in every step."""
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["q_proj", "v_proj"], "target_parameters": ["mlp.experts.gate_up_proj"], "r": 4}

    def adapted():
        torch.manual_seed(2)
        return peft.get_peft_model(build(AutoModelForCausalLM), peft.LoraConfig(**options, init_lora_weights=False))

    compare(make, adapted, tokenizer, tmp_path)


def compare(make, build, tokenizer, tmp_path):
    settings = {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 4, "max_steps": 3, "logging_steps": 1, "report_to": [],
        "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False,
        "learning_rate": 1e-3,
    }  # fmt: skip
    losses = []
    for optimized in (False, True):
        model = build()
        if optimized:
            model = moefx.optimize(model, compile=False, strict=True)
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = make(model, settings, tokenizer)
            trainer.train()
        losses.append([step["loss"] for step in trainer.state.log_history if "loss" in step])
    assert len(losses[0]) == 3 and len(set(losses[0])) > 1
    assert losses[1] == pytest.approx(losses[0], rel=2e-3, abs=2e-4)
    # what runs without a graph is generation, with its cache
    fallbacks = moefx.report(trainer.model).fallbacks
    assert all("Cache" in reason for _, reason in fallbacks) and bool(fallbacks) == (make is grpo)
