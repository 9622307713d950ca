"""Checkpoints of spread models: the files of plain Transformers, and resuming at another ep_size and number of ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from spawn import run


def start():
    sys.path.insert(0, str(Path(__file__).parent.parent.parent))


def save_and_load(rank, world, folder):
    """Runs in each rank: loads a folder of plain Transformers over the ranks, saves it, and saves DCP checkpoints."""
    start()
    import moefx
    from tests.families import batch

    found = {}
    for name, ep, dtype in (("qwen3_moe", 2, torch.float32), ("gpt_oss", world, torch.bfloat16)):
        source = Path(folder, name)
        model = moefx.parallelize(source, ep_size=ep, dtype=dtype, compile=False)
        model.save_pretrained(Path(folder, f"{name}-again"), max_shard_size="60KB")
        found[name] = {n: tuple(p.to_local().shape) for n, p in model.named_parameters() if "experts" in n}
        if name != "qwen3_moe":
            continue
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
        for step in range(4):
            loss = model(**batch(2, 8, seed=50 + step)).loss  # the same batch on every rank: any number of ranks agrees
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 1:
                moefx.save_checkpoint(Path(folder, "resume"), model, optimizer, step=step)
        found["loss"] = float(loss.detach())
    return found


def resume(rank, world, folder, ep):
    start()
    import moefx
    from tests.families import batch, build

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
    return float(loss.detach()), sentences


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders made by plain Transformers, and what two ranks made of them."""
    start()
    from tests.families import build

    folder = tmp_path_factory.mktemp("checkpoints")
    build("qwen3_moe").save_pretrained(folder / "qwen3_moe", max_shard_size="60KB")
    build("gpt_oss").bfloat16().save_pretrained(folder / "gpt_oss", max_shard_size="60KB")
    return folder, run(save_and_load, 2, str(folder), timeout=300)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_saved_as_plain_transformers_saves(saved, name):
    """Load what the ranks saved with plain Transformers and save it again: the same files, bit for bit; and the same weights."""
    from transformers import AutoModelForCausalLM

    folder, results = saved
    AutoModelForCausalLM.from_pretrained(folder / f"{name}-again").save_pretrained(folder / f"{name}-plain", max_shard_size="60KB")
    ours, theirs = (sorted(p.name for p in (folder / f"{name}-{k}").iterdir()) for k in ("again", "plain"))
    assert ours == theirs and len([f for f in ours if f.endswith(".safetensors")]) > 2
    first, whole = {}, {}
    for file in ours:
        if file.endswith(".safetensors"):
            a, b = load_file(folder / f"{name}-again" / file), load_file(folder / f"{name}-plain" / file)
            assert a.keys() == b.keys()
            assert all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a), file
            whole |= a
    for file in (folder / name).glob("*.safetensors"):
        first |= load_file(file)
    assert first.keys() == whole.keys() and all(torch.equal(first[k], whole[k]) for k in first)
    assert all(shape[0] == 4 for shape in results[0][name].values())  # of 8 experts, on each of two ranks


@pytest.mark.parametrize("world, ep", [(1, 1), (4, 4)])
def test_resumed_on_another_mesh(saved, world, ep):
    folder, results = saved
    for loss, sentences in run(resume, world, str(folder), ep, timeout=300):
        assert loss == pytest.approx(results[0]["loss"], rel=1e-5)
        assert len(sentences) == 3
        assert "has model.embed_tokens.weight of shape (256, 64), the model of (128, 64)" in sentences[0]
        assert "lacks model.layers.2" in sentences[1]
        assert "has model.layers.1" in sentences[2] and "which the model has not" in sentences[2]


def bad_folders(rank, world, folder):
    start()
    import json

    import moefx

    sentences = []
    source = Path(folder, "qwen3_moe-again")
    for key, value in (("num_hidden_layers", 3), ("num_hidden_layers", 1), ("vocab_size", 128)):
        config = json.loads((source / "config.json").read_text())
        config[key] = value
        bad = Path(folder, f"bad-{key}-{value}-{rank}")
        bad.mkdir()
        for file in source.iterdir():
            (bad / file.name).symlink_to(file) if file.name != "config.json" else None
        (bad / "config.json").write_text(json.dumps(config))
        try:
            moefx.parallelize(bad, compile=False)
        except Exception as error:
            sentences.append(f"{type(error).__name__}: {error}")
    for given in (Path(folder, "nowhere"), source):
        try:
            moefx.parallelize(given, ep_size=1 if given != source else 3, compile=False)
        except moefx.MoefxError as error:
            sentences.append(str(error))
    return sentences


def test_bad_folders_are_errors(saved):
    folder, _ = saved
    for sentences in run(bad_folders, 2, str(folder), timeout=300):
        lacks, extra, shape, nowhere, ep = sentences
        assert "lacks model.layers.2" in lacks
        assert "model.layers.1" in extra
        assert "size" in shape or "shape" in shape
        assert "there is no" in nowhere and "ep_size=3 does not divide the 2 ranks" in ep


def test_an_interrupted_save_leaves_the_previous_one(saved):
    """Whatever is left of a save that did not end is neither read nor in the way of the next."""
    folder, _ = saved
    leftover = folder / "qwen3_moe-again" / "model-00001-of-00002.safetensors.incomplete"
    leftover.write_bytes(b"half")
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder / "qwen3_moe-again")
