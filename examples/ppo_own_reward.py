"""PPO with a reward function of your own: film reviews that become enthusiastic, but stay short.

Run it with `python examples/ppo_own_reward.py`: two minutes on two CPU cores.
"""

import quartet

PRAISE = {"wonderful", "delight", "superb", "moving", "brilliant", "charming", "great", "best"}
SIZES = {"policy.create.hidden_size": 64, "sft.lr": 2e-3, "optim.lr": 3e-4, "optim.critic_lr": 1e-3}


def enthusiasm(responses, **_):
    """Return one number per response: 1 for each word of praise, minus 0.05 for each word."""
    words = [response.lower().split() for response in responses]
    return [sum(w.strip(".,!") in PRAISE for w in text) - 0.05 * len(text) for text in words]


def main(steps: int = 40, **settings):
    run = quartet.train(
        ["sft", "ppo", "evaluation"],
        data={"world": "reviews"},
        policy={"create": {"num_layers": 2, "num_heads": 4}},
        reward=enthusiasm,
        steps=steps,
        **(SIZES | settings),
    )
    for step in run:
        if isinstance(step, quartet.Step) and step.number % 10 == 0:
            best = max(step.rollouts, key=lambda rollout: rollout.score or 0.0)
            print(f"{step.number:3}  reward {step.metrics['reward']:5.2f}  {best.response}")
    print(run.summaries["evaluation"]["win_rate"], run.report)
    return run


if __name__ == "__main__":
    main()
