"""Files of prompts, demonstrations and comparisons: read, checked, encoded once, and sampled."""

from quartet.errors import QuartetError


class DataError(QuartetError, ValueError):
    """Data that cannot be used: one sentence that says where, why, and what to do."""
