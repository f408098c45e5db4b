"""What crosses the border of the process: bounded HTTP, background calls, text from outside."""
