"""A person's reward functions that cannot be used, and what they return that is no score."""

import pytest

from quartet.rewards import functions
from quartet.rewards.functions import FunctionReward
from quartet.rewards.protocol import RewardError, Weighted, rewarded, with_score
from tests.malformed.saying import refusal
from tests.support.world import prompts, rollout, tokenizer

NOTHING = "none of 3 responses has a score from f: there is nothing to learn from."
LATE = "took longer than 0.3 s for 3 responses. Raise reward.timeout, give it more reward.processes"
NO_LIST = ", not a list with a number for each response."
NO_NUMBER = " for response 0, not a number, None or a list of numbers."


def asked():
    """Answers of one, two and three tokens."""
    return [rollout(prompt, (5, 6, 7)[: i + 1], 0.0, i) for i, prompt in enumerate(prompts(3))]


def said_of(tmp_path, monkeypatch, source, reference="mine.py:f", per_token=False, timeout=20.0):
    """From the reference to the scores of a step."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_bytes(source if isinstance(source, bytes) else source.encode())

    def scored():
        made = FunctionReward(
            "f", reference, lambda ids: [tokenizer().decode([i]) for i in ids], timeout=timeout
        )
        return with_score(rewarded(asked(), [Weighted(made)], per_token))

    return refusal(RewardError, scored)


RETURNS = {
    "nothing": ("pass", "mine.py:f returned None" + NO_LIST),
    "a number": ("return 1.0", "mine.py:f returned a float" + NO_LIST),
    "a text as long as the answers": ("return 'abc'", "returned 'abc'" + NO_LIST),
    "a table": ("return {'scores': [1, 2, 3]}", "returned a dict" + NO_LIST),
    "bytes": ("return b'abc'", "returned a bytes" + NO_LIST),
    "a numpy number": ("import numpy; return numpy.float32(1)", "returned a float32" + NO_LIST),
    "none at all": ("return []", "mine.py:f returned 0 values for 3 responses. Return a list of 3 numbers."),
    "one too many": ("return [1] * 4", "mine.py:f returned 4 values for 3 responses. Return a list of 3 numbers."),
    "a set": ("return {1.0, 2.0, 3.0}", "returned a set, not a list with a number for each response"),
    "one list too short": ("return [[1.0]] * 3", "mine.py:f returned a list of 1 for tiny:1/0, which has 2 tokens. Return one number for each response, or one for each of its `tokens`."),
    "a matrix": ("import numpy; return numpy.ones((3, 2))", "mine.py:f returned a list of 2 for tiny:0/0, which has 1 tokens."),
    "lists in lists": ("return [[[1.0]]] * 3", "returned lists in lists for response 0."),
    "None in lists": ("return [[None]] * 3", "returned None" + NO_NUMBER),
    "numbers in quotes": ("return ['1.0'] * 3", "returned '1.0'" + NO_NUMBER),
    "tables": ("return [{'score': 1}] * 3", "returned a dict" + NO_NUMBER),
    "complex numbers": ("return [1j] * 3", "returned a complex" + NO_NUMBER),
    "a coroutine's number": ("import asyncio; return asyncio.sleep(0, 3)", "returned an int" + NO_LIST),
    "NaN": ("return [float('nan')] * 3", NOTHING),
    "infinity": ("return [float('inf'), -float('inf'), float('inf')]", NOTHING),
    "1e308": ("return [1e308] * 3", NOTHING),
    "a decimal NaN": ("from decimal import Decimal; return [Decimal('nan')] * 3", NOTHING),
    "NaN for a token": ("return [[float('nan')] * n for n in (1, 2, 3)]", NOTHING),
    "None for all": ("return [None] * 3", NOTHING),
    "10 to the 400": ("return [10 ** 400] * 3", NOTHING),
    "an error": ("raise ValueError('bad thing')", "mine.py:f failed: ValueError: bad thing (mine.py, line 2)."),
    "itself again": ("return f(responses)", "failed: RecursionError: maximum recursion depth exceeded"),
    "an exit": ("raise SystemExit(0)", "failed: SystemExit: 0 (mine.py, line 2)."),
    "a silent exit": ("import os; os._exit(0)", "mine.py:f: its process ended by itself (exit code 0). What it said is in run.log."),
    "a signal": ("import os; os.kill(os.getpid(), 9)", "mine.py:f: its process ended by itself (exit code -9)."),
    "an object that is no number": ("class X:\n        def __float__(self): raise RuntimeError('no')\n    return [X()] * 3", "mine.py:f returned a X for response 0, not a number, None or a list of numbers."),
    "never": ("import time; time.sleep(60)", LATE),
    "never, and busy": ("while True: pass", LATE),
    "without end": ("while True: yield 1.0", LATE),
}  # fmt: skip


@pytest.mark.parametrize(("body", "sentence"), RETURNS.values(), ids=RETURNS)
def test_what_a_function_returns(tmp_path, monkeypatch, body, sentence):
    timeout = 0.3 if sentence == LATE else 20.0
    assert sentence in said_of(
        tmp_path, monkeypatch, f"def f(responses):\n    {body}\n", timeout=timeout
    )


TAKES = {
    "no argument": ("def f(): return [1.0]", "mine.py:f returned 1 value for 3 responses."),
    "an argument misspelt": ("def f(response): return [1.0]", "mine.py:f asks for response, which the data do not have. Did you mean responses? Each is a list. There are prompts"),
    "a position": ("def f(responses, /): return [1.0]", "missing 1 required positional argument: 'responses'"),
    "Python's own": ("f = len", "len() takes exactly one argument (0 given)"),
}  # fmt: skip


@pytest.mark.parametrize(("source", "sentence"), TAKES.values(), ids=TAKES)
def test_what_a_function_asks_for(tmp_path, monkeypatch, source, sentence):
    assert sentence in said_of(tmp_path, monkeypatch, source + "\n")


def test_one_number_where_the_algorithm_reads_one_per_token(tmp_path, monkeypatch):
    said = said_of(tmp_path, monkeypatch, "def f(responses): return [1.0] * 3\n", per_token=True)
    assert said.startswith(
        "mine.py:f returned one number for tiny:0/0, and the algorithm reads one per token: return a list of them"
    )


F = "def f(responses): return []\n"
MODULES = {
    "an open bracket": ("def f(responses:\n    return\n", "mine.py is not Python: '(' was never closed"),
    "no indent": ("def f(responses):\nreturn 3\n", "mine.py is not Python: expected an indented block"),
    "tabs and blanks": ("def f(responses):\n\tif 1:\n        return 3\n", "mine.py is not Python: "),
    "a NUL": (b"def f(responses):\n    return '\0'\n", "mine.py is not Python: "),
    "latin-1": (b"# \xe9\n" + F.encode(), "mine.py is not Python: "),
    "nothing": ("", 'reward.function = "mine.py:f": mine.py has no f.'),
    "another name": ("def g(responses): return []\n", "mine.py has no f. It defines g."),
    "a package that is not there": ("import nosuch\n" + F, "mine.py:f cannot be used: ModuleNotFoundError: No module named 'nosuch' (mine.py, line 1)."),
    "an error": ("raise RuntimeError('at import')\n" + F, "mine.py:f cannot be used: RuntimeError: at import (mine.py, line 1)."),
    "an exit": ("import sys\nsys.exit(3)\n" + F, "mine.py:f cannot be used: SystemExit: 3 (mine.py, line 2)."),
    "a silent exit": ("import os\nos._exit(3)\n" + F, "mine.py:f: its process ended by itself (exit code 3)."),
    "a list": ("f = [1]\n", "mine.py:f cannot be used: TypeError: f is a list, not a function."),
    "deleted again": (F + "del f\n", "mine.py:f cannot be used: AttributeError: mine.py has no f."),
}  # fmt: skip


@pytest.mark.parametrize(("source", "sentence"), MODULES.values(), ids=MODULES)
def test_files_that_cannot_be_imported(tmp_path, monkeypatch, source, sentence):
    assert sentence in said_of(tmp_path, monkeypatch, source)


def test_an_import_that_never_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(functions, "START_SECONDS", 0.5)
    said = said_of(tmp_path, monkeypatch, "import time\ntime.sleep(60)\n" + F)
    assert said == "mine.py:f could not be imported within 0.5 s."


FORM = ": write file.py:name, or package.module.name."
REFERENCES = {
    "none.py:f": 'reward.function = "none.py:f": none.py: no such file.',
    "mine.py:": 'reward.function = "mine.py:"' + FORM,
    ":f": 'reward.function = ":f"' + FORM,
    "mine.py:a b": 'reward.function = "mine.py:a b"' + FORM,
    "mine.py": 'reward.function = "mine.py"' + FORM,
    "mine.py:1": 'reward.function = "mine.py:1"' + FORM,
    "brevity": 'reward.function = "brevity"' + FORM,
    "nosuch.module.f": "nosuch.module.f cannot be used: ModuleNotFoundError: No module named 'nosuch'.",
    "json.nosuch": "json.nosuch cannot be used: AttributeError: json has no nosuch.",
    "os.path": "os.path cannot be used: TypeError: path is a module, not a function.",
    "math.pi": "math.pi cannot be used: TypeError: pi is a float, not a function.",
    "json.dumps": "json.dumps asks for obj, which the data do not have.",
    "http://h/y.py:f": 'reward.function = "http://h/y.py:f": http://h/y.py: no such file.',
}


@pytest.mark.parametrize("reference", REFERENCES)
def test_references_that_name_no_function(tmp_path, monkeypatch, reference):
    assert REFERENCES[reference] in said_of(tmp_path, monkeypatch, F, reference)
