from quartet.observability.doctor import Watch


def test_a_warning_comes_after_three_steps_and_once():
    watch = Watch()
    said = [watch.see({"response/ended": 0.5}) for _ in range(6)]
    assert [len(s) for s in said] == [0, 0, 1, 0, 0, 0]
    assert said[2][0] == "50% of responses end without EOS. Raise rollout.max_new_tokens, or let SFT see whole answers."


def test_a_good_step_in_between_starts_the_count_again():
    watch = Watch()
    for ended in (0.5, 0.5, 1.0, 0.5, 0.5):
        assert watch.see({"response/ended": ended}) == []


def test_no_signal_and_a_disagreeing_sampler_are_said():
    watch = Watch(patience=1)
    said = watch.see({"advantage/std": 0.0, "sampler_mismatch": 0.5})
    assert "every group has equal rewards: no gradient." in said[0]
    assert "the sampler's log-probs are up to 0.5 from the learner's." in said[1]


def test_a_healthy_step_is_silent():
    assert Watch(patience=1).see({"response/ended": 0.99, "advantage/std": 1.0, "sampler_mismatch": 1e-6}) == []
