"""The passes of moefx, one a file, and the default pipeline: one visible tuple."""

from moefx.pipeline import Change, Changes, Pass, Pipeline

from .canonicalize import Canonicalize
from .dense_experts import RaiseDenseExperts
from .expert_parallel import ExpertParallel
from .fp8 import FP8
from .linear_cross_entropy import RaiseLinearCrossEntropy
from .linear_to_fp32 import LinearToFP32
from .lower import Lower
from .norm_rotary import FuseNormRotary
from .norm_streams import NormStreams
from .overlap import Overlap
from .recompute_experts import RecomputeExperts
from .residual_rms_norm import FuseResidualRMSNorm
from .rms_norm import RaiseRMSNorm
from .rotary import RaiseRotary
from .route import RaiseRoute
from .routes import Routes
from .swiglu import RaiseSwiGLU

__all__ = [
    "Canonicalize", "Change", "Changes", "ExpertParallel", "FP8", "FuseNormRotary", "FuseResidualRMSNorm", "LinearToFP32",
    "Lower", "NormStreams", "Overlap", "Pass", "Pipeline", "RaiseDenseExperts", "RaiseLinearCrossEntropy", "RaiseRMSNorm",
    "RaiseRotary", "RaiseRoute", "RaiseSwiGLU", "RecomputeExperts", "Routes", "default",
]  # fmt: skip


def default() -> Pipeline:
    """The default pipeline, in order: raise, transform, lower. (Experts and attention are raised by capture itself.)"""
    return Pipeline((
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
    ))  # fmt: skip
