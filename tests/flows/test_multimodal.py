"""Multimodal models: with images, without, and over ranks of which one has images and another has none."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import moefx
from moefx.errors import MoefxError
from moefx.integrations.transformers.auto import auto_class
from moefx.integrations.transformers.tiny_config import tiny_config
from moefx.runtime.verify import against
from tests.support.parity import distances_in_bf16, of_a_checkpoint
from tests.support.spawn import run

pytestmark = pytest.mark.usefixtures("cached_captures")

FAMILIES = ["qwen3_vl_moe", "glm4v_moe"]
IMAGE, START, END = 200, 202, 203


def build(family):
    config = tiny_config(family)
    config.text_config.moe_intermediate_size = 24  # no matrix of the experts is square: a transposed one shows
    names = (
        "image_token_id",
        "video_token_id",
        "vision_start_token_id",
        "vision_end_token_id",
        "image_start_token_id",
        "image_end_token_id",
    )
    for i, name in enumerate(names):
        if hasattr(config, name):
            setattr(config, name, IMAGE + i)
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config).train()


def text(rows, length, seed=0):
    ids = torch.randint(5, 190, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def picture(model, high, wide, length, seed=0):
    """An image of high x wide patches, and text around it."""
    vision, random = model.config.vision_config, torch.Generator().manual_seed(seed)
    many = high * wide // vision.spatial_merge_size**2
    before, after = (torch.randint(5, 190, (n,), generator=random) for n in (3, length))
    ids = torch.cat([before, torch.tensor([START]), torch.full((many,), IMAGE), torch.tensor([END]), after])[None]
    numbers = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "input_ids": ids,
        "labels": ids,
        "use_cache": False,
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.randn(high * wide, numbers, generator=random),
        "image_grid_thw": torch.tensor([[1, high, wide]]),
    }


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    plain = build(request.param)
    return plain, moefx.optimize(copy.deepcopy(plain), compile=False, strict=True)


def test_losses_and_all_gradients_are_the_models(family):
    plain, model = family
    pictures = [picture(plain, *size, seed=i) for i, size in enumerate([(4, 4, 9), (4, 8, 20), (8, 8, 1)])]
    for batch in (text(1, 1), text(2, 13), *pictures):
        result = against(plain, model, batch)
        assert result.ok, result.worst
    assert not moefx.report(model).fallbacks and not moefx.report(model).shortfall()
    model.zero_grad()
    model(**pictures[0]).loss.backward()
    assert all(
        p.grad is not None and p.grad.abs().max() > 0
        for n, p in model.named_parameters()
        if "visual.blocks" in n and "qkv.weight" in n
    )


def test_bf16(family):
    plain, _ = family
    ours, own = distances_in_bf16(plain, picture(plain, 4, 8, 20))
    assert ours <= 1.5 * own, (ours, own)


@pytest.mark.parametrize("family", ["qwen3_vl_moe"], indirect=True)
def test_compiled(family):
    plain, _ = family
    torch._dynamo.reset()
    model = moefx.optimize(copy.deepcopy(plain), compile="aot_eager")
    for batch in (picture(plain, 4, 4, 9), text(2, 13), picture(plain, 4, 8, 5)):
        against(plain, model, batch).raise_if_wrong()
    assert not moefx.report(model).fallbacks


def test_an_example_with_images_says_what_to_leave_out(family):
    plain, _ = family
    with pytest.raises(
        MoefxError, match="leave pixel_values, image_grid_thw out: calls with more than text are captured when they occur"
    ):
        moefx.optimize(copy.deepcopy(plain), example=picture(plain, 4, 4, 9))


def over_ranks(rank, world, family):
    """Rank 0 has an image, rank 1 has none: (loss, its own experts and all others' gradients) of one process for each, averaged."""
    plain = build(family)
    batches = [picture(plain, 4, 8, 20, seed=1), text(1, 17, seed=2)]
    wanted = {n: torch.zeros_like(p) for n, p in plain.named_parameters()}
    for i, batch in enumerate(batches):
        plain.zero_grad()
        loss = plain(**batch).loss
        loss.backward()
        if i == rank:
            own_loss = loss.item()
        for n, p in plain.named_parameters():
            wanted[n] += 0 if p.grad is None else p.grad / world
    model = moefx.optimize(build(family), ep_size=world, compile=False, strict=True)
    loss = model(**batches[rank]).loss
    loss.backward()
    wrong = [] if abs(loss.item() - own_loss) < 1e-5 * own_loss else [f"loss {loss.item()} instead of {own_loss}"]
    spread = 0
    for n, p in model.named_parameters():
        if ".experts." in n:
            spread += 1
            mine = wanted[n].chunk(world)[rank]
            far = (p.grad.to_local() - mine).abs().max() / mine.abs().max()
            wrong += [f"{n}: {far:.1e}"] if far > 1e-4 else []
    return wrong, spread


@pytest.mark.parametrize("family_name", FAMILIES)
def test_a_rank_with_an_image_and_one_without(family_name):
    for wrong, spread in run(over_ranks, 2, family_name):
        assert wrong == [] and spread == 4


def test_the_class_that_a_configuration_means():
    assert auto_class(AutoConfig.for_model("qwen3_moe")) is AutoModelForCausalLM
    assert auto_class(AutoConfig.for_model("qwen3_vl_moe")) is AutoModelForImageTextToText
    both = AutoConfig.for_model("qwen3_5_moe")
    assert auto_class(both) is AutoModelForCausalLM
    both.architectures = ["Qwen3_5MoeForConditionalGeneration"]
    assert auto_class(both) is AutoModelForImageTextToText


def from_a_folder(rank, world, family, folder):
    """Each rank has a picture of its own."""
    plain = build(family)
    batches = [picture(plain, 4, 4, 9, seed=1), picture(plain, 4, 8, 5, seed=2)]
    return of_a_checkpoint(rank, world, folder, AutoModelForImageTextToText, batches)


@pytest.mark.parametrize(("family_name", "published"), [("qwen3_vl_moe", False), ("qwen3_vl_moe", True), ("glm4v_moe", False)])
def test_a_checkpoint_over_ranks(family_name, published, tmp_path):
    """Qwen3-VL-MoE's checkpoints are published with the experts' weights transposed, and saved as the model has them."""
    plain = build(family_name)
    plain.save_pretrained(tmp_path)
    if published:
        (file,) = tmp_path.glob("*.safetensors")
        tensors = load_file(file)
        turned = {n: t.transpose(1, 2).contiguous() if ".experts." in n else t for n, t in tensors.items()}
        assert sum(".experts." in n and t.dim() == 3 for n, t in turned.items()) == 4
        save_file(turned, file, {"format": "pt"})
    assert run(from_a_folder, 2, family_name, str(tmp_path)) == [[], []]
