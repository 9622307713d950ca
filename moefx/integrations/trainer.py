"""Hugging Face's Trainer for optimized models: resuming on any mesh, expert load in the log, a load-balancing callback.

Needs ``moefx[train]``. The plain ``transformers.Trainer`` trains such models too, but refuses to save what resuming a sharded
model needs.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import transformers
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from moefx.distributed import checkpoint_dcp, rank_monitor
from moefx.distributed.clip_grad import clip_grad_norm_
from moefx.errors import MoefxError
from moefx.integrations import fsdp
from moefx.integrations.peft import unwrap
from moefx.runtime import router_tools
from moefx.runtime.cuda_graph import cuda_graph as make_step

#: The folder within a checkpoint of the Trainer that holds what resuming needs.
FOLDER = "moefx"


class RouterBias(TrainerCallback):
    """Auxiliary-loss-free load balancing (arXiv 2408.15664), once per optimizer step: see :func:`moefx.update_router_bias`.

    Args:
        rate: how far each expert's bias moves per step.
    """

    def __init__(self, rate: float = 1e-3):
        self.rate = rate

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Starts to count the tokens of each expert."""
        router_tools.enable_load_tracking(unwrap(model))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Updates the biases from the load since the last step."""
        router_tools.update_router_bias(unwrap(model), self.rate)


class TrainerMixin:
    """What ``moefx.trainer.Trainer`` adds, for other trainers: ``class MyTrainer(TrainerMixin, trl.SFTTrainer): ...``

    Checkpoints get a folder for resuming at any ``ep_size`` and number of ranks (DCP: weights, optimizer, scheduler), beside
    the weights in Hugging Face layout. ``log`` gets the :func:`moefx.expert_load_metrics` of the steps since the last log:
    ``router/max_load``, ``router/entropy``, ``router/dropped``, and ``router/max_load/<layer>``, ``router/entropy/<layer>``.

    Args:
        log_router_load: count tokens per expert and log their metrics, one small all-reduce per log; "model": without those of
            single layers.
        cuda_graph: replay training steps as a CUDA graph (see :func:`moefx.cuda_graph` for its requirements): forward, loss
            and backward of batches with the shape of the first one; others run eagerly. ``compute_loss`` and hooks run while
            a step is recorded, not in a replay. With gradient accumulation over ranks, each micro-batch reduces its gradients.

    Raises:
        MoefxError: with ``cuda_graph``, if ``args`` ask for something that cannot be recorded.
    """

    model: Any
    optimizer: Any
    lr_scheduler: Any
    args: Any
    state: Any
    accelerator: Any
    _step: Any

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *rest: Any,
        log_router_load: bool | str = True,
        cuda_graph: bool = False,
        **named: Any,
    ):
        self._spread = model is not None and not isinstance(model, str) and fsdp.is_sharded(model)
        only = getattr(args, "save_only_model", None)
        if self._spread and args is not None:
            args.save_only_model = True  # the Trainer would refuse to save the rest: see _save_optimizer_and_scheduler
        super().__init__(model, args, *rest, **named)  # type: ignore[call-arg]
        if self._spread and args is not None:
            self.args.save_only_model = only
        self._replays, self._step = cuda_graph, None
        if cuda_graph:
            _can_be_recorded(self.args)
        self._counts = log_router_load
        if log_router_load:
            router_tools.enable_load_tracking(unwrap(self.model))

    def train(self, resume_from_checkpoint: Any = None, *rest: Any, **named: Any) -> Any:
        """As the Trainer's; ``resume_from_checkpoint=True`` takes the last complete checkpoint."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = _last_complete(Path(self.args.output_dir)) or True  # True: the Trainer says what it wants
        try:
            with rank_monitor.named():
                return super().train(resume_from_checkpoint, *rest, **named)  # type: ignore[misc]
        finally:
            if self._step is not None:
                self._step.close()
                self._step = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's, with the load metrics beside each training loss."""
        if self._counts and "loss" in logs:
            load = router_tools.expert_load(unwrap(self.model), "log")
            if any(int(c.sum()) for c in load.values()):
                found = router_tools.expert_load_metrics(load)
                names = found if self._counts is True else ("max_load", "entropy", "dropped")
                logs |= {f"router/{k}": round(found[k], 4) for k in names}
        super().log(logs, start_time)  # type: ignore[misc]

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """As the Trainer's; with ``cuda_graph``, recorded and replayed."""
        inner = unwrap(self.model)
        if hasattr(inner, "_moefx_router_state"):
            inner._moefx_router_state.step = self.state.global_step + 1  # for the error of check_numerics
        ordinary: Any = super().training_step  # type: ignore[misc]
        if not self._replays:
            return ordinary(model, inputs, num_items_in_batch)
        if self._step is None or self._step.model is not model:

            def forward_backward(*, num_items_in_batch: Any, accumulated: int, **batch: Any) -> Any:
                return ordinary(model, batch, num_items_in_batch)

            self._step = make_step(model, forward_backward=forward_backward)
        batch = self._prepare_inputs(inputs)  # type: ignore[attr-defined]
        # the loss may be divided by so many: fewer at the end of an epoch, which is another kind of step
        accumulated = self.current_gradient_accumulation_steps  # type: ignore[attr-defined]
        return self._step(**batch, num_items_in_batch=num_items_in_batch, accumulated=accumulated)

    def _defer_fsdp_gradient_reduction(self) -> Any:
        """Defers the reduction to an optimizer step's last micro-batch (Transformers 5.24); recorded steps reduce each."""
        return contextlib.nullcontext() if self._replays else super()._defer_fsdp_gradient_reduction()  # type: ignore[misc]

    def _clip_grad_norm(self, model: Any) -> Any:
        if not self._spread:
            return super()._clip_grad_norm(model)  # type: ignore[misc]
        self.accelerator.unscale_gradients()  # fp16
        return clip_grad_norm_(model, self.args.max_grad_norm)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        scheduler = self.lr_scheduler.state_dict()
        checkpoint_dcp.save_checkpoint(Path(output_dir, FOLDER), self._held(), _plain(self.optimizer), scheduler=scheduler)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        here = Path(resume_from_checkpoint, FOLDER).is_dir()
        if self._spread and not here:
            raise MoefxError(
                f"{resume_from_checkpoint} has no folder {FOLDER!r} with the shards to resume from: it was saved with "
                "save_only_model, or by another Trainer"
            )
        if not here:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        # else: weights come with the optimizer, once there is one

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is None or not Path(checkpoint_folder, FOLDER).is_dir():
            return super()._load_optimizer_and_scheduler(checkpoint_folder)  # type: ignore[misc]
        extra = checkpoint_dcp.load_checkpoint(Path(checkpoint_folder, FOLDER), self._held(), _plain(self.optimizer))
        self.lr_scheduler.load_state_dict(_for_groups(extra["scheduler"], len(_plain(self.optimizer).param_groups)))

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint or "")
        if (best / FOLDER).is_dir():
            return checkpoint_dcp.load_state(best / FOLDER, self._held())
        if self._spread:
            raise MoefxError(f"{best} has no folder {FOLDER!r} to load the best model from: leave save_only_model off")
        super()._load_best_model()  # type: ignore[misc]

    def _held(self) -> Any:
        """The model whose state is saved: the one inside DDP."""
        return getattr(self.model, "module", self.model)


class Trainer(TrainerMixin, transformers.Trainer):
    """``transformers.Trainer`` with :class:`TrainerMixin`."""


def _can_be_recorded(args: Any) -> None:
    """Raises MoefxError if training steps with these arguments cannot be recorded."""
    if args.n_gpu > 1:
        raise MoefxError(
            f"cuda_graph=True in one process that sees {args.n_gpu} GPUs: the Trainer would run copies of the model by "
            "nn.DataParallel, which cannot be recorded; start one process per GPU with torchrun, or set CUDA_VISIBLE_DEVICES=0"
        )
    if args.fp16:
        raise MoefxError("cuda_graph=True with fp16=True: the loss scale would be recorded as a constant; train in bf16")
    if args.torch_empty_cache_steps is not None:
        raise MoefxError(
            f"cuda_graph=True with torch_empty_cache_steps={args.torch_empty_cache_steps}: memory cannot be freed while a step "
            "is recorded, leave it out"
        )


def _last_complete(folder: Path) -> str | None:
    """The last complete checkpoint: the Trainer writes its state last, so one without a readable state was interrupted."""
    for path in sorted(folder.glob("checkpoint-*"), key=_step, reverse=True):
        with contextlib.suppress(OSError, ValueError):
            json.loads((path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
            return str(path)
    return None


def _step(path: Path) -> int:
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _plain(optimizer: Any) -> Any:
    """The optimizer inside Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _for_groups(scheduler: dict[str, Any], groups: int) -> dict[str, Any]:
    """A scheduler's state for ``groups`` parameter groups: there is one group per mesh of parameters."""
    found = dict(scheduler)
    for key, values in scheduler.items():
        if isinstance(values, list) and len(values) not in (0, groups):
            if any(v != values[0] for v in values):
                raise MoefxError(
                    f"the checkpoint's scheduler has {len(values)} parameter groups whose {key} differ ({values}), this "
                    f"optimizer has {groups}: resume with as many ranks and the ep_size of the run that saved it"
                )
            found[key] = values[:1] * groups
    return found
