"""The study of long answers: its world and true values by hand, and a small one as a whole."""

import json
import math
import random
import sys

import pytest

from tests.benchmarks.conftest import FOLDER


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER / "papers"))
    import long_answers

    yield long_answers
    sys.modules.pop("long_answers")
    sys.modules.pop("chapters")


@pytest.fixture
def chapters(study):
    """The module of the world that the study trains on."""
    return sys.modules[study.World.__module__]


@pytest.fixture
def world(chapters):
    return chapters.World(chapters=2, letters=3, remark=2)


def rows(text, logprobs, values, score=0.0):
    """Return the recorded tokens of an answer, a letter each; a point is its end."""
    return [
        {"text": "<eos>" if c == "." else c, "old_logprob": p, "value": v, "score": score}
        for c, p, v in zip(text, logprobs, values, strict=True)
    ]


def test_answers_are_of_more_than_500_tokens_and_four_of_them_are_options(chapters):
    world, rng = chapters.World(), random.Random(0)
    lengths = {len(world.answer(world.right, rng)) for _ in range(20)}
    assert lengths == {512, 576}, "with the token that ends them 513 and 577"
    answer = world.answer(world.right, rng)
    assert [answer[k * 128] for k in range(4)] == list("ADEH")
    assert world.reward([answer]) == [1.0]


def test_only_right_options_in_whole_chapters_are_rewarded(world):
    assert world.right == "AD" and world.options == ["AB", "CD"]
    right = ["AxxxDyyy", "AxyxDzzz", "AxxxDyyyrr"]
    other = ["BxxxDyyy", "AxxxCyyy", "DxxxAyyy", "AxxDyyy", "AxxxxDyyy", "AxxxDyyyr", "AxDxDyyy"]
    assert world.reward(right + other + ["A", ""]) == [1] * 3 + [0] * 9


def test_demonstrations_are_careless_in_each_option_by_itself(chapters):
    world, rng = chapters.World(letters=3), random.Random(0)
    texts = [row["completion"] for row in world.demonstrations(2_000, rng)]
    for chapter, right in enumerate(world.right):
        share = sum(text[chapter * 4] == right for text in texts) / len(texts)
        assert share == pytest.approx(0.65, abs=0.04)
    assert sum(world.reward(texts)) / len(texts) == pytest.approx(0.65**4, abs=0.03)


def test_comparisons_are_a_right_answer_beside_a_wrong_one(world):
    for row in world.comparisons(50, random.Random(0)):
        assert world.reward([row["chosen"], row["rejected"]]) == [1.0, 0.0]


def test_every_character_is_one_token(chapters):
    world = chapters.World(chapters=2, letters=5, remark=3)
    tokenizer = world.tokenizer()
    text = world.answer(world.right, random.Random(0))
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text) and tokenizer.unk_token_id not in ids


def test_true_values_by_hand(chapters, world):
    """Chapter 1 is right, chosen with 0.6; chapter 2 would be with 1 − 0.5 and is not."""
    logprobs = [math.log(0.6), 0, 0, 0, math.log(0.5), 0, 0, 0, 0]

    def of(text):
        return chapters.Answer.of(world, rows(text, logprobs, [0.0] * 9))

    answer = of("AxxxCyyy.")
    assert answer.option_probs == pytest.approx([0.6, 0.5])
    assert answer.true_values(1.0) == pytest.approx([0.3, *[0.5] * 4, *[0.0] * 4])
    assert of("AxxxDyyy.").true_values(1.0) == pytest.approx([0.3, *[0.5] * 4, *[1.0] * 4])
    assert of("BxxxDyyy.").true_values(1.0) == pytest.approx([0.2, *[0.0] * 8])
    formed = of("AxxxDyyy.").true_values(0.5)
    assert formed[0] == pytest.approx(0.3 * 0.5)
    assert formed[6] == pytest.approx(0.5 ** (1 / 3)), "three of nine tokens are to come"


@pytest.mark.parametrize("text", ["AxxDyyyy.", "AxxxDyy.", "AxxxBxxx.", "AxDxDyyy.", "Axxx"])
def test_answers_of_another_form_have_no_true_values(chapters, world, text):
    assert chapters.Answer.of(world, rows(text, [0.0] * len(text), [0.0] * len(text))) is None


def test_a_critic_is_held_against_true_values(study, chapters, world):
    logprobs = [math.log(0.5), 0, 0, 0, math.log(0.5), 0, 0, 0, 0]
    for error in (0.0, 0.25):
        answers = []
        for text in ("AxxxDyyy.", "AxxxCyyy.", "BxxxDyyy."):
            true = chapters.Answer.of(world, rows(text, logprobs, [0.0] * 9)).true_values(1.0)
            values = [v + error * (t < 4) for t, v in enumerate(true)]
            answers.append(chapters.Answer.of(world, rows(text, logprobs, values)))
        found = study.by_position(chapters.Answers(answers, 1.0))
        assert found["rmse"] == pytest.approx(error * math.sqrt(4 / 9))
        assert (found["explained"] == 1.0) == (error == 0.0)
        plan = {"world": {"chapters": 2, "letters": 3, "remark": 2, "right_share": 0.65}}
        assert study.chapters_of(found, plan) == pytest.approx([error, 0.0])


def test_each_variant_differs_from_vapo_in_what_its_name_says(study):
    from quartet.config.toml import settings_of_table

    def parts(variant):
        table = {"recipe": variant.algorithm["preset"], "algorithm": variant.algorithm}
        table |= {"data": {"world": "sums"}, "reward": [{"type": "exact"}]}
        table |= {"policy": {"model": "a-folder"}, "rollout": {"samples_per_prompt": 4}}
        algorithm = settings_of_table(table, "test", "test").config.algorithm
        return {name: getattr(algorithm, name) for name in type(algorithm).__dataclass_fields__}

    vapo, *others = study.VARIANTS
    changed = {
        v.name: {name for name, part in parts(v).items() if part != parts(vapo)[name]}
        for v in others
    }
    assert changed == {
        "PPO": {"advantage", "policy_loss", "aggregation", "positives"},
        "without value pretraining": set(),
        "without decoupled λ": {"advantage"},
        "without it, also in pretraining": {"advantage"},
        "without length-adaptive λ": {"advantage"},
        "λ = 1": {"advantage"},
        "group mean, no critic": {"advantage", "value_loss"},
        "Monte Carlo values, no critic": {"advantage", "value_loss"},
        "without positive examples": {"positives"},
        "without clip-higher": {"policy_loss"},
        "without token-level loss": {"aggregation"},
    }
    assert {v.name for v in study.VARIANTS if v.critic == "reward model"} == {
        "PPO",
        "without value pretraining",
    }


def test_only_rows_that_are_missing_are_made_those_of_a_seed_first(study, monkeypatch):
    class Made:
        plan, world = study.Plan(seeds=2), study.World()

        def probed(self, origin, seed):
            return origin, seed

        def trained(self, variant, seed):
            return variant.name, seed

    monkeypatch.setattr(study, "by_position", lambda answers: answers)
    monkeypatch.setattr(study, "of_run", lambda world, run: run)
    for name in ("critic_cells", "run_cells"):
        monkeypatch.setattr(study, name, lambda *_: [])
    kept = study.begun(Made.plan, None)
    kept["critics"] = {origin: ["kept", "kept"] for origin in study.ORIGINS}
    first, *others = [variant.name for variant in study.VARIANTS]
    kept["runs"] = {first: ["kept"], others[0]: ["kept", "kept"]}
    states = []
    results = study.measured(Made(), kept, lambda r: states.append(json.dumps(r["runs"])))
    assert results["runs"][first] == ["kept", (first, 1)]
    assert results["runs"][others[0]] == ["kept", "kept"]
    assert all(results["runs"][name] == [(name, 0), (name, 1)] for name in others[1:])
    assert len(states) == 1 + 2 * len(others[1:])
    halfway = json.loads(states[len(others[1:]) - 1])
    assert [len(runs) for runs in halfway.values()] == [1, 2, *[1] * len(others[1:])]


def test_results_of_another_plan_are_refused_and_other_numbers_of_seeds_are_not(study, tmp_path):
    file = tmp_path / "results.json"
    assert study.begun(study.Plan(seeds=2), file)["runs"] == {}
    study.write(file, {**study.begun(study.Plan(seeds=2), None), "runs": {"VAPO": [1, 2]}})
    found = study.begun(study.Plan(seeds=5), file)
    assert found["runs"] == {"VAPO": [1, 2]} and found["plan"]["seeds"] == 5
    with pytest.raises(SystemExit, match="results of another plan"):
        study.begun(study.Plan(steps=25), file)


@pytest.mark.slow
def test_a_small_study_makes_its_tables_and_makes_nothing_twice(
    study, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(
        sys, "argv", ["long_answers", "--small", "--seeds", "1", "--folder", str(tmp_path)]
    )
    study.main()
    first = capsys.readouterr().out
    made = sorted(path.name for path in tmp_path.iterdir())
    assert all(f"| {variant.name} |" in first for variant in study.VARIANTS)
    study.main()
    assert capsys.readouterr().out == first
    assert sorted(path.name for path in tmp_path.iterdir()) == made


def test_the_table_of_the_docs_is_of_the_results(study):
    page = FOLDER.parent / "docs" / "papers" / "long_answers.md"
    results = json.loads(study.RESULTS.read_text(encoding="utf-8"))
    for part in study.tables(results).split("\n\n"):
        assert part in page.read_text(encoding="utf-8")


def test_the_figure_has_a_line_for_each_critic_and_two_for_each_variant(study):
    pytest.importorskip("plotly")
    results = json.loads(study.RESULTS.read_text(encoding="utf-8"))
    lines = study.figure(results).data
    assert len(lines) == 1 + len(results["critics"]) + 2 * len(results["runs"])
    [vapo] = [line for line in lines if line.name == "VAPO" and len(line.y) == 4]
    assert vapo.x0 == 1
    assert list(vapo.y) == study.right_of(results["runs"]["VAPO"])
