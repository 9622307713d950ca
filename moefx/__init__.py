"""moefx: Hugging Face mixture-of-experts models, captured, rewritten and trained with expert parallelism."""

from . import passes
from .backends import Backend, Kernel, resolve
from .capture import capture
from .checkpoint import load_checkpoint, save_checkpoint
from .clip import clip_grad_norm_
from .cuda_graph import cuda_graph
from .errors import CaptureError, ExchangeError, MoefxError, PassError, RankLostError, VerifyError
from .faults import watch as watch_ranks
from .graph import insert
from .match import Match, Miss, Pattern, f64
from .ops import op
from .optimize import explain, optimize, report, restore, rewrite
from .parallelize import parallelize
from .pipeline import Changes, Pass, Pipeline
from .plan import Plan
from .program import Function, Program
from .raising import Raise
from .report import Report, ShortfallWarning
from .routing import count_routes, expert_load, load_metrics, record_routes, replay_routes, update_router_bias
from .verify import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "Backend", "CaptureError", "Changes", "ExchangeError", "Function", "Kernel", "Match", "Miss", "MoefxError", "Pass",
    "PassError", "Pattern", "Pipeline", "Plan", "Program", "Raise", "RankLostError", "Report", "ShortfallWarning",
    "Verification", "VerifyError",
    "capture", "clip_grad_norm_", "count_routes", "cuda_graph", "expert_load", "explain", "f64", "insert", "load_checkpoint",
    "load_metrics", "op", "optimize", "parallelize", "passes", "record_routes", "replay_routes", "report", "resolve", "restore",
    "rewrite", "save_checkpoint", "update_router_bias", "verify", "watch_ranks",
]  # fmt: skip
