"""Objects in the place of folders and files: runs, models, tokenizers, rows, functions."""

import json
import os
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, LlamaForCausalLM
from typer.testing import CliRunner

import quartet
from quartet.api.inputs import inputs_of
from quartet.cli import app
from quartet.rewards.objects import check_reads_ids
from quartet.rewards.protocol import RewardError
from tests.support import world

PROMPTS = ["the film was", "a story is", "the end was", "the music is"] * 2
SMALL = {"rollout": {"prompts_per_step": 4, "max_new_tokens": 4}, "steps": 1}


def two(responses, **_):
    """Has `**_`, as the functions in the docs have it: every argument that there is."""
    return [2.0 for _ in responses]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    policy, tokenizer = world.model(), world.tokenizer()
    root = tmp_path_factory.mktemp("runs")
    given = {"policy": policy, "tokenizer": tokenizer, "prompts": PROMPTS, "reward": two}
    return quartet.train("grpo", **given, folder=root, **samples(2)).finish(progress=False)


def samples(count):
    return {**SMALL, "rollout": {**SMALL["rollout"], "samples_per_prompt": count}}


def test_a_run_is_a_path(run):
    assert os.fspath(run) == str(run.folder)
    assert quartet.Run(run).name == run.folder.name
    assert quartet.train(resume=run, reward=two).folder == run.folder.resolve()


def test_a_run_whose_policy_is_trained_on_is_that_of_its_last_stage(run, tmp_path):
    for given in (run, run.folder, str(run.folder)):
        inputs = inputs_of("ppo", {"policy": given, "folder": tmp_path}, {})
        assert inputs.table["policy"] == {"model": str(run.folder / "policy")}


@pytest.mark.slow
def test_a_run_is_compared_with_another_policy(run, tmp_path):
    same = (run.policy, run.tokenizer)
    given = {"data": PROMPTS, "reward": two, "folder": tmp_path}
    for policy in (run, run.folder):
        result = quartet.evaluate(policy, same, **given, rollout={"max_new_tokens": 4})
        summary = result.summaries["evaluation"]
        assert summary["kl"]["mean"] == pytest.approx(0, abs=1e-5)
        assert summary["win_rate"]["mean"] == 0.5 and summary["after"]["reward"] == 2.0


def test_a_policy_that_is_not_there_is_said_before_the_other_has_answered(run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(quartet.QuartetError, match=r"empty: has no config.json"):
        quartet.evaluate(
            tmp_path / "empty",
            run,
            data=PROMPTS,
            reward=two,
            folder=tmp_path,
            rollout={"max_new_tokens": 4},
        )
    assert not list(tmp_path.glob("[0-9]*"))


def test_functions_are_measures_and_rows_are_sets(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def two(responses, **_):\n    return [2.0 for _ in responses]\n")
    form = {"on": {"mine": PROMPTS}, "max_new_tokens": 4}
    objects = [quartet.TextReward("three", lambda prompt, response: 3.0)]
    measures = [two, *objects, "function:mine.py:two"]
    with pytest.raises(quartet.QuartetError, match=r"measures: two are called two\. Add name ="):
        quartet.evaluate(run, **form, measures=measures)
    measures[2] = {"type": "function", "function": "mine.py:two", "name": "in_a_file"}
    result = quartet.evaluate(run, **form, measures=measures)
    values = {cell["measure"]: cell["value"] for cell in result["cells"]}
    assert values["two"] == values["in_a_file"] == 2.0 and values["three"] == 3.0
    assert quartet.evaluate(run, **form, measures=two)["path"] != result["path"]
    assert json.loads(result["path"].read_text())["sets"][0]["name"] == "mine"


REFUSED = {
    "a model": (lambda run: {"policy": run.policy, "on": "x"}, "save.model, tokenizer, folder."),
    "rows": (lambda run: {"policy": run, "on": [{"prompt": "a"}]}, "a dict is no file. Give rows"),
    "no measure": (lambda run: {"policy": run, "on": "x.jsonl"}, "Add measures: accuracy"),
    "a class": (
        lambda run: {"policy": run, "on": "x.jsonl", "measures": quartet.TextReward},
        "measures TextReward: is no function",
    ),
    "a reward model": (
        lambda run: {"policy": run, "on": "x.jsonl", "measures": run.policy},
        "is no function. Name the folder",
    ),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_is_no_policy_set_or_measure_is_one_sentence(case, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.jsonl").write_text('{"prompt": "a"}\n')
    arguments, sentence = REFUSED[case]
    with pytest.raises(quartet.QuartetError, match=sentence):
        quartet.evaluate(**arguments(run))


def frozen():
    policy = world.model()
    policy.model.embed_tokens.requires_grad_(False)
    return policy


def adapted():
    return get_peft_model(world.model(), LoraConfig(r=2, target_modules=["q_proj"]))


def of_a_class_of_its_own():
    class Louder(LlamaForCausalLM):
        """Has logits of its own, which no folder can hold."""

    return Louder(world.model().config)


def of_another_activation():
    model = world.model()
    model.model.layers[0].mlp.act_fn = torch.nn.ReLU()
    return model


def without_a_norm():
    model = world.model()
    del model.model.norm
    return model


def hooked(name, register):
    def doubled(_module, inputs, *_output):
        return inputs

    model = world.model()
    getattr(model.get_submodule(name), register)(doubled)
    return model


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # of PEFT
@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        (of_another_activation, r"layers\.0\.mlp\.act_fn is a ReLU, where .* has a SiLU"),
        (without_a_norm, r"model\.norm is not there, where .* has a LlamaRMSNorm"),
        (
            lambda: hooked("model.layers.0.mlp", "register_forward_hook"),
            r"policy: model\.layers\.0\.mlp has the hook doubled, which the run would not call",
        ),
        (
            lambda: hooked("", "register_forward_pre_hook"),
            r"policy: LlamaForCausalLM has the hook doubled",
        ),
        (
            lambda: hooked("lm_head", "register_full_backward_hook"),
            r"policy: lm_head has the hook doubled",
        ),
        (of_a_class_of_its_own, r"a Louder\. A run reads .* as a LlamaForCausalLM, without code"),
        (lambda: world.model().model, r"Give a LlamaForCausalLM\."),
        (frozen, r"policy: model\.embed_tokens\.weight has requires_grad = False"),
        (adapted, r"policy: a model with an adapter of PEFT"),
        (lambda: type(world.model()), "policy: LlamaForCausalLM is a class"),
        (lambda: world.model().state_dict(), "policy: a state dict, which is weights without a"),
    ],
)
def test_a_model_whose_training_would_not_be_the_one_that_is_meant_is_refused(
    policy, sentence, tmp_path
):
    given = {"policy": policy(), "tokenizer": world.tokenizer(), "prompts": PROMPTS}
    with pytest.raises(quartet.QuartetError, match=sentence):
        quartet.train("ppo", **given, reward=two, folder=tmp_path, steps=1)
    assert list(tmp_path.iterdir()) == []


def test_hooks_of_transformers_itself_are_no_users_hooks(tmp_path):
    policy = world.model()
    ids = torch.tensor([[5, 6, 7]])
    policy(input_ids=ids, output_hidden_states=True)
    assert any(module._forward_hooks for module in policy.modules())
    given = {"policy": policy, "tokenizer": world.tokenizer(), "prompts": PROMPTS}
    inputs_of("ppo", {**given, "reward": two, "folder": tmp_path}, {})


def test_a_model_whose_forward_is_compiled_is_the_model_itself(tmp_path):
    given = {"tokenizer": world.tokenizer(), "folder": tmp_path}
    paths = [
        inputs_of("ppo", {"policy": policy, **given}, {}).table["policy"]["model"]
        for policy in (world.model(), torch.compile(world.model(), backend="eager"))
    ]
    assert paths[0] == paths[1]


def test_a_model_that_transformers_cannot_save_is_refused_in_its_words(tmp_path):
    policy = world.model()
    policy.generation_config.temperature = 0.1  # without do_sample
    given = {"policy": policy, "tokenizer": world.tokenizer(), "folder": tmp_path}
    with pytest.raises(quartet.QuartetError, match=r"policy: .*GenerationConfig is invalid"):
        inputs_of("ppo", given, {})
    assert list((tmp_path / "inputs").iterdir()) == []


def scorer(**changes):
    config = world.model().config
    for key, value in {"num_labels": 1, **changes}.items():
        setattr(config, key, value)
    return AutoModelForSequenceClassification.from_config(config)


def of_another_tokenizer(folder):
    """Return a reward model that was loaded from a folder, where its tokenizer has the same words
    as the policy's, with other ids."""
    scorer().save_pretrained(folder)
    tokenizer = world.tokenizer()
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    first, second = list(words)[-2:]
    words[first], words[second] = words[second], words[first]
    path.write_text(json.dumps(content))
    return AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize(
    ("reward", "sentence"),
    [
        (lambda folder: scorer(vocab_size=5), "has 5 embeddings and the policy's tokenizer"),
        (
            of_another_tokenizer,
            'rewards, from which the model was loaded, is not the policy\'s, .* reward=".*rewards"',
        ),
        (lambda folder: torch.nn.Linear(3, 1), "a Linear is no reward model of transformers"),
        (lambda folder: world.model(), "a LlamaForCausalLM generates text and gives no score"),
    ],
)
def test_a_model_that_cannot_read_the_policys_ids_is_no_reward(reward, sentence, tmp_path):
    given = {"policy": world.model(), "tokenizer": world.tokenizer(), "prompts": PROMPTS}
    with pytest.raises(quartet.QuartetError, match=sentence):
        reward = reward(tmp_path / "rewards")
        quartet.train("grpo", **given, reward=reward, folder=tmp_path, **samples(2))


def test_a_reward_model_whose_tokenizer_has_more_tokens_reads_the_policys_ids(tmp_path):
    """The policy's tokens have the same ids in it, and padding is never scored."""
    model, tokenizer, policys = scorer(vocab_size=40), world.tokenizer(), world.tokenizer()
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    check_reads_ids("r", loaded, policys)
    policys.add_special_tokens({"pad_token": "<own pad>"})
    check_reads_ids("r", loaded, policys)
    policys.add_tokens(["<another>"])
    with pytest.raises(RewardError, match="is not the policy's"):
        check_reads_ids("r", loaded, policys)
    ends = world.tokenizer()  # an end that pads as well is read, and has to be the same
    ends.add_special_tokens({"eos_token": "<own end>", "pad_token": "<own end>"})
    with pytest.raises(RewardError, match="is not the policy's"):
        check_reads_ids("r", loaded, ends)


def test_a_frozen_model_may_get_an_adapter_and_may_be_evaluated(tmp_path):
    given = {"policy": frozen(), "tokenizer": world.tokenizer(), "folder": tmp_path}
    adapter = {"policy.adapter": {"type": "lora", "rank": 2}}
    assert inputs_of("ppo", given, adapter).table["policy"]["adapter"]["rank"] == 2
    assert "model" in inputs_of("evaluation", given, {}).table["policy"]


def test_no_progress_bar_is_shown_where_a_model_is_stored(tmp_path, capfd):
    inputs_of("ppo", {"policy": (world.model(), world.tokenizer()), "folder": tmp_path}, {})
    assert capfd.readouterr().err == ""


def test_conversations_are_prompts_and_an_empty_text_is_no_path(tmp_path):
    def stored(rows):
        table = inputs_of("ppo", {"data": rows, "folder": tmp_path}, {}).table
        return [json.loads(line) for line in Path(table["data"]["train"]).read_text().splitlines()]

    talk = [{"role": "user", "content": "hi"}]
    assert stored([talk, talk]) == [{"prompt": talk}] * 2
    assert stored(["", "a"]) == [{"prompt": ""}, {"prompt": "a"}]


ROWS = Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"model": torch.nn.Linear(1, 1), "tokenizer": object()}, "model: .*Did you mean policy?"),
        ({"reward_funcs": [two]}, "reward_funcs: no such argument. Did you mean reward?"),
        ({"train_dataset": ROWS}, "train_dataset: no such argument. Did you mean data?"),
        ({"data": DatasetDict(train=ROWS, test=ROWS)}, "data.test: .*Did you mean eval_data?"),
        ({"data": {"prompt": ["a", "b"]}}, "data: a dict of columns is no data. Give a list"),
        ({"data": {"a", "b"}}, "data.train: a set is no data"),
        (
            {"policy": "x", "tokenizer": world.tokenizer()},
            "tokenizer: .*a policy that is an object",
        ),
        ({"callbacks": [two]}, "callbacks: there are no callbacks. .*for step in run"),
    ],
)
def test_an_argument_as_another_library_calls_it_is_answered(arguments, sentence, tmp_path):
    with pytest.raises(quartet.QuartetError, match=sentence.replace("?", r"\?")):
        quartet.train("ppo", **arguments, folder=tmp_path)


def test_models_are_saved_in_a_folder_that_is_a_text(tmp_path):
    policy, tokenizer = world.model(), world.tokenizer()
    quartet.save(policy, tokenizer, str(tmp_path / "policy"))
    critic = quartet.ScalarModel.from_trunk(policy, tokenizer.pad_token_id, seed=0)
    critic.save(str(tmp_path / "critic"), tokenizer)
    weights = quartet.load_model(str(tmp_path / "policy")).state_dict()
    assert all(torch.equal(weights[name], w) for name, w in policy.state_dict().items())
    assert (tmp_path / "critic" / "model.safetensors").is_file()


def test_the_folder_of_a_run_is_no_model_and_says_which_it_has(run):
    with pytest.raises(quartet.QuartetError, match=f"Its model is {run.folder / 'policy'}"):
        quartet.load_model(run.folder)


def test_a_checkpoint_of_a_run_with_a_reward_of_python_can_be_taken_without_the_function(tmp_path):
    """After Ctrl-C, say: its policy is exported, and answers, though nothing can score it."""
    given = {"policy": world.model(), "tokenizer": world.tokenizer(), "prompts": PROMPTS}
    small = {"rollout": SMALL["rollout"], "optim": {"lr": 1e-2}}
    run = quartet.train("ppo", **given, reward=two, folder=tmp_path, steps=3, **small)
    assert next(iter(run)).number == 1
    run.close()
    with pytest.raises(quartet.QuartetError, match="finish.. first, or .*--checkpoint ppo-000001"):
        _ = run.policy
    words = [str(run.folder), "--to", str(tmp_path / "out"), "--checkpoint", "ppo-000001"]
    refused = CliRunner().invoke(app, ["export", *words[:3]])
    assert refused.exit_code == 2 and "checkpoint: --checkpoint ppo-000001." in refused.output
    assert CliRunner().invoke(app, ["export", *words]).exit_code == 0
    weights = quartet.load_model(tmp_path / "out").state_dict()
    assert any(not torch.equal(weights[n], w) for n, w in world.model().state_dict().items())
    form = {"on": {"mine": PROMPTS}, "max_new_tokens": 4, "folder": tmp_path / "eval"}
    result = quartet.evaluate(f"{run.folder}@1", **form, measures=two)
    assert result["cells"][0]["value"] == 2.0


@pytest.mark.slow
def test_a_critic_is_audited_with_a_reward_of_python(tmp_path):
    given = {"policy": world.model(), "tokenizer": world.tokenizer(), "prompts": PROMPTS * 3}

    def length(responses, **_):
        return [len(response) / 10 for response in responses]

    small = {"rollout": SMALL["rollout"], "folder": tmp_path}
    run = quartet.train("ppo", **given, reward=length, steps=2, **small).finish(progress=False)
    audit = quartet.critic_audit(run, prompts=2, prefixes=2, continuations=2)
    assert audit.path.is_file() and audit.numbers["step"] == 2
    with pytest.raises(quartet.QuartetError, match="was given as a Python object"):
        quartet.critic_audit(run.folder, prompts=2, prefixes=2, continuations=2)
