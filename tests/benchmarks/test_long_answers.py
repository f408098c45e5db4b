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
    for name in ("long_answers", "chapters", "group_sampling"):
        sys.modules.pop(name, None)


@pytest.fixture
def sampling(study):
    """The study of many prompts in the same world."""
    import group_sampling

    return group_sampling


@pytest.fixture
def chapters(study):
    """The module of the world that the study trains on."""
    return sys.modules[study.World.__module__]


@pytest.fixture
def world(chapters):
    return chapters.World(chapters=2, letters=3, remark=2)


@pytest.fixture
def asking(chapters):
    """A world with a prompt for each choice of options, easy and hard."""
    return chapters.World(chapters=2, letters=3, remark=2, right_share=0.8, prompts=8)


def rows(text, logprobs, values, score=0.0, prompt="?"):
    """Return the recorded tokens of a prompt and an answer, a letter each; a point is its end."""
    asked = [
        {"text": c, "is_response": False, "old_logprob": None, "value": None, "score": score}
        for c in prompt
    ]
    return asked + [
        {
            "text": "<eos>" if c == "." else c,
            "is_response": True,
            "old_logprob": p,
            "value": v,
            "score": score,
        }
        for c, p, v in zip(text, logprobs, values, strict=True)
    ]


def test_answers_are_of_more_than_500_tokens_and_four_of_them_are_options(chapters):
    world, rng = chapters.World(), random.Random(0)
    [right] = world.right.values()
    lengths = {len(world.answer(right, rng)) for _ in range(20)}
    assert lengths == {512, 576}, "with the token that ends them 513 and 577"
    answer = world.answer(right, rng)
    assert [answer[k * 128] for k in range(4)] == list("ADEH")
    assert world.reward(["?"], [answer]) == [1.0]


def test_only_right_options_in_whole_chapters_are_rewarded(world):
    assert world.right == {"?": "AD"} and world.options == ["AB", "CD"]
    right = ["AxxxDyyy", "AxyxDzzz", "AxxxDyyyrr"]
    other = ["BxxxDyyy", "AxxxCyyy", "DxxxAyyy", "AxxDyyy", "AxxxxDyyy", "AxxxDyyyr", "AxDxDyyy"]
    assert world.reward(["?"] * 12, right + other + ["A", ""]) == [1] * 3 + [0] * 9


def test_each_of_many_prompts_names_its_own_right_options(asking):
    assert asking.right == {
        "?ac": "AC",
        "!ac": "AC",
        "?ad": "AD",
        "!ad": "AD",
        "?bc": "BC",
        "!bc": "BC",
        "?bd": "BD",
        "!bd": "BD",
    }
    prompts = ["?ad", "!ad", "?ac", "!bd"]
    assert asking.reward(prompts, ["AxxxDyyy"] * 4) == [1, 1, 0, 0]


def test_demonstrations_are_careless_in_each_option_by_itself(chapters):
    world, rng = chapters.World(letters=3), random.Random(0)
    texts = [row["completion"] for row in world.demonstrations(2_000, rng)]
    for chapter, right in enumerate(world.right["?"]):
        share = sum(text[chapter * 4] == right for text in texts) / len(texts)
        assert share == pytest.approx(0.65, abs=0.04)
    rewards = world.reward(["?"] * len(texts), texts)
    assert sum(rewards) / len(texts) == pytest.approx(0.65**4, abs=0.03)


def test_demonstrations_of_hard_prompts_are_half_as_far_above_chance(asking):
    found = list(asking.demonstrations(4_000, random.Random(0)))
    for kind, share in (("?", 0.8), ("!", 0.65)):
        of_kind = [row for row in found if row["prompt"].startswith(kind)]
        prompts, texts = zip(*((r["prompt"], r["completion"]) for r in of_kind), strict=True)
        assert len(of_kind) == 2_000 and len(set(prompts)) == 4
        mean = sum(asking.reward(prompts, texts)) / len(texts)
        assert mean == pytest.approx(share**2, abs=0.03)


@pytest.mark.parametrize("kind", ["world", "asking"])
def test_comparisons_are_a_right_answer_beside_a_wrong_one(kind, request):
    world = request.getfixturevalue(kind)
    for row in world.comparisons(50, random.Random(0)):
        answers = [row["chosen"], row["rejected"]]
        assert world.reward([row["prompt"]] * 2, answers) == [1.0, 0.0]


@pytest.mark.parametrize("prompts", [1, 8])
def test_every_character_is_one_token(chapters, prompts):
    world = chapters.World(chapters=2, letters=5, remark=3, prompts=prompts)
    tokenizer = world.tokenizer()
    text = "".join(world.right) + world.answer("AD", random.Random(0))
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


def test_true_values_are_those_of_the_prompt(chapters, asking):
    logprobs = [math.log(0.6), 0, 0, 0, math.log(0.5), 0, 0, 0, 0]
    answer = chapters.Answer.of(asking, rows("AxxxDyyy.", logprobs, [0.0] * 9, prompt="!bd"))
    assert answer.prompt == "!bd" and answer.text == "AxxxDyyy"
    assert answer.option_probs == pytest.approx([0.4, 0.5])
    assert answer.true_values(1.0) == pytest.approx([0.2, *[0.0] * 8])


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


# --- many prompts


def test_a_step_has_as_many_answers_however_they_are_spread_over_prompts(sampling):
    study = object.__new__(sampling.Study)
    study.plan, study.world = sampling.PLAN, sampling.PLAN.world
    steps = [study.step_of(study.plan.responses, row.each) for row in sampling.ROWS]
    assert [tuple(step.values()) for step in steps] == [
        *[(32, 1), (8, 4), (4, 8), (2, 16)],
        *[(8, 4), (4, 8), (2, 16)],
    ]
    assert tuple(study.step_of(study.plan.responses).values()) == (32, 1)
    assert tuple(study.step_of(128).values()) == (32, 4)
    names = [row.name(32) for row in sampling.ROWS]
    assert names[0] == "VAPO, 32 × 1" and names[-1] == "group mean, no critic, 2 × 16"


def test_a_policy_is_measured_by_the_share_of_right_answers_to_each_prompt(
    sampling, chapters, asking
):
    """Of eight answers to each of two prompts: two right and a wrong one, and a right one; the
    others have lost the form, and count as wrong."""
    logprobs = [-0.1] * 9
    answers = {
        "?ad": ["AxxxDyyy."] * 2 + ["AxxxCyyy."] + ["AxxxDyy.."] * 5,
        "!bc": ["BxxxCyyy."] + ["A"] * 7,
    }

    class Run:
        def rollouts(self, step, columns):
            assert step == 1
            texts = [(prompt, text) for prompt, each in answers.items() for text in each]
            return self.Table(texts)

        class Table:
            def __init__(self, texts):
                self.texts = texts

            def to_pylist(self):
                for sample, (prompt, text) in enumerate(self.texts):
                    score = asking.reward([prompt], [text.removesuffix(".")])[0]
                    values = logprobs[: len(text)]
                    for row in rows(text, values, values, score, prompt):
                        yield {"sample": sample, **row}

    found = sampling.right_by_prompt(asking, Run())
    assert dict(zip(asking.right, found["by_prompt"], strict=True)) == {
        **dict.fromkeys(asking.right, 0.0),
        "?ad": 2 / 8,
        "!bc": 1 / 8,
    }
    assert found["held_out_formed"] == 4 / 16
    assert sampling.right_of(found) == pytest.approx((2 + 1) / 64)
    assert sampling.right_of(found, [False]) == pytest.approx(2 / 32)
    assert sampling.right_of(found, [True]) == pytest.approx(1 / 32)


def test_the_table_of_many_prompts_in_the_docs_is_of_the_results(sampling):
    page = FOLDER.parent / "docs" / "papers" / "long_answers.md"
    results = json.loads(sampling.RESULTS.read_text(encoding="utf-8"))
    assert sampling.table(results) in page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_small_study_of_many_prompts_makes_its_table_and_nothing_twice(
    sampling, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(
        sys, "argv", ["group_sampling", "--small", "--seeds", "1", "--folder", str(tmp_path)]
    )
    sampling.main()
    first = capsys.readouterr().out
    made = sorted(path.name for path in tmp_path.iterdir())
    assert all(f"| {row.name(16)} |" in first for row in sampling.ROWS)
    sampling.main()
    assert capsys.readouterr().out == first
    assert sorted(path.name for path in tmp_path.iterdir()) == made
