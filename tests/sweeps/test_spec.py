"""What a [sweep] table may say, and the sentence of each mistake."""

import re
from pathlib import Path

import pytest

from quartet.config.toml import ConfigError, read_settings
from quartet.recipes import sweep_names
from quartet.sweeps.plan import plan_sweep
from quartet.sweeps.request import request_of
from tests.sweeps.files import GRID, RUN, sweep_file

DOCS = Path(__file__).parents[2] / "docs" / "sweeps.md"


def asked(tmp_path, sweep=GRID, *words, **more):
    return request_of(str(sweep_file(tmp_path, sweep, **more)), words)


def keys(line, method="grid", extra=""):
    return f'objective = "gold"\nmethod = "{method}"\n{extra}\n[sweep.keys]\n{line}'


def test_a_grid_is_every_combination_and_the_last_key_varies_fastest(tmp_path):
    request = asked(tmp_path)
    assert request.spec.num_trials == 6 and request.seeds == (0, 1)
    assert list(request.spec.grid())[:3] == [
        {"algorithm.kl.coef": 0.01, "optim.lr": 1e-4},
        {"algorithm.kl.coef": 0.01, "optim.lr": 1e-3},
        {"algorithm.kl.coef": 0.1, "optim.lr": 1e-4},
    ]


def test_keys_with_and_without_quotes_are_the_same(tmp_path):
    plain = asked(tmp_path, keys("optim.lr = { values = [0.1, 0.2] }")).spec
    assert asked(tmp_path, keys('"optim.lr" = [0.1, 0.2]')).spec == plain


def test_one_name_can_set_several_settings(tmp_path):
    line = "e = { values = [0.1, 0.2], set = ['algorithm.policy_loss.low', 'algorithm.policy_loss.high'] }"
    request = asked(tmp_path, keys(line))
    words = request.trial_words({"e": 0.2}, 7)
    assert words == ["algorithm.policy_loss.low=0.2", "algorithm.policy_loss.high=0.2", "seed=7"]


def test_words_change_the_run_and_the_table(tmp_path):
    request = asked(tmp_path, GRID, "run.steps=3", "sweep.parallel=2", "sweep.seeds=[5]", "seed=9")
    assert request.base.config.run.steps == 3 and request.spec.parallel == 2
    assert request.seeds == (5,)
    assert asked(tmp_path, GRID, "seed=9").seeds == (9, 10)


def test_stages_that_run_once_leave_the_trials_their_folders(tmp_path):
    run = """
[data]
world = "reviews"
max_prompt_tokens = 32
max_response_tokens = 64
[policy]
create = { type = "llama", hidden_size = 16, num_layers = 1, num_heads = 2, max_length = 128 }
"""
    recipe = '["sft", "reward_model", "ppo", "evaluation"]'
    table = keys("algorithm.kl.coef = [0.1, 0.2]", extra='once = ["sft", "reward_model"]')
    request = asked(tmp_path, table, run=run, recipe=recipe)
    assert request.once_words() == ['recipe=["sft", "reward_model"]']
    assert request.trial_words({"algorithm.kl.coef": 0.1}, 0, "runs/x")[:3] == [
        'recipe=["ppo", "evaluation"]',
        'policy.model="runs/x/sft"',
        'reward=[{ type = "model", model = "runs/x/reward_model" }]',
    ]
    words = ("run.steps=3", "data.sampling=pass_rate", "sft.steps=2", "data.rows=9")
    later = asked(tmp_path, table, *words, run=run, recipe=recipe).once_words()
    assert later == ["sft.steps=2", "data.rows=9", 'recipe=["sft", "reward_model"]']
    reads = keys("sft.lr = [0.1, 0.2]", extra='once = ["sft", "reward_model"]')
    with pytest.raises(ConfigError, match=r"sft.lr: is read by sft, which runs once for all"):
        asked(tmp_path, reads, run=run, recipe=recipe)
    later = keys("algorithm.kl.coef = [0.1, 0.2]", extra='once = ["reward_model"]')
    with pytest.raises(ConfigError, match="not the first stages of the recipe"):
        asked(tmp_path, later, run=run, recipe=recipe)


MISTAKES = {
    "optim.lrr = [0.1, 0.2]": r"search.toml:7: optim.lrr: no such key. Did you mean optim.lr\?",
    "algorithm.kl.coff = [0.1, 0.2]": r"search.toml:7: algorithm.kl.coff: no such key. Did you mean algorithm.kl.coef\?",
    "algorithm.kl.coef = [0.1, -5.0]": r"search.toml:7: algorithm.kl.coef = -5.0: must be ≥ 0",
    "optim.lr = []": "search.toml:7: sweep.keys.optim.lr: has no values",
    "optim.lr = 0.1": "sweep.keys.optim.lr = 0.1: is one value",
    "optim.lr = [0.1, 0.1]": "lists 0.1 twice",
    "optim.lr = { min = 0.1, max = 0.2 }": "a grid needs values",
    "optim.lr = { min = 0.1 }": "needs values, or min and max",
    "optim.lr = { min = 0.1, mx = 0.2 }": r"sweep.keys.optim.lr.mx: no such key. Did you mean max\?",
    "seed = [1, 2]": "seed cannot be searched; sweep.seeds sets it",
    "sft.lr = [0.1, 0.2]": "sft.lr: no stage of this recipe reads it",
    "a = { values = [1, 2], set = ['optim.epochs', 'optim.epochs'] }": "optim.epochs is set by two",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_in_a_searched_key_is_one_sentence(tmp_path, line):
    with pytest.raises(ConfigError, match=MISTAKES[line]) as refused:
        asked(tmp_path, keys(line))
    assert "\n" not in str(refused.value)


RANGES = {
    "optim.lr = { min = 0.2, max = 0.1 }": "min = 0.2 is not below max = 0.1: the range is empty",
    "optim.lr = { min = 0.0, max = 0.1, log = true }": "must be > 0, because the range is log",
    "optim.lr = { min = 0.1, max = inf }": "finite",
}


@pytest.mark.parametrize("line", RANGES)
def test_a_range_that_cannot_work_is_refused(tmp_path, line):
    with pytest.raises(ConfigError, match=RANGES[line]):
        asked(tmp_path, keys(line, "random", "trials = 3"))


TABLES = {
    'objective = "gold"\ntrails = 3': r"search.toml:4: sweep.trails: no such key. Did you mean trials\?",
    'objective = "golden"': r'search.toml:3: sweep.objective: "golden" is no metric. Did you mean gold\?',
    'objective = "gold"\nmethod = "bayes"': 'sweep.method = "bayes": not one of',
    'objective = "gold"\nmethod = "random"': "needs sweep.trials",
    'objective = "gold"\ntrials = 3': "a grid tries all 2 combinations",
    'objective = "gold"\nseeds = 0': "sweep.seeds = 0: must be ≥ 1",
    'objective = "gold"\nparallel = 0': "sweep.parallel = 0: must be ≥ 1",
    'objective = "gold"\nat_most = { kll = 3.0 }': r'"kll" is no metric. Did you mean kl\?',
    'objective = "gold"\nstop_on = ["entropy_colapse"]': r"Did you mean entropy_collapse\?",
    'method = "grid"': "sweep.objective: is missing. By what trials are compared",
}


@pytest.mark.parametrize("table", TABLES)
def test_a_mistake_in_the_table_is_one_sentence(tmp_path, table):
    with pytest.raises(ConfigError, match=TABLES[table]):
        asked(tmp_path, f"{table}\n[sweep.keys]\noptim.lr = [0.1, 0.2]")


def test_an_objective_of_an_evaluation_needs_one(tmp_path):
    with pytest.raises(ConfigError, match="comes from the stage evaluation"):
        asked(tmp_path, recipe='["ppo"]')


def test_only_tpe_and_pruning_need_optuna(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert asked(tmp_path) and asked(tmp_path, GRID, "sweep.method=random", "sweep.trials=2")
    for words in (["sweep.method=tpe", "sweep.trials=2"], ["sweep.prune={startup=2}"]):
        with pytest.raises(ConfigError, match=r"needs optuna. Install it: pip install .*sweep\]"):
            asked(tmp_path, GRID, *words)


def test_quartet_run_says_whose_table_it_is(tmp_path):
    with pytest.raises(ConfigError, match="search.toml:3: sweep: belongs to quartet sweep"):
        read_settings(sweep_file(tmp_path))


def test_a_file_without_the_table_is_refused(tmp_path):
    (tmp_path / "plain.toml").write_text('recipe = "ppo"\n')
    with pytest.raises(ConfigError, match=r"plain.toml: has no \[sweep\] table"):
        request_of(str(tmp_path / "plain.toml"))


def test_the_file_in_the_docs_is_a_sweep(tmp_path):
    pytest.importorskip("optuna")
    [block] = re.findall(r"```toml\n(.*?)```", DOCS.read_text(), re.DOTALL)
    rest = RUN[RUN.index("max_prompt") :].replace("steps = 8", "steps = 2")
    (tmp_path / "search.toml").write_text(block + rest)
    request = request_of(str(tmp_path / "search.toml"), ["reward=[{type='model'}]"])
    assert request.spec.method == "tpe" and request.spec.prune.warmup == 8
    assert list(request.spec.keys) == [
        "optim.lr",
        "optim.epochs",
        "algorithm.kl.controller.type",
        "epsilon",
    ]


def test_sweeps_that_ship_with_quartet_can_be_carried_out():
    assert sweep_names() == ["epsilon-beta"]
    for name in sweep_names():
        assert request_of(name).spec.num_trials == 9


def test_a_plan_adds_up_the_runs(tmp_path):
    plan = plan_sweep(asked(tmp_path))
    one = plan_sweep(asked(tmp_path, GRID, "sweep.seeds=1"))
    assert (plan.num_runs, one.num_runs, len(plan.trials)) == (12, 6, 6)
    assert plan.seconds == pytest.approx(2 * one.seconds)
