"""What reads run folders. It imports nothing of the trainer and no torch."""
