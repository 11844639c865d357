"""The training loop that every method shares: data in memory, nets, steps, checkpoints, and what a run leaves."""
