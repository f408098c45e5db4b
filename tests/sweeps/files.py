"""Sweep files of the tests."""

from pathlib import Path

RUN = """
[data]
world = "reviews"
max_prompt_tokens = 32
max_response_tokens = 64
[policy]
create = { type = "llama", hidden_size = 16, num_layers = 1, num_heads = 2, max_length = 128 }
[[reward]]
type = "gold"
[run]
steps = 8
"""
GRID = """
objective = "gold"
seeds = 2
[sweep.keys]
algorithm.kl.coef = [0.01, 0.1, 1.0]
optim.lr = [1e-4, 1e-3]
"""


def sweep_text(sweep: str = GRID, run: str = RUN, recipe: str = '["ppo", "evaluation"]') -> str:
    return f"recipe = {recipe}\n[sweep]\n{sweep.strip()}\n{run}"


def sweep_file(folder: Path, sweep: str = GRID, **more: str) -> Path:
    path = folder / "search.toml"
    path.write_text(sweep_text(sweep, **more))
    return path
