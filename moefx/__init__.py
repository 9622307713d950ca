"""moefx: Hugging Face mixture-of-experts models, captured, rewritten and trained with expert parallelism."""

from moefx import passes
from moefx.analysis.report import Report, ShortfallWarning
from moefx.api import explain, optimize, parallelize, report, restore, rewrite
from moefx.backends import Backend, Kernel, resolve
from moefx.distributed.checkpoint import load_checkpoint, save_checkpoint
from moefx.distributed.clip_grad import clip_grad_norm_
from moefx.distributed.rank_monitor import watch as watch_ranks
from moefx.errors import CaptureError, ExchangeError, MoefxError, PassError, RankLostError, VerifyError
from moefx.frontend.capture import capture
from moefx.ir.graph import insert
from moefx.ir.plan import Plan
from moefx.ir.program import Function, Program
from moefx.ops import op
from moefx.rewriting.pattern import Match, Miss, Pattern, f64
from moefx.rewriting.pipeline import Changes, Pass, Pipeline
from moefx.rewriting.raise_ops import Raise
from moefx.runtime.cuda_graph import cuda_graph
from moefx.runtime.router_state import count_routes, expert_load, load_metrics, record_routes, replay_routes, update_router_bias
from moefx.runtime.verify import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "Backend", "CaptureError", "Changes", "ExchangeError", "Function", "Kernel", "Match", "Miss", "MoefxError", "Pass",
    "PassError", "Pattern", "Pipeline", "Plan", "Program", "Raise", "RankLostError", "Report", "ShortfallWarning",
    "Verification", "VerifyError",
    "capture", "clip_grad_norm_", "count_routes", "cuda_graph", "expert_load", "explain", "f64", "insert", "load_checkpoint",
    "load_metrics", "op", "optimize", "parallelize", "passes", "record_routes", "replay_routes", "report", "resolve", "restore",
    "rewrite", "save_checkpoint", "update_router_bias", "verify", "watch_ranks",
]  # fmt: skip
