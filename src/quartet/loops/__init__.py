"""The training loops: generators that yield each step with its metrics."""
