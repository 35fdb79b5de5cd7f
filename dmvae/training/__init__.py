"""The training loop, validation and checkpoints."""
