"""The loop, its checkpoints and what it logs."""
