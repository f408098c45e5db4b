"""The study of sampler–learner mismatch: what the perturbed sampler does, by comparison with plain
forward passes, the definitions by hand, and a small study as a whole."""

import copy
import json
import sys

import pytest
import torch

import quartet
from quartet.models.language_model import stop_ids
from tests.benchmarks.conftest import FOLDER
from tests.support import world

MODULES = ("mismatch", "mismatch_tables", "perturbed", "paper")


@pytest.fixture(autouse=True)
def _papers_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER / "papers"))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


def generator(model, **settings):
    from perturbed import Perturbed

    tokenizer = world.tokenizer()
    context = quartet.GeneratorContext(model, tokenizer, stop_ids(model, tokenizer), seed=3)
    return Perturbed(**settings).make(context)


def sampled(source, count=6):
    return source.generate(world.prompts(count), quartet.Sampling(max_new_tokens=8), 2)


def recorded_and_computed(rollouts, model, change):
    """Return the recorded log-probs, and those of logits that `change` has perturbed, computed one
    response at a time."""
    recorded, computed = [], []
    for rollout in rollouts:
        ids = torch.tensor([[*rollout.prompt.ids, *rollout.response_ids]])
        start = len(rollout.prompt.ids)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, start - 1 : -1]
        chosen = torch.tensor(rollout.response_ids)[:, None]
        computed.append(change(logits).log_softmax(-1).gather(1, chosen)[:, 0])
        recorded.append(torch.tensor(rollout.logprobs))
    return torch.cat(recorded), torch.cat(computed)


def test_without_a_perturbation_it_is_the_native_generator():
    model = world.model()
    plain = quartet.NativeGenerator(
        model, world.tokenizer(), stop_ids(model, world.tokenizer()), seed=3
    )
    assert sampled(generator(model)) == sampled(plain)


def test_fixed_noise_and_temperature_are_in_what_is_recorded():
    model = world.model()
    source = generator(model, sigma=2.0, noise="fixed", temperature=0.8)
    offsets = 2.0 * source.offsets[: len(world.tokenizer())]
    pair = recorded_and_computed(sampled(source), model, lambda z: (z + offsets) / 0.8)
    torch.testing.assert_close(*pair, atol=1e-5, rtol=0)


def test_fresh_noise_is_another_at_every_token():
    """The recorded log-prob of a token with noise ε is that of the policy plus ε, less a constant
    that is the mean of e^ε: for σ = 1 the deviation over tokens is about 1."""
    model = world.model()
    pair = recorded_and_computed(sampled(generator(model, sigma=1.0), 40), model, lambda z: z)
    noise = pair[0] - pair[1]
    assert 0.8 < float(noise.std()) < 1.2
    assert len(noise.unique()) > 0.9 * len(noise)


def test_noisy_records_leave_the_responses_alone():
    model = world.model()
    noisy, plain = sampled(generator(model, sigma=1.0, noise="recorded")), sampled(generator(model))
    assert [r.response_ids for r in noisy] == [r.response_ids for r in plain]
    errors = [
        a - b
        for one, other in zip(noisy, plain, strict=True)
        for a, b in zip(one.logprobs, other.logprobs, strict=True)
    ]
    assert 0.7 < float(torch.tensor(errors).std()) < 1.3


@pytest.mark.parametrize(
    ("weights", "dtype"), [("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn)]
)
def test_rounded_weights_are_the_samplers_alone(weights, dtype):
    model, before = world.model(), copy.deepcopy(world.model())
    source = generator(model, weights=weights)
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in rounded.state_dict().values():
            tensor.copy_(tensor.to(dtype))
    pair = recorded_and_computed(sampled(source), rounded, lambda z: z)
    torch.testing.assert_close(*pair, atol=1e-5, rtol=0)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before.state_dict()[name], atol=0, rtol=0)


def test_late_weights_come_as_many_updates_later():
    """With two updates of delay, the sampler has the weights of the start after two updates, and
    those of update 1 after three."""
    model = world.model()
    source = generator(model, staleness=2)
    name = next(iter(model.state_dict()))
    start, used = model.state_dict()[name].clone(), []
    for version in (1, 2, 3, 4):
        with torch.no_grad():
            model.state_dict()[name].add_(1.0)
        source.load_weights(quartet.Weights(version, model.state_dict()))
        moved = (source.model.state_dict()[name] - start).mean().round().item()
        used.append((source.version, moved))
    assert used == [(0, 0.0), (0, 0.0), (1, 1.0), (2, 2.0)]


def test_the_doctor_stops_a_run_with_a_perturbed_sampler(tmp_path):
    from perturbed import Perturbed

    run = quartet.train(
        "grpo",
        policy={
            "create": {"hidden_size": 32, "num_layers": 1, "num_heads": 2},
            "tokenizer": {"type": "train"},
        },
        data=["the film was", "a story", "music is", "the end"] * 4,
        reward=lambda responses, **_: [float(len(r)) for r in responses],
        generator=Perturbed(sigma=0.3),
        steps=2,
        folder=tmp_path,
        **{"rollout.prompts_per_step": 2, "rollout.samples_per_prompt": 2},
    )
    with pytest.raises(quartet.QuartetError, match=r"the sampler's probabilities are .*% from"):
        run.finish(progress=False)
    assert [warning["rule"] for warning in run.record.warnings] == ["sampler_disagrees"]


def test_a_collapse_is_less_than_half_of_the_clean_runs_to_the_end():
    from mismatch_tables import collapse

    clean = [0.4, 0.6, 0.8, 0.8]
    assert collapse([0.4, 0.5, 0.4, 0.4], clean, 5) is None, "half is not less than half"
    assert collapse([0.4, 0.2, 0.3, 0.3], clean, 5) == 5
    assert collapse([0.4, 0.2, 0.7, 0.3], clean, 5) == 15, "it had come back in between"
    assert collapse([0.1, 0.1, 0.1, 0.1], clean, 5) == 0


def test_gold_falls_where_its_mean_stays_below_its_maximum():
    """Means of five: 1, 1, 0.8, 0.6, … The fourth is 0.4 below the maximum, and is that of steps 4
    to 8. One that comes back has not fallen."""
    from mismatch_tables import fall

    gold = [1.0] * 6 + [0.0] * 6
    assert fall(gold) == 8
    assert fall([*gold, *[1.0] * 5]) is None
    assert fall([1.0] * 12) is None


def test_rules_are_listed_by_the_step_at_which_the_first_run_heard_them():
    from mismatch_tables import steps_of

    runs = [{"hacked": 22, "repeats_itself": 30}, {"repeats_itself": 9}]
    assert steps_of(runs) == "`repeats_itself` (30, 9), `hacked` (22, –)"
    assert steps_of([{"hacked": 3}, {"hacked": 3}]) == "`hacked` (3 in all)"
    assert steps_of([{}, {}]) == "silent"


@pytest.mark.slow
def test_a_small_study_makes_its_tables_and_makes_nothing_twice(tmp_path, monkeypatch, capsys):
    import dataclasses

    import mismatch

    small = {"prompts": 2, "samples": 2, "every": 3, "held_out": 4}
    for name, setting in (("SUMS", mismatch.SUMS), ("REVIEWS", mismatch.REVIEWS)):
        changed = dataclasses.replace(setting, **small, sft={**setting.sft, "steps": 2})
        monkeypatch.setattr(mismatch, name, changed)
    late = mismatch.Perturbed(staleness=2)
    kinds = (
        mismatch.Kind("none", mismatch.Perturbed(), steps=6),
        mismatch.Kind("2 updates late", late, mismatch.ALL, steps=6),
    )
    monkeypatch.setattr(mismatch, "KINDS", kinds)
    monkeypatch.setattr(mismatch, "JUDGED", (("word", 0.0),))
    monkeypatch.setattr(mismatch, "JUDGED_STEPS", 6)
    results = tmp_path / "mismatch.json"
    words = ["mismatch", "--seeds", "1", "--folder", str(tmp_path), "--results", str(results)]
    monkeypatch.setattr(sys, "argv", words)
    mismatch.main()
    first, kept = capsys.readouterr().out, results.read_text()
    monkeypatch.setattr(mismatch, "made", lambda *_: pytest.fail("made again"))
    mismatch.main()
    tables = capsys.readouterr().out
    assert first.endswith(tables) and results.read_text() == kept
    assert tables.count("| 2 updates late |") == 6, "five corrections, and the doctor"
    written = json.loads(kept)
    assert [len(row["held_out"]) for row in written["sums"]] == [3] * 6
    assert [len(row["gold"]) for row in written["reviews"]] == [6]
    monkeypatch.setattr(sys, "argv", [*words, "--redraw"])
    mismatch.main()
    assert capsys.readouterr().out == tables


def test_the_tables_of_the_docs_are_of_the_results():
    import mismatch_tables
    import paper

    page = (FOLDER.parent / "docs" / "papers" / "mismatch.md").read_text(encoding="utf-8")
    results = json.loads((paper.RESULTS / "mismatch.json").read_text(encoding="utf-8"))
    for part in mismatch_tables.tables(results).split("\n\n"):
        assert part in page
        assert len({line.count("|") for line in part.splitlines() if line}) == 1
    pytest.importorskip("plotly")
    titles = [note.text for note in mismatch_tables.figure(results).layout.annotations]
    assert titles[-1] == "reviews"
