"""Plans for machines that are not here: the formulas by hand, and a simulation against what is known of queues."""

import dataclasses
import statistics

import pytest

from quartet.cluster import (
    GPUS,
    CannotFit,
    Cluster,
    Workload,
    generating,
    generation_memory,
    in_words,
    plan_cluster,
    pushing,
    simulate,
    splits,
    training,
    training_memory,
    workload,
)
from quartet.memory import Sizes
from quartet.recipes import recipe_path
from quartet.settings import read_settings
from tests.test_runs import quartet

SEVEN_B = Workload(
    parameters=7_000_000_000,
    model=Sizes(hidden=4096, layers=32, intermediate=11008),
    unsharded=600_000_000,
    learners=2,
    frozen=2,
    rows=512,
    prompt=200.0,
    response=400.0,
    longest=1000,
    epochs=1,
    micro_tokens=8192,
    checkpointing=True,
)


def test_memory_by_hand():
    """On 8 ranks: 6.4 G of the parameters are in parts, 0.6 G whole; 16 bytes of each that is trained, 4 of others."""
    memory = training_memory(SEVEN_B, 8)
    held = 6.4e9 / 8 + 0.6e9
    assert memory["actor"] == memory["critic"] == 16 * held
    assert memory["reference, reward model"] == 2 * 4 * held
    assert memory["blocks put together"] == 2 * 4 * 6.4e9 / 32
    assert training_memory(SEVEN_B, 1)["blocks put together"] == 0
    assert training_memory(SEVEN_B, 1)["actor"] == 16 * 7e9


def test_generation_by_hand():
    """14 GB of weights in bf16; a token's keys and values are 2 · 32 layers · 4096 · 2 bytes = 524,288; an answer may have 1,200."""
    assert SEVEN_B.cache_bytes == 524_288
    held, each, rows = generation_memory(SEVEN_B, GPUS["h100"], 4)
    assert each == 1 and held["weights"] == 14e9
    assert rows == int((72e9 - 14e9) / (524_288 * 1200)) == 92
    assert generation_memory(SEVEN_B, GPUS["h100"], 4, taken=40e9)[2] == int((32e9 - 14e9) / (524_288 * 1200))
    seventy = dataclasses.replace(SEVEN_B, parameters=70_000_000_000)
    assert generation_memory(seventy, GPUS["h100"], 8)[1] == 4, "140 GB need more than two GPUs of 80, and powers of two"
    with pytest.raises(CannotFit, match="generation: 140 GB of weights and 0.63 GB for one answer need 4 GPUs, there are 2"):
        generation_memory(seventy, GPUS["h100"], 2)


def test_no_generation_is_shorter_than_its_longest_answer():
    """However many GPUs: 600 more tokens than the mean, one after the other, each a reading of the weights."""
    made, binds = generating(SEVEN_B, GPUS["h100"], 10_000)
    assert made.best >= 600 * 14e9 / (3350e9 * 0.85) and binds == "the longest answer"
    few, _ = generating(SEVEN_B, GPUS["h100"], 2)
    assert few.best > made.best and few.worst > few.best


def test_training_by_hand():
    """512 rows of 600 tokens; of each parameter 8 operations for two learners, 2 for each of the four that read."""
    made = training(SEVEN_B, GPUS["h100"], 8)
    assert made.best == pytest.approx(7e9 * 512 * 600 * (8 * 2 + 2 * 4) / (989e12 * 8 * 0.5))
    assert made.worst == pytest.approx(2 * made.best)
    assert pushing(SEVEN_B, GPUS["h100"]).best == pytest.approx(14e9 / (50e9 * 0.85))


def test_the_best_split_is_the_best_of_all():
    config = read_settings(
        recipe_path("reviews"), ["policy.create.hidden_size=2048", "policy.create.num_layers=24"], "x"
    ).config
    cluster = Cluster.of("16xH100")
    made, everything = plan_cluster(config, cluster), list(splits(workload(config), cluster))
    assert {split.trainers + split.generators for split in everything} == {16} or everything[0].generators == 0
    assert made.best.step.best + made.best.step.worst == min(s.step.best + s.step.worst for s in everything)
    assert any("GPU-hours" in line for line in in_words(made))


def test_what_does_not_fit_is_refused_with_what_is_missing(tmp_path):
    words = ["policy.create.hidden_size=8192", "policy.create.num_layers=80", "policy.create.num_heads=64"]
    config = read_settings(recipe_path("reviews"), words, "x").config
    with pytest.raises(
        CannotFit, match=r"training needs [\d,.]+ GB on each of 1xl40s, 43.2 GB are usable: [\d,.]+ GB are missing"
    ) as found:
        plan_cluster(config, Cluster.of("1xl40s"))
    assert "actor: " in str(found.value) and "gradient_checkpointing = true" in str(found.value)
    said = quartet("plan", "reviews", *words, "--on", "1xl40s", cwd=tmp_path)
    assert said.returncode == 2 and "GB are missing" in said.stderr
    typo = quartet("plan", "reviews", "--on", "8 toasters", cwd=tmp_path)
    assert typo.returncode == 2 and 'say how many of which, "8xh200". Known are a100' in typo.stderr
    alone = quartet("plan", "reviews", "--simulate", "1", cwd=tmp_path)
    assert alone.returncode == 2 and "--simulate: goes with --on" in alone.stderr


# --- the simulation ------------------------------------------------------------------------------------------------------------


def test_answers_that_take_as_long_as_each_other_cost_the_longer_of_both():
    """64 answers on 64 slots, 10 s each; updates of 4 s. One after the other 14 s; side by side 10; with a slower trainer, its 15."""

    def step(update, bound):
        return simulate(64, None, 10.0, 0.0, 64, update, 0.0, bound, 40).seconds

    assert step(4.0, 0) == pytest.approx(14)
    assert step(4.0, 1) == pytest.approx(10)
    assert step(15.0, 1) == pytest.approx(15)
    assert simulate(64, None, 10.0, 0.0, 64, 4.0, 1.0, 0, 40).seconds == pytest.approx(15), "and the weights' way"


def test_half_the_slots_take_twice_as_long():
    assert simulate(32, None, 10.0, 0.0, 64, 4.0, 0.0, 0, 40).seconds == pytest.approx(24)


def test_no_answer_is_older_than_the_bound_and_a_longer_tail_costs_time():
    for bound in (0, 1, 2, 4):
        made = simulate(128, None, 10.0, 0.8, 64, 6.0, 0.5, bound, 100)
        assert len(made.staleness) == 6400 and min(made.staleness) >= 0 and max(made.staleness) <= bound
    even, tailed = (simulate(64, None, 10.0, spread, 64, 4.0, 0.0, 1, 100).seconds for spread in (0.0, 0.8))
    assert tailed > 1.3 * even


def test_more_staleness_is_never_slower_and_ends_at_the_slower_of_both():
    """With enough ahead, slots are never idle: a step takes rows · mean / slots, or the update. Until then the longest answers
    of each batch are waited for."""
    seconds = [simulate(64, None, 10.0, 0.8, 64, 4.0, 0.0, bound, 150).seconds for bound in (0, 1, 2, 16)]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] == pytest.approx(10.0, rel=0.05)


def test_littles_law():
    """Answers under way = rate · time of each: with all slots busy, slots = rows / step · mean."""
    made = simulate(48, None, 7.0, 0.6, 96, 1.0, 0.0, 6, 150)
    assert 96 / made.seconds * 7.0 == pytest.approx(48, rel=0.05)
    assert statistics.fmean(made.staleness) <= 6
