"""Some of the LoRA trainings that lora.py generates; `python tests/flows/lora.py --cases 200` tries more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

import moefx
from tests.flows.lora import FORMER, LOOPS, PARTS, Case, Outcome, anatomy, outcome
from tests.support.families import FAMILIES, batch, build
from tests.support.spawn import run

pytestmark = pytest.mark.usefixtures("cached_captures")


@pytest.mark.parametrize("seed", [3, 7])
def test_drawn_case(seed):
    assert outcome(Case.drawn(seed)) == Outcome()


EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
UNGATED = ("experts.up_proj", "experts.down_proj")
#: By how the experts' weights lie in memory.
LAYOUTS = {
    "[E, 2 I, H]": Case("qwen3_moe", parameters=EXPERTS),
    "[E, H, 2 I], gate and up interleaved, with biases": Case("gpt_oss", parameters=EXPERTS),
    "[E, H, 2 I], on every token": Case("llama4_text", parameters=EXPERTS),
    "ungated": Case("nemotron_h", parameters=UNGATED),
    "by the names of single experts' modules": Case("olmoe", FORMER),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters_go_both_ways_and_merge_in_every_layout(layout):
    assert outcome(LAYOUTS[layout], parts=("save_and_load", "merge_and_unmerge", "unload")) == Outcome()


def test_adapters_on_modules_that_hold_one_weight_of_all_experts():
    assert outcome(Case("jetmoe", parameters=("input_linear.weight", "output_linear.weight")), parts=("switch",)) == Outcome()


def test_two_adapters_at_once():
    case = Case(
        modules=("q_proj", "v_proj"),
        parameters=("experts.down_proj",),
        rank_pattern=(("experts.down_proj", 5),),
        alpha_pattern=((r"layers\.1\..*", 16),),
        rslora=True,
        second=("o_proj",),
    )
    assert outcome(case, parts=("switch", "merge_and_unmerge", "unload")) == Outcome()


def test_merged_between_steps():
    assert outcome(Case(modules=("o_proj",), parameters=("gate.weight",), merged_between=True), parts=("train",)) == Outcome()


@pytest.mark.parametrize("optimized", [True, False])
def test_an_adapter_with_modules_of_single_experts(optimized, tmp_path):
    """As adapters were written when each expert was a module: PEFT concatenates their factors, also into the optimized model."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"gate_proj": (64, 32), "up_proj": (64, 32), "down_proj": (32, 64)}
    tensors = {}
    for layer in range(2):
        for expert in range(8):
            for name, (inner, outer) in sizes.items():
                path = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
                tensors[f"{path}.lora_A.weight"] = torch.randn(2, inner, generator=generator) * 0.1
                tensors[f"{path}.lora_B.weight"] = torch.randn(outer, 2, generator=generator) * 0.1
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    LoraConfig(r=2, lora_alpha=4, target_modules=[*FORMER], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    plain, ours = build("qwen3_moe"), build("qwen3_moe")
    without = plain(**batch(2, 9), use_cache=False).loss.item()
    plain = PeftModel.from_pretrained(plain, tmp_path)
    if optimized:
        ours = PeftModel.from_pretrained(moefx.optimize(ours, compile=False), tmp_path)
    else:
        ours = moefx.optimize(PeftModel.from_pretrained(ours, tmp_path), compile=False)
    losses = [float(m(**batch(2, 9), use_cache=False).loss) for m in (plain, ours)]
    assert losses[1] == pytest.approx(losses[0], abs=2e-5) and abs(losses[0] - without) > 1e-2
    merged = [dict(m.merge_and_unload().named_parameters()) for m in (plain, ours)]
    assert merged[0].keys() == merged[1].keys()
    assert [n for n, p in merged[0].items() if not torch.equal(p, merged[1][n])] == []


def test_an_adapter_is_loaded_into_a_model_that_has_one(tmp_path):
    """By ``load_adapter``, after ``optimize``."""
    config = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"], "init_lora_weights": False}
    get_peft_model(build("qwen3_moe"), LoraConfig(r=2, **config)).save_pretrained(tmp_path)
    found = []
    for optimize in (False, True):
        torch.manual_seed(1)
        model = get_peft_model(build("qwen3_moe", seed=2), LoraConfig(r=4, **config))
        if optimize:
            moefx.optimize(model, compile=False)
        losses = [float(model(**batch(2, 9), use_cache=False).loss)]
        model.load_adapter(tmp_path, "loaded")
        model.set_adapter("loaded")
        losses.append(float(model(**batch(2, 9), use_cache=False).loss))
        found.append(losses)
    assert found[1] == pytest.approx(found[0], abs=2e-5) and abs(found[0][0] - found[0][1]) > 1e-3


# --- over ranks ------------------------------------------------------------------------------------------------------


def in_ranks(rank: int, ranks: int, case: dict[str, Any], parts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Runs in each rank."""
    found = outcome(Case(**case), rank, ranks, parts)
    return found.differences, found.raised


def across(case: Case, ranks: int, parts: Sequence[str] = PARTS) -> Outcome:
    """Of all ranks together."""
    found = run(in_ranks, ranks, asdict(case), parts, timeout=200)
    differences, raised = ([said for part in found for said in part[n]] for n in (0, 1))
    return Outcome(differences, raised)


SPREAD = {
    "DDP": (2, Case(modules=("q_proj",), parameters=EXPERTS, merged_between=True, spread="ddp", ep=2), PARTS),
    # its checkpoints have other names than the model (test_peft.py shards others)
    "FSDP2 and experts": (4, Case("nemotron_h", ("q_proj",), UNGATED, spread="parallelize", ep=2), ("save_and_load", "unload")),
}


@pytest.mark.parametrize("how", SPREAD)
def test_over_ranks(how):
    ranks, case, parts = SPREAD[how]
    assert across(case, ranks, parts) == Outcome()


# --- the generator ---------------------------------------------------------------------------------------------------


def test_drawn_cases_cover_what_there_is():
    cases = [Case.drawn(seed) for seed in range(300)]
    assert cases == [Case.drawn(seed) for seed in range(300)]
    assert {c.family for c in cases} == {*FAMILIES, *LOOPS}
    for family in FAMILIES:
        of, mine = anatomy(family), [c for c in cases if c.family == family]
        wanted = {*of.linears, *of.shared, *of.router_linears}
        assert wanted <= {m for c in mine if not isinstance(c.modules, str) for m in c.modules}, family
        assert {*of.experts, *of.router_parameters} <= {p for c in mine for p in c.parameters}, family
    for name, values in {"optimized": 3, "saved": 4, "dropout": 2, "merged_between": 2, "safe": 2, "rslora": 2}.items():
        assert len({getattr(c, name) for c in cases}) == values, name
    over_ranks = {(c.spread, c.ep) for c in (Case.drawn(seed, 4) for seed in range(50))}
    assert over_ranks == {("ddp", 4), ("parallelize", 1), ("parallelize", 2), ("parallelize", 4)}


def test_a_wrong_adapter_is_found(monkeypatch):
    def wrong(model: Any, **_: Any) -> Any:
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if n.endswith("q_proj.lora_B.default.weight")).mul_(1.01)
        return model

    monkeypatch.setattr(moefx, "optimize", wrong)
    assert outcome(Case(modules=("q_proj",)), parts=("switch",)).differences[0].startswith("enabled again: logits")


def test_a_merge_that_rounds_otherwise_is_found(monkeypatch):
    def wrong(model: Any, **_: Any) -> Any:
        def merge_adapter(**_: Any) -> None:
            model.base_model.merge_adapter()
            with torch.no_grad():
                weight = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").base_layer.weight
                weight.copy_(torch.nextafter(weight, torch.zeros(())))

        model.merge_adapter = merge_adapter
        return model

    monkeypatch.setattr(moefx, "optimize", wrong)
    said = outcome(Case(modules=("q_proj",)), parts=("merge_and_unmerge",)).differences
    assert said[0].startswith("weights merged: base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight differs")
