"""Sizes of 1, and sizes that happen to be equal: the same graphs serve them, with the original model's loss and gradients."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import moefx
from moefx.analysis.report import ShortfallWarning
from moefx.frontend.call_signature import Call
from moefx.frontend.call_template import flatten
from moefx.frontend.readings import MOST, readings
from moefx.runtime import block
from tests.support.families import batch, build


def kinds(rows, length):
    """The calls of a training step, by name."""
    ids = batch(rows, length, seed=rows)["input_ids"]
    plain = {"input_ids": ids, "labels": ids}
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    padding = torch.ones_like(ids)
    padding[0, : length // 3] = 0
    packed = torch.cat([torch.arange(length // 2), torch.arange(length - length // 2)])[None].repeat(rows, 1)
    return {
        "plain": plain,
        "items": {**plain, "num_items_in_batch": torch.tensor(7)},
        "shift_labels, items": {**plain, "shift_labels": shifted, "num_items_in_batch": 5},
        "shift_labels, flat": {**plain, "shift_labels": shifted.reshape(-1)},
        "ignore_index": {"input_ids": ids, "labels": ids.masked_fill(ids % 3 == 0, -7), "ignore_index": -7},
        "padded": {**plain, "attention_mask": padding, "labels": ids.masked_fill(padding == 0, -100), "num_items_in_batch": 6},
        "packed": {**plain, "position_ids": packed, "use_cache": False, "num_items_in_batch": 6},
        "last tokens": {"input_ids": ids, "labels": ids[:, -1:], "logits_to_keep": 1, "num_items_in_batch": 6},
    }


LONGER = ("padded", "packed")  #: kinds that one token cannot be of
#: Kinds with two graphs of the block: positions of one row are taken for those of all rows; labels that are flat lie along the
#: sequence, for all that a block knows which does not read them.
SHARED = ("packed", "shift_labels, flat")


def train(model, example, name):
    """Compares a step with the untouched model's; gives how many functions there are then."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ShortfallWarning)
        result = moefx.verify(model, example)
    assert result.ok, f"{name}: {result}"
    assert not moefx.report(model).fallbacks, name
    return len(list(moefx.report(model).program))


def small(**changes):
    return moefx.optimize(build("qwen3_moe", num_hidden_layers=1, **changes), compile=False)


@pytest.mark.parametrize("shapes", [[(1, 9), (3, 5)], [(1, 1), (4, 4)]], ids=["one row first", "one token first"])
def test_one_row_or_one_token_first(shapes, monkeypatch):
    monkeypatch.setattr(block, "MAX_VARIANTS", 99)
    model = small()
    for name in kinds(2, 2) if shapes[0] == (1, 9) else ("items", "shift_labels, flat"):
        seen = [
            train(model, kinds(*shape)[name], f"{name} of {shape}") for shape in shapes if shape[1] > 1 or name not in LONGER
        ]
        assert seen[-1] == seen[0] or (name in SHARED and seen[-1] == seen[0] + 1), name


@pytest.mark.parametrize("changes", [{"num_experts": 1, "num_experts_per_tok": 1}, {"num_attention_heads": 1, "num_key_value_heads": 1}],
                         ids=["one expert", "one head"])  # fmt: skip
def test_one_of_what_the_model_has(changes):
    model = small(**changes)
    for shape, name in (((1, 16), "items"), ((8, 1), "plain"), ((1, 64), "plain")):
        train(model, kinds(*shape)[name], f"{name} of {shape}")


def test_in_bf16_and_in_evaluation():
    model = moefx.optimize(build("qwen3_moe", num_hidden_layers=1).bfloat16(), compile=False)
    for training in (True, False):
        model.train(training)
        result = moefx.verify(model, kinds(1, 9)["items"], tolerance=0.12)
        assert result.ok, str(result)
    assert not moefx.report(model).fallbacks


def read(*shapes, names=None, before=None, dtype=torch.int64):
    tensors = [torch.empty(shapes[0]), *(torch.empty(s, dtype=dtype) for s in shapes[1:])]
    return list(readings(tensors, {64}, names or {}, before or {}))


def test_likely_readings_come_first():
    assert read((1, 9, 64), (1, 9))[0] == (("a", "b", 64), ("a", "b"))
    assert read((1, 9, 64), (1, 9), names={1: "x"}, before={"x": [(1, "b")]})[0][1] == (1, "b")
    assert read((1, 9, 64), (1, 9), names={1: "x"}, before={"x": [("a", 7)]})[0][1] == ("a", "b")  # another length
    assert read((2, 1, 64), (2, 1, 1, 1), dtype=torch.bool)[0][1] == ("a", 1, "b", "b")
    assert [r[1] for r in read((1, 9, 64), (9,))[:2]] == [("b",), ("ab",)]
    assert read((1, 9, 64), (1,))[0][1] == (1,)
    assert read((3, 5, 64), (3, 5), (15,), (7,))[0][1:] == (("a", "b"), ("ab",), ("t",))  # a list has a length of its own
    assert read((1, 64, 64), (1, 64, 16), dtype=torch.float32)[0][1] == ("a", "b", 16)


def test_the_last_reading_is_for_lengths_of_one_only():
    found = read((1, 1, 64), (1, 1), (1,), (1, 1, 1, 1))
    assert len(found) == MOST and found[-1] == ((1, 1, 64), (1, 1), (1,), (1, 1, 1, 1))
    assert all("a" in r[0] for r in found[:-1])
    assert read((1, 9, 64), (1, 9))[-1] == ((1, "b", 64), (1, "b"))
    assert read((2, 9, 64), (2, 9)) == [
        (("a", "b", 64), ("a", "b")),
        (("a", "b", 64), ("a", 9)),
        (("a", "b", 64), (2, "b")),
        (("a", "b", 64), (2, 9)),
    ]


def test_a_recorded_call_has_one_reading():
    tensors, template = flatten((torch.empty(3, 17, 64), torch.empty(1, 17, 16)), {"mask": torch.empty(3, 1, 17, 17)})
    call = Call.of(tensors, template, True, {64})
    assert call.sizes == (("a", "b", 64), (1, "b", 16), ("a", 1, "b", "b"))


def padding_free(step):
    """As TRL's collator passes a row of sequences: their lengths, number and longest differ from step to step."""
    total = 20 + step
    cuts = sorted({3, 7, *range(4, 4 + step % 3)})
    starts = torch.tensor([0, *cuts, total], dtype=torch.int32)
    positions = torch.cat([torch.arange(int(n)) for n in starts.diff()])[None]
    ids = torch.randint(0, 256, (1, total), generator=torch.Generator().manual_seed(step))
    longest = int(starts.diff().max())
    return {
        "input_ids": ids,
        "labels": ids,
        "position_ids": positions,
        "use_cache": False,
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": longest,
        "max_length_k": longest,
        "num_items_in_batch": total + step,
    }


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_numbers_that_change_each_step_and_nobody_reads(family):
    plain = build(family)
    model = moefx.optimize(copy.deepcopy(plain), compile=False)
    for step in range(11):
        torch.testing.assert_close(model(**padding_free(step)).loss, plain(**padding_free(step)).loss)
    report = moefx.report(model)
    assert not report.fallbacks
    assert (
        len([f for f in report.program if f.name.startswith("head")]) == 3
    )  # as captured first, with these arguments, with any


def test_a_number_that_changes_each_step_and_is_read_is_named():
    plain = build("qwen3_moe")
    model = moefx.optimize(copy.deepcopy(plain), compile=False)
    with pytest.warns(UserWarning, match="computes with ignore_index, which differs each time"):
        for number in range(10):
            given = padding_free(0) | {"ignore_index": number}
            torch.testing.assert_close(model(**given).loss, plain(**given).loss)
    assert [path for path, _ in moefx.report(model).fallbacks] == ["lm_head"]
