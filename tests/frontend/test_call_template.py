"""Call templates: which calls are equal, what is left open, and that filling one is the inverse of flattening."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch

from moefx.errors import CaptureError
from moefx.frontend.call_template import Constant, OpenNumber, call_key, flatten, flatten_output, paths
from moefx.integrations import transformers as hf

X, COS, SIN = torch.ones(2, 3, 4), torch.ones(2, 3), torch.zeros(2, 3)

CALLS = {
    "tensor": ((X,), {}),
    "tables": ((X,), {"position_embeddings": (COS, SIN), "use_cache": False}),
    "list": ((X, [COS, None]), {}),
    "nested": ((X,), {"extra": {"a": [COS, (SIN, "text")], "b": {}}, "dtype": torch.float32}),
    "numbers": ((X, 3), {"scale": 0.5, "flag": True, "nothing": None}),
    "empty": ((X, (), []), {"none": {}}),
}


@pytest.mark.parametrize("name", CALLS)
def test_filling_is_the_inverse_of_flattening(name):
    args, kwargs = CALLS[name]
    tensors, template = flatten(args, kwargs)
    again, more = template.fill(tensors)
    assert repr((again, more)) == repr((args, kwargs))
    found, same = flatten(again, more)
    assert same == template and hash(same) == hash(template)
    assert all(a is b for a, b in zip(found, tensors, strict=True))
    assert len(template.leaves) == len(paths(template.structure))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("other", CALLS)
def test_different_calls_have_different_templates_and_keys(name, other):
    templates = [flatten(*CALLS[n])[1] for n in (name, other)]
    keys = [call_key(*CALLS[n])[0] for n in (name, other)]
    assert (templates[0] == templates[1]) == (keys[0] == keys[1]) == (name == other)


@pytest.mark.parametrize(
    ("value", "other"),
    [
        (True, 1),
        (False, 0),
        (1, 1.0),
        (True, 1.0),
        ((True,), (1,)),
        ([1], (1,)),
        ({"a": 1}, {"a": True}),
        (None, False),
        ((), []),
    ],
)
def test_types_of_constants_count(value, other):
    """In Python True == 1 == 1.0 and (1,) == (True,): a graph captured with the one is not a graph for the other."""
    one, two = flatten((X, value), {})[1], flatten((X, other), {})[1]
    assert one != two and not one.covers(two) and not two.covers(one)
    assert call_key((X, value), {})[0] != call_key((X, other), {})[0]
    assert one == flatten((X, value), {})[1]


def test_numbers_of_one_type_are_left_open():
    three, four = (flatten((X,), {"length": n, "scale": 2.0})[1] for n in (3, 4))
    opened = three.opened(four)
    assert opened is not None and opened.leaves[1:] == (OpenNumber("length", int), Constant(2.0))
    assert opened.covers(three) and opened.covers(four) and not three.covers(four)
    assert opened.opened(three) == opened and three.opened(three) == three
    assert opened.numbers() == {"scale": 2.0} and three.numbers() == {"length": 3, "scale": 2.0}
    _, kwargs = opened.fill([X])
    assert flatten((X,), kwargs)[1] == opened
    with pytest.raises(CaptureError, match="it reads its argument length, a number that differs"):
        kwargs["length"] + 1


@pytest.mark.parametrize("other", [3.0, True, "3", None, X, (3,)])
def test_anything_else_is_not_left_open(other):
    three, different = (flatten((X,), {"length": v})[1] for v in (3, other))
    assert three.opened(different) is None and different.opened(three) is None


def test_names():
    _, template = flatten((X, COS, [SIN]), {"position_embeddings": (COS, SIN), "extra": {"a": X}, "flag": True})
    assert list(template.names().values()) == [
        "input", "input 1", "input 2 0", "position_embeddings 0", "position_embeddings 1", "extra a",
    ]  # fmt: skip


def test_masks_are_made_again_by_the_sizes_of_the_first_tensor():
    mask = hf.MaskPattern(torch.bool, window=2).mask(2, 3, torch.device("cpu"))
    tensors, template = flatten((X,), {"attention_mask": mask})
    assert len(tensors) == 1 and template.names() == {0: "input"}
    _, kwargs = template.fill([torch.ones(5, 7, 4)])
    assert kwargs["attention_mask"].shape == (5, 1, 7, 7)
    plain, _ = flatten((torch.ones(1, 3, 4),), {"attention_mask": mask})  # of another batch size than the call's
    assert len(plain) == 2


def test_dictionaries_that_take_results():
    class Notes(UserDict):
        pass

    tensors, template = flatten((X,), {"notes": Notes(a=1)})
    written: dict = {}
    _, kwargs = template.fill(tensors, written)
    kwargs["notes"]["b"] = X
    assert written == {"notes": {"b": X}} and isinstance(kwargs["notes"], Notes)
    assert flatten((X,), kwargs)[1] == template
    with pytest.raises(CaptureError, match="it reads its argument notes, a Notes"):
        kwargs["notes"]["a"]


def test_what_is_neither_tensor_nor_constant_is_named():
    with pytest.raises(CaptureError, match="its argument past 0 k is a object, neither tensor nor constant"):
        flatten((X,), {"past": [{"k": object()}]})
    with pytest.raises(CaptureError, match="its argument input 1 is a object"):
        flatten((X, object()), {})
    with pytest.raises(CaptureError, match="its output 1 is a object"):
        flatten_output((X, object()), [])
    key, tensors = call_key((X, object()), {})  # it has a key nevertheless
    assert hash(key) and len(tensors) == 1


def test_outputs_share_one_list_of_tensors():
    tensors: list = []
    first, second = flatten_output(X, tensors), flatten_output((COS, {"a": SIN}), tensors)
    assert first.fill(["x", "cos", "sin"]) == "x" and second.fill(["x", "cos", "sin"]) == ("cos", {"a": "sin"})
    assert len(tensors) == 3
