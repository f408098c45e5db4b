"""Where scores come from, behind a protocol of one method."""
