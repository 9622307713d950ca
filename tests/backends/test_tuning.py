"""Tuning: which kernel is chosen by its time, what is cached and reported, and what happens when a kernel fails."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import moefx
from moefx import ops
from moefx.backends import tuning
from moefx.backends.torch import experts
from tests.support.families import batch, build

pytestmark = pytest.mark.usefixtures("cached_captures")


def broken(*args, **kwargs):
    raise ValueError("no such instruction")


def backend(name, fn):
    def kernel(
        x,
        index,
        weights,
        up,
        gate_up_bias,
        down,
        down_bias,
        *,
        activation,
        alpha=0.0,
        limit=0.0,
        transposed=False,
        interleaved=False,
    ):
        return fn(
            x,
            index,
            weights,
            up,
            gate_up_bias,
            down,
            down_bias,
            activation=activation,
            alpha=alpha,
            limit=limit,
            transposed=transposed,
            interleaved=interleaved,
        )

    return moefx.Backend(name, {ops.experts: moefx.Kernel(kernel, why=f"of {name}")})


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEFX_TUNING", str(tmp_path / "below" / "tuning.json"))
    return tmp_path / "below" / "tuning.json"


@pytest.fixture
def timed(monkeypatch):
    """Times by backend instead of the clock's; collects who was timed."""
    times, seen = {}, []

    def measure(self, kernel, compile):
        name = re.search(r"of (\w+)", kernel.__doc__).group(1)
        seen.append(name)
        return times[name]

    monkeypatch.setattr(tuning._Site, "measure", measure)
    return times, seen


def named(name):
    made = backend(name, experts)
    made.kernels[ops.experts].fn.__doc__ = f"of {name}"
    return made


def optimized(*backends, **options):
    model = moefx.optimize(build("qwen3_moe"), backends=[*backends, "reference"], compile=False, **options)
    (why,) = [why for (op, _), (_, why) in moefx.report(model).kernels().items() if op == "experts"]
    (name,) = [b for op, b in moefx.report(model).kernels() if op == "experts"]
    return model, name, why


def test_the_fastest_gets_it_and_all_times_are_said(kept, timed):
    times, seen = timed
    times |= {"first": [1.0, 3.0], "second": [2.0, 1.5], "third": [4.0, 4.0]}
    backends = [named(n) for n in times]
    _, name, why = optimized(*backends, tune=(2, 64))
    assert name == "second" and seen == ["first", "second", "third"]  # both blocks are one function: timed once
    assert why.endswith("measured at B=2, S=64: first 1.00 + 3.00 ms, second 2.00 + 1.50 ms, third 4.00 + 4.00 ms")
    assert optimized(*backends, tune=(2, 64))[1] == "second" and len(seen) == 3  # read from the file
    assert optimized(*backends)[1] == "first" and len(seen) == 3  # not asked to measure
    optimized(*backends, tune=(4, 64))
    assert len(seen) == 6  # another size


def test_only_what_is_new_is_timed(kept, timed):
    times, seen = timed
    times |= {"first": [1.0, 1.0], "second": [2.0, 2.0], "third": [0.5, 0.5]}
    first, second, third = (named(n) for n in times)
    optimized(first, second, tune=(1, 32))
    assert optimized(first, second, third, tune=(1, 32))[1] == "third" and seen == ["first", "second", "third"]
    (entry,) = json.loads(kept.read_text()).values()
    assert entry == times


def test_a_kernel_that_fails_is_left_out_and_said(kept):
    model, name, why = optimized(backend("broken", broken), backend("good", experts), tune=(1, 16))
    assert name == "good" and "broken failed (ValueError: no such instruction), good " in why
    assert moefx.verify(model, batch(2, 9)).ok
    forward, backward = map(float, re.search(r"good ([\d.]+) \+ ([\d.]+) ms", why).groups())
    assert forward > 0 and backward > 0
    model = build("qwen3_moe")
    with pytest.raises(moefx.MoefxError, match="no kernel of moefx.experts runs at B=1, S=16 on cpu: broken: failed .*; also"):
        moefx.optimize(model, backends=[backend("broken", broken), backend("also", broken)], compile=False, tune=(1, 16))
    assert not hasattr(model, "_moefx")


def test_a_file_that_cannot_be_read_is_written_anew(kept, timed):
    times, _ = timed
    times |= {"first": [2.0, 1.0], "second": [1.0, 1.0]}
    kept.parent.mkdir()
    kept.write_text("{ half")
    assert optimized(named("first"), named("second"), tune=(1, 16))[1] == "second"
    assert len(json.loads(kept.read_text())) == 1


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "nemotron_h"])
def test_sites_of_other_families(kept, name):
    """Values of another width than queries; biased and ungated experts; the head."""
    own = moefx.Backend(
        "own",
        {op: moefx.Kernel(k.fn, k.refuses) for op, k in moefx.resolve(["torch"])[0].kernels.items() if op in tuning.TUNED},
    )
    model = moefx.optimize(build(name), backends=[own, "torch"], compile=False, tune=(2, 24))
    measured = {op for (op, _), (_, why) in moefx.report(model).kernels().items() if "measured at B=2, S=24" in why}
    sinks = name == "gpt_oss"  # which torch has no kernel for on the CPU
    assert measured == {"experts", "linear_cross_entropy"} | ({"attention"} if not sinks else set())
    assert not any("failed" in why for _, why in moefx.report(model).kernels().values())
    assert moefx.verify(model, batch(2, 9)).ok


@pytest.mark.parametrize("tune", [4096, (1,), (0, 4096), (1.0, 2), "fast"])
def test_no_size(tune):
    with pytest.raises(moefx.MoefxError, match=r"tune=.* is not a size: pass \(sequences, tokens per sequence\)"):
        moefx.optimize(build("qwen3_moe"), tune=tune)


def test_nothing_is_timed_on_the_meta_device(kept, timed):
    with torch.device("meta"):
        model = build("qwen3_moe")
    moefx.optimize(model, backends=[named("first"), named("second")], compile=False, tune=True)
    assert timed[1] == []


def test_without_timing_what_is_kept_decides_then_the_table_then_the_order(kept, timed, tmp_path, monkeypatch):
    times, seen = timed
    times |= {"first": [2.0, 2.0], "second": [1.0, 1.0]}
    backends = [named(n) for n in times]
    monkeypatch.setattr(tuning, "table_of", lambda where: tmp_path / "table.json")
    monkeypatch.setenv("MOEFX_TUNE", "0")
    _, name, why = optimized(*backends, tune=(2, 64))
    assert name == "first" and not seen and "MOEFX_TUNE=0, and nothing is kept of B=2, S=64 on " in why

    monkeypatch.delenv("MOEFX_TUNE")
    assert optimized(*backends, tune=(2, 64))[1] == "second" and len(seen) == 2
    sites = tuning.rows(tuning.name_of(torch.device("cpu")))
    assert list(sites.values()) == [times] and not tuning.rows("another device")
    (tmp_path / "table.json").write_text(json.dumps({"sites": {row: times | {"first": [0.1, 0.1]} for row in sites}}))

    monkeypatch.setenv("MOEFX_TUNE", "0")
    assert optimized(*backends, tune=(2, 64))[1] == "second"  # what was measured here, by these versions
    kept.unlink()
    _, name, why = optimized(*backends, tune=(2, 64))
    assert name == "first" and why.endswith("table.json at B=2, S=64: first 0.10 + 0.10 ms, second 1.00 + 1.00 ms")
    _, name, why = optimized(*backends, named("third"), tune=(2, 64))
    assert name == "first" and "third" not in why  # not in the table: not a candidate
    assert len(seen) == 2 and not kept.exists()


def test_the_tables_that_moefx_has_are_of_devices_and_sites_that_it_asks_for():
    tables = sorted((Path(tuning.__file__).parent / "tuned").glob("*.json"))
    assert [t.name for t in tables] == ["nvidia-h200.json"] and tuning.table_of("NVIDIA H200") == tables[0]
    sites = json.loads(tables[0].read_text())["sites"]
    asked = {f"moefx.{op._schema.name.split('::')[1]}" for op in tuning.TUNED}
    for row, found in sites.items():
        name, given, training = json.loads(row)
        assert name in asked and training and given and all(len(times) == 2 for times in found.values()) and len(found) > 1


@pytest.mark.parametrize(
    ("where", "served"),
    [("NVIDIA H100 80GB HBM3", True), ("NVIDIA GH200 480GB", True), ("NVIDIA H20", False), ("NVIDIA A100-SXM4-80GB", False)],
)
def test_a_device_with_the_same_chip_is_served_by_its_table(where, served):
    assert (tuning._same_chip(where) == "NVIDIA H200") is served
