"""The public path of Hugging Face's Trainer for optimized models: see :mod:`moefx.integrations.trainer`."""

from moefx.integrations.trainer import RouterBias, Trainer, TrainerMixin

__all__ = ["RouterBias", "Trainer", "TrainerMixin"]
