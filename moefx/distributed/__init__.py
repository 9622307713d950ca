"""Training over several ranks: sharding, devices, checkpoints, gradient clipping, the loss of a rank."""
