"""Linear layer and cross entropy chunk by chunk: the logits of all tokens never exist at once.

The gradients are computed with the loss, while a chunk's logits are there (as Liger-Kernel does, arXiv 2410.10989), and
scaled in the backward. Nothing waits for the device: the number of labels that count stays a tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moefx.kernels.gemm import mm
from moefx.ops import CrossEntropySpec, takes_spec
from moefx.ops.custom_op import first_order, opaque

#: Logits of one chunk, in elements: 1 GiB in 16 bits. On an H200 with 16,384 tokens and 151,936 words half of it takes 8 %
#: longer, twice as much is 2 % faster.
CHUNK = 1 << 29
#: A chunk of more rows has a multiple of this many: matrix products work in tiles of up to 256 rows.
ROWS = 256
#: Up to so many chunks the weight's gradient is summed in its own dtype. On an H200 (bf16, 4,096 tokens, 151,936 words) its
#: distance from fp32 is 7.9e-4 then, 7.4e-4 with an fp32 sum, which costs 5 to 10 % of the time and twice the memory.
PLAIN_SUMS = 16


def _scaled(logits: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor | float]:
    """What the loss is of, in fp32, and its derivative by the logits."""
    x = logits.float() * scale if scale != 1.0 else logits.float()
    if not softcap:
        return x, scale
    bent = torch.tanh(x / softcap)
    return bent * softcap, (1 - bent * bent) * scale


def _losses_and_gradient(logits: Tensor, at: Tensor, share: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """Of one chunk [r, V]: the losses [r] in fp32 at columns ``at`` [r], and the gradient of the logits times ``share`` [r]."""
    if logits.is_cuda:
        from moefx.kernels.cross_entropy import cross_entropy_

        return cross_entropy_(logits, at, share, scale, softcap), logits
    x, slope = _scaled(logits, scale, softcap)
    norm = x.logsumexp(dim=1, keepdim=True)
    losses = (norm - x.gather(1, at.unsqueeze(1))).squeeze(1)
    gradient = (x - norm).exp_().scatter_add_(1, at.unsqueeze(1), x.new_full((len(at), 1), -1.0))
    return losses, (gradient * (share.unsqueeze(1) * slope)).to(logits.dtype)


@opaque("chunked_linear_cross_entropy")
def _chunked(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    mean: bool,
    needs: list[bool],
    scale: float = 1.0,
    softcap: float = 0.0,
    gemm: str = "torch",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss (fp32 scalar), and its gradients by hidden [T, H], weight [V, H], bias [V]: of those that ``needs`` says.

    The others are empty: a frozen weight costs no product, and no memory for its gradient.

    ``gemm``: one of :mod:`moefx.kernels.gemm`; with a bias torch's.
    """
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    chunks = max(1, -(-tokens * vocabulary // CHUNK))
    rows = max(1, -(-tokens // chunks))
    if rows > ROWS:
        rows += -rows % ROWS
    valid = labels != ignore_index
    target = labels.masked_fill(~valid, 0)
    count = valid.sum() if mean else torch.ones((), device=hidden.device)
    share = valid.float() / count.clamp(min=1)  # no label at all: the loss is NaN, the gradients zeros, as torch's
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    of_hidden, of_weight, of_bias = needs
    if not any(needs):
        for start in range(0, tokens, rows):
            part = slice(start, start + rows)
            logits, _ = _scaled(F.linear(hidden[part], weight, bias), scale, softcap)
            loss = logits.logsumexp(dim=1) - logits.gather(1, target[part].unsqueeze(1)).squeeze(1)
            total += (loss * valid[part]).sum()
        return total / count, hidden.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    to_hidden = torch.empty_like(hidden) if of_hidden else hidden.new_empty(0)
    sums = weight.dtype if chunks <= PLAIN_SUMS else torch.float32
    to_weight = torch.empty_like(weight, dtype=sums) if of_weight else weight.new_empty(0)
    if not tokens:
        to_weight.zero_()
    to_bias = torch.zeros(vocabulary if of_bias else 0, dtype=torch.float32, device=hidden.device)
    for start in range(0, tokens, rows):
        part = slice(start, start + rows)
        if bias is None and gemm != "torch":
            mm(gemm, hidden[part], weight.T, logits := hidden.new_empty(len(hidden[part]), vocabulary))
        else:
            logits = F.linear(hidden[part], weight, bias)
        losses, to_logits = _losses_and_gradient(logits, target[part], share[part], scale, softcap)
        total += (losses * valid[part]).sum()
        if of_hidden:
            mm(gemm, to_logits, weight, to_hidden[part])
        if of_weight and sums == weight.dtype:
            mm(gemm, to_logits.T, hidden[part], to_weight, add=start > 0)
        elif of_weight and not start:
            to_weight.copy_(to_logits.T @ hidden[part])
        elif of_weight:
            to_weight += to_logits.T @ hidden[part]
        if of_bias:
            to_bias += to_logits.sum(dim=0, dtype=torch.float32)
    return total / count, to_hidden, to_weight.to(weight.dtype), to_bias.to(weight.dtype)


@_chunked.register_fake
def _(hidden, weight, bias, labels, ignore_index, mean, needs, scale=1.0, softcap=0.0, gemm="torch"):
    found = (hidden, weight, weight if bias is None else bias)
    gradients = [torch.empty_like(t) if need else t.new_empty(0) for t, need in zip(found, needs, strict=True)]
    return hidden.new_empty((), dtype=torch.float32), *gradients


def _save(ctx, inputs, _, output) -> None:
    ctx.needs = inputs[6]
    ctx.save_for_backward(*output[1:])


def _backward(ctx, grad: Tensor, *_):
    # in fp32: a factor such as 1/3 rounded to 16 bits would bend all gradients the same way
    found = zip(ctx.saved_tensors, ctx.needs, strict=True)
    return *((t.float() * grad).to(t.dtype) if need else None for t, need in found), *[None] * 7


_chunked.register_autograd(_backward, setup_context=_save)


def linear_cross_entropy_by(gemm: str) -> Callable[..., Tensor]:
    """The head with its products by ``gemm``, one of :mod:`moefx.kernels.gemm`."""

    @takes_spec
    def linear_cross_entropy(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, spec: CrossEntropySpec
    ) -> Tensor:
        """The kernel of ``moefx.linear_cross_entropy``; same arguments, same fp32 scalar.

        torch's own ``F.linear_cross_entropy`` (2.13) takes over where it is as exact and stays in the graph: in fp32, of plain
        logits, outside of torch.compile, which it would leave. In fp16 the gradients have to be computed after the loss is
        scaled up, so all logits are built, as the operation itself does.
        """
        needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
        grads = any(needs)
        if torch.is_autocast_enabled(hidden.device.type):  # opaque to autocast: cast as F.linear would be
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        plain = spec.scale == 1.0 and not spec.softcap and hidden.dtype == torch.float32
        if hasattr(F, "linear_cross_entropy") and plain and not torch.compiler.is_compiling() and grads:
            # its gradients are computed in the forward, without a graph
            hidden, weight = (first_order("linear_cross_entropy", t) for t in (hidden, weight))
            bias = None if bias is None else first_order("linear_cross_entropy", bias)
            options = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True)
            total = F.linear_cross_entropy(
                hidden, weight, labels, linear_bias=bias, reduction="sum", ignore_index=spec.ignore_index, options=options
            )
            if spec.reduction == "sum":
                return total
            # divided here: with no label that counts, torch's own mean has NaN gradients where cross_entropy has zeros
            count = (labels != spec.ignore_index).sum()
            return torch.where(count > 0, total / count.clamp(min=1), torch.nan)
        if hidden.dtype == torch.float16 and grads:
            logits, _ = _scaled(F.linear(hidden, weight, bias), spec.scale, spec.softcap)
            return F.cross_entropy(logits, labels, ignore_index=spec.ignore_index, reduction=spec.reduction)
        mean = spec.reduction == "mean"
        return _chunked(hidden, weight, bias, labels, spec.ignore_index, mean, needs, spec.scale, spec.softcap, gemm)[0]

    return linear_cross_entropy


linear_cross_entropy = linear_cross_entropy_by("torch")
