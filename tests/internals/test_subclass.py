"""Forwards under moefx behave like methods: a class's new one is called, and one that was wrapped before stays what it was."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

import moefx
from moefx.integrations.transformers.tiny_config import tiny_config
from tests.flows.alive_helpers import scaled, scaled_forward, with_forward
from tests.support.families import batch, build

#: A module of each kind that has a subclass under moefx, and one inside a block.
PATHS = ("", "model", "model.layers.0", "lm_head", "model.norm", "model.layers.0.mlp")


def losses(path: str, act: Callable[[Any, Callable[[], None]], None], optimize: bool) -> list[float]:
    """The losses that ``act(module, see)`` sees of a model, whose module ``path`` it is given."""
    model, found = build("qwen3_moe", num_hidden_layers=1), []
    model = moefx.optimize(model, compile=False) if optimize else model

    def see() -> None:
        out = model(**batch(2, 7))
        found.append(float(out.loss))
        out.loss.backward()

    see()
    act(model.get_submodule(path), see)
    return found


def own_class(module: nn.Module) -> Any:
    return next(c for c in type(module).__mro__ if "_moefx_base" not in vars(c))


def replaced(module: nn.Module) -> Any:
    cls = own_class(module)
    return mock.patch.object(cls, "forward", scaled_forward(cls.forward, 0.7))


def in_the_class(module: nn.Module, see: Callable[[], None]) -> None:
    with replaced(module):
        see()
    see()


def around_it_before(module: nn.Module, see: Callable[[], None]) -> None:
    with_forward(module, 0.6)
    with replaced(module):
        see()
    del module.forward
    see()


def around_it_after(module: nn.Module, see: Callable[[], None]) -> None:
    with replaced(module):
        with_forward(module, 0.6)
        see()
    see()  # what it wraps stays the patched one


def calling_its_class(module: nn.Module, see: Callable[[], None]) -> None:
    module.forward = types.MethodType(
        lambda self, *args, **kwargs: scaled(type(self).forward(self, *args, **kwargs), 0.6), module
    )
    with replaced(module):
        see()
    see()


class Wrapper:
    def __init__(self, plain: Callable) -> None:
        self.plain = [plain]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return scaled(self.plain[0](*args, **kwargs), 0.6)


def by_an_object(module: nn.Module, see: Callable[[], None]) -> None:
    module.forward = Wrapper(module.forward)
    with replaced(module):
        see()
    see()


def by_a_default(module: nn.Module, see: Callable[[], None]) -> None:
    kept = functools.partial(module.forward)
    module.forward = lambda *args, plain=kept, **kwargs: scaled(plain(*args, **kwargs), 0.6)
    with replaced(module):
        see()


def dropped_by_vars(module: nn.Module, see: Callable[[], None]) -> None:
    with_forward(module, 0.6)
    vars(module).pop("forward")
    with replaced(module):
        see()
        with_forward(module, 0.6)
        see()


ACTS = [in_the_class, around_it_before, around_it_after, calling_its_class, by_an_object, by_a_default, dropped_by_vars]


@pytest.mark.filterwarnings("ignore::moefx.ShortfallWarning")
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("path", PATHS)
def test_a_forward_is_that_of_plain_python(path, act):
    wanted = losses(path, act, False)
    torch.testing.assert_close(losses(path, act, True), wanted, rtol=1e-5, atol=1e-6)
    assert len({round(x, 6) for x in wanted}) > 1, "it changes nothing"


@pytest.mark.parametrize("path", PATHS)
def test_a_forward_that_was_kept_outlives_restore(path):
    model = moefx.optimize(build("qwen3_moe", num_hidden_layers=1), compile=False)
    module, given = model.get_submodule(path), batch(2, 7)
    with_forward(module, 0.6)
    wanted = float(model(**given).loss)
    moefx.restore(model)
    assert "_moefx_forward" not in vars(module)
    torch.testing.assert_close(float(model(**given).loss), wanted, rtol=1e-5, atol=1e-6)
    again = moefx.optimize(model, compile=False)
    torch.testing.assert_close(float(again(**given).loss), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_a_method_that_is_kept_elsewhere_outlives_restore(path):
    model = moefx.optimize(build("qwen3_moe", num_hidden_layers=1), compile=False)
    module = model.get_submodule(path)
    kept, given = module.forward, batch(2, 7)
    wanted = float(moefx.restore(model)(**given).loss)
    module.forward = lambda *args, **kwargs: kept(*args, **kwargs)
    assert float(model(**given).loss) == wanted


class Scaled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 0.7


@pytest.mark.filterwarnings("ignore::moefx.ShortfallWarning")
@pytest.mark.parametrize("path", ["lm_head", "model.norm"])
def test_a_module_that_was_parametrized_since_stays_so_after_restore(path):
    found, given = [], batch(2, 7)
    for optimize in (False, True):
        model = build("qwen3_moe", num_hidden_layers=1)
        model = moefx.optimize(model, compile=False) if optimize else model
        module = model.get_submodule(path)
        parametrize.register_parametrization(module, "weight", Scaled())
        found.append([float(model(**given).loss)])
        model = moefx.restore(model) if optimize else model
        found[-1].append(float(model(**given).loss))
        model = moefx.optimize(model, compile=False) if optimize else model
        found[-1].append(float(model(**given).loss))
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
        found[-1].append(float(model(**given).loss))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("family", "name"), [("dbrx", "DbrxExperts"), ("jetmoe", "JetMoeMoE")])
@pytest.mark.filterwarnings("ignore::moefx.ShortfallWarning")
def test_a_loop_of_experts_whose_class_is_replaced_runs_as_it_is(family, name):
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(tiny_config(family)).train()
    model, given = moefx.optimize(copy.deepcopy(plain), compile=False), batch(2, 9)
    before = float(plain(**given).loss)
    with replaced(next(m for m in plain.modules() if type(m).__name__ == name)):
        wanted = float(plain(**given).loss)
        assert abs(float(model(**given).loss) - wanted) < 1e-5
    assert abs(wanted - before) > 1e-4 and abs(float(model(**given).loss) - before) < 1e-5
