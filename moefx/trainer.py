"""Hugging Face's Trainer for optimized models; the public path of :mod:`moefx.integrations.trainer`."""

from moefx.integrations.trainer import RouterBias, Trainer, TrainerMixin

__all__ = ["RouterBias", "Trainer", "TrainerMixin"]
