"""A run while it runs: pipeline, workers, signals, resuming, replaying, planted faults."""
