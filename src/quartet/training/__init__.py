"""Training: batches, scoring, updates, optimizers and checkpoints."""
