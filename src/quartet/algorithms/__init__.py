"""The formulas of RLHF: pure functions and the parts that carry their settings."""
