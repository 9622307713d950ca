"""moefx: faster and expert-parallel training of Hugging Face mixture-of-experts models.

``import moefx`` loads neither torch nor Transformers: each public name is imported from its module when it is first used.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    # Optimize and train
    "optimize", "parallelize", "restore", "cuda_graph", "clip_grad_norm_", "save_checkpoint", "load_checkpoint", "watch_ranks",
    # Inspect and verify
    "report", "explain", "verify", "Report", "Verification", "ShortfallWarning",
    # Routers
    "enable_load_tracking", "expert_load", "expert_load_metrics", "record_routes", "replay_routes", "update_router_bias",
    # Capture and rewrite
    "capture", "rewrite", "Program", "Function", "Plan", "passes", "Pipeline", "Pass", "Changes",
    # Patterns and operations
    "op", "Raise", "Pattern", "Match", "Miss", "f64",
    # Graphs
    "is_call", "arguments", "value", "emit", "unpack", "replace",
    # Kernels
    "Backend", "Kernel", "resolve",
    # Errors
    "MoefxError", "CaptureError", "ExchangeError", "PassError", "RankLostError", "VerifyError",
]  # fmt: skip

if TYPE_CHECKING:
    from moefx import passes
    from moefx.analysis.report import Report, ShortfallWarning
    from moefx.api import explain, optimize, parallelize, report, restore, rewrite
    from moefx.backends import Backend, Kernel, resolve
    from moefx.distributed.checkpoint_dcp import load_checkpoint, save_checkpoint
    from moefx.distributed.clip_grad import clip_grad_norm_
    from moefx.distributed.rank_monitor import watch as watch_ranks
    from moefx.errors import CaptureError, ExchangeError, MoefxError, PassError, RankLostError, VerifyError
    from moefx.frontend.capture import capture
    from moefx.ir.graph import arguments, emit, is_call, replace, unpack, value
    from moefx.ir.plan import Plan
    from moefx.ir.program import Function, Program
    from moefx.ops import op
    from moefx.rewriting.pattern import Match, Miss, Pattern, f64
    from moefx.rewriting.pipeline import Changes, Pass, Pipeline
    from moefx.rewriting.raise_ops import Raise
    from moefx.runtime.cuda_graph import cuda_graph
    from moefx.runtime.router_tools import (
        enable_load_tracking,
        expert_load,
        expert_load_metrics,
        record_routes,
        replay_routes,
        update_router_bias,
    )
    from moefx.runtime.verify import Verification, verify
else:  # a type checker that saw __getattr__ would accept any name
    import importlib

    #: The imports above, by module; a test compares the two.
    _EXPORTS = {
        "moefx.analysis.report": ("Report", "ShortfallWarning"),
        "moefx.api": ("explain", "optimize", "parallelize", "report", "restore", "rewrite"),
        "moefx.backends": ("Backend", "Kernel", "resolve"),
        "moefx.distributed.checkpoint_dcp": ("load_checkpoint", "save_checkpoint"),
        "moefx.distributed.clip_grad": ("clip_grad_norm_",),
        "moefx.distributed.rank_monitor": ("watch as watch_ranks",),
        "moefx.errors": ("CaptureError", "ExchangeError", "MoefxError", "PassError", "RankLostError", "VerifyError"),
        "moefx.frontend.capture": ("capture",),
        "moefx.ir.graph": ("arguments", "emit", "is_call", "replace", "unpack", "value"),
        "moefx.ir.plan": ("Plan",),
        "moefx.ir.program": ("Function", "Program"),
        "moefx.ops": ("op",),
        "moefx.rewriting.pattern": ("Match", "Miss", "Pattern", "f64"),
        "moefx.rewriting.pipeline": ("Changes", "Pass", "Pipeline"),
        "moefx.rewriting.raise_ops": ("Raise",),
        "moefx.runtime.cuda_graph": ("cuda_graph",),
        "moefx.runtime.router_tools": (
            "enable_load_tracking", "expert_load", "expert_load_metrics", "record_routes", "replay_routes",
            "update_router_bias",
        ),
        "moefx.runtime.verify": ("Verification", "verify"),
    }  # fmt: skip
    _SUBPACKAGES = ("backends", "ops", "passes")
    _SOURCES = {
        public or name: (module, name)
        for module, names in _EXPORTS.items()
        for name, _, public in (entry.partition(" as ") for entry in names)
    }

    def __getattr__(name):
        if name in _SUBPACKAGES:
            return importlib.import_module(f"moefx.{name}")
        if name not in _SOURCES:
            raise AttributeError(f"module 'moefx' has no attribute {name!r}")
        module, attribute = _SOURCES[name]
        found = globals()[name] = getattr(importlib.import_module(module), attribute)
        return found

    def __dir__():
        return sorted({*globals(), *__all__})
