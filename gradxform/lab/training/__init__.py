"""Races and sweeps, with batches, checkpoints and several processes."""
