"""Runs of ILQL, from a world and from a file."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from quartet.runs.doctor import examine
from quartet.runs.reader import Run
from tests.launch.test_launch import assert_alike, done, metrics
from tests.support.tiny_run import SMALL

WORDS = [
    "run",
    "sums",
    *(word for word in SMALL if not word.startswith("sft.")),
    "policy.create.max_length=32",
    "ilql.steps=4",
    "ilql.batch_size=8",
    "evaluation.best_of=0",
]


@pytest.mark.slow
def test_a_run_leaves_a_policy_of_any_beta(tmp_path):
    words = [*WORDS, "recipe=['ilql','evaluation']", "run.name=x", "ilql.lr=0.05", "ilql.beta=6"]
    code, said = done(tmp_path, *words)
    assert code == 0 and "win rate" in said, said
    [run] = tmp_path.glob("runs/*-x")
    assert metrics(tmp_path, "x")["ilql", 4].keys() >= {"q/mean", "value/mean", "loss/cql"}
    policies = {}
    for beta in ("6", "0"):
        code, said = done(tmp_path, "export", str(run), "--to", f"at-{beta}", "--beta", beta)
        assert code == 0, said
        policies[beta] = AutoModelForCausalLM.from_pretrained(tmp_path / f"at-{beta}")
    weights = {beta: policy.get_output_embeddings().weight for beta, policy in policies.items()}
    trained = AutoModelForCausalLM.from_pretrained(run / "policy").get_output_embeddings().weight
    assert torch.allclose(weights["6"], trained) and not torch.allclose(weights["0"], trained)


@pytest.mark.slow
def test_rows_of_a_file_need_a_score(tmp_path):
    rows = [{"prompt": f"{n}+1=", "completion": f"{n + 1}", "score": n / 10} for n in range(20)]
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labelled = [{k: v for k, v in row.items() if k != "score"} | {"label": True} for row in rows]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    del rows[7]["score"]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*WORDS, "recipe=['ilql']"]
    for name in ("good", "labels"):
        code, said = done(tmp_path, *words, f"ilql.data={name}.jsonl", f"run.name={name}")
        assert code == 0, said
    code, said = done(tmp_path, *words, "ilql.data=bad.jsonl")
    assert code == 2 and "bad.jsonl:8: has no number in a column score" in said, said


BROKEN = {
    "q_prefers_unseen": (-9.0, ["ilql.loss.cql=0.001"]),  # scores below 0, and Q begins at 0
    "q_diverges": (1.0, ["ilql.lr=3"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("rule", [None, *BROKEN])
def test_the_doctor_speaks_of_a_broken_q_and_is_silent_about_a_good_one(rule, tmp_path):
    sign, more = BROKEN.get(rule, (1.0, ["ilql.loss.cql=0.02"]))
    rows = [
        {"prompt": f"{n}+1=", "completion": f"{n + d}", "score": sign * (0.9 if d == 1 else 0.5)}
        for n in range(10, 60)
        for d in (1, 2)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*WORDS, "recipe=['ilql']", "ilql.data=rows.jsonl", "ilql.steps=40", "ilql.lr=0.02"]
    code, said = done(tmp_path, *words, *more, "run.name=x")
    assert code == 0, said
    [run] = tmp_path.glob("runs/*-x")
    found = {finding.rule for finding in examine(Run(run))} & set(BROKEN)
    assert rule in found if rule else not found


@pytest.mark.slow
def test_two_ranks_learn_what_one_learns(tmp_path):
    words = [*WORDS, "recipe=['ilql']"]
    for name, more in (("one", ()), ("two", ("launch.processes=2",))):
        code, said = done(tmp_path, *words, f"run.name={name}", *more)
        assert code == 0, said
    assert_alike(metrics(tmp_path, "two"), metrics(tmp_path, "one"), 2e-4)
