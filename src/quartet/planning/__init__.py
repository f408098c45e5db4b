"""What a run takes before it runs: parameters, memory, time, disk, and the same on a cluster."""
