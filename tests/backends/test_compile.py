"""Inductor's disk cache: compiled code is reused, but not across versions of moefx or process group sizes."""

import copy
import operator

import pytest
import torch
from torch import fx
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_inductor_cache

import moefx
from moefx import ops
from moefx.backends import compile
from moefx.ir.plan import Plan
from tests.support.families import batch, build

pytestmark = pytest.mark.usefixtures("cached_captures")


def _graph() -> fx.GraphModule:
    graph = fx.Graph()
    x, w = (graph.placeholder(n) for n in ("x", "w"))
    graph.output(graph.call_function(torch.ops.aten.sin.default, (graph.call_function(ops.rms_norm, (x, w, 1e-6)),)))
    return fx.GraphModule({}, graph)


def _found(ep_size=1) -> bool:
    """Whether the code of the same graph was in the cache."""
    torch._dynamo.reset()
    counters.clear()
    compile.compiled(_graph(), Plan((), ep_size=ep_size))(torch.ones(3, 4), torch.ones(4))
    hits, misses = (sum(n for name, n in counters["inductor"].items() if name == f"fxgraph_cache_{w}") for w in ("hit", "miss"))
    hits += counters["aot_autograd"]["autograd_cache_hit"]
    return not misses and hits > 0


def test_found_again_unless_version_or_group_differ(monkeypatch):
    with fresh_inductor_cache():
        assert not _found()
        assert _found()
        assert not _found(ep_size=2)
        assert _found(ep_size=2)
        monkeypatch.setattr(compile, "revision", lambda: "another version")
        assert not _found()


class _Own(CustomGraphPass):
    seen = 0

    def __call__(self, graph):
        type(self).seen += 1

    def uuid(self):
        return "mine"


@pytest.mark.parametrize(("then", "cached"), [(_Own(), True), (lambda graph: setattr(_Own, "seen", _Own.seen + 1), False)])
def test_a_pass_of_the_users_still_runs(then, cached):
    _Own.seen = 0
    with fresh_inductor_cache(), config.patch(post_grad_custom_post_pass=then):
        assert not _found()
        assert _Own.seen > 0
        if cached:
            assert _found()


def test_revision_is_of_all_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(compile, "__file__", str(tmp_path / "compiling.py"))
    read = compile.revision.__wrapped__
    (tmp_path / "a.py").write_text("1")
    first = read()
    assert first == read()
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "b.py").write_text("")
    assert read() != first


def _of_numbers() -> fx.GraphModule:
    """A function that computes with a size what torch.export writes for ``min``, ``max``, ``int``, ``float`` and ``not``."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    size = graph.call_function(torch.ops.aten.sym_size.int, (x, 0))
    few = graph.call_function(torch.sym_min, (size, 8))
    many = graph.call_function(torch.sym_max, (few, 3))
    half = graph.call_function(torch.sym_int, (graph.call_function(torch.sym_float, (many,)),))
    kept = graph.call_function(torch.ops.aten.slice.Tensor, (x, 0, 0, half))
    wide = graph.call_function(torch.sym_not, (graph.call_function(operator.lt, (size, 100)),))
    scaled = graph.call_function(torch.ops.aten.mul.Tensor, (kept, graph.call_function(torch.sym_int, (wide,))))
    graph.output((graph.call_function(torch.ops.aten.add.Tensor, (kept, scaled)),))
    return fx.GraphModule({}, graph)


def test_what_exports_compute_of_sizes_compiles_at_a_first_length_and_another():
    plain = _of_numbers()
    run = compile.compiled(plain, Plan((), compile="eager"))
    for size in (4, 20, 120, 2):
        x = torch.randn(size, 3)
        torch.testing.assert_close(run(x), plain(x))
    with_numbers = compile.with_builtins(plain)
    # torch 2.11's Dynamo traces none of these where their arguments are plain numbers
    assert not any(
        getattr(torch, n) in {node.target for node in with_numbers.graph.nodes} for n in dir(torch) if n.startswith("sym_")
    )
    assert any(node.target is torch.sym_min for node in plain.graph.nodes), "the graph that people look at stays as it was"


#: Training, evaluating and scoring at a few shapes: 18 variants of Dynamo's, whose own limit is 8.
USES = [(shape, grad) for shape in ((2, 24), (1, 31), (1, 1), (2, 1), (3, 17)) for grad in (True, False)]


@pytest.mark.parametrize("later_torch", [True, False])
def test_many_uses_of_one_model_are_all_compiled(monkeypatch, later_torch, recwarn):
    if not later_torch:  # before 2.13 torch.compile takes no limit
        monkeypatch.setattr(compile, "_limit", dict)
    torch._dynamo.reset()
    plain = build("qwen3_moe")
    model = moefx.optimize(copy.deepcopy(plain), compile="eager")
    for (batch_size, length), grad in USES:
        model.train(grad), plain.train(grad)
        given = batch(batch_size, length)
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(model(**given).loss, plain(**given).loss, equal_nan=True)  # one token: no labels
    assert not [w for w in recwarn if "compiled" in str(w.message)]


def test_more_variants_than_that_run_uncompiled_and_say_so(monkeypatch):
    monkeypatch.setattr(compile, "MOST_VARIANTS", 1)
    torch._dynamo.reset()
    plain = _graph()
    run = compile.compiled(plain, Plan((), compile="eager"))
    # not by monkeypatch, which would leave the entry of Dynamo's configuration hidden
    with torch._dynamo.config.patch(recompile_limit=1), pytest.warns(UserWarning, match="compiled 1 times") as warned:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            x, w = torch.randn(3, 4, dtype=dtype), torch.ones(4, dtype=dtype)
            torch.testing.assert_close(run(x, w), plain(x, w))
    assert len(warned) == 1
