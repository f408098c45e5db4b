"""Presets by their names."""

import pytest

from quartet.algorithms.preference import PREFERENCES
from quartet.algorithms.presets import ALGORITHMS


def test_a_name_that_is_none_says_which_may_be_meant():
    with pytest.raises(KeyError, match=r"'pppo': no such name. Did you mean ppo\?"):
        ALGORITHMS["pppo"]
    with pytest.raises(KeyError, match=r"no such name. Did you mean ipo\?"):
        PREFERENCES["ippo"]
    assert ALGORITHMS.get("pppo") is None and "pppo" not in ALGORITHMS
