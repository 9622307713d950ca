"""The passes of moefx, one a file, and the default pipeline: one visible tuple."""

from moefx.passes.canonicalize import Canonicalize
from moefx.passes.dense_experts import RaiseDenseExperts
from moefx.passes.expert_parallel import ExpertParallel
from moefx.passes.fp8 import FP8
from moefx.passes.linear_cross_entropy import RaiseLinearCrossEntropy
from moefx.passes.linear_to_fp32 import LinearToFP32
from moefx.passes.lower import Lower
from moefx.passes.norm_rotary import FuseNormRotary
from moefx.passes.norm_streams import NormStreams
from moefx.passes.overlap import Overlap
from moefx.passes.recompute_experts import RecomputeExperts
from moefx.passes.residual_rms_norm import FuseResidualRMSNorm
from moefx.passes.rms_norm import RaiseRMSNorm
from moefx.passes.rotary import RaiseRotary
from moefx.passes.route import RaiseRoute
from moefx.passes.routes import Routes
from moefx.passes.swiglu import RaiseSwiGLU
from moefx.rewriting.pipeline import Change, Changes, Pass, Pipeline

__all__ = [
    "Canonicalize", "Change", "Changes", "ExpertParallel", "FP8", "FuseNormRotary", "FuseResidualRMSNorm", "LinearToFP32",
    "Lower", "NormStreams", "Overlap", "Pass", "Pipeline", "RaiseDenseExperts", "RaiseLinearCrossEntropy", "RaiseRMSNorm",
    "RaiseRotary", "RaiseRoute", "RaiseSwiGLU", "RecomputeExperts", "Routes", "default",
]  # fmt: skip


def default() -> Pipeline:
    """The default pipeline, in order: raise, transform, lower. (Experts and attention are raised by capture itself.)"""
    return Pipeline(
        (
            Canonicalize(),
            RaiseDenseExperts(),
            RaiseRMSNorm(),
            RaiseRoute(),
            RaiseRotary(),
            RaiseSwiGLU(),
            RaiseLinearCrossEntropy(),
            FuseResidualRMSNorm(),
            FuseNormRotary(),
            LinearToFP32(),
            Routes(),
            ExpertParallel(),
            Lower(),
            NormStreams(),
            Overlap(chunks=1),  # chunks=0 lets the cost model cut tokens into chunks: no GPU has measured it yet
        )
    )
