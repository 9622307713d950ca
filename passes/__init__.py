"""The passes of moefx, one a file, and the default pipeline: one visible tuple."""

from moefx.passes.canonicalize import Canonicalize
from moefx.passes.dense_experts import DenseExperts
from moefx.passes.expert_parallel import ExpertParallel
from moefx.passes.expose_routes import ExposeRoutes
from moefx.passes.fp8 import FP8
from moefx.passes.linear_cross_entropy import LinearCrossEntropy
from moefx.passes.linear_to_fp32 import LinearToFP32
from moefx.passes.lower import Lower
from moefx.passes.norm_rotary import NormRotary
from moefx.passes.norm_streams import NormStreams
from moefx.passes.overlap import Overlap
from moefx.passes.recompute_experts import RecomputeExperts
from moefx.passes.residual_rms_norm import ResidualRMSNorm
from moefx.passes.rms_norm import RMSNorm
from moefx.passes.rotary import Rotary
from moefx.passes.route import Route
from moefx.passes.split_lora import SplitLoRA
from moefx.passes.swiglu import SwiGLU
from moefx.rewriting.pipeline import Change, Changes, Pass, Pipeline

__all__ = [
    # Raise what a model writes to operations
    "Canonicalize", "DenseExperts", "RMSNorm", "Route", "Rotary", "SwiGLU", "LinearCrossEntropy",
    # Transform
    "ResidualRMSNorm", "NormRotary", "LinearToFP32", "SplitLoRA", "ExposeRoutes", "ExpertParallel",
    # Lower to kernels
    "Lower", "NormStreams", "Overlap",
    # Opt-in
    "FP8", "RecomputeExperts",
    # Pipelines
    "default", "Pipeline", "Pass", "Changes", "Change",
]  # fmt: skip


def default() -> Pipeline:
    """The default pipeline, in order: raise, transform, lower. (Experts and attention are raised by capture itself.)"""
    return Pipeline((
        Canonicalize(),        # one form for casts, copies and views; assertions are dropped
        DenseExperts(),        # Llama 4: all experts on all tokens -> route, experts
        RMSNorm(),             # pow, mean, rsqrt, mul, casts -> rms_norm
        Route(),               # softmax or sigmoid, topk, gather, div of logits -> route
        Rotary(),              # the rotations of a query and its key -> rotary
        SwiGLU(),              # silu, mul -> swiglu
        LinearCrossEntropy(),  # linear, cast, cross_entropy -> linear_cross_entropy
        ResidualRMSNorm(),     # add, rms_norm -> add_rms_norm
        NormRotary(),          # rms_norm of query and key, rotary -> norm_rotary of each
        LinearToFP32(),        # casts to fp32, linear -> linear_to_fp32
        SplitLoRA(),           # experts of W + B A -> experts with the factors
        ExposeRoutes(),        # each router's experts -> an output of the function (replaying: an input)
        ExpertParallel(),      # experts -> dispatch, grouped_mlp, combine
        Lower(),               # each operation -> a backend's kernel
        NormStreams(),         # rms_norm beside other readers of its input -> one kernel that adds their gradients
        Overlap(chunks=1),     # dispatch, combine -> start and wait; chunks=0, by the cost model: not measured on a GPU yet
    ))  # fmt: skip
