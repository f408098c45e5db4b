"""A policy loss of your own, used by name in Python and in TOML.

`Squared` replaces PPO's clip by a penalty on the squared distance of the ratio from 1. It registers
itself: `type = "examples/own_policy_loss.py:Squared"` in a TOML file is this class.
"""

import quartet


class Squared(quartet.PolicyLoss):
    """-ratio · advantage + scale · (ratio - 1)², per token."""

    scale: float = quartet.Field(default=5.0, gt=0, description="The weight of the penalty.")

    def __call__(self, tokens: quartet.Surrogate):
        return self.scale * (tokens.ratio - 1) ** 2 - tokens.ratio * tokens.advantages


def main(steps: int = 30, **settings):
    run = quartet.train(
        "sums",
        algorithm={"policy_loss": Squared(scale=3.0)},
        steps=steps,
        **(
            {"sft.steps": 300, "policy.create.hidden_size": 96, "policy.create.num_layers": 3}
            | settings
        ),
    ).finish()
    rewards = [r for r in run.record.metrics.to_pydict()["reward"] if r is not None]
    print(f"reward {rewards[0]:.2f} → {rewards[-1]:.2f}; {run.folder}")
    return run


if __name__ == "__main__":
    main()
