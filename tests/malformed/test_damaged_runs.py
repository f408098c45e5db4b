"""Run folders that are damaged, or made to harm their readers: each reader answers, says what it could not read, and shows the
other runs."""

import pytest

from tests.malformed.damages import EVALUATION, GONE, RECORD, SECRET, SETTINGS, STEP, TOKENS
from tests.malformed.reading_runs import Readers


@pytest.fixture(scope="module")
def readers(ppo_run, tmp_path_factory):
    return Readers(ppo_run.path, tmp_path_factory.mktemp("readers"))


def survives(readers, change, sentence, pages, data=()):
    change(readers.restore())
    problems, shown = readers.methods(), readers.pages(pages)
    readers.data(data)
    assert sentence.removeprefix(STEP) in problems and sentence in shown
    assert SECRET not in problems + shown + readers.listed()


def test_a_run_that_is_whole_has_no_problems(readers):
    readers.restore()
    assert readers.methods(figures=True) == ""
    assert "could not be read" not in readers.pages() + readers.listed() + readers.verbs()
    readers.data()


@pytest.mark.parametrize(("change", "sentence"), RECORD.values(), ids=RECORD)
def test_a_record_that_is_damaged(readers, change, sentence):
    survives(readers, change, sentence, ("",), ("overview",))


@pytest.mark.parametrize(("change", "sentence"), SETTINGS.values(), ids=SETTINGS)
def test_a_config_that_is_damaged(readers, change, sentence):
    survives(readers, change, sentence, ("", "config", "tokens?step=1&sample=0"))


@pytest.mark.parametrize(("change", "sentence"), EVALUATION.values(), ids=EVALUATION)
def test_an_evaluation_that_is_damaged(readers, change, sentence):
    survives(readers, change, sentence, ("frontier", "answers", "reward-model"))


@pytest.mark.parametrize(("change", "sentence"), TOKENS.values(), ids=TOKENS)
def test_rollouts_that_are_damaged(readers, change, sentence):
    survives(readers, change, sentence, ("samples?step=1", "tokens?step=1&sample=0"), ("sample?step=1&sample=0",))


@pytest.mark.parametrize(("change", "sentence"), GONE.values(), ids=GONE)
def test_a_record_that_cannot_be_opened(readers, change, sentence):
    """The run is listed with the reason; what is asked of it is refused with the reason."""
    change(readers.restore())
    for text in (readers.listed(), readers.pages(("",)), readers.methods(), readers.verbs()):
        assert sentence in text
    readers.data()
    readers.comparison()
