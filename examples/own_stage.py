"""A stage of your own in the place of PPO: it imitates the right ones of several answers.

In a TOML file the recipe says "custom", and `[custom]` has `type = "examples/own_stage.py:Star"`.
"""

import quartet


class Star(quartet.StageSource):
    """Imitates answers with a score (STaR, Zelikman et al. 2022; RAFT, Dong et al. 2023)."""

    answers: int = quartet.Field(default=8, ge=2, description="Answers to each prompt.")

    def step(self, context: quartet.StageContext):
        rollouts = context.sample(context.batch(), self.answers)
        right = [rollout for rollout in rollouts if rollout.score]
        if right:
            context.update(right, lambda tokens: -tokens.logprobs)
        return {"star/right": len(right)}


def main(steps: int = 60, **settings):
    run = quartet.train(
        ["sft", "custom", "evaluation"],
        data={"world": "sums", "rows": 20_000},
        reward="exact",
        custom=Star(batch_size=128, lr=1e-3),
        steps=steps,
        sft={"steps": 600, "batch_size": 128, "lr": 2e-3},
        **({"policy.create.num_layers": 3, "rollout.max_new_tokens": 6} | settings),
    ).finish()
    after, before = (run.summaries["evaluation"][side]["reward"] for side in ("after", "before"))
    print(f"right {before:.2f} → {after:.2f}; {run.folder}")
    return run


if __name__ == "__main__":
    main()
