"""Servers that answer wrongly, partly, slowly or not at all: each fault for each source that is asked over HTTP.

A judge and a reward server that fail end the step with one sentence, or have no score; a generation server that fails is left
alone, the log says why, and another one answers.
"""

import dataclasses
import json
import logging
import re
import socket
import time

import pytest

from quartet.generation import servers
from quartet.generation.dialects import DIALECTS
from quartet.generation.protocol import Weights
from quartet.generation.sampling import Sampling
from quartet.generation.servers import ServedGenerator, ServersGone
from quartet.rewards import remote
from quartet.rewards.judge import JudgeReward
from quartet.rewards.protocol import RewardError, Weighted, rewarded, with_score
from quartet.rewards.remote import Endpoint, ServerReward
from tests.malformed.saying import readable, refusal
from tests.support.fault_server import (
    FAULTS,
    HARMLESS,
    LATE,
    MAX_BYTES,
    FaultServer,
    answers,
    says,
    silent,
)
from tests.support.world import prompts, rollout, tokenizer

pytestmark = pytest.mark.slow

PATIENT, IMPATIENT = 20.0, 0.25
"""Seconds for an answer that comes, and for one that does not."""


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(servers, "PAUSE", 0.02)
    monkeypatch.setattr(servers, "MAX_BYTES", MAX_BYTES - 8 * servers.BYTES_PER_TOKEN)


# --- rewards -------------------------------------------------------------------------------------------------------------------


PROMPTS, TOKENIZER = prompts(3), tokenizer()
ROLLOUTS = [rollout(prompt, (5, 6), 0.0, i, i) for i, prompt in enumerate(PROMPTS)]


def server_reward(endpoint, folder):
    return ServerReward("source", endpoint)


def openrlhf_reward(endpoint, folder):
    return ServerReward("source", endpoint, "openrlhf")


def judge(endpoint, folder):
    return JudgeReward("source", endpoint, "m", "score", None, folder / "cache.jsonl", parallel=3)


def verdict(content, **more):
    return {"choices": [{"message": {"content": content}} | more]}


REWARDS = {
    "reward server": (server_reward, {"scores": [7, 7, 7]}),
    "OpenRLHF's": (openrlhf_reward, {"rewards": [7, 7, 7], "extra_logs": {}}),
    "judge": (judge, verdict("Score: 7")),
}


# Faults below the JSON are the client's, which all share: the long suite tries them on the other two as well.
FEWER_REWARDS = [
    pytest.param(*REWARDS[name], marks=[pytest.mark.long] * (name == "OpenRLHF's"))
    for name in REWARDS
]
FEWER_KINDS = pytest.mark.parametrize(
    "kind", ["vllm", pytest.param("sglang", marks=pytest.mark.long)]
)


class Asked:
    """A reward with its endpoint, closed behind the test."""

    def __init__(self, make, url, folder, timeout=PATIENT, tries=2):
        self.endpoint = Endpoint("server", url, timeout=timeout, tries=tries, max_bytes=MAX_BYTES)
        self.reward = make(self.endpoint, folder)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.endpoint.close()

    def scores(self):
        return self.reward.score(ROLLOUTS)

    def step(self):
        return [r.score for r in with_score(rewarded(ROLLOUTS, [Weighted(self.reward)]))]


@pytest.mark.parametrize(("make", "good"), FEWER_REWARDS, ids=REWARDS)
@pytest.mark.parametrize(("fault", "sentence"), FAULTS.values(), ids=FAULTS)
def test_a_fault_ends_a_step_with_one_sentence(tmp_path, make, good, fault, sentence):
    limit = IMPATIENT if sentence == LATE else PATIENT
    with FaultServer(fault(good)) as server, Asked(make, server.url, tmp_path, limit) as asked:
        begun = time.monotonic()
        said = refusal(RewardError, asked.step)
        assert time.monotonic() - begun < 15
    assert re.search(sentence, said) and server.url in said
    assert not (tmp_path / "cache.jsonl").exists(), "nothing of a fault is cached"


@pytest.mark.parametrize(("make", "good"), REWARDS.values(), ids=REWARDS)
@pytest.mark.parametrize("answer", HARMLESS.values(), ids=HARMLESS)
def test_what_is_odd_and_right_is_read(tmp_path, make, good, answer):
    answer = answer(good)
    if isinstance(answer, list):
        answer = (
            answer[:-1] * (3 if make is judge else 1) + answer[-1:]
        )  # a judge is asked thrice at once
    with FaultServer(answer) as server, Asked(make, server.url, tmp_path, tries=4) as asked:
        assert asked.step() == [7, 7, 7]
        assert asked.step() == [7, 7, 7]
    assert not any("cookie:" in head.lower() for _, head, _ in server.requests), (
        "cookies are not kept"
    )


@pytest.mark.parametrize(("make", "good"), REWARDS.values(), ids=REWARDS)
def test_a_redirect_is_never_followed(tmp_path, make, good):
    with FaultServer(says(good)) as other:
        with FaultServer(answers(307, b"", f"location: {other.url}/")) as server:
            with Asked(make, server.url, tmp_path) as asked:
                assert "answered 307" in refusal(RewardError, asked.step)
    assert server.requests and not other.requests


@pytest.mark.parametrize(("make", "good"), REWARDS.values(), ids=REWARDS)
def test_nobody_listens(tmp_path, make, good):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with Asked(make, f"http://127.0.0.1:{free.getsockname()[1]}/", tmp_path, tries=1) as asked:
            said = refusal(RewardError, asked.step)
    assert said.endswith("cannot be reached (Connection refused) (1 try).")


@pytest.mark.parametrize(("make", "good"), REWARDS.values(), ids=REWARDS)
def test_a_name_that_nobody_has(tmp_path, make, good):
    with Asked(make, "http://nobody.invalid/", tmp_path, tries=1) as asked:
        assert "cannot be reached (" in refusal(RewardError, asked.step)


def test_tls_where_there_is_none(tmp_path):
    """What is said depends on who loses patience first; that it ends does not."""
    with FaultServer(says({"scores": [1, 2, 3]})) as server:
        with Asked(
            server_reward, server.url.replace("http", "https"), tmp_path, IMPATIENT
        ) as asked:
            assert re.search("cannot be reached|did not answer", refusal(RewardError, asked.step))


@pytest.mark.parametrize("value", [None, ""], ids=["not set", "empty"])
def test_a_token_that_is_not_there(monkeypatch, value):
    if value is not None:
        monkeypatch.setenv("NO_TOKEN", value)
    said = refusal(
        RewardError, lambda: Endpoint("judge", "http://127.0.0.1:1/", token_env="NO_TOKEN")
    )
    assert (
        said == 'reward.token_env = "NO_TOKEN": no such environment variable. Set it to the token.'
    )


@pytest.mark.parametrize("value", ["s3cret ", "s3 cret", "s3cret\n", "s3crét"])
def test_a_token_that_cannot_be_sent_is_not_shown(monkeypatch, value):
    monkeypatch.setenv("BAD_TOKEN", value)
    said = refusal(
        RewardError, lambda: Endpoint("judge", "http://127.0.0.1:1/", token_env="BAD_TOKEN")
    )
    assert "holds letters that no token has" in said and "s3" not in said


SCORES = {
    "null": (b"null", "without a list"),
    "a text": (b'"777"', "without a list"),
    "an object": (b'{"0": 7}', "without a list"),
    "true": (b"true", "without a list"),
    "too few": (b"[7]", "returned 1 value for 3 responses."),
    "none": (b"[]", "returned 0 values for 3 responses."),
    "too many": (b"[7, 7, 7, 7]", "returned 4 values for 3 responses."),
    "texts": (b'["7", 7, 7]', "returned '7' for response 0, not a number or null."),
    "lists": (b"[[7], [7], [7]]", r"returned \[7\] for response 0, not a number or null."),
    "nested": (b"[7, " + b"[" * 90 + b"]" * 90 + b", 7]", r"returned \[\[\[.* for response 1, not a number or null."),
    "objects": (b'[7, {"score": 7}, 7]', "for response 1, not a number or null."),
    "a long text": (b'["' + b"x" * 50_000 + b'", 7, 7]', "returned 'x+ … for response 0, not a number or null."),
    "half a surrogate pair": (rb'["\ud800", 7, 7]', "for response 0, not a number or null."),
    "false": (b"[7, 7, false]", "returned False for response 2, not a number or null."),
    "nulls": (b"[null, null, null]", "none of 3 responses has a score from source"),
    "NaN": (b"[NaN, NaN, NaN]", "none of 3 responses has a score from source"),
    "infinities": (b"[Infinity, -Infinity, Infinity]", "none of 3 responses has a score from source"),
    "1e308": (b"[1e308, -1e308, 1e308]", "none of 3 responses has a score from source"),
    "1e309": (b"[1e309, -1e309, 1e309]", "none of 3 responses has a score from source"),
    "400 digits": (b", ".join([b"9" * 400] * 3).join([b"[", b"]"]), "none of 3 responses has a score from source"),
    "5,000 digits": (b", ".join([b"-" + b"9" * 5000] * 3).join([b"[", b"]"]), "none of 3 responses has a score from source"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("make", "key"),
    [(server_reward, b"scores"), (openrlhf_reward, b"rewards")],
    ids=["quartet", "openrlhf"],
)
@pytest.mark.parametrize(("value", "sentence"), SCORES.values(), ids=SCORES)
def test_scores_that_are_none_are_never_zero(tmp_path, make, key, value, sentence):
    body = b'{"' + key + b'": ' + value + b"}"
    with FaultServer(answers(200, body)) as server, Asked(make, server.url, tmp_path) as asked:
        assert re.search(sentence, refusal(RewardError, asked.step))


@pytest.mark.parametrize("key", ["scores", "rewards"])
def test_scores_beside_missing_ones_stay(tmp_path, key):
    body = f'{{"{key}": [1.5, null, NaN]}}'.encode()
    make = server_reward if key == "scores" else openrlhf_reward
    with FaultServer(answers(200, body)) as server, Asked(make, server.url, tmp_path) as asked:
        scored = rewarded(ROLLOUTS, [Weighted(asked.reward)])
    assert [r.score for r in scored] == [1.5, None, None]


def test_what_json_has_no_word_for_is_refused_before_it_is_sent(tmp_path):
    with (
        FaultServer(says({"scores": [7]})) as server,
        Asked(server_reward, server.url, tmp_path) as asked,
    ):

        def priced(price):
            return [rollout(dataclasses.replace(PROMPTS[0], extra={"price": price}), (5, 6), 0.0)]

        said = refusal(RewardError, lambda: asked.reward.score(priced(float("nan"))))
        assert "the request is no JSON" in said
        assert asked.reward.score(priced("half a pair: \ud800")) == [7]
    assert len(server.requests) == 1
    assert json.loads(server.requests[0][2])["columns"] == {"price": ["half a pair: \ud800"]}


NO_CONTENT = "answered without choices[0].message.content."
CONTENTS = {
    "no choices": ({"choices": []}, NO_CONTENT),
    "null for choices": ({"choices": None}, NO_CONTENT),
    "a number for choices": ({"choices": 5}, NO_CONTENT),
    "a text for choices": ({"choices": "Score: 7"}, NO_CONTENT),
    "an object for choices": ({"choices": {"message": {"content": "Score: 7"}}}, NO_CONTENT),
    "null for a choice": ({"choices": [None]}, NO_CONTENT),
    "a list for a choice": ({"choices": [[{"message": {"content": "Score: 7"}}]]}, NO_CONTENT),
    "null for a message": ({"choices": [{"message": None}]}, NO_CONTENT),
    "a text for a message": ({"choices": [{"message": "Score: 7"}]}, NO_CONTENT),
    "no content": ({"choices": [{"message": {}}]}, NO_CONTENT),
    "null": (verdict(None), "answered with null for choices[0].message.content, not a text."),
    "a number": (verdict(7), "answered with 7 for choices[0].message.content, not a text."),
    "true": (verdict(True), "answered with true for choices[0].message.content, not a text."),
    "a list": (verdict(["Score: 7"]), 'answered with ["Score: 7"] for choices[0].message.content'),
    "parts": (verdict([{"type": "text", "text": "Score: 7"}]), "for choices[0].message.content, not a text."),
    "an object": (verdict({"text": "Score: 7"}), "for choices[0].message.content, not a text."),
    "an empty text": (verdict(""), "answered with an empty text."),
    "spaces": (verdict(" \n "), "answered with an empty text."),
    "a text that was cut off": (verdict("Score: 7", finish_reason="length"), 'was cut off before its end (finish_reason "length").'),
    "a text that was filtered": (verdict("Score: 7", finish_reason="content_filter"), "was cut off before its end"),
}  # fmt: skip


@pytest.mark.parametrize(("table", "sentence"), CONTENTS.values(), ids=CONTENTS)
def test_a_judge_that_says_no_text_is_an_error_and_nothing_is_cached(tmp_path, table, sentence):
    with FaultServer(says(table)) as server, Asked(judge, server.url, tmp_path) as asked:
        assert sentence in readable(refusal(RewardError, asked.step))
        assert not (tmp_path / "cache.jsonl").exists()
    with (
        FaultServer(says(verdict("Score: 7"))) as server,
        Asked(judge, server.url, tmp_path) as asked,
    ):
        assert asked.step() == [7, 7, 7], "a resumed run asks again"


def test_half_a_surrogate_pair_in_a_judges_text_is_written_as_its_escape(tmp_path):
    with (
        FaultServer(says(verdict("a \ud800 b\nScore: 7"))) as server,
        Asked(judge, server.url, tmp_path) as asked,
    ):
        assert asked.step() == [7, 7, 7]
    cached = [
        json.loads(line)["text"]
        for line in (tmp_path / "cache.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert cached == ["a \\ud800 b\nScore: 7"] * 3


# --- generation ----------------------------------------------------------------------------------------------------------------

VOCAB, END = len(TOKENIZER), TOKENIZER.eos_token_id
TOKENS, LOGPROBS = [5, 6, END], [-1.0, -0.5, 0.0]
SPANS = [{"version": "0", "start": 0, "end": 3}]
HEALTHY = ("/health", "/pause", "/resume", "/collective_rpc", "/update_weight_version", "/pause_generation", "/continue_generation", "/update_weights_from_disk")  # fmt: skip


def reply(kind, ids=TOKENS, logprobs=LOGPROBS, spans=SPANS, finish="stop"):
    """An answer as vLLM or SGLang gives it."""
    if kind == "vllm":
        content = (
            [{"logprob": logprob} for logprob in logprobs]
            if isinstance(logprobs, list)
            else logprobs
        )
        return {
            "choices": [
                {
                    "token_ids": ids,
                    "logprobs": {"content": content},
                    "weight_versions": spans,
                    "finish_reason": finish,
                }
            ]
        }
    listed = isinstance(logprobs, list) and isinstance(ids, list)
    rows = (
        [[logprob, token, None] for logprob, token in zip(logprobs, ids, strict=False)]
        if listed
        else 5
    )
    meta = {
        "output_token_logprobs": rows,
        "weight_version": "0",
        "weight_versions": spans,
        "finish_reason": {"type": finish},
    }
    return {"meta_info": meta}


class Generation:
    """A generator with a server that has a fault, and one that has none."""

    def __init__(self, kind, fault, folder, timeout=PATIENT, alone=False):
        self.bad = FaultServer(fault, HEALTHY)
        self.good = FaultServer(says(reply(kind)), HEALTHY)
        self.kind, self.folder, self.timeout, self.alone = kind, folder, timeout, alone

    def __enter__(self):
        self.bad.__enter__(), self.good.__enter__()
        urls = [self.bad.url] if self.alone else [self.bad.url, self.good.url]
        write = lambda place, tensors: place.mkdir(parents=True)  # noqa: E731
        self.generator = ServedGenerator(
            DIALECTS[self.kind],
            urls,
            write,
            self.folder,
            TOKENIZER,
            frozenset({END}),
            0,
            self.timeout,
            4,
            vocab_size=VOCAB,
        )
        self.generator.load_weights(Weights(0, {}))
        return self

    def __exit__(self, *_):
        self.generator.close()
        self.bad.__exit__(), self.good.__exit__()

    def tokens(self):
        return [
            r.response_ids for r in self.generator.generate(PROMPTS[:1], Sampling(max_new_tokens=8))
        ]


KINDS = pytest.mark.parametrize("kind", ["vllm", "sglang"])


@FEWER_KINDS
@pytest.mark.parametrize(("fault", "sentence"), FAULTS.values(), ids=FAULTS)
def test_a_fault_of_a_generation_server_is_logged_and_another_server_answers(
    tmp_path, caplog, kind, fault, sentence
):
    limit = 2 * IMPATIENT if sentence == LATE else PATIENT
    with Generation(kind, fault(reply(kind)), tmp_path, limit) as generation:
        begun = time.monotonic()
        assert generation.tokens() == [tuple(TOKENS)]
        assert time.monotonic() - begun < 15
    assert (
        re.search(sentence, readable(caplog.messages[0]))
        and generation.bad.url in caplog.messages[0]
    )
    assert generation.bad.requests, "the server with the fault was asked"


@KINDS
@pytest.mark.parametrize("answer", HARMLESS.values(), ids=HARMLESS)
def test_what_is_odd_and_right_is_read_of_generation_servers(tmp_path, kind, answer):
    with Generation(kind, answer(reply(kind)), tmp_path, alone=True) as generation:
        assert generation.tokens() == [tuple(TOKENS)]


@KINDS
def test_alone_a_server_with_a_fault_ends_the_run_with_its_reason(tmp_path, kind):
    with Generation(
        kind, answers(500, b"<html>boom</html>"), tmp_path, 0.3, alone=True
    ) as generation:
        said = refusal(ServersGone, generation.tokens)
    assert (
        said.startswith("no generation server answered for 0.3 s (")
        and "answered 500: <html>boom</html>" in said
    )


PIECES = {
    "null for ids": {"ids": None},
    "a text for ids": {"ids": "567"},
    "a text among ids": {"ids": [5, "6", END]},
    "a float among ids": {"ids": [5, 6.7, END]},
    "true among ids": {"ids": [5, True, END]},
    "null among ids": {"ids": [5, None, END]},
    "an id below zero": {"ids": [5, -1, END]},
    "an id beyond the vocabulary": {"ids": [5, VOCAB, END]},
    "an id of 20 digits": {"ids": [5, 10**20, END]},
    "null for log-probs": {"logprobs": None},
    "a text among log-probs": {"logprobs": [-1.0, "-0.5", 0.0]},
    "null among log-probs": {"logprobs": [-1.0, None, 0.0]},
    "true among log-probs": {"logprobs": [-1.0, False, 0.0]},
    "a list among log-probs": {"logprobs": [-1.0, [-0.5], 0.0]},
    "NaN among log-probs": {"logprobs": [-1.0, float("nan"), 0.0]},
    "minus infinity among log-probs": {"logprobs": [-1.0, float("-inf"), 0.0]},
    "-1e309 among log-probs": {"logprobs": [-1.0, -(10**309), 0.0]},
    "a probability above 1": {"logprobs": [-1.0, 0.5, 0.0]},
    "no tokens": {"ids": [], "logprobs": [], "spans": []},
    "too many tokens": {"ids": [5] * 9, "logprobs": [-1.0] * 9, "spans": [{"version": "0", "start": 0, "end": 9}], "finish": "length"},
    "too few tokens": {"ids": [5] * 7, "logprobs": [-1.0] * 7, "spans": [{"version": "0", "start": 0, "end": 7}], "finish": "length"},
    "an unknown end": {"finish": "tool_calls"},
    "null as end": {"finish": None},
    "a list as end": {"finish": ["stop"]},
    "a text for versions": {"spans": "0"},
    "a number for versions": {"spans": 5},
    "versions of fewer tokens": {"spans": [{"version": "0", "start": 0, "end": 2}]},
    "versions of more tokens": {"spans": [{"version": "0", "start": 0, "end": 4}]},
    "versions of 10¹² tokens": {"spans": [{"version": "0", "start": 0, "end": 10**12}]},
    "versions that overlap": {"spans": [{"version": "0", "start": 0, "end": 2}, {"version": "0", "start": 1, "end": 2}]},
    "versions with a gap": {"spans": [{"version": "0", "start": 1, "end": 3}, {"version": "0", "start": 3, "end": 4}]},
    "versions backwards": {"spans": [{"version": "0", "start": 3, "end": 0}]},
    "versions at fractions": {"spans": [{"version": "0", "start": 0.0, "end": 3.0}]},
    "a version that is a name": {"spans": [{"version": "default", "start": 0, "end": 3}]},
    "a version below zero": {"spans": [{"version": "-1", "start": 0, "end": 3}]},
    "a version to come": {"spans": [{"version": "1", "start": 0, "end": 3}]},
    "a version of 5,000 digits": {"spans": [{"version": "9" * 5000, "start": 0, "end": 3}]},
    "a span without a version": {"spans": [{"start": 0, "end": 3}]},
    "a number as span": {"spans": [5]},
}  # fmt: skip


@KINDS
@pytest.mark.parametrize("fields", PIECES.values(), ids=PIECES)
def test_an_answer_that_cannot_be_trained_on_is_never_taken(tmp_path, caplog, kind, fields):
    with Generation(kind, says(reply(kind, **fields)), tmp_path) as generation:
        assert generation.tokens() == [tuple(TOKENS)]
    assert "is left alone until it answers again" in readable(caplog.messages[0])
    assert generation.bad.requests, "the server with the fault was asked"


@KINDS
def test_a_server_that_aborts_every_answer_does_not_hold_a_run_for_ever(tmp_path, kind):
    aborted = reply(kind, [], [], [], "abort")
    with Generation(kind, says(aborted), tmp_path, 1.5, alone=True) as generation:
        said = refusal(ServersGone, generation.tokens)
    assert "aborted every request before its first token" in said


@KINDS
def test_a_server_that_refuses_weights_is_not_asked_for_answers(tmp_path, caplog, kind):
    """Also one that does so with status 200."""
    caplog.set_level(logging.WARNING)
    with (
        FaultServer(says({"success": False, "message": "no such folder"})) as bad,
        FaultServer(says(reply(kind)), HEALTHY) as good,
    ):
        write = lambda place, tensors: place.mkdir(parents=True)  # noqa: E731
        generator = ServedGenerator(
            DIALECTS[kind],
            [bad.url, good.url],
            write,
            tmp_path,
            TOKENIZER,
            frozenset({END}),
            0,
            PATIENT,
            4,
        )
        generator.load_weights(Weights(0, {}))
        assert [
            r.response_ids for r in generator.generate(PROMPTS[:1], Sampling(max_new_tokens=8))
        ] == [tuple(TOKENS)]
        generator.close()
    assert "refused: " in caplog.messages[0] and "no such folder" in caplog.messages[0]
    assert not any(path.startswith(("/inference", "/generate")) for path, _, _ in bad.requests)


@KINDS
def test_an_interrupted_generation_waits_for_no_server(tmp_path, monkeypatch, kind):
    """What a signal raises in the main thread ends the requests and the threads that wait for them."""

    class Stop(BaseException):
        pass

    def stop(*_):
        raise Stop

    with Generation(kind, silent, tmp_path, alone=True) as generation:
        monkeypatch.setattr(servers.ServedGenerator, "_rollout", stop)
        submit = generation.generator.pool.submit

        def first_is_ready(
            work, *args
        ):  # so that the caller is interrupted while the others are on their way
            return submit(lambda: None) if not generation.bad.requests else submit(work, *args)

        monkeypatch.setattr(generation.generator.pool, "submit", first_is_ready)
        begun = time.monotonic()
        with pytest.raises(Stop):
            generation.generator.generate(PROMPTS, Sampling(max_new_tokens=8))
        generation.generator.pool.shutdown()
        assert time.monotonic() - begun < 10
