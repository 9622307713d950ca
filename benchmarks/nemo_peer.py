"""NVIDIA NeMo AutoModel as a peer: its own Qwen3-MoE class, on the weights of a Transformers model.

    pip install nemo-automodel==0.7.0 "transformer-engine[pytorch]>=2.20"

Settings are those of its own benchmark recipe (examples/llm_benchmark/qwen/qwen3_moe_30b_te_deepep.yaml), less what several
GPUs need: Transformer Engine's attention, linears and RMSNorm, grouped GEMMs for the experts, its cross-entropy without an
fp32 copy of the logits. Its auxiliary loss is off, since Transformers adds none either unless it is asked to return router
logits. Nothing of it is changed.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

VERSION = "0.7.0"


def settings(cuda: bool, balanced: bool) -> dict[str, Any]:
    """The arguments of its BackendConfig. Without CUDA, to try it out: torch's own modules."""
    kernels = dict(attn="te", linear="te", rms_norm="te") if cuda else dict(attn="sdpa", linear="torch", rms_norm="torch")
    return {**kernels, "rope_fusion": cuda, "experts": "torch_mm", "dispatcher": "torch", "fake_balanced_gate": balanced}


class Nemo(nn.Module):
    """Its model with its loss, called as Transformers models are: ``(input_ids, labels, use_cache=False).loss``."""

    def __init__(self, model: nn.Module):
        super().__init__()
        from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy

        self.model, self.config = model, model.config
        self.loss = MaskedCrossEntropy(fp32_upcast=False)
        self._shifted: tuple[Tensor, Tensor, int] | None = None

    def forward(self, input_ids: Tensor, labels: Tensor, use_cache: bool = False) -> Any:
        """input_ids and labels [B, S]. NeMo's data sets shift the labels: here once a batch, in the warm-up."""
        if self._shifted is None or self._shifted[0] is not labels:
            ahead = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
            self._shifted = (labels, ahead, int((ahead != -100).sum()))
        out = self.model(input_ids)
        logits = getattr(out, "logits", out)
        return SimpleNamespace(loss=self.loss(logits, self._shifted[1], num_label_tokens=self._shifted[2]))


def from_transformers(model: Any, balanced: bool = False) -> Nemo:
    """NeMo AutoModel's model with the numbers of ``model``, in memory of its own (its layout is another).

    Raises:
        RuntimeError: it is another version, or has no class here for the model.
    """
    # not nemo_automodel.__version__: within a git checkout that has the checkout's commit in it
    found = importlib.metadata.version("nemo-automodel")
    if found != VERSION:
        raise RuntimeError(f"nemo-automodel is {found}, this peer is written for {VERSION}")
    if model.config.model_type != "qwen3_moe":
        raise RuntimeError(f"the nemo peer knows qwen3_moe, not {model.config.model_type}")
    from nemo_automodel.components.models.common import BackendConfig
    from nemo_automodel.components.models.qwen3_moe.model import Qwen3MoeForCausalLM

    first = next(model.parameters())
    backend = BackendConfig(**settings(first.is_cuda, balanced))
    config = model.config.__class__.from_dict({**model.config.to_dict(), "torch_dtype": str(first.dtype)[6:]})
    with torch.device(first.device):
        nemo = Qwen3MoeForCausalLM(config, backend=backend, moe_overrides={"aux_loss_coeff": 0.0})
    weights = nemo.state_dict_adapter.from_hf(dict(_per_expert(model.state_dict())))
    missing, unexpected = nemo.load_state_dict(weights, strict=False)
    # Transformer Engine's modules have "_extra_state"; a balanced gate has no weight
    lacking = [n for n in missing if not n.endswith("_extra_state")]
    foreign = [n for n in unexpected if not (balanced and n.endswith("mlp.gate.weight"))]
    if lacking or foreign:
        raise RuntimeError(f"NeMo AutoModel's model did not take the weights: lacks {lacking[:3]}, has no {foreign[:3]}")
    return Nemo(nemo.to(first.device)).train()


def _per_expert(state: Mapping[str, Tensor]) -> Any:
    """Experts one by one, as checkpoints hold them and NeMo's adapter reads them; Transformers keeps them stacked."""
    for name, t in state.items():
        if name.endswith("experts.gate_up_proj"):
            for i, both in enumerate(t):
                gate, up = both.chunk(2)
                yield name.replace("gate_up_proj", f"{i}.gate_proj.weight"), gate
                yield name.replace("gate_up_proj", f"{i}.up_proj.weight"), up
        elif name.endswith("experts.down_proj"):
            for i, one in enumerate(t):
                yield name.replace("down_proj", f"{i}.down_proj.weight"), one
        else:
            yield name, t
