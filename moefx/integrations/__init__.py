"""Transformers, PEFT and FSDP2 as moefx uses them, and the Trainer."""
