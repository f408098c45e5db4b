"""A person's functions, in real processes."""

import dataclasses
import datetime
import decimal
import fractions
import os
import signal
import time

import numpy
import pytest
import torch

from quartet.rewards.functions import FunctionReward, check_reference
from quartet.rewards.protocol import RewardError, Weighted, rewarded, with_score
from quartet.rewards.worker import plain
from quartet.training.metrics import response_metrics
from tests.support.world import prompts, rollout, tokenizer

CODE = """
import asyncio, os, sys, time

def brevity(responses):
    print("this is no answer")
    return [-len(r) for r in responses]

def with_columns(prompts, completions, answer, **others):
    assert set(others) == {*"responses messages ended tokens level prompt_ids completion_ids".split()}, others
    return [float(a == c) for a, c in zip(answer, completions)]

def for_trl(prompts, completions, completion_ids, prompt_ids, trainer_state, log_extra, log_metric, **columns):
    log_extra("length", [len(ids) for ids in completion_ids])
    log_metric("mean", 0.5)
    return [trainer_state.global_step + len(c) + len(p) / 100 for c, p in zip(completion_ids, prompt_ids)]

def for_openrlhf(queries, prompts, labels, **others):
    import torch
    right = [q[len(p):] == a for q, p, a in zip(queries, prompts, labels)]
    rewards = torch.tensor(right).float()
    return {"rewards": rewards, "scores": rewards, "extra_logs": {"n": len(queries)}}

def wants_epoch(prompts, completions, trainer_state):
    return [trainer_state.epoch for _ in prompts]

async def slowly(responses):
    await asyncio.sleep(0.01)
    return [1 for _ in responses]

def numpy_like(responses):
    import numpy
    return numpy.arange(len(responses), dtype="float32")

def per_token(tokens):
    return [[len(t) for t in ts] for ts in tokens]

def sometimes(responses):
    return [None if i == 1 else 1.0 for i in range(len(responses))]

def short(responses):
    return [1.0]

def wrong(responses):
    return ["good"] * len(responses)

def fails(responses):
    return [1 / 0 for _ in responses]

def hangs(responses):
    time.sleep(60)

def dies(responses):
    os._exit(3)

def exits(responses):
    sys.exit("enough")

def asks(responses, difficulty):
    return [0.0] * len(responses)

def alone(prompt, response):
    return 0.0

def forges(responses):
    os.write(1, b'{"values": [9, 9, 9]}\\n')
    print('{"values": [9, 9, 9]}')
    return [0.0] * len(responses)

def process(responses):
    return [os.getpid()] * len(responses)

calls = 0

def counted(tokens):
    global calls
    calls += 1
    return [[float(calls) for _ in ts] for ts in tokens]

class Judge:
    def __call__(self, responses):
        return [2.0] * len(responses)

judge = Judge()
number = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(CODE)
    return path


def rollouts(**extra):
    made = []
    for i, prompt in enumerate(prompts(3)):
        asked = type(prompt)(prompt.id, prompt.ids, prompt.text, extra)
        made.append(rollout(asked, (5 + i, 6, 7)[: 1 + i], 0.0, i))
    return made


def reward(file, name, **more):
    return FunctionReward(
        name, f"{file}:{name}", lambda ids: [tokenizer().decode([i]) for i in ids], **more
    )


def test_a_function_gets_responses_and_its_prints_are_no_answers(file):
    assert reward(file, "brevity").score(rollouts()) == [-len(r.response) for r in rollouts()]
    assert reward(file, "forges").score(rollouts()) == [0, 0, 0]


def test_extra_columns_come_as_lists(file):
    asked = rollouts(answer="bad", level=2)
    assert reward(file, "with_columns").score(asked) == [float(r.response == "bad") for r in asked]


def test_async_functions_arrays_and_callable_objects(file):
    assert reward(file, "slowly").score(rollouts()) == [1, 1, 1]
    assert reward(file, "numpy_like").score(rollouts()) == [0, 1, 2]
    assert reward(file, "judge").score(rollouts()) == [2, 2, 2]


def test_a_dotted_path(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    made = FunctionReward("brevity", "my_rewards.brevity", lambda ids: [])
    assert made.score(rollouts())[0] == -len(rollouts()[0].response)


def test_numbers_per_token_add_up_to_the_score(file):
    asked = rollouts()
    made = reward(file, "per_token")
    lengths = [[float(len(tokenizer().decode([i]))) for i in r.response_ids] for r in asked]
    assert made.score(asked) == [sum(row) for row in lengths]
    scored = rewarded(asked, [Weighted(made, 2.0)], per_token=True)
    assert [list(r.token_scores) for r in scored] == [[2 * x for x in row] for row in lengths]


def test_a_function_is_asked_once_for_a_step_also_where_it_is_read_per_token(file):
    made = [Weighted(reward(file, "counted"))]
    first, second = (rewarded(rollouts(), made, per_token=True) for _ in range(2))
    assert all(set(r.token_scores) == {1.0} and r.score == len(r.token_scores) for r in first)
    assert all(set(r.token_scores) == {2.0} and r.score == 2 * len(r.token_scores) for r in second)


def test_a_process_that_was_stopped_is_started_again_and_stays(file):
    made = reward(file, "brevity", processes=2)
    made.workers[0].stop()
    for _ in range(2):
        time.sleep(0.2)
        assert made.score(rollouts()) == [-len(r.response) for r in rollouts()]


def test_none_leaves_a_response_out_and_is_never_zero(file):
    scored = rewarded(
        rollouts(), [Weighted(reward(file, "sometimes")), Weighted(reward(file, "slowly"), 0.5)]
    )
    assert [r.score for r in scored] == [1.5, None, 1.5]
    assert scored[1].components == {"sometimes": None, "slowly": 1.0}
    assert len(with_score(scored)) == 2
    watched = rewarded(
        rollouts(), [Weighted(reward(file, "sometimes"), 0.0), Weighted(reward(file, "slowly"))]
    )
    assert [r.score for r in watched] == [1, 1, 1]


def test_where_nothing_has_a_score_the_reward_is_named():
    class Silent:
        name = "silent"

        def score(self, rollouts):
            return [None] * len(rollouts)

    with pytest.raises(RewardError, match="none of 3 responses has a score from silent"):
        with_score(rewarded(rollouts(), [Weighted(Silent())]))


class Given:
    name = "given"

    def __init__(self, scores):
        self.scores = scores

    def score(self, rollouts):
        return self.scores


def test_scores_of_an_object_may_be_a_tensor():
    given = Weighted(Given(torch.tensor([1.0, float("nan"), -2.0])))
    scored = rewarded(rollouts(), [given])
    assert [r.score for r in scored] == [1.0, None, -2.0]
    assert [type(r.components["given"]) for r in scored] == [float, type(None), float]


@pytest.mark.parametrize(
    ("scores", "sentence"),
    [
        (None, "reward given returned None, not a list with a number for each response."),
        (["a", 1, 2], "reward given returned 'a' for response 0, not a number, None or a list"),
        ([1, [2.0], 3], "reward given returned a list for response 1. Return one number for each"),
        ([1, 2], "reward given returned 2 values for 3 responses. Return a list of 3 numbers."),
    ],
)
def test_scores_of_an_object_that_are_none_are_one_sentence(scores, sentence):
    with pytest.raises(RewardError) as error:
        rewarded(rollouts(), [Weighted(Given(scores))])
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "short",
            "my_rewards.py:short returned 1 value for 3 responses. Return a list of 3 numbers.",
        ),
        (
            "wrong",
            ":wrong returned 'good' for response 0, not a number, None or a list of numbers.",
        ),
        (
            "fails",
            "failed: ZeroDivisionError: division by zero (my_rewards.py, line 47).",
        ),
        ("exits", "failed: SystemExit: enough"),
        ("dies", "its process ended by itself (exit code 3)"),
        ("asks", "asks for difficulty, which the data do not have. There are prompts, responses"),
        ("alone", "do not have. Did you mean prompts, responses? Each is a list. There are"),
    ],
)
def test_a_broken_contract_is_one_sentence(file, name, sentence):
    made = reward(file, name)
    with pytest.raises(RewardError) as error:
        made.score(rollouts())
    assert sentence in str(error.value)


def test_a_time_limit_is_kept_and_the_process_is_gone(file):
    made = reward(file, "hangs", timeout=0.3)
    process = made.workers[0].process
    started = time.monotonic()
    with pytest.raises(
        RewardError, match="took longer than 0.3 s for 3 responses. Raise reward.timeout"
    ):
        made.score(rollouts())
    assert time.monotonic() - started < 10
    assert process.poll() == -signal.SIGKILL


def test_several_processes_share_the_responses_in_order(file):
    many = [r for _ in range(4) for r in rollouts()]
    made = reward(file, "brevity", processes=3)
    assert made.score(many) == [-len(r.response) for r in many]
    pids = reward(file, "process", processes=3).score(many)
    assert len(set(pids)) == 3 and os.getpid() not in pids


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("missing.py:f", "missing.py: no such file."),
        ("{file}:nothing", "has no nothing. It defines brevity"),
        ("{file}", "write file.py:name"),
        ("{broken}:f", "is not Python"),
    ],
)
def test_a_wrong_reference_is_known_without_running_it(file, tmp_path, reference, sentence):
    (tmp_path / "broken.txt.py").write_text("def f(:")
    shown = reference.format(file=file, broken=tmp_path / "broken.txt.py")
    with pytest.raises(RewardError) as error:
        if reference == "{file}":
            check_reference("nofunction")
        else:
            check_reference(shown)
    assert sentence in str(error.value)


def test_what_is_not_a_function_and_what_cannot_be_imported_are_refused_at_the_start(
    file, tmp_path
):
    with pytest.raises(RewardError, match="number is an int, not a function"):
        reward(file, "number")
    (tmp_path / "raises.py").write_text("import nowhere_to_be_found\ndef f(responses): return []\n")
    with pytest.raises(
        RewardError,
        match="cannot be used: ModuleNotFoundError: No module named 'nowhere_to_be_found'",
    ):
        reward(tmp_path / "raises.py", "f")


# --- what a function may return


class Half:
    def __float__(self):
        return 0.5


TAKEN = {
    "integers": ([1, -2], [1.0, -2.0]),
    "True and False": ([True, False], [1.0, 0.0]),
    "numpy's True and False": (numpy.array([True, False]), [1.0, 0.0]),
    "torch's True and False": (torch.tensor([True, False]), [1.0, 0.0]),
    "None and numbers": ((None, 2), [None, 2.0]),
    "an array of objects": (numpy.array([None, 1], dtype=object), [None, 1.0]),
    "numbers with a gradient": (torch.ones(2, requires_grad=True), [1.0, 1.0]),
    "bfloat16": (torch.tensor([1.5], dtype=torch.bfloat16), [1.5]),
    "arrays without dimensions": ([numpy.array(3.0), torch.tensor(2)], [3.0, 2.0]),
    "numbers per token": ([[1, True], torch.tensor([0.5])], [[1.0, 1.0], [0.5]]),
    "a matrix": (numpy.ones((2, 2)), [[1.0, 1.0], [1.0, 1.0]]),
    "a generator": ((n for n in (1, 2)), [1.0, 2.0]),
    "a decimal and a fraction": ([decimal.Decimal("1.5"), fractions.Fraction(1, 4)], [1.5, 0.25]),
    "an object that is a float": ([Half()], [0.5]),
    "infinity": ([float("-inf")], [float("-inf")]),
    "an integer beyond floats": ([10**400, -(10**400)], [float("inf"), float("-inf")]),
}
REFUSED = {
    "nothing": None,
    "a number": 5,
    "a number in an array": numpy.array(3.0),
    "text": "12",
    "bytes": b"12",
    "a byte array": bytearray(b"12"),
    "a memory view": memoryview(b"12"),
    "a table": {0: 1.0},
    "a table's keys": {0: 1.0}.keys(),
    "a set": {1.0},
    "numbers as text": ["1.5"],
    "numbers as numpy's text": numpy.array(["1.5"]),
    "a number as text in an array": [numpy.array("1.5")],
    "numbers as bytes": [b"1"],
    "bytes as numbers": [bytearray(b"1")],
    "a table for a response": [{"score": 1}],
    "a set for a response": [{1.0}],
    "a complex number": [1j],
    "numpy's complex numbers": numpy.array([1j, 2]),
    "torch's complex numbers": torch.tensor([1j]),
    "a time": [datetime.timedelta(1)],
    "numpy's times": numpy.array(["2020-01-01"], dtype="datetime64[D]"),
    "a decimal that is no number": [decimal.Decimal("sNaN")],
    "None for a token": [[1.0, None]],
    "text for a token": [[1.0, "2"]],
    "lists in lists": [[[1.0]]],
    "a function": [print],
    "itself": None,
}
REFUSED["itself"] = []
REFUSED["itself"].append(REFUSED["itself"])


@pytest.mark.parametrize(("values", "numbers"), TAKEN.values(), ids=TAKEN)
def test_these_values_are_numbers(values, numbers):
    assert plain(values) == numbers


@pytest.mark.parametrize("values", REFUSED.values(), ids=REFUSED)
def test_these_values_are_refused_and_never_converted(values):
    with pytest.raises(TypeError, match=r"^returned ('|None|a|lists)"):
        plain(values)


def test_values_that_no_float32_holds_leave_their_responses_out(file):
    file.write_text("def f(responses):\n    return [10**400, float('nan'), 1.0]\n")
    assert [r.score for r in rewarded(rollouts(), [Weighted(reward(file, "f"))])] == [
        None,
        None,
        1.0,
    ]


def test_a_function_for_trl_is_called_as_it_was_written(file):
    asked = [dataclasses.replace(r, policy_version=3) for r in rollouts()]
    expected = [3 + len(r.response_ids) + len(r.prompt.ids) / 100 for r in asked]
    scored = rewarded(asked, [Weighted(reward(file, "for_trl"))])
    assert [r.score for r in scored] == pytest.approx(expected)
    assert [r.logged_metrics for r in scored] == [{"for_trl/mean": 0.5}] * 3
    assert [r.logged_columns for r in scored] == [{"for_trl/length": n} for n in (1, 2, 3)]
    with pytest.raises(RewardError, match="trainer_state has global_step here, and no epoch"):
        reward(file, "wants_epoch").score(asked)


@pytest.mark.slow
def test_a_function_for_openrlhf_is_called_as_it_was_written(file):
    asked = rollouts(label=rollouts()[1].response)
    assert reward(file, "for_openrlhf").score(asked) == [0.0, 1.0, 0.0]
    assert reward(file, "for_openrlhf").score(rollouts()) == [0.0, 0.0, 0.0], "without labels"


LOGGING = """
def f(responses, log_metric, log_extra):
    {line}
    return [0.0 for _ in responses]
"""
UNLOGGABLE = {
    "log_metric(3, 1.0)": "log_metric was given an int for a name; give it a text of 1 to 100 printable characters",
    "log_metric('', 1.0)": "log_metric was given '' for a name",
    "log_metric('a\\nb', 1.0)": "for a name",
    "log_metric('m', 'high')": "log_metric('m', …) was given 'high', not a finite number",
    "log_metric('m', '1')": "not a finite number",
    "log_metric('m', None)": "log_metric('m', …) was given None, not a finite number",
    "log_metric('m', float('nan'))": "log_metric('m', …) was given nan, not a finite number",
    "log_metric('m', 10**400)": "not a finite number",
    "log_extra('c', 'text')": "log_extra('c', …) was given 'text', not a list",
    "log_extra('c', [1])": "log_extra('c', …) was given 1 values for 3 responses",
    "log_extra(None, [1, 2, 3])": "log_extra was given None for a name",
}


@pytest.mark.parametrize(("line", "sentence"), UNLOGGABLE.items(), ids=UNLOGGABLE)
def test_what_cannot_be_logged_is_one_sentence_with_the_line(tmp_path, line, sentence):
    path = tmp_path / "logs.py"
    path.write_text(LOGGING.format(line=line))
    with pytest.raises(RewardError) as caught:
        reward(path, "f").score(rollouts())
    assert sentence in str(caught.value) and "(logs.py, line 3)" in str(caught.value)


def test_what_is_logged_is_a_plain_number_or_text(tmp_path):
    line = (
        "import torch; log_metric('m', torch.tensor(1.0)); log_metric('m', True); "
        "log_metric('m', 4); log_extra('c', torch.tensor([1.5, 2.0, float('inf')])); "
        "log_extra('d', ['x', None, {'k': 1}])"
    )
    path = tmp_path / "logs.py"
    path.write_text(LOGGING.format(line=line))
    logged = reward(path, "f").logged(rollouts())
    assert [one.metrics for one in logged] == [{"m": 2.0}] * 3, "the mean of 1, 1 and 4"
    cells = [{"c": 1.5, "d": "x"}, {"c": 2.0, "d": None}, {"c": "inf", "d": "{'k': 1}"}]
    assert [one.columns for one in logged] == cells


def test_processes_share_the_responses_and_the_mean_is_that_of_one(tmp_path):
    path = tmp_path / "logs.py"
    path.write_text(
        LOGGING.format(line="log_metric('n', sum(map(len, responses)) / len(responses))")
    )
    asked = rollouts()
    alone, two = reward(path, "f"), reward(path, "f", processes=2)
    means = [
        response_metrics(rewarded(asked, [Weighted(each)]))["logged/f/n"] for each in (alone, two)
    ]
    assert means[1] == pytest.approx(means[0]) == sum(len(r.response) for r in asked) / 3
