"""Resumable checkpoints: another ep_size and number of ranks, interruptions, random states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.spawn import run


def train_and_save(rank, world, folder):
    """Runs in each rank: four steps, with a checkpoint after the second; the last loss."""
    import moefx
    from tests.support.families import batch, build

    model = moefx.parallelize(build("qwen3_moe"), ep_size=2, compile=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    for step in range(4):
        loss = model(**batch(2, 8, seed=50 + step)).loss  # the same batch on every rank: any number of ranks agrees
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            moefx.save_checkpoint(Path(folder, "resume"), model, optimizer, step=step)
    return float(loss.detach())


def resume(rank, world, folder, ep):
    import moefx
    from tests.support.families import batch, build

    model = moefx.parallelize(build("qwen3_moe", seed=5), ep_size=ep, compile=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    extra = moefx.load_checkpoint(Path(folder, "resume"), model, optimizer)
    for step in range(extra["step"] + 1, 4):
        loss = model(**batch(2, 8, seed=50 + step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    sentences = []
    for change in ({"vocab_size": 128}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}):
        other = moefx.parallelize(build("qwen3_moe", **change), ep_size=ep, compile=False)
        try:
            moefx.load_checkpoint(Path(folder, "resume"), other)
        except moefx.MoefxError as error:
            sentences.append(str(error))
    if world == 4:  # more ranks than experts: each holds a part of the hidden width, from and to the same files
        for name, ep_size in FEW.items():
            few = moefx.parallelize(Path(folder, f"few-{name}"), ep_size=ep_size, compile=False)
            few.save_pretrained(Path(folder, f"few-{name}-{ep_size}"))
            optimizer = torch.optim.AdamW(few.parameters())
            few(**batch(1, 8)).loss.backward()
            optimizer.step()
            moefx.save_checkpoint(Path(folder, "few"), few, optimizer)
            other = moefx.parallelize(Path(folder, f"few-{name}"), ep_size=3 - ep_size, compile=False)
            moefx.load_checkpoint(Path(folder, "few"), other, torch.optim.AdamW(other.parameters()))
            a, b = few.state_dict(), other.state_dict()
            if not all(torch.equal(t.full_tensor(), b[n].full_tensor()) for n, t in a.items() if hasattr(t, "full_tensor")):
                sentences.append(f"{name} resumed with other weights")
    return float(loss.detach()), sentences


#: Two experts over four ranks, and ep_size.
FEW = {"qwen3_moe": 2, "gpt_oss": 1}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a checkpoint of two ranks, and the loss that they went on to."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, run(train_and_save, 2, str(folder), timeout=300)[0]


@pytest.mark.parametrize(("world", "ep"), [(1, 1), (4, 4)])
def test_resumed_on_another_mesh(saved, world, ep):
    folder, last_loss = saved
    from tests.support.families import build

    for name in FEW if world == 4 else ():
        experts = "num_experts" if name == "qwen3_moe" else "num_local_experts"
        build(name, **{experts: 2}).save_pretrained(folder / f"few-{name}")
    for loss, sentences in run(resume, world, str(folder), ep, timeout=300):
        assert loss == pytest.approx(last_loss, rel=1e-5)
        assert len(sentences) == 3
        assert "has model.embed_tokens.weight of shape (256, 64), the model of (128, 64)" in sentences[0]
        assert "lacks model.layers.2" in sentences[1]
        assert "has model.layers.1" in sentences[2] and "which the model lacks" in sentences[2]
    for name, ep in FEW.items() if world == 4 else ():
        before, after = (load_file(folder / f / "model.safetensors") for f in (f"few-{name}", f"few-{name}-{ep}"))
        assert before.keys() == after.keys() and all(torch.equal(t, after[n]) for n, t in before.items())


class Killed(BaseException):
    pass


def test_a_checkpoint_that_dies_between_its_renames(tmp_path, monkeypatch):
    """Twice, one time after the other: the last one that was whole is loaded."""
    import os

    import moefx
    from moefx.distributed import checkpoint_dcp
    from tests.support.families import build

    model, folder, replace = build("qwen3_moe"), tmp_path / "resume", os.replace
    moefx.save_checkpoint(folder, model, step=1)

    def dies(source, target):
        if Path(target) == folder:
            raise Killed
        replace(source, target)

    for step in (2, 3):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(os, "replace", dies)
            moefx.save_checkpoint(folder, model, step=step)
        assert moefx.load_checkpoint(folder, model)["step"] == 1
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint_dcp, "_random_state", lambda: (_ for _ in ()).throw(Killed))
        moefx.save_checkpoint(folder, model, step=4)
    assert moefx.load_checkpoint(folder, model)["step"] == 1
    moefx.save_checkpoint(folder, model, step=5)
    assert moefx.load_checkpoint(folder, model)["step"] == 5 and [p.name for p in tmp_path.iterdir()] == ["resume"]


def test_random_states_and_optimizer_tensors(tmp_path):
    """All generators go on as they would have; of the optimizer, what is missing or too many is named."""
    import random

    import numpy as np

    import moefx
    from tests.support.families import batch, build

    def made(optimizer=torch.optim.AdamW, frozen="", **options):
        model = build("qwen3_moe")
        for name, p in model.named_parameters():
            p.requires_grad_(not frozen or frozen not in name)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = optimizer([{"params": trained}, {"params": []}], lr=1e-2, **options)  # the Trainer makes empty groups too
        model(**batch(1, 9)).loss.backward()
        optimizer.step()
        return model, optimizer

    def draw():
        return random.random(), np.random.rand(), float(torch.rand(()))

    moefx.save_checkpoint(tmp_path / "all", *made())
    wanted = draw()
    model, optimizer = made()
    moefx.load_checkpoint(tmp_path / "all", model, optimizer)
    assert draw() == wanted and [len(g["params"]) for g in optimizer.param_groups] == [len(list(model.parameters())), 0]
    moefx.save_checkpoint(tmp_path / "frozen", *made(frozen="experts"))
    for folder, (model, optimizer), text in (
        (
            "frozen",
            made(),
            "lacks the optimizer's state.model.layers.0.mlp.experts.down_proj.exp_avg, which this optimizer has",
        ),
        (
            "all",
            made(frozen="experts"),
            "has the optimizer's state.model.layers.0.mlp.experts.down_proj.exp_avg, which this optimizer l",
        ),
        ("all", made(torch.optim.SGD), "has the optimizer's state.lm_head.weight.exp_avg, which this optimizer lacks"),
    ):
        with pytest.raises(moefx.MoefxError, match=text):
            moefx.load_checkpoint(tmp_path / folder, model, optimizer)
