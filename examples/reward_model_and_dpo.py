"""A reward model and DPO on the same pairs; then the reward model scores what DPO learnt.

Run it with `python examples/reward_model_and_dpo.py`: two minutes on two CPU cores.
"""

import quartet

SIZE = {"create": {"hidden_size": 64, "num_layers": 2, "num_heads": 4}}


def main(steps: int = 150, **settings):
    world = {"data": {"world": "reviews"}, **settings}
    start = quartet.train("sft", policy=SIZE, steps=steps, **{"sft.lr": 2e-3, **world}).finish()
    policy = start.folder / "sft"
    reward_model = quartet.train(
        "reward_model", policy=policy, steps=steps, **{"reward_model.lr": 1e-3, **world}
    ).finish()
    dpo = quartet.train(
        "dpo", policy=policy, steps=steps, **{"preference.lr": 3e-4, **world}
    ).finish()
    result = quartet.evaluate(
        dpo.folder / "policy",
        policy,
        reward=reward_model.folder / "reward_model",
        num_prompts=200,
        **{"rollout.max_new_tokens": 24, **world},
    )
    before, after = (result.summaries["evaluation"][side] for side in ("before", "after"))
    print(f"score of the reward model: {before['reward']:.2f} → {after['reward']:.2f}")
    print(f"gold reward: {before['gold']:.2f} → {after['gold']:.2f}")
    return dpo


if __name__ == "__main__":
    main()
