"""AI feedback: labels by a judge that is asked in both orders."""

import pytest

from quartet.labels.agreement import agreements
from quartet.labels.log import Label, LabelLog, read_labels
from quartet.labels.pairs import Pair
from quartet.rewards.judge import PAIR_PROMPT
from quartet.rewards.pair_judge import PairJudge
from quartet.rewards.protocol import RewardError
from quartet.rewards.remote import Endpoint
from quartet.rewards.verdicts import reconciled


@pytest.mark.parametrize(
    ("straight", "swapped", "verdict"),
    [
        (1.0, 0.0, "a"),
        (0.0, 1.0, "b"),
        (1.0, 1.0, "tie"),
        (0.0, 0.0, "tie"),
        (0.5, 0.5, "tie"),
        (1.0, 0.5, "tie"),
        (None, 0.0, "skip"),
        (1.0, None, "skip"),
    ],
)
def test_a_judge_that_changes_its_mind_with_the_order_gives_a_tie(straight, swapped, verdict):
    assert reconciled(straight, swapped) == verdict


class Longer(Endpoint):
    """A judge's address: prefers the longer answer, and the first one in prompts about order."""

    def __init__(self):
        super().__init__("judge", "http://judge")

    def ask_each(self, requests, parallel):
        for i in reversed(range(len(requests))):
            text = requests[i]["messages"][0]["content"]
            first, second = (
                text.split(f"<answer {side}>\n")[1].split("\n</answer")[0] for side in "AB"
            )
            better = "A" if "order" in text or len(first) > len(second) else "B"
            if "down" in text:
                yield i, RewardError("judge http://judge answered 500.")
                continue
            content = "no idea" if "mute" in text else f"Better: {better}"
            yield (
                i,
                {
                    "choices": [{"message": {"content": content}}],
                    "usage": {"prompt_tokens": 10, "completion_tokens": 3},
                },
            )


PAIRS = [Pair(p, "short", "a long answer") for p in ("one", "order", "mute", "down")]


def test_labels_of_a_judge_record_its_prompt_and_cost_and_agree_with_people(tmp_path):
    log = LabelLog(tmp_path / "labels.jsonl")
    judge, errors = PairJudge(Longer(), "m"), []
    for label in judge.labels(PAIRS):
        if isinstance(label, RewardError):
            errors.append(label)
        else:
            log.add(label)
    log.add(Label("1", "ann", PAIRS[0], "b", "ba"))
    log.add(Label("2", "ann", PAIRS[1], "a", "ab"))
    log.close()
    labels = {(e.labeller, e.pair.prompt): e for _, e in read_labels(log.path).labels}
    assert {prompt: e.verdict for (name, prompt), e in labels.items() if name == "judge m"} == {
        "one": "b",
        "order": "tie",
        "mute": "skip",
    }
    noted = labels["judge m", "one"].extra["judge"]
    assert (
        noted["prompt"] == PAIR_PROMPT
        and noted["calls"] == 2
        and noted["tokens"] == {"prompt": 20, "completion": 6}
    )
    assert noted["answers"] == ["Better: B", "Better: A"] and len(errors) == 1
    (both,) = agreements(list(labels.values()))
    assert (both.pairs, both.agreement) == (2, 0.5)
