"""Is the policy better than the one it came from, and what did that cost?"""
