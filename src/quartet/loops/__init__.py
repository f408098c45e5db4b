"""The loops: flat, without flags; they yield what happened, and whoever wants it iterates."""
