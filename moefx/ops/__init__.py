"""The semantic operations: each states its meaning once, as the Python body that is reference, fake, autograd and pattern.

The operations here are composite (``CompositeImplicitAutograd``): a graph keeps one node per operation until a backend
takes it or its body is inlined. The exchange operations, whose shapes depend on data, are in
:mod:`moefx.ops.dispatch_combine`, the grouped matrix products in :mod:`moefx.ops.grouped_mlp`.

Letters in shapes: B batch, S sequence, T tokens (B*S), H hidden size, A attention heads, D head size, E experts,
K experts per token, I intermediate size of an expert, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moefx.ops.activations import ACTIVATIONS
from moefx.ops.grouped_mlp import grouped_mm

LIBRARY = torch.library.Library("moefx", "FRAGMENT")


def op(schema: str, library: torch.library.Library = LIBRARY) -> Callable[[Callable], torch._ops.OpOverload]:
    """Defines a composite operation ``moefx::<name>`` whose body is the decorated function; returns its overload.

    The body must be functional (no in-place writes to its arguments) and made of torch operations, so that it
    differentiates, runs on any device and can be traced as a pattern. Example::

        @moefx.op("scale_silu(Tensor x, float scale) -> Tensor")
        def scale_silu(x, scale):
            return torch.nn.functional.silu(x) * scale
    """

    def define(body: Callable) -> torch._ops.OpOverload:
        name = schema.split("(", 1)[0]
        library.define(schema)
        library.impl(name, body, "CompositeImplicitAutograd")
        overload = getattr(getattr(torch.ops, library.ns), name).default
        BODIES[overload] = body
        return overload

    return define


#: The body of each composite operation, by overload: what patterns are traced from.
BODIES: dict[torch._ops.OpOverload, Callable] = {}


@op("rms_norm(Tensor x, Tensor? weight, float eps, *, bool cast_first=True, float offset=0.0) -> Tensor")
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, cast_first: bool = True, offset: float = 0.0) -> Tensor:
    """Root mean square norm over the last dimension (arXiv 1910.07467), computed in fp32.

    x [..., H], weight [H] or None. ``cast_first``: the normalised value returns to x's dtype before the product with the
    weight (Llama, Qwen, Mixtral, DeepSeek); otherwise the product is taken in fp32 and then cast (GPT-OSS, Nemotron-H).
    ``offset`` is added to the weight in fp32 (1.0: the zero-centred weights of Gemma and Qwen3-Next).
    """
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return h.to(x.dtype)
    if offset:
        return (h * (offset + weight.to(torch.float32))).to(x.dtype)
    return weight * h.to(x.dtype) if cast_first else (weight * h).to(x.dtype)


@op(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, *, bool cast_first=True, float offset=0.0) "
    "-> (Tensor, Tensor)"
)
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, *, cast_first: bool = True, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The residual addition and the norm that reads it: ``(rms_norm(x + residual), x + residual)``."""
    total = x + residual
    return rms_norm(total, weight, eps, cast_first=cast_first, offset=offset), total


def route_body(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    *,
    score: str = "softmax",
    topk_first: bool = False,
    fp32: bool = True,
    groups: int = 0,
    topk_groups: int = 0,
    group_score: str = "top2",
    zero_fill: bool = False,
    sorted: bool = True,
    gather: bool = False,
    renormalize: bool = False,
    eps: float = 0.0,
    least: float = 0.0,
    scale: float = 1.0,
    expert_scale: Tensor | None = None,
    cast: bool = False,
    fill: float = float("-inf"),
) -> tuple[Tensor, Tensor]:
    """See :func:`route`; here ``groups`` of 1 still writes the group selection out, as the models do."""
    scores = logits if topk_first else _scores(logits, score, fp32)
    choice = scores if bias is None else scores + bias
    if groups:
        experts = choice.shape[-1]
        grouped = choice.view(-1, groups, experts // groups)
        best = grouped.topk(2, dim=-1)[0].sum(dim=-1) if group_score == "top2" else grouped.max(dim=-1).values
        chosen = torch.topk(best, k=topk_groups, dim=-1, sorted=False)[1]
        mask = torch.zeros_like(best).scatter(1, chosen, 1)
        mask = mask.unsqueeze(-1).expand(-1, groups, experts // groups).reshape(-1, experts)
        choice = choice.masked_fill(~mask.bool(), 0.0 if zero_fill else fill)
    weights, index = torch.topk(choice, top_k, dim=-1, sorted=sorted)
    if gather:
        weights = scores.gather(1, index)
    if topk_first:
        weights = _scores(weights, score, fp32)
    weights = _weights(weights, index, renormalize, eps, least, scale, expert_scale)
    return weights.to(logits.dtype) if cast else weights, index


def _scores(logits: Tensor, score: str, fp32: bool) -> Tensor:
    if score == "sigmoid":
        return torch.sigmoid(logits)
    if score == "sqrtsoftplus":
        return F.softplus(logits).sqrt()
    return torch.softmax(logits.to(torch.float32) if fp32 else logits, dim=-1)


def _weights(
    weights: Tensor, index: Tensor, renormalize: bool, eps: float, least: float, scale: float, expert_scale: Tensor | None
) -> Tensor:
    """What a router does with the scores of the experts that it chose."""
    if renormalize:
        total = weights.sum(dim=-1, keepdim=True)
        weights = weights / (total.clamp(min=least) if least else total + eps if eps else total)
    if scale != 1.0:
        weights = weights * scale
    return weights if expert_scale is None else weights * expert_scale[index]


@op(
    "route(Tensor logits, Tensor? bias, int top_k, *, str score='softmax', bool topk_first=False, bool fp32=True, "
    "int groups=0, int topk_groups=0, str group_score='top2', bool zero_fill=False, bool sorted=True, bool gather=False, "
    "bool renormalize=False, float eps=0.0, float least=0.0, float scale=1.0, Tensor? expert_scale=None, bool cast=False) "
    "-> (Tensor, Tensor)"
)
def route(logits: Tensor, bias: Tensor | None, top_k: int, **options) -> tuple[Tensor, Tensor]:
    """What a router does with its logits [T, E]: returns weights [T, K] and expert index [T, K] (int64).

    ``score``: softmax (in fp32 if ``fp32``), sigmoid or sqrtsoftplus (the root of softplus, DeepSeek-V4), of all logits, or
    of the K chosen ones if ``topk_first``. ``bias`` [E] is added for the choice only (auxiliary-loss-free balancing, arXiv
    2408.15664); with ``gather`` the weights are the unbiased scores at the chosen experts. ``groups``/``topk_groups``: the
    choice is limited to the best groups of experts by the sum of their two best scores ("top2", DeepSeek-V3, arXiv
    2412.19437) or their best ("max", DeepSeek-V2); the scores of the others become -inf, or 0 if ``zero_fill``.
    ``renormalize`` divides by the sum, plus ``eps`` or not below ``least`` (Ernie 4.5), then ``scale`` multiplies, then each
    expert's entry of ``expert_scale`` [E] (Gemma 4), then ``cast`` returns to the logits' dtype. ``sorted`` is top-k's own:
    it decides the order of the K, hence rounding.
    """
    if options.get("groups", 0) == options.get("topk_groups", 0):
        options = {**options, "groups": 0, "topk_groups": 0}  # all groups are allowed: nothing to select
    return route_body(logits, bias, top_k, **options)


@op(
    "route_at(Tensor logits, Tensor? bias, Tensor index, *, str score='softmax', bool topk_first=False, bool fp32=True, "
    "bool gather=False, bool renormalize=False, float eps=0.0, float least=0.0, float scale=1.0, Tensor? expert_scale=None, "
    "bool cast=False) -> Tensor"
)
def route_at(
    logits: Tensor,
    bias: Tensor | None,
    index: Tensor,
    *,
    score: str = "softmax",
    topk_first: bool = False,
    fp32: bool = True,
    gather: bool = False,
    renormalize: bool = False,
    eps: float = 0.0,
    least: float = 0.0,
    scale: float = 1.0,
    expert_scale: Tensor | None = None,
    cast: bool = False,
) -> Tensor:
    """The weights [T, K] that :func:`route` would give to the experts index [T, K], chosen by somebody else."""
    scores = logits if topk_first else _scores(logits, score, fp32)
    weights = (scores if gather or bias is None else scores + bias).gather(1, index)
    if topk_first:
        weights = _scores(weights, score, fp32)
    weights = _weights(weights, index, renormalize, eps, least, scale, expert_scale)
    return weights.to(logits.dtype) if cast else weights


@op("load_balancing_loss(Tensor logits, int top_k) -> Tensor")
def load_balancing_loss(logits: Tensor, top_k: int) -> Tensor:
    """``E * sum_e(rows of e / T * mean probability of e)`` of a softmax router's logits [T, E] (arXiv 2101.03961, eq. 4 to 6).

    fp32 scalar; the probabilities are computed in fp32, the rows are those of their ``top_k`` greatest.
    """
    probability = torch.softmax(logits.to(torch.float32), dim=-1)
    chosen = torch.zeros_like(probability).scatter(1, torch.topk(probability, top_k, dim=-1).indices, 1.0)
    return (chosen.mean(0) * probability.mean(0)).sum() * logits.shape[1]


@op("balanced_index(Tensor logits, int top_k) -> Tensor")
def balanced_index(logits: Tensor, top_k: int) -> Tensor:
    """An index [T, K] that gives every expert of logits [T, E] the same number of rows (but one), whatever the logits say."""
    rows = torch.arange(logits.shape[0] * top_k, device=logits.device)
    return rows.remainder(logits.shape[1]).view(logits.shape[0], top_k)


@op("nonfinite(Tensor x) -> Tensor")
def nonfinite(x: Tensor) -> Tensor:
    """How many numbers of x are NaN or infinite; int64 scalar."""
    return (~torch.isfinite(x)).sum()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    if layout == "half":
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin
    if layout == "half_table":  # the table holds each angle once
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    if layout == "pairs":
        h = x.to(torch.float32)
        turned = torch.stack((-h[..., 1::2], h[..., 0::2]), dim=-1).flatten(-2)
        return (h * cos + turned * sin).to(x.dtype)
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


ROTARY_LAYOUTS = ("half", "half_table", "pairs", "interleaved")


@op("rotary_table(Tensor angles, str part) -> Tensor")
def rotary_table(angles: Tensor, part: str) -> Tensor:
    """The "cos" or the "sin" table [B or 1, S, D'] for the layout "pairs", of complex angles [B or 1, S, D'/2]."""
    return torch.view_as_real(angles)[..., 0 if part == "cos" else 1].repeat_interleave(2, dim=-1)


@op("rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, *, str layout='half', int unsqueeze_dim=1) -> (Tensor, Tensor)")
def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, layout: str = "half", unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (arXiv 2104.09864) of q and k [B, heads, S, D'] by tables cos, sin [B or 1, S, D' or D'/2].

    ``layout``: "half" pairs dimension i with i + D'/2 and reads a table of D' angles (Llama), "half_table" the same with a
    table of D'/2 (GPT-OSS). "pairs" pairs 2i with 2i + 1, reads D' angles, each twice in a row, and computes in fp32 (Ernie,
    Cohere); "interleaved" pairs them too, reads D'/2 angles and writes halves (DeepSeek).
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _rotate(q, cos, sin, layout), _rotate(k, cos, sin, layout)


@op(
    "norm_rotary(Tensor x, Tensor? weight, Tensor cos, Tensor sin, float eps, *, bool cast_first=True, float offset=0.0, "
    "str layout='half') -> Tensor"
)
def norm_rotary(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    *,
    cast_first: bool = True,
    offset: float = 0.0,
    layout: str = "half",
) -> Tensor:
    """The norm of each head and its rotation (QK-norm, arXiv 2302.05442): x [B, S, A, D] -> [B, A, S, D].

    weight [D] or None, ``eps``, ``cast_first`` and ``offset`` as in :func:`rms_norm`; cos, sin [B or 1, S, D or D/2] and
    ``layout`` as in :func:`rotary`. The tables have no gradient.
    """
    heads = rms_norm(x, weight, eps, cast_first=cast_first, offset=offset).transpose(1, 2)
    return _rotate(heads, cos.unsqueeze(1), sin.unsqueeze(1), layout)


@op("linear_to_fp32(Tensor x, Tensor weight) -> Tensor")
def linear_to_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., H] in 16 bits times weight [E, H], in 16 bits or fp32 -> [..., E] in fp32."""
    return F.linear(x.float(), weight.float())


@op("swiglu(Tensor gate, Tensor up) -> Tensor")
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` (arXiv 2002.05202), elementwise."""
    return F.silu(gate) * up


def is_packed(mask: Tensor | None) -> bool:
    """Does attention's mask say where packed sequences begin, and not who sees whom?"""
    return mask is not None and mask.dtype == torch.int32


def visible(queries: int, keys: int, window: int | None, starts: Tensor | None, device: torch.device) -> Tensor:
    """The boolean mask of causal attention that ``window`` and ``starts`` [B, S] say: [S, T], or [B, 1, S, T] with starts."""
    key = torch.arange(keys, device=device)
    distance = torch.arange(queries, device=device)[:, None] - key
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return seen if starts is None else seen & (key >= starts[:, None, :, None])


@op(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? sinks, *, float scale, bool is_causal, "
    "int? window=None, float softcap=0.0, float dropout=0.0) -> Tensor"
)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    *,
    scale: float,
    is_causal: bool,
    window: int | None = None,
    softcap: float = 0.0,
    dropout: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention with grouped key/value heads: q [B, A, S, D], k and v [B, A/n, S, D]; [B, S, A, Dv].

    ``mask`` [B or 1, 1, S, S] is boolean (True: attend) or added to the scores, and then says everything; without one,
    ``is_causal`` and ``window`` (how many positions back, itself included) say who sees whom. ``mask`` [B, S] in int32 says
    besides where each query's sequence begins in a packed row: it sees no key before. ``sinks`` [A]: one more
    logit per head that takes probability and gives no value (GPT-OSS). ``softcap`` c: ``c * tanh(score / c)``. The softmax
    runs in fp32, or with sinks in the scores' dtype after subtracting the maximum, as the models do.
    """
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = (x[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2) for x in (k, v))
    scores = torch.matmul(q, k.transpose(2, 3)) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if is_causal and (mask is None or is_packed(mask)):
        mask = visible(q.shape[2], k.shape[2], window, mask, q.device)
    boolean = mask is not None and mask.dtype == torch.bool
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if boolean else scores + mask
    if sinks is None:
        probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    else:
        sink = sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, sink.to(scores.dtype)], dim=-1)
        scores = scores - scores.max(dim=-1, keepdim=True).values
        probabilities = torch.softmax(scores, dim=-1)[..., :-1].to(v.dtype)
    if boolean and mask is not None:
        probabilities = probabilities.masked_fill(~mask, 0.0)  # a query that may see nothing (padding) gives zeros, as SDPA
    if dropout:
        probabilities = F.dropout(probabilities, p=dropout)
    return torch.matmul(probabilities, v).transpose(1, 2).contiguous()


@op(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, *, int ignore_index=-100, "
    "str reduction='mean', float scale=1.0, float softcap=0.0) -> Tensor"
)
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    scale: float = 1.0,
    softcap: float = 0.0,
) -> Tensor:
    """Cross entropy of ``hidden @ weight.T + bias`` against labels: hidden [T, H], weight [V, H], labels [T]; fp32 scalar.

    The labels are already shifted. ``reduction`` "mean" divides by the labels that are not ``ignore_index`` (NaN if there
    are none, as torch), "sum" does not divide. The logits are multiplied by ``scale``, then, if ``softcap`` is not 0, become
    ``softcap * tanh(logits / softcap)`` (Gemma 2, arXiv 2408.00118, section 2).
    """
    logits = F.linear(hidden, weight, bias).to(torch.float32)
    logits = logits * scale if scale != 1.0 else logits
    logits = torch.tanh(logits / softcap) * softcap if softcap else logits
    return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction=reduction)


@op("grouped_linear(Tensor rows, Tensor weight, Tensor counts) -> Tensor")
def grouped_linear(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """rows [R, a], expert by expert, ``counts`` [E] of each, times weight [E, b, a] -> [R, b] in the weight's dtype."""
    return grouped_mm(rows.to(weight.dtype), weight.transpose(1, 2), counts.cumsum(0).to(torch.int32))


def has_nobody(up: Tensor, down: Tensor) -> bool:
    """Whether some of the experts that ``up`` has matrices for are nobody's."""
    return up.shape[0] > down.shape[0]


def rows_of(expert: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Where each expert's rows end [E of up], int32, those that are nobody's not counted; expert [R], in ascending order."""
    ends = torch.searchsorted(expert, torch.arange(up.shape[0], device=expert.device), right=True).to(torch.int32)
    return ends.clamp(max=ends[down.shape[0] - 1]) if has_nobody(up, down) else ends


def somebodys_of(expert: Tensor, up: Tensor, down: Tensor) -> Tensor | None:
    """Which rows [R, 1] are somebody's; None: all are."""
    return (expert < down.shape[0]).unsqueeze(-1) if has_nobody(up, down) else None


def only(rows: Tensor, somebodys: Tensor | None) -> Tensor:
    """Zeros in rows that are nobody's, whose products and gradients mean nothing."""
    return rows if somebodys is None else torch.where(somebodys, rows, 0)


@op(
    "experts(Tensor x, Tensor index, Tensor weights, Tensor up, Tensor? up_bias, Tensor down, Tensor? down_bias, *, "
    "str activation, float alpha=0.0, float limit=0.0, bool transposed=False, bool interleaved=False) -> Tensor"
)
def experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    *,
    activation: str,
    alpha: float = 0.0,
    limit: float = 0.0,
    transposed: bool = False,
    interleaved: bool = False,
) -> Tensor:
    """The routed experts: ``y[t] = sum_k weights[t, k] * mlp_{index[t, k]}(x[t])``; x [T, H] -> [T, H] in x's dtype.

    index [T, K] int64, weights [T, K]. Gated activations read up [E, 2I, H] ([E, H, 2I] if ``transposed``), whose two
    halves alternate if ``interleaved``; ungated ones up [E, I, H]. down is [E, H, I] ([E, I, H] if ``transposed``), biases
    [E, 2I or I] and [E, H]. Each token's rows are multiplied by their weights after the down projection, in the promoted
    dtype, and summed in the order of k (Transformers' grouped_mm experts, integrations/moe.py).

    A choice of an expert that down has no matrix for is nobody's and adds nothing; up may have matrices for those, which are
    not read (LongCat-Flash, arXiv 2509.01322: experts that compute nothing). Such experts have no biases.
    """
    top_k = index.shape[1]
    flat = index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    expert = flat[order]
    offsets, somebodys = rows_of(expert, up, down), somebodys_of(expert, up, down)

    def project(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        matrices = weight if transposed else weight.transpose(-2, -1)
        out = grouped_mm(h.to(weight.dtype), matrices, offsets[: weight.shape[0]])
        return out if bias is None else out + bias[expert]

    h = project(only(x[order // top_k], somebodys), up, up_bias)
    h = ACTIVATIONS[activation].forward(h, alpha, limit, interleaved)
    h = only(project(h, down, down_bias), somebodys) * weights.reshape(-1)[order].unsqueeze(-1)
    inverse = torch.empty_like(order).scatter(0, order, torch.arange(order.shape[0], device=x.device))
    return h[inverse].view(-1, top_k, h.shape[-1]).sum(dim=1).to(x.dtype)
