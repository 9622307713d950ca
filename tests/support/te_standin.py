"""A stand-in for Transformer Engine on a CPU: the functions that moefx calls, by their signatures in 2.20.2, in plain torch.

It does not test NVIDIA's kernels (tests/gpu/test_te.py does), but moefx's code around them: which arguments go where, what is
saved for the backward, shapes of fakes, gradients, zero tokens, and that torch.compile keeps the operations in one graph.
"""

from __future__ import annotations

import sys
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import torch


def _vjp(fn, inputs, grad):
    """Gradients of ``fn(*inputs)``; in a thread of its own, since within an operation autograd is switched off."""

    def compute():
        leaves = [t.detach().requires_grad_() for t in inputs]
        return torch.autograd.grad(fn(*leaves), leaves, grad)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(compute).result()


def _norm(x, w, eps, centered):
    h = x.float()
    scale = torch.rsqrt(h.pow(2).mean(-1) + eps)
    return (h * scale.unsqueeze(-1) * (w.float() + centered)).to(x.dtype), scale


class Extension(types.ModuleType):
    """``transformer_engine_torch``."""

    eps = 1e-6  # rmsnorm_bwd gets the scales, not eps; the tests use this one

    def get_cublasLt_version(self):
        return 130_400

    def rmsnorm_fwd(self, x, weight, eps, out, quantizer, otype, sm_margin, zero_centered_gamma):
        assert x.dim() == 2 and x.is_contiguous() and out is None and quantizer is None and otype == x.dtype and sm_margin == 0
        y, scale = _norm(x, weight, eps, zero_centered_gamma)
        return y, None, scale

    def rmsnorm_bwd(self, dz, x, rsigma, gamma, sm_margin, zero_centered_gamma):
        assert dz.shape == x.shape and rsigma.shape == x.shape[:1] and sm_margin == 0
        return _vjp(lambda x, w: _norm(x, w, self.eps, zero_centered_gamma)[0], (x, gamma), dz)

    def rmsnorm_bwd_add(self, dz, x, add, rsigma, gamma, sm_margin, zero_centered_gamma):
        to_x, to_weight = self.rmsnorm_bwd(dz, x, rsigma, gamma, sm_margin, zero_centered_gamma)
        return to_x + add, to_weight

    # --- router ---

    def _weights(self, logits, index, first, scale, score):
        if score == "softmax":
            return (logits.softmax(-1).gather(1, index) if first else logits.gather(1, index).softmax(-1)) * scale
        s = logits.sigmoid().gather(1, index)
        return (s / (s.sum(-1, keepdim=True) + 1e-20) if index.shape[1] > 1 else s) * scale

    def fused_topk_with_score_function_fwd(
        self,
        logits,
        topk,
        use_pre_softmax,
        num_groups,
        group_topk,
        scaling_factor,
        score_function,
        expert_bias,
        routing_map_format,
        topk_indices,
    ):
        assert logits.is_contiguous() and len(logits) and routing_map_format == 0 and isinstance(scaling_factor, float)
        assert expert_bias is None or (score_function == "sigmoid" and expert_bias.dtype == torch.float32)
        scores = logits.sigmoid() if score_function == "sigmoid" else logits.softmax(-1) if use_pre_softmax else logits
        choice = scores if expert_bias is None else scores + expert_bias
        if group_topk:
            best = choice.view(len(logits), num_groups, -1)
            groups = best.topk(topk // group_topk).values.sum(-1).topk(group_topk).indices
            allowed = torch.zeros(len(logits), num_groups).scatter(1, groups, 1.0).bool().unsqueeze(-1).expand_as(best)
            choice = best.masked_fill(~allowed, -torch.inf).view_as(logits)
        topk_indices.copy_(choice.topk(topk).indices)
        weights = self._weights(logits, topk_indices, use_pre_softmax, scaling_factor, score_function)
        probabilities = torch.zeros_like(logits).scatter(1, topk_indices, weights)
        return probabilities, topk_indices, logits.clone()  # the third is opaque to us: here the logits

    def fused_topk_with_score_function_bwd(
        self,
        routing_map,
        intermediate_output,
        grad_probs,
        grad_logits,
        topk,
        use_pre_softmax,
        scaling_factor,
        score_function,
        use_dense_indices,
        routing_map_format,
    ):
        assert use_dense_indices and routing_map_format == 0 and routing_map.shape[1] == topk
        (to_logits,) = _vjp(
            lambda x: self._weights(x, routing_map, use_pre_softmax, scaling_factor, score_function),
            (intermediate_output,),
            grad_probs.gather(1, routing_map),
        )
        grad_logits.copy_(to_logits)

    def fused_score_for_moe_aux_loss_fwd(self, logits, topk, score_function, routing_map_format):
        assert logits.is_contiguous() and score_function == "softmax" and routing_map_format == 0
        scores = logits.softmax(-1)
        return scores, torch.zeros_like(scores).scatter(1, scores.topk(topk).indices, 1.0).bool(), scores.clone()

    def fused_score_for_moe_aux_loss_bwd(self, intermediate_output, grad_scores, grad_logits, topk, score_function):
        p = intermediate_output
        grad_logits.copy_(p * (grad_scores - (p * grad_scores).sum(-1, keepdim=True)))

    def fused_moe_aux_loss_fwd(self, probs, tokens_per_expert, total_num_tokens, num_experts, num_rows, num_cols, topk, coeff):
        factor = num_experts * coeff / topk / total_num_tokens / total_num_tokens
        loss = (probs.sum(0) * tokens_per_expert).sum() * factor
        return loss, torch.tensor([factor, float(loss)])

    def fused_moe_aux_loss_bwd(self, const_buf, tokens_per_expert, num_rows, num_cols, grad_aux_loss):
        return (tokens_per_expert * const_buf[0] * grad_aux_loss).float().expand(num_rows, num_cols).contiguous()

    # --- permutation ---

    def moe_unpermute_fwd(self, rows, dtype, row_id_map, probs, num_tokens, top_k):
        assert rows.dtype == dtype and len(row_id_map) == num_tokens * top_k
        found = rows[row_id_map.long()].view(num_tokens, top_k, -1).float()
        found = found * probs.unsqueeze(-1) if probs.numel() else found
        return found.sum(1).to(rows.dtype)

    def moe_permute_bwd(self, rows, dtype, row_id_map, probs, num_tokens, top_k):
        return self.moe_unpermute_fwd(rows, dtype, row_id_map, probs, num_tokens, top_k)

    def moe_unpermute_bwd(self, grad, rows, dtype, row_id_map, probs):
        where, given = row_id_map.long(), grad.float().repeat_interleave(probs.shape[1], 0)
        to_rows = torch.empty_like(rows)
        to_rows[where] = (given * probs.reshape(-1, 1)).to(rows.dtype)
        return to_rows, (given * rows[where].float()).sum(-1).view(probs.shape)


def _permute_index_map(inp, index, num_out_tokens, max_token_num):
    assert index.dtype == torch.int32 and num_out_tokens == index.numel()
    order = torch.argsort(index.reshape(-1), stable=True)
    where = torch.empty_like(order).scatter(0, order, torch.arange(len(order)))
    return inp[order // index.shape[1]], where.int()


# --- attention -------------------------------------------------------------------------------------------------------


@dataclass
class AttentionParams:
    qkv_dtype: torch.dtype
    qkv_layout: str
    batch_size: int
    num_heads: int
    num_gqa_groups: int
    max_seqlen_q: int
    max_seqlen_kv: int
    head_dim_qk: int
    head_dim_v: int
    attn_mask_type: str
    window_size: tuple
    bottom_right_diagonal: bool
    softmax_type: str
    softmax_scale: float
    core_attention_bias_requires_grad: bool
    deterministic: bool
    is_training: bool


def _get_attention_backend(asked):
    """Refuses heads of more than 256, as cuDNN does, at debug level."""
    import logging

    logger = logging.getLogger("DotProductAttention")
    logger.setLevel(utils.AttentionLogging._log_level)
    fused = asked.head_dim_qk <= 256
    if not fused:
        logger.debug("Disabling FusedAttention: head_dim_qk = %s", asked.head_dim_qk)
    return False, None, fused, 1 if fused else None, not fused, [False, fused, True]


utils = SimpleNamespace(
    AttentionParams=AttentionParams,
    AttentionLogging=SimpleNamespace(_log_level=0),
    get_attention_backend=_get_attention_backend,
    get_cudnn_version=lambda: (9, 12, 0),
    get_full_cu_seqlens=lambda batch, length, device: torch.arange(
        0, (batch + 1) * length, length, dtype=torch.int32, device=device
    ),
)


def _attend(q, k, v, softmax_offset, attn_scale, attn_mask_type, window_size):
    q, k, v = (t.float().transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * attn_scale
    back = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    if attn_mask_type == "causal":
        left = window_size[0]
        scores = scores.masked_fill((back < 0) | (back > left if left >= 0 else torch.zeros(1, dtype=torch.bool)), -torch.inf)
    if softmax_offset is not None:
        scores = torch.cat((scores, softmax_offset.expand(len(q), -1, q.shape[2], 1)), -1)
    p = scores.softmax(-1)
    return (p if softmax_offset is None else p[..., :-1]) @ v, scores.logsumexp(-1, keepdim=True)


def _fused_attn_fwd(
    is_training,
    max_seqlen_q,
    max_seqlen_kv,
    cu_seqlens_q,
    cu_seqlens_kv,
    q,
    k,
    v,
    fake_dtype,
    fused_attention_backend,
    *,
    attn_scale,
    qkv_layout,
    o_format,
    attn_mask_type,
    window_size,
    softmax_type,
    bottom_right_diagonal,
    softmax_offset,
):
    assert (
        is_training
        and (qkv_layout, o_format) == ("bshd_bshd_bshd", "bshd")
        and fused_attention_backend == "F16_arbitrary_seqlen"
    )
    assert (
        all(t.is_contiguous() for t in (q, k, v))
        and (softmax_offset is None) == (softmax_type == "vanilla")
        and not bottom_right_diagonal
    )
    out, statistics = _attend(q, k, v, softmax_offset, attn_scale, attn_mask_type, window_size)
    kept = [statistics, torch.zeros(2, dtype=torch.int64)] + ([] if softmax_offset is None else [softmax_offset])
    return out.transpose(1, 2).contiguous().to(fake_dtype), kept


def _fused_attn_bwd(
    max_seqlen_q,
    max_seqlen_kv,
    cu_seqlens_q,
    cu_seqlens_kv,
    q,
    k,
    v,
    o,
    d_o,
    fake_dtype,
    aux_ctx_tensors,
    fused_attention_backend,
    *,
    attn_scale,
    qkv_layout,
    o_format,
    do_format,
    dqkv_layout,
    attn_mask_type,
    window_size,
    softmax_type,
    bottom_right_diagonal,
    deterministic,
):
    assert (do_format, dqkv_layout) == ("bshd", "bshd_bshd_bshd") and d_o.is_contiguous()
    given = (q, k, v, *([aux_ctx_tensors[2]] if softmax_type == "learnable" else []))

    def attend(q, k, v, offset=None):
        return _attend(q, k, v, offset, attn_scale, attn_mask_type, window_size)[0]

    found = _vjp(attend, given, d_o.transpose(1, 2).float())
    return *(t.to(fake_dtype).contiguous() for t in found[:3]), None, *(found[3:] or [None])


# --- grouped GEMM ----------------------------------------------------------------------------------------------------


class GroupedTensorStorage:
    def __init__(self, shape, dtype, *, num_tensors, quantizer=None, data=None, first_dims=None, tensor_offsets=None):
        assert (
            quantizer is None
            and data.dtype == dtype
            and tensor_offsets.tolist() == [0, *(first_dims.cumsum(0) * shape[1]).tolist()]
        )
        self.parts = [p for p in data.view(shape).split(first_dims.tolist())]


class GroupedTensor:
    def __init__(self, parts):
        self.parts = parts

    @staticmethod
    def make_grouped_tensor_from_rowwise_data(*, num_tensors, tensor_shape, rowwise_data, dtype):
        assert rowwise_data.is_contiguous() and rowwise_data.dtype == dtype
        return GroupedTensor(list(rowwise_data.view(num_tensors, *tensor_shape)))


def _general_grouped_gemm_for_grouped_tensor(a, b, out, *, layout, use_split_accumulator=False):
    for x, y, o in zip(a.parts, b.parts, out.parts, strict=True):
        o.copy_({"TN": lambda x, y: y @ x.T, "NN": lambda x, y: y @ x, "NT": lambda x, y: y.T @ x}[layout](x, y))


# --- fp8 -------------------------------------------------------------------------------------------------------------


class Quantized:
    """Its FP8 numbers as they lie, and transposed: None where not asked for; a product reads the one that its layout wants."""

    def __init__(self, data, transpose, scale):
        self._data, self._transpose, self.scale = data, transpose, scale

    def update_usage(self, rowwise_usage=None, columnwise_usage=None):
        self._data = self._data if rowwise_usage is not False else None
        self._transpose = self._transpose if columnwise_usage is not False else None
        assert self._data is not None or self._transpose is not None
        assert (not rowwise_usage or self._data is not None) and (not columnwise_usage or self._transpose is not None)

    def operand(self, transposed):
        found = self._transpose if transposed else self._data
        if found is None:
            raise RuntimeError(f"the product wants {'column' if transposed else 'row'}-wise usage")
        return (found.T if transposed else found).float() * self.scale


class Quantizer:
    """Rounds to FP8 with one scale, as Float8CurrentScalingQuantizer: no columnwise copy without the rowwise one."""

    def __init__(self, dtype, rowwise_usage=True, columnwise_usage=True):
        self.dtype, self.internal = dtype, False
        self.rowwise_usage, self.columnwise_usage = rowwise_usage, columnwise_usage

    def copy(self):
        return Quantizer(self.dtype, self.rowwise_usage, self.columnwise_usage)

    def set_usage(self, *, rowwise=None, columnwise=None):
        self.rowwise_usage = self.rowwise_usage if rowwise is None else rowwise
        self.columnwise_usage = self.columnwise_usage if columnwise is None else columnwise

    def __call__(self, x):
        assert self.internal and x.dim() == 2 and x.is_contiguous() and not x.shape[0] % 16 and not x.shape[1] % 16
        if not self.rowwise_usage:
            raise NotImplementedError("Columnwise-only per-tensor FP8 quantization is not implemented")
        scale = x.abs().max().float().clamp_min(1e-12) / torch.finfo(self.dtype).max
        data = (x.float() / scale).to(self.dtype)
        return Quantized(data, data.T.contiguous() if self.columnwise_usage else None, scale)


def _create(recipe, *, mode, num_quantizers):
    dtype = torch.float8_e4m3fn if mode == "forward" else torch.float8_e5m2
    return SimpleNamespace(make_quantizers=lambda: [Quantizer(dtype) for _ in range(num_quantizers)])


def _general_gemm(a, b, out_dtype=None, *, layout="TN", bias=None, use_split_accumulator=False, grad=False):
    """Column-major, as cuBLAS counts: A's own rows are its columns."""
    assert use_split_accumulator == grad  # as Float8CurrentScaling has it
    x, y = a.operand(transposed=layout[0] == "N"), b.operand(transposed=layout[1] == "T")
    x, y = (x.T if layout[0] == "T" else x), (y.T if layout[1] == "T" else y)
    out = y @ x
    return (out if bias is None else out + bias.float()).to(out_dtype), None, None, None


def _recipe():
    mm = [SimpleNamespace(use_split_accumulator=split) for split in (False, True, True)]
    return SimpleNamespace(**dict(zip(("fp8_gemm_fprop", "fp8_gemm_dgrad", "fp8_gemm_wgrad"), mm)))


def install(monkeypatch) -> None:
    """Puts the stand-in where Transformer Engine would be."""
    if hasattr(torch.ops.te_moe, "permute_index_map"):
        # this process has imported Transformer Engine, whose operation stays and is for CUDA only, or installed this before
        torch.library.register_kernel("te_moe::permute_index_map", "cpu", _permute_index_map)
    else:
        op = torch.library.custom_op(
            "te_moe::permute_index_map", _typed(_permute_index_map), mutates_args=(), device_types="cpu"
        )
        op.register_fake(lambda inp, index, *_: (inp.new_empty(index.numel(), inp.shape[1]), index.new_empty(index.numel())))
    root = "transformer_engine.pytorch"
    dpa = f"{root}.attention.dot_product_attention"
    modules = {
        "transformer_engine": {}, root: {}, f"{root}.permutation": {}, f"{root}.attention": {}, dpa: {"utils": utils},
        f"{root}.constants": {"TE_DType": {d: d for d in (torch.float32, torch.bfloat16, torch.float16)}},
        f"{root}.cpp_extensions": {
            "general_grouped_gemm_for_grouped_tensor": _general_grouped_gemm_for_grouped_tensor, "general_gemm": _general_gemm,
        },
        f"{root}.quantization": {
            "RecipeState": SimpleNamespace(create=_create), "check_fp8_support": lambda: (True, ""),
            "check_fp8_block_scaling_support": lambda: (False, "FP8 block scaled GEMM requires Hopper."),
        },
        "transformer_engine.common": {"recipe": SimpleNamespace(Float8CurrentScaling=_recipe)},
        f"{root}.cpp_extensions.fused_attn": {
            "fused_attn_fwd": _fused_attn_fwd, "fused_attn_bwd": _fused_attn_bwd, "FusedAttnBackend": {"F16_arbitrary_seqlen": "F16_arbitrary_seqlen"},
        },
        f"{root}.tensor": {}, f"{root}.tensor.storage": {}, f"{root}.tensor.grouped_tensor": {"GroupedTensor": GroupedTensor},
        f"{root}.tensor.storage.grouped_tensor_storage": {"GroupedTensorStorage": GroupedTensorStorage},
    }  # fmt: skip
    for name, contents in modules.items():
        module = types.ModuleType(name)
        vars(module).update(contents, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:  # `from package import module` reads the attribute
            parent, _, leaf = name.rpartition(".")
            vars(sys.modules[parent]).setdefault(leaf, module)
    monkeypatch.setitem(sys.modules, "transformer_engine_torch", Extension("transformer_engine_torch"))
    forget()


def forget() -> None:
    """What moefx keeps of Transformer Engine between calls."""
    from moefx.kernels.te import attention, extension, linear

    for cached in (extension, attention.why_not_fused, linear._quantizers):
        cached.cache_clear()


def _typed(fn):
    t = torch.Tensor
    fn.__annotations__ = {"inp": t, "index": t, "num_out_tokens": int, "max_token_num": int, "return": tuple[t, t]}
    return fn
