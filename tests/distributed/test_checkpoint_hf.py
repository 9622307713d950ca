"""Hugging Face checkpoints of sharded models: the files of plain Transformers."""

from __future__ import annotations

import ctypes
import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.spawn import run


def load_and_save(rank, world, folder):
    """Runs in each rank: loads a folder of plain Transformers, sharded across the ranks, and saves it again."""
    import moefx

    found = {}
    for name, ep, dtype in (("qwen3_moe", 2, torch.float32), ("gpt_oss", world, torch.bfloat16)):
        model = moefx.parallelize(Path(folder, name), ep_size=ep, dtype=dtype, compile=False)
        model.save_pretrained(Path(folder, f"{name}-again"), max_shard_size="60KB")
        found[name] = {n: tuple(p.to_local().shape) for n, p in model.named_parameters() if "experts" in n}
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of plain Transformers, and what two ranks made of them."""
    from tests.support.families import build

    folder = tmp_path_factory.mktemp("checkpoints")
    build("qwen3_moe").save_pretrained(folder / "qwen3_moe", max_shard_size="60KB")
    build("gpt_oss").bfloat16().save_pretrained(folder / "gpt_oss", max_shard_size="60KB")
    return folder, run(load_and_save, 2, str(folder), timeout=300)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_saved_as_plain_transformers_saves(saved, name):
    """Load what the ranks saved with plain Transformers and save it again: the same files, bit for bit; and the same weights."""
    from transformers import AutoModelForCausalLM

    folder, results = saved
    AutoModelForCausalLM.from_pretrained(folder / f"{name}-again").save_pretrained(
        folder / f"{name}-plain", max_shard_size="60KB"
    )
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


def bad_folders(rank, world, folder):
    import json

    import moefx

    sentences = []
    source = Path(folder, "qwen3_moe-again")
    changes = (
        ("num_hidden_layers", 3),
        ("num_hidden_layers", 1),
        ("vocab_size", 128),
        ("num_local_experts", 4),
        ("num_local_experts", 16),
    )
    for key, value in changes:
        config = json.loads((source / "config.json").read_text())
        config[key] = value
        bad = Path(folder, f"bad-{key}-{value}-{rank}")
        bad.mkdir()
        for file in source.iterdir():
            (bad / file.name).symlink_to(file) if file.name != "config.json" else None
        (bad / "config.json").write_text(json.dumps(config))
        try:
            moefx.parallelize(bad, compile=False)
        except moefx.MoefxError as error:
            sentences.append(str(error))
    for kind in ("fused", "bare", "pickled", "half"):
        try:
            moefx.parallelize(Path(folder, f"wrong-{kind}"), compile=False)
        except moefx.MoefxError as error:
            sentences.append(str(error))
    for given in (Path(folder, "nowhere"), source):
        try:
            moefx.parallelize(given, ep_size=1 if given != source else 3, compile=False)
        except moefx.MoefxError as error:
            sentences.append(str(error))
    return sentences


def wrong_folders(folder):
    """The experts' fused weights as the model has them; names without the base model's prefix; pickled; cut off. One bad shape each."""
    from safetensors.torch import save_file

    from tests.support.families import build

    fused = {n: t.detach() for n, t in build("qwen3_moe").state_dict().items()}
    fused["model.layers.1.mlp.experts.gate_up_proj"] = fused["model.layers.1.mlp.experts.gate_up_proj"][:, :-2]
    source = load_file(next((folder / "one-file").glob("*.safetensors")))
    bare = {n.removeprefix("model."): t for n, t in source.items()}
    bare["embed_tokens.weight"] = torch.zeros(258, 64)
    for kind, tensors in (("fused", fused), ("bare", bare), ("pickled", bare), ("half", bare)):
        made = folder / f"wrong-{kind}"
        made.mkdir()
        (made / "config.json").write_bytes((folder / "one-file/config.json").read_bytes())
        if kind == "pickled":
            torch.save(tensors, made / "pytorch_model.bin")
        else:
            save_file(
                {n: t.contiguous().clone() for n, t in tensors.items()}, made / "model.safetensors", metadata={"format": "pt"}
            )
    half = folder / "wrong-half/model.safetensors"
    half.write_bytes(half.read_bytes()[:5000])


def test_bad_folders_are_errors(saved):
    from tests.support.families import build

    folder, _ = saved
    build("qwen3_moe").save_pretrained(folder / "one-file")
    wrong_folders(folder)
    for sentences in run(bad_folders, 2, str(folder), timeout=300):
        lacks, extra, shape, many, few, fused, bare, pickled, half, nowhere, ep = sentences
        assert "has model.layers.1.mlp.experts.gate_up_proj of shape (8, 62, 64), the model of (8, 64, 64)" in fused
        assert all("has embed_tokens.weight of shape (258, 64), the model of (256, 64)" in text for text in (bare, pickled))
        assert "wrong-half/model.safetensors cannot be read" in half and "download it again" in half
        assert "lacks model.layers.2" in lacks
        assert "model.layers.1" in extra
        assert "has lm_head.weight of shape (256, 64), the model of (128, 64)" in shape
        assert "has model.layers.0.mlp.experts.4." in many and "which the model lacks" in many
        assert "of shape (8, 64), the model of (16, 64)" in few or "lacks model.layers.0.mlp.experts.10." in few
        assert "there is no" in nowhere and "ep_size=3 does not divide the 2 ranks" in ep


def test_an_interrupted_save_leaves_the_previous_one(saved):
    """Whatever is left of a save that did not end is neither read nor in the way of the next."""
    folder, _ = saved
    leftover = folder / "qwen3_moe-again" / "model-00001-of-00002.safetensors.incomplete"
    leftover.write_bytes(b"half")
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder / "qwen3_moe-again")


class Killed(BaseException):
    pass


def test_a_save_that_dies_between_two_renames(tmp_path, monkeypatch):
    """At each of its steps: the folder has the old model, or none that anybody reads and the new one for finish_save."""
    import os

    from transformers import AutoModelForCausalLM

    from moefx.distributed import checkpoint_hf
    from tests.support.families import build

    old, new = build("qwen3_moe"), build("qwen3_moe", seed=1)
    steps = {"replace": os.replace, "unlink": Path.unlink}
    outcomes = set()

    def is_there(model, folder):
        there = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        return all(torch.equal(t, there[n]) for n, t in model.state_dict().items())

    for sizes in (("60KB", "60KB"), ("1GB", "60KB"), ("60KB", "1GB")):
        for death in range(100):
            folder = tmp_path / f"{sizes}-{death}"
            checkpoint_hf.save_pretrained(old, folder, max_shard_size=sizes[0])
            (folder / "model-00001-of-00077.safetensors.incomplete").write_bytes(
                b"half"
            )  # of another one, that died while writing
            (folder / "tokenizer.json").write_text("{}")
            left = iter(range(death, -1, -1))

            def counted(real, left=left):
                def step(*args, **named):
                    if next(left) == 0:
                        raise Killed
                    return real(*args, **named)

                return step

            monkeypatch.setattr(os, "replace", counted(steps["replace"]))
            monkeypatch.setattr(Path, "unlink", counted(steps["unlink"]))
            try:
                checkpoint_hf.save_pretrained(new, folder, max_shard_size=sizes[1])
                died = False
            except Killed:
                died = True
            monkeypatch.undo()
            if died and (folder / "config.json").exists():
                assert is_there(old, folder)
                outcomes.add("old")
            else:
                if died:
                    with pytest.raises(ValueError, match="config.json"):
                        AutoModelForCausalLM.from_pretrained(folder)
                    checkpoint_hf.finish_save(folder)
                    outcomes.add("finished")
                assert is_there(new, folder)
            if not died:
                break
            checkpoint_hf.save_pretrained(old, folder, max_shard_size=sizes[0])  # and nothing of it is in the way of the next
            assert is_there(old, folder) and not list(folder.glob("*.incomplete"))
        names = {p.name for p in folder.iterdir()}
        assert names == {p.name for p in _plain_files(new, tmp_path, sizes[1])} | {"tokenizer.json"}
        assert 3 < death < 99 and outcomes == {"old", "finished"}


def _plain_files(model, tmp_path, size):
    folder = tmp_path / f"plain-{size}"
    model.save_pretrained(folder, max_shard_size=size)
    return folder.iterdir()


#: How the experts lie on disk, by family: one matrix an expert and projection, or all experts' in one tensor, also transposed.
LAYOUTS = {
    "qwen3_moe": ("experts.3.gate_proj.weight", torch.bfloat16, "60KB"),
    "mixtral": ("experts.3.w1.weight", torch.float32, "1GB"),
    "olmoe": ("experts.3.up_proj.weight", torch.float32, "60KB"),
    "deepseek_v3": ("experts.3.down_proj.weight", torch.bfloat16, "1GB"),
    "glm4_moe": ("experts.3.down_proj.weight", torch.float32, "1GB"),
    "gpt_oss": ("experts.gate_up_proj", torch.float32, "1GB"),
    "nemotron_h": ("experts.3.up_proj.weight", torch.bfloat16, "60KB"),
}  # fmt: skip


def through_ranks(rank, world, folder):
    """Loads as parallelize does, without rewriting, and saves."""
    from moefx.distributed import checkpoint_hf
    from moefx.distributed.layout import make_layout
    from moefx.distributed.load_sharded import load

    for name, (_, _, size) in LAYOUTS.items():
        model = load(Path(folder, name), make_layout(world, 1))
        checkpoint_hf.save_pretrained(model, Path(folder, f"{name}-again"), max_shard_size=size)


def test_every_layout_comes_back_file_by_file(tmp_path):
    """Through two ranks or through plain Transformers: the same files, tensors and bits, in fp32 and bf16, one file or several."""
    from transformers import AutoModelForCausalLM

    from tests.support.families import build

    for name, (_, dtype, size) in LAYOUTS.items():
        build(name).to(dtype).save_pretrained(tmp_path / name)
        AutoModelForCausalLM.from_pretrained(tmp_path / name).save_pretrained(tmp_path / f"{name}-plain", max_shard_size=size)
    run(through_ranks, 2, str(tmp_path), timeout=300)
    for name, (tensor, dtype, size) in LAYOUTS.items():
        before, after = (sorted((tmp_path / n).glob("*.safetensors*")) for n in (f"{name}-plain", f"{name}-again"))
        assert [p.name for p in before] == [p.name for p in after] and (len(before) == 1) == (size == "1GB"), name
        seen = set()
        for a, b in zip(before, after, strict=True):
            if a.suffix == ".json":
                assert json.loads(a.read_text())["weight_map"] == json.loads(b.read_text())["weight_map"], name
                continue
            a, b = load_file(a), load_file(b)
            assert a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a), name
            assert any(t.dtype == dtype for t in a.values())
            seen |= a.keys()
        assert any(k.endswith(tensor) for k in seen), f"{name} has no {tensor} but {sorted(seen)[:3]}"


# --- memory ----------------------------------------------------------------------------------------------------------


def anonymous():
    """Bytes of memory that this process has allocated; pages of files that are mapped do not count."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


class Peak(threading.Thread):
    """The most that the process held while the block ran, above what it held before."""

    def __enter__(self):
        self.ended, self.before, self.most = threading.Event(), anonymous(), 0
        self.start()
        return self

    def run(self):
        while not self.ended.wait(0.001):
            self.most = max(self.most, anonymous() - self.before)

    def __exit__(self, *_):
        self.ended.set()
        self.join()


def held(rank, world, folder):
    threshold = -3  # M_MMAP_THRESHOLD: what is freed goes back to the system at once, or old tensors are counted as held
    ctypes.CDLL(None).mallopt(threshold, 1 << 20)
    from moefx.distributed import checkpoint_hf
    from moefx.distributed.layout import make_layout
    from moefx.distributed.load_sharded import load

    with Peak() as loading:
        model = load(Path(folder), make_layout(world, 1))
    with Peak() as saving:
        checkpoint_hf.save_pretrained(model, Path(folder, "again"), max_shard_size="50MB")
    share = sum(p.to_local().nbytes for p in model.parameters())
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    block = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"share": share, "largest": largest, "block": block, "whole": whole, "load": loading.most, "save": saving.most}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts allocated memory as Linux tells it")
def test_no_rank_holds_the_model(tmp_path):
    """400 MB over four ranks, experts one by one on disk: loading holds the rank's share and a tensor, saving a file and a block."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen3_moe",
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        num_experts_per_tok=2,
        moe_intermediate_size=512,
        num_experts=32,
        head_dim=64,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path, max_shard_size="50MB")
    slack = 40e6  # what Python, gloo and the C library's own pools take
    for rank in run(held, 4, str(tmp_path), timeout=300):
        assert rank["whole"] > 400e6 and rank["share"] < 0.26 * rank["whole"]
        assert rank["load"] < rank["share"] + rank["largest"] + slack < 0.5 * rank["whole"]
        assert (
            rank["save"] < 50e6 + 3 * rank["block"] + slack < 0.7 * rank["whole"]
        )  # gathered, split by expert, and in transit
