"""GRPO with a verifier: two-digit sums, where an answer is right or wrong.

The demonstrations are careless, so imitation learns to make mistakes; the verifier rewards being
right. Run it with `python examples/grpo_verifier.py`: three minutes on two CPU cores.
"""

import quartet


def main(steps: int = 40, **settings):
    run = quartet.train(
        "sums",  # a recipe: sft, grpo, evaluation
        reward="exact",
        steps=steps,
        **(
            {"sft.steps": 300, "policy.create.hidden_size": 96, "policy.create.num_layers": 3}
            | settings
        ),
    )
    for step in run:
        if step.number % 10 == 0 and run.stage == "grpo":
            print(f"{step.number:3}  {step.metrics['reward/exact']:.0%} right")
    after = run.summaries["evaluation"]["after"]["reward"]
    print(f"{after:.0%} of held-out sums are right; {run.folder}")
    return run


if __name__ == "__main__":
    main()
