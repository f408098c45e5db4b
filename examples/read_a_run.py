"""Read a run folder: metrics, tokens and warnings. `python examples/read_a_run.py [RUN]`."""

import sys

import quartet


def main(folder: str = "runs/latest"):
    run = quartet.Run(folder)
    print(run)
    metrics = run.metrics.to_pydict()
    stage = run.rl_stage or run.main_stage
    steps = [i for i, name in enumerate(metrics["stage"]) if name == stage]
    name = "reward" if run.rl_stage else "loss"
    if name in metrics:
        print(f"{stage}: {name} {metrics[name][steps[0]]:.3f} → {metrics[name][steps[-1]]:.3f}")
    for warning in run.warnings:
        print(f"step {warning['step']}: {warning['sentence']}")
    if not run.steps():
        return run
    tokens = run.rollouts(run.steps()[-1]).to_pylist()  # a row per token
    first = [t for t in tokens if t["sample"] == 0 and t["is_response"]]
    print(f"{'token':12} {'reward':>8} {'advantage':>10} {'ratio':>7}")
    for token in first:
        ratio = float("nan") if token["ratio"] is None else token["ratio"]
        print(
            f"{token['text']!r:12} {token['reward']:8.3f} {token['advantage']:10.3f} {ratio:7.3f}"
        )
    return run


if __name__ == "__main__":
    main(*sys.argv[1:])
