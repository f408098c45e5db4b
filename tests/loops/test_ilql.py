"""The loop and the stage of ILQL in the tiny world."""

import dataclasses

import pytest
import torch

from quartet.algorithms.ilql import Ilql
from quartet.data.records import Demonstration
from quartet.loops.ilql import IlqlLearner, discounted, num_tokens
from quartet.models.q_heads import QHeads
from quartet.stages.ilql import IlqlStage
from quartet.training.optim import Optimizer, OptimizerConfig
from quartet.training.state_tree import join_tensors, split_tensors
from tests.support.world import model, prompts, tokenizer

GOOD, BAD, END = 9, 10, 1
LOSS = Ilql(gamma=0.9, cql=0.01, polyak=0.1)


def rows():
    """To each prompt a good answer with score 1 and three bad ones with 0."""
    return [
        Demonstration(f"{p.id}/{n}", p.ids, (token, END), score=float(token == GOOD))
        for p in prompts(8)
        for n, token in enumerate((GOOD, BAD, BAD, BAD))
    ]


def optimizer_of(made, heads, steps=30, lr=1e-2):
    parameters = [*made.parameters(), *heads.parameters()]
    return Optimizer(parameters, OptimizerConfig(lr=lr, schedule="constant"), steps)


def stage(steps=30, tokens=4096, loss=LOSS, beta=8.0):
    return IlqlStage(
        rows=rows(),
        held_out=rows()[:4],
        tokenizer=tokenizer(),
        load_policy=lambda _: model(),
        loss=loss,
        beta=beta,
        optimizer=lambda made, heads: optimizer_of(made, heads, steps),
        num_steps=steps,
        batch_size=16,
        micro_batch_tokens=tokens,
        seed=0,
    )


def learner():
    made = model()
    heads = QHeads(made)
    with torch.no_grad():
        rng = torch.Generator().manual_seed(1)
        for parameter in (heads.q.weight, heads.target, heads.value.linear.weight):
            parameter.normal_(0, 0.3, generator=rng)
    return IlqlLearner(made, heads, LOSS)


def test_a_reward_is_at_the_last_token_that_is_learnt_from():
    batch = [
        Demonstration("a", (4, 5), (6, 7, 8), score=2.0),
        Demonstration("b", (4,), (5, 6, 7, 8), (True, False, True, False), score=-1.0),
    ]
    made = learner()
    values = made.action_values(batch)
    assert values.rows.tolist() == [0, 0, 0, 1, 1] and num_tokens(batch) == 5
    assert values.rewards.tolist() == [0, 0, 2, 0, -1]
    assert discounted(values, 0.5).tolist() == [0.5, 1, 2, -0.5, -1]
    # One row alone has the same numbers: nothing of a row depends on the others.
    alone = made.action_values(batch[1:])
    for name in ("logprobs", "q", "target_q", "q_logprobs", "values"):
        assert torch.allclose(getattr(values, name)[3:], getattr(alone, name), atol=1e-5)
    # V before a token and Q of it are read from the text before it.
    other = dataclasses.replace(batch[0], response_ids=(6, 7, 9))
    changed = made.action_values([other])
    assert torch.allclose(changed.values, values.values[:3], atol=1e-5)
    assert torch.allclose(changed.q[:2], values.q[:2], atol=1e-5)


def test_micro_batches_do_not_change_it():
    gradients = []
    for tokens in (4096, 8):
        made = learner()
        parameters = [*made.model.parameters(), *made.heads.parameters()]
        for loss in made._losses(rows(), tokens, []):
            loss.backward()
        gradients.append([p.grad for p in parameters])
    for whole, small in zip(*gradients, strict=True):
        assert torch.allclose(whole, small, atol=1e-6)


def test_metrics_are_those_of_all_tokens():
    made = learner()
    values = made.action_values(rows())
    terms = LOSS(values)
    metrics = made.step(rows(), optimizer_of(made.model, made.heads), 16)
    for name, term in terms.items():
        assert metrics[f"loss/{name}"] == pytest.approx(term.mean().item(), abs=1e-5)
    returns = discounted(values, 0.9)
    errors = returns - values.q
    explained = 1 - errors.var(correction=0) / returns.var(correction=0)
    assert metrics["q/explained_variance"] == pytest.approx(explained.item(), abs=1e-4)
    assert metrics["loss"] == pytest.approx(sum(t.mean().item() for t in terms.values()), abs=1e-5)


def test_it_learns_which_answers_are_good(tmp_path):
    (tmp_path / "a").mkdir()
    run = stage().begin(tmp_path / "a")
    steps = list(run.steps(0))
    summary = run.finish()
    assert steps[-1].metrics["q/explained_variance"] > 0.9 and summary["held_out_loss"] > 0
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "policy").eval()
    with torch.no_grad():
        p = [
            policy(input_ids=torch.tensor([prompt.ids])).logits[0, -1].softmax(-1)
            for prompt in prompts(8)
        ]
    # The data have it in a quarter of the answers; β 8 makes the odds e⁸ times as large.
    assert min(float(each[GOOD]) for each in p) > 0.95


def test_a_stage_that_goes_on_is_the_one_that_did_not_stop(tmp_path):
    whole, first, second = (stage(steps=6).begin(tmp_path) for _ in range(3))
    metrics = [step.metrics for step in whole.steps(0)]
    steps = first.steps(0)
    for _ in range(3):
        next(steps)
    tree, tensors = split_tensors({name: each.state() for name, each in first.stateful.items()})
    saved = join_tensors(tree, {name: tensor.clone() for name, tensor in tensors.items()})
    for name, each in second.stateful.items():
        each.load_state(saved[name])
    assert [step.metrics for step in second.steps(3)] == metrics[3:]
    for name in ("optimizer", "heads"):
        _, ours = split_tensors(second.stateful[name].state())
        _, theirs = split_tensors(whole.stateful[name].state())
        assert all(bool((ours[key] == theirs[key]).all()) for key in theirs)
