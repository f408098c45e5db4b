"""Places and numbers in words."""

from quartet.runs.wording import where


def test_where_something_was_seen():
    assert where("ppo", 1) == where("ppo", 1, 1) == "ppo, step 1"
    assert where("reward_model.2", 999, 1200) == "reward model.2, steps 999 to 1,200"
    assert where("evaluation", 2) == "evaluation", "its steps say nothing to a reader"
