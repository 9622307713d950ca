"""Functions return each router's choice, and a replaying function takes it; the code of both says so."""

import pytest
import torch

import moefx
from tests.support.families import batch, build

pytestmark = pytest.mark.usefixtures("cached_captures")


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral"])
def test_the_choice_is_an_output(name):
    model = moefx.optimize(build(name), compile=False)
    report = moefx.report(model)["expose_routes"]
    assert report.made and all("its topk_ids are output" in c.what for c in report.made) and not report.missed
    assert "topk_ids" in report.code
    given = batch(2, 9)
    with torch.no_grad(), moefx.record_routes(model) as routes:
        wanted = model(**given, use_cache=False).logits
    with torch.no_grad(), moefx.replay_routes(model, routes):
        found = model(**given, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert all(ids.shape == (18, model.config.num_experts_per_tok) for ids in routes.values())


def test_another_choice_is_obeyed():
    model = moefx.optimize(build("qwen3_moe"), compile=False)
    given, experts = batch(2, 9), model.config.num_experts
    with torch.no_grad(), moefx.record_routes(model) as routes:
        model(**given, use_cache=False)
    shifted = {path: (ids + 1) % experts for path, ids in routes.items()}
    with torch.no_grad(), moefx.replay_routes(model, shifted), moefx.record_routes(model) as seen:
        model(**given, use_cache=False)
    assert all(torch.equal(seen[path], ids) for path, ids in shifted.items())
