"""What a run shows: its metrics, its folder, its screen, its warnings."""
