"""The transports over DeepEP's two buffers, against a stand-in of the library for one rank: it calls no kernel, but what is called.

DeepEP itself needs GPUs: tests/gpu. Here all that surrounds its calls runs: padding, FP8, handles as bytes, headers, reuse.
"""

from __future__ import annotations

import contextlib
import types

import pytest
import torch
import torch.distributed as dist

from moefx import transports
from moefx.backends.deepep import buffers, handles, library
from moefx.ops import dispatch_combine, exchange

E, K = 4, 2


class Event:
    def current_stream_wait(self):
        pass


def padded(rows, capacity, value=0):
    """Rows up to ``capacity``, if there is one; e4m3 numbers come with scales."""
    if isinstance(rows, tuple):
        return tuple(padded(part, capacity) for part in rows)
    missing = max(0, capacity - rows.shape[0])
    return torch.cat([rows.float(), torch.full((missing, *rows.shape[1:]), float(value))]).to(rows.dtype)


class Buffer:
    """``deep_ep.Buffer`` of one rank: what it sends it receives."""

    def __init__(self, group, *sizes, **options):
        pass

    def destroy(self):
        pass

    @staticmethod
    def get_dispatch_config(ep):
        hints = {"get_nvl_buffer_size_hint": lambda row_bytes, ep: row_bytes * ep}
        return types.SimpleNamespace(**hints)

    get_combine_config = get_dispatch_config

    def capture(self):
        return Event()

    def get_comm_stream(self):
        return types.SimpleNamespace(record_event=Event)

    def get_dispatch_layout(self, topk_idx, num_experts, **options):
        return torch.tensor([len(topk_idx)]), None, torch.bincount(topk_idx.flatten() + 1), torch.ones(1), Event()

    def dispatch(self, x, handle=None, *, topk_idx=None, topk_weights=None, num_worst_tokens=0, **options):
        if handle is not None:
            return padded(x, int(handle[0][0])), None, None, None, None, Event()
        counts = [int((topk_idx == e).sum()) for e in range(E)]
        sizes = torch.tensor([num_worst_tokens], dtype=torch.int32), torch.ones(len(topk_idx), dtype=torch.bool)
        ids, weights = padded(topk_idx, num_worst_tokens, -1), padded(topk_weights, num_worst_tokens)
        return padded(x, num_worst_tokens), ids, weights, counts, sizes, Event()

    def combine(self, x, handle, topk_weights=None, **options):
        tokens = len(handle[1])
        return x[:tokens].clone(), None if topk_weights is None else topk_weights[:tokens].clone(), Event()


class Handle:
    """``deep_ep.EPHandle``."""

    def __init__(self, **fields):
        tensors = (
            "topk_idx", "psum_num_recv_tokens_per_expert", "num_unaligned_recv_tokens_per_expert", "recv_src_metadata",
            "dst_buffer_slot_idx", "token_metadata_at_forward", "channel_linked_list",
        )  # fmt: skip
        numbers = ("num_experts", "expert_alignment", "num_sms", "num_recv_tokens", "num_expanded_tokens")
        vars(self).update({**dict.fromkeys(tensors), **dict.fromkeys(numbers, 1)})
        vars(self).update(fields)


class ElasticBuffer(Buffer):
    """``deep_ep.ElasticBuffer`` of one rank."""

    def dispatch(self, x, handle=None, *, num_max_tokens_per_rank=0, **options):
        if handle is not None:
            return padded(x, handle.num_max_tokens_per_rank), None, None, None, Event()
        x, ids, weights, _, (_, sent), event = super().dispatch(x, num_worst_tokens=num_max_tokens_per_rank, **options)
        received = torch.tensor([len(sent)], dtype=torch.int32)
        fields = {"num_max_tokens_per_rank": num_max_tokens_per_rank, "psum_num_recv_tokens_per_scaleup_rank": received}
        return x, ids, weights, Handle(**fields), event

    def combine(self, x, handle, topk_weights=None, **options):
        tokens = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
        return x[:tokens].clone(), None if topk_weights is None else topk_weights[:tokens].clone(), Event()


@pytest.fixture
def where(monkeypatch):
    """The arguments of dispatch and combine for a group of one rank."""
    stand_in = types.SimpleNamespace(Buffer=Buffer, ElasticBuffer=ElasticBuffer, EPHandle=Handle)
    for module in (library, buffers):
        monkeypatch.setattr(module, "load", lambda: stand_in)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD.group_name
    yield {"num_experts": E, "group": group}
    transports.release(group)
    dist.destroy_process_group()


@pytest.mark.parametrize(("name", "capacity"), [("deepep", 0), ("deepep", 12), ("deepep_elastic", 12)])
@pytest.mark.parametrize("dispatch_dtype", ["", "fp8"])
@pytest.mark.parametrize(("tokens", "hidden"), [(7, 256), (7, 128), (0, 128)])
def test_values_and_gradients(where, name, capacity, dispatch_dtype, tokens, hidden):
    x = torch.randn(tokens, hidden).bfloat16().requires_grad_()
    ids, weights = torch.rand(tokens, E).topk(K, dim=1).indices, torch.rand(tokens, K).requires_grad_()
    options = {**where, "capacity": capacity, "dispatch_dtype": dispatch_dtype}
    dispatch = dispatch_combine.dispatch_with(name)
    rows, probs, tokens_per_expert, *route, _ = dispatch(x, ids, weights, **options)
    assert tokens_per_expert.tolist() == torch.bincount(ids.flatten(), minlength=E).tolist()
    y = dispatch_combine.combine((rows * probs.unsqueeze(1)).to(rows.dtype), ids, *route, **where)
    grad = torch.randn_like(y)
    y.backward(grad)
    share = weights.detach().sum(1, keepdim=True)
    torch.testing.assert_close(y.float(), x.detach().float() * share, rtol=0.1, atol=0.1)
    torch.testing.assert_close(x.grad.float(), grad.float() * share, rtol=0.1, atol=0.1)
    assert weights.grad.shape == weights.shape and exchange.num_in_flight() == 0
    record = exchange.RecordedDispatches()
    for _ in range(2):
        with exchange.reuse_dispatches(record):
            again, *_ = dispatch(x, ids, weights, **options)
        assert torch.equal(again[: tokens * K], rows[: tokens * K])


def test_handles_are_read_as_they_were_packed():
    given = [
        torch.arange(5, dtype=torch.int32),
        None,
        torch.ones(2, 3, dtype=torch.int64),
        torch.zeros(0, 4, dtype=torch.uint8),
    ]
    packed, own = handles.pack_tensors([*given, torch.tensor(3, dtype=torch.int32)])
    for before, after in zip(given, handles.unpack_tensors(packed, own)):
        assert (before is after is None) or torch.equal(before, after)
