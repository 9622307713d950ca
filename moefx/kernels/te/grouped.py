"""GroupedLinear's grouped GEMM over a rank's experts, with the row counts on the device (cuBLASLt 13.4 on Hopper)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moefx.kernels.te import extension
from moefx.ops.grouped_mlp import define

#: Below, GroupedLinear is one cuBLAS call an expert, and reads the counts back: 17.5 ms where torch takes 4.45 (H200).
CUBLASLT = 130_400


def cublaslt() -> int:
    """The version of cuBLASLt, as 130400 for 13.4.0."""
    return extension().get_cublasLt_version()


class Groups:
    """Rows that lie expert by expert, as Transformer Engine describes them: :class:`moefx.ops.grouped_mlp.Products`."""

    def __init__(self, tokens_per_expert: Tensor):
        self.counts = tokens_per_expert.to(torch.int64).contiguous()
        ends = self.counts.cumsum(0)
        self.starts = torch.cat((ends.new_zeros(1), ends))

    def forward(self, x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        """See :class:`moefx.ops.grouped_mlp.Products`."""
        return self._gemm(x.contiguous(), weight, by_columns=transposed)

    def backward(self, grad: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        """See :class:`moefx.ops.grouped_mlp.Products`."""
        return self._gemm(grad.contiguous(), weight, by_columns=not transposed)

    def outer(self, x: Tensor, y: Tensor) -> Tensor:
        """See :class:`moefx.ops.grouped_mlp.Products`."""
        from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm_for_grouped_tensor as run

        x, y = x.contiguous(), y.contiguous()
        out = x.new_zeros(len(self.counts), x.shape[1], y.shape[1])
        if len(x):
            run(self._rows(y), self._rows(x), _matrices_of(out), layout="NT", use_split_accumulator=True)
        return out

    def _gemm(self, x: Tensor, weight: Tensor, by_columns: bool) -> Tensor:
        """x [R, b] times weight [E, a, b] transposed -> [R, a]; ``by_columns``: x [R, a] times weight -> [R, b]."""
        from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm_for_grouped_tensor as run

        weight = weight.contiguous()
        out = x.new_empty(x.shape[0], weight.shape[2 if by_columns else 1])
        if len(x):
            run(_matrices_of(weight), self._rows(x), self._rows(out), layout="NN" if by_columns else "TN")
        return out

    def _rows(self, x: Tensor) -> Any:
        """x [R, a] as Transformer Engine's grouped tensor."""
        from transformer_engine.pytorch.tensor.storage.grouped_tensor_storage import GroupedTensorStorage

        return GroupedTensorStorage(
            shape=tuple(x.shape),
            dtype=x.dtype,
            num_tensors=len(self.counts),
            quantizer=None,
            data=x.reshape(-1),
            first_dims=self.counts,
            tensor_offsets=self.starts * x.shape[1],
        )


def _matrices_of(weight: Tensor) -> Any:
    """[E, a, b], contiguous: no copy."""
    from transformer_engine.pytorch.tensor.grouped_tensor import GroupedTensor

    experts, a, b = weight.shape
    return GroupedTensor.make_grouped_tensor_from_rowwise_data(
        num_tensors=experts, tensor_shape=(a, b), rowwise_data=weight.view(-1), dtype=weight.dtype
    )


#: :func:`moefx.ops.grouped_mlp.mlp` by Transformer Engine.
te_grouped_mlp = define("te_grouped_mlp", Groups)
