"""Some walks of alive.py; `python -m tests.flows.alive --seeds 0:1000` runs more."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.flows.alive import Failure, Step, Walk, result, script, shrunk, state_of
from tests.flows.alive_actions import ACTIONS
from tests.support import capture_cache
from tests.support.families import FAMILIES

#: Actions that moefx follows on all families.
FOLLOWED = (
    "train_step", "forward", "generate", "whole_mode", "part_mode", "requires_grad", "checkpointing", "checkpointing_off",
    "load_state_dict", "write_weights", "new_parameter", "replace_activation", "swap_layers", "resize_embeddings", "undo_all",
    "saved", "restored", "autocast",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def captures() -> Iterator[None]:
    """Equal captures are made once."""
    capture_cache.start(state_of)
    yield
    capture_cache.stop()


@pytest.mark.parametrize("seed", range(8))
def test_walk(seed):
    walk = Walk.drawn(seed, 6, [*FAMILIES], FOLLOWED)
    found = result(walk)
    if found.failure:
        pytest.fail(script(*shrunk(walk, found.failure, lambda w: result(w).failure)))
    assert not found.refused


ROUTER_LOGITS = Step("probe_by", {"where": "", "what": {"output_router_logits": True}})
#: Walks that have failed.
ONCE_WRONG = {
    "the router of a wrapped mlp gives no logits": Walk(
        "gpt_oss",
        (Step("optimized"), Step("replace_module", {"path": "model.layers.0.mlp", "by": "Wrapped({old}, 0.5)"}), ROUTER_LOGITS),
    ),
    "experts on every token have no known layout any more": Walk(
        "llama4_text", (Step("optimized"), Step("patch_class", {"name": "Llama4TextExperts"}))
    ),
}


@pytest.mark.parametrize("name", ONCE_WRONG)
def test_walk_that_failed(name):
    found = result(ONCE_WRONG[name])
    assert found.failure is None and not found.raised and not found.refused


def test_the_drawing_is_fixed_by_the_seed():
    one, other = (Walk.drawn(5, 10, [*FAMILIES], ACTIONS) for _ in range(2))
    assert one == other != Walk.drawn(6, 10, [*FAMILIES], ACTIONS)
    assert [s.name for s in one.steps].count("optimized") == 1 and len(one.steps) == 11


def test_shrinking_keeps_what_matters():
    steps = (
        Step("whole_mode", {"mode": "train"}),
        Step("optimized"),
        Step("train_step", {k: v[-1] for k, v in ACTIONS["train_step"].choices.items()}),
        Step("write_weights", {"group": "norm", "how": "p.mul_(1.2)"}),
        Step("undo_all"),
    )

    def fails(walk: Walk) -> Failure | None:
        """Where weights are written after a training with AdamW."""
        names = [s.name for s in walk.steps]
        trains = any(s.name == "train_step" and s.arguments["optimizer"] == "AdamW" for s in walk.steps)
        return Failure(names.index("write_weights"), "loss", "") if trains and "write_weights" in names else None

    smallest, failure = shrunk(Walk("mixtral", steps), Failure(3, "loss", ""), fails)
    assert [s.name for s in smallest.steps] == ["optimized", "train_step", "write_weights"] and failure.step == 2
    given = {k: v[0] for k, v in ACTIONS["train_step"].choices.items()} | {"optimizer": "AdamW"}
    assert smallest.steps[1].arguments == given
    assert smallest.steps[2].arguments == {"group": "q_proj", "how": "p.mul_(1.2)"}


def test_a_difference_is_found(monkeypatch):
    """Where weights are written, the model that a walk calls optimized gets other ones."""
    import moefx

    def wrong(model: Any, **_: Any) -> Any:
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight.mul_(1.01)
        return model

    walk = Walk("qwen3_moe", (Step("optimized"), Step("whole_mode", {"mode": "eval"})))
    assert result(walk).failure is None
    monkeypatch.setattr(moefx, "optimize", wrong)
    failure = result(walk).failure
    assert failure is not None and (failure.step, failure.kind) == (0, "parameter")


def test_the_script_runs_by_itself(tmp_path):
    steps = (
        Step("lora", {"targets": "target_modules=['q_proj']", "pattern": ""}),
        Step("optimized"),
        Step("hook", {"path": "model.layers.0", "kind": "forward_hook", "factor": 1}),
    )
    file = tmp_path / "walk.py"
    file.write_text(script(Walk("qwen3_moe", steps), Failure(1, "loss", "shown")))
    done = subprocess.run([sys.executable, "-W", "ignore", str(file)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    losses = [line.split()[2:] for line in done.stdout.splitlines() if " loss " in line]
    assert len(losses) == 2 and all(abs(float(a) - float(b)) < 1e-5 for a, b in losses)
