"""What writes a run folder: events, rollouts, trackers, model cards."""
