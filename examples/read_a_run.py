"""Read a run folder: metrics, tokens and warnings. `python examples/read_a_run.py [RUN]`."""

import math
import sys

import quartet

NUMBERS = ("old_logprob", "reward", "advantage", "ratio")


def main(folder: str = "runs/latest"):
    run = quartet.Run(folder)
    print(run)
    metrics = run.metrics.to_pydict()
    stage = run.rl_stage or run.main_stage
    name = "reward" if run.rl_stage else "loss"
    rows = zip(metrics["stage"], metrics.get(name, ()), strict=False)
    values = [value for of, value in rows if of == stage and value is not None]
    if values:
        print(f"{stage}: {name} {values[0]:.3f} → {values[-1]:.3f}")
    for warning in run.warnings:
        print(f"step {warning['step']}: {warning['sentence']}")
    if not run.steps():
        return run
    tokens = run.rollouts(run.steps()[-1]).to_pylist()  # a row per token
    first = [t for t in tokens if t["sample"] == 0 and t["is_response"]]
    names = [name for name in NUMBERS if first[0][name] is not None]
    print(f"{'token':12}", *(f"{name:>11}" for name in names))
    for token in first:
        numbers = (math.nan if token[name] is None else token[name] for name in names)
        print(f"{token['text']!r:12}", *(f"{number:11.3f}" for number in numbers))
    return run


if __name__ == "__main__":
    main(*sys.argv[1:])
