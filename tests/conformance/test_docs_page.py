"""The code of docs/conformance.md gives what it says."""

import re
from pathlib import Path

PAGE = Path("docs/conformance.md").read_text(encoding="utf-8")


def test_the_adapter_of_the_page_has_the_mistake_that_it_says(capsys):
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    exec(block, {"__name__": "page"})
    assert capsys.readouterr().out.splitlines() == ["kl/k3 fails", "kl/k3-far fails"]
