"""What cannot work: one function for each combination of settings that is refused.

A rule returns a sentence that names the key, says what is wrong and what to do, or None. Rules are
asked in the order in which they stand here, and a config is refused with the first sentence; so a
rule may rely on those before it.
"""

import json
from collections.abc import Callable
from pathlib import Path

from quartet.algorithms.preference import PREFERENCES
from quartet.algorithms.update import TrustRegion
from quartet.config.tables import Config, SeparateCritic
from quartet.generation.source import Servers
from quartet.io.texts import did_you_mean
from quartet.rewards.sources import (
    EnsembleSource,
    EnvironmentSource,
    GoldSource,
    JudgeSource,
    ModelSource,
    is_trained_here,
)
from quartet.stages.kinds import KINDS, kind_of
from quartet.training.optimizer_types import TYPES

Rule = Callable[[Config], str | None]

RULES: list[Rule] = []
"""All rules, in the order in which they are asked."""

KNOWN_STAGES = "sft, reward_model, evaluation, and what `quartet algorithms` lists"
CHECKED_WORLDS = ("sums", "guess")
"""Worlds whose answers are right or wrong; they have no comparisons to learn from."""
WITHOUT_LINEAR_LAYERS = ("gpt2", "openai-gpt")
"""Model types whose blocks keep their weights in transformers' Conv1D."""


def rule(function: Rule) -> Rule:
    """Add a function to `RULES`."""
    RULES.append(function)
    return function


def first_problem(config: Config) -> str | None:
    """Return the sentence of the first rule that a config breaks, None if it breaks none."""
    return next((problem for check in RULES if (problem := check(config)) is not None), None)


def untrained_filter(config: Config) -> str | None:
    """Return a sentence if a new run would sample from another distribution than it trains; None if
    it would not. It is no rule: runs that began with such a filter can be resumed and read."""
    rollout = config.rollout
    if config.rl_stage is None or not rollout.filters or rollout.keep_mask:
        return None
    setting = f"min_new_tokens = {rollout.min_new_tokens}"
    if rollout.keeps_probable:
        setting = f"top_k = {rollout.top_k}" if rollout.top_k else f"top_p = {rollout.top_p}"
    remedy = (
        "Servers do not tell which tokens they kept, so take the filter out."
        if isinstance(config.generator, Servers)
        else "Set rollout.keep_mask = true, which trains the filtered one, or take the filter out."
    )
    return f"rollout.{setting}: the distribution without this filter would be trained. {remedy}"


# --- the recipe


@rule
def recipe_needs_a_stage(config: Config) -> str | None:
    if config.recipe:
        return None
    return f"recipe: is empty. Name one stage or more of {KNOWN_STAGES}."


@rule
def recipe_names_known_stages(config: Config) -> str | None:
    known = [stage for kind in KINDS for stage in kind.stages]
    for stage in config.recipe:
        if stage not in known:
            near = did_you_mean(stage, known)
            return f'recipe: "{stage}" is no stage.{near} Known are {KNOWN_STAGES}.'
    return None


@rule
def stages_stand_in_order(config: Config) -> str | None:
    order = [kind.order for stage in config.recipe if (kind := kind_of(stage)) is not None]
    if order == sorted(set(order)):
        return None
    return (
        "recipe: stages go from sft over label, reward_model and one RL or preference stage to "
        f"evaluation, each at most once; this one says {', '.join(config.recipe)}."
    )


@rule
def preference_loss_is_the_stages(config: Config) -> str | None:
    stage, loss = config.preference_stage, config.preference.loss.type
    is_own = loss not in {preset.type for preset in PREFERENCES.values()}
    if stage is None or is_own or loss == PREFERENCES[stage].type:
        return None
    return f'preference.loss.type = "{loss}", but the recipe says "{stage}". Make them the same.'


@rule
def kto_needs_two_comparisons(config: Config) -> str | None:
    if config.preference_stage != "kto" or config.preference.batch_size >= 2:
        return None
    return (
        "preference.batch_size = 1: KTO estimates the KL from answers under other prompts of the "
        "batch, so it must be ≥ 2."
    )


@rule
def evaluation_needs_a_policy(config: Config) -> str | None:
    aligned, given = config.rl_stage or config.preference_stage, config.evaluation.policy
    if aligned and given is not None:
        return (
            f"evaluation.policy: this run evaluates the policy that {aligned} trains. Leave it "
            'out, or evaluate another with recipe = ["evaluation"].'
        )
    if "evaluation" not in config.recipe or aligned or given is not None:
        return None
    return (
        "recipe: evaluation compares an RL or preference stage's policy with the one before it; "
        "there is none."
    )


@rule
def evaluation_needs_a_reward(config: Config) -> str | None:
    if "evaluation" not in config.recipe or config.reward or config.data.world is not None:
        return None
    return "recipe: evaluation needs a [[reward]] or a world to say which answers are better."


@rule
def labels_are_for_a_reward_model(config: Config) -> str | None:
    if "label" not in config.recipe or "reward_model" in config.recipe:
        return None
    return "recipe: label leaves comparisons for the stage reward_model; there is none."


@rule
def labels_are_the_reward_models_data(config: Config) -> str | None:
    if "label" not in config.recipe:
        return None
    if config.reward_model.data is not None:
        return (
            "reward_model.data: the reward model is trained on what the stage label leaves. Leave "
            "it out; label.earlier names comparisons to add."
        )
    if config.reward_model.epochs is None:
        return None
    return (
        "reward_model.epochs: how many comparisons the labels give is not known before. Set "
        "reward_model.steps."
    )


@rule
def labels_do_not_exceed_pairs(config: Config) -> str | None:
    label = config.label
    if "label" not in config.recipe or label.labels <= label.pairs:
        return None
    return (
        f"label.labels = {label.labels}: only label.pairs = {label.pairs} pairs are written. Raise "
        "label.pairs."
    )


@rule
def simulated_labels_need_a_gold_reward(config: Config) -> str | None:
    if "label" not in config.recipe or config.label.simulated is None or config.data.world:
        return None
    return (
        "label.simulated: labels are simulated by the gold reward of a world (data.world), and "
        "there is none. Leave it out."
    )


@rule
def labels_are_awaited_by_one_process(config: Config) -> str | None:
    if "label" not in config.recipe or config.launch.processes == 1:
        return None
    return (
        f"launch.processes = {config.launch.processes}: the stage label waits in one process. Run "
        "it and the stages before it with launch.processes = 1."
    )


# --- data and the policy


@rule
def data_train_lists_a_file(config: Config) -> str | None:
    if config.data.train is None or config.data.files:
        return None
    return "data.train: is empty. Name a file."


@rule
def paths_are_not_empty(config: Config) -> str | None:
    paths = {
        "data.train": config.data.files,
        "data.eval": (config.data.eval,),
        "data.texts": (config.data.texts,),
        "policy.model": (config.policy.model,),
        "reward_model.model": (config.reward_model.model,),
        "reference.model": (config.reference.model,),
    }
    for key, named in paths.items():
        if "" in named:
            return f"{key}: is empty. Name a file or folder."
    return None


@rule
def run_name_is_no_path(config: Config) -> str | None:
    name = config.run.name
    if name is None or (
        name.strip() and Path(name).name == name and name[0] != "." and name.isprintable()
    ):
        return None
    return f"run.name = {name!r}: is a name, not a path; letters, digits and dashes."


@rule
def policy_has_one_origin(config: Config) -> str | None:
    if (config.policy.model is None) != (config.policy.create is None):
        return None
    return (
        "policy.model: name a folder or hub id, or describe a new model in policy.create; exactly "
        "one of the two."
    )


@rule
def data_have_one_origin(config: Config) -> str | None:
    if (config.data.world is None) != (config.data.train is None):
        return None
    return "data.train: name a file, or an embedded world in data.world; exactly one of the two."


@rule
def adapter_excludes_frozen_layers(config: Config) -> str | None:
    if config.policy.adapter is None or not config.policy.frozen_layers:
        return None
    return "policy.frozen_layers: an adapter freezes all layers already. Take one of the two out."


@rule
def some_layers_are_trained(config: Config) -> str | None:
    shape, frozen = config.policy.create, config.policy.frozen_layers
    if shape is None or frozen < shape.num_layers:
        return None
    return f"policy.frozen_layers = {frozen}: the model has {shape.num_layers} layers."


@rule
def every_file_has_a_weight(config: Config) -> str | None:
    weights, files = config.data.weights, config.data.files
    if weights is None:
        return None
    if len(weights) == len(files) and all(w >= 0 for w in weights) and any(weights):
        return None
    return (
        f"data.weights = {list(weights)}: needs one number ≥ 0 for each of {len(files)} files in "
        "data.train."
    )


@rule
def new_model_needs_a_tokenizer(config: Config) -> str | None:
    policy = config.policy
    if policy.create is None or policy.tokenizer is not None or config.data.world is not None:
        return None
    return (
        'policy.tokenizer: a new model needs one. Write tokenizer = { type = "train" } or name a '
        "folder."
    )


@rule
def reward_model_needs_comparisons(config: Config) -> str | None:
    if config.data.world not in CHECKED_WORLDS or "reward_model" not in config.recipe:
        return None
    return (
        f"recipe: the world {config.data.world} has no comparisons to train a reward model on, its "
        "answers are checked."
    )


# --- rewards


@rule
def learning_needs_a_reward(config: Config) -> str | None:
    if config.rewarded_stage is None or config.reward:
        return None
    return (
        f'reward: {config.rewarded_stage} needs one. Add [[reward]] with type = "model" and model '
        '= a folder, or type = "exact".'
    )


@rule
def reward_model_has_an_origin(config: Config) -> str | None:
    unnamed = next((r for r in config.reward if is_trained_here(r)), None)
    if unnamed is None or "reward_model" in config.recipe or not config.reads("reward"):
        return None
    key, folders = (
        ("model", "model's folder")
        if isinstance(unnamed, ModelSource)
        else ("models", "models' folders")
    )
    return (
        f"reward.{key}: name the reward {folders}, or put reward_model before "
        f"{config.rewarded_stage or 'the others'} in the recipe."
    )


@rule
def reward_is_what_is_trained(config: Config) -> str | None:
    if "reward_model" not in config.recipe:
        return None
    members = config.reward_model.members
    for source in filter(is_trained_here, config.reward):
        if isinstance(source, ModelSource) and members > 1:
            return (
                f'reward.type = "model": the run trains {members} reward models. Use type = '
                '"ensemble", or name the folder of one in reward.model.'
            )
        if isinstance(source, EnsembleSource):
            if members == 1:
                return (
                    'reward.models: the run trains one reward model. Use type = "model", or set '
                    "reward_model.members to 2 or more."
                )
            if (problem := source.weights_problem(members)) is not None:
                return f"reward.{problem}."
    return None


@rule
def other_backbone_is_whole(config: Config) -> str | None:
    if config.reward_model.model is None or not config.launch.shard:
        return None
    return (
        "launch.shard: a reward model on a backbone of its own is held whole by each rank, and "
        "cannot be trained beside models in parts. Leave out reward_model.model, or train the "
        "reward model in a run without launch.shard and name its folder in reward.model."
    )


@rule
def rewards_have_different_names(config: Config) -> str | None:
    names = [r.called for r in config.reward]
    for name in names:
        if names.count(name) > 1:
            return (
                f"reward.name: two rewards are called {name}. Give each a name of its own, "
                'name = "…".'
            )
    return None


@rule
def some_reward_counts(config: Config) -> str | None:
    if config.rewarded_stage is None or any(r.weight for r in config.reward):
        return None
    return "reward.weight: is 0 for every reward, so there is nothing to learn from."


@rule
def pairwise_judge_needs_two_answers(config: Config) -> str | None:
    pairwise = any(
        isinstance(r, JudgeSource) and r.mode == "pairwise" and r.weight for r in config.reward
    )
    if not pairwise or config.rl_stage is None or config.rollout.samples_per_prompt >= 2:
        return None
    return (
        'reward.mode = "pairwise": compares answers to the same prompt, so '
        "rollout.samples_per_prompt must be ≥ 2."
    )


@rule
def gold_reward_needs_a_world(config: Config) -> str | None:
    if config.data.world is not None or not any(isinstance(r, GoldSource) for r in config.reward):
        return None
    return 'reward.type: "gold" is known in an embedded world only.'


@rule
def preference_stage_needs_comparisons(config: Config) -> str | None:
    world = config.data.world
    if world not in CHECKED_WORLDS or not config.preference_stage or config.rewarded_stage:
        return None
    return f"recipe: the world {world} has no comparisons to learn from; its answers are checked."


@rule
def environment_reward_needs_an_environment(config: Config) -> str | None:
    if config.has_episodes or not any(isinstance(r, EnvironmentSource) for r in config.reward):
        return None
    return (
        'reward.type: "environment" needs an environment. Add [environment] with function = '
        '"file.py:Name".'
    )


@rule
def greedy_baseline_needs_one_turn(config: Config) -> str | None:
    if config.algorithm is None or not config.algorithm.needs_greedy or not config.has_episodes:
        return None
    return (
        "environment: an algorithm that compares with a greedy answer is not written for several "
        "turns."
    )


# --- the RL stage


@rule
def groups_need_two_answers(config: Config) -> str | None:
    algorithm, samples = config.algorithm, config.rollout.samples_per_prompt
    if algorithm is None or not algorithm.needs_group or samples >= 2:
        return None
    return (
        f"rollout.samples_per_prompt = {samples}: {config.rl_stage} compares several answers to "
        "one prompt, so it must be ≥ 2. Typical: 8."
    )


@rule
def critic_starts_from_something(config: Config) -> str | None:
    critic = config.critic
    if not isinstance(critic, SeparateCritic) or critic.init != "reward_model":
        return None
    if config.rl_stage is None or config.reward_model_source is not None:
        return None
    return 'critic.init = "reward_model": there is no reward model here. Use "policy" or a folder.'


@rule
def token_rewards_need_token_scores(config: Config) -> str | None:
    algorithm = config.algorithm
    whole = [r for r in config.reward if r.weight and not r.gives_token_scores]
    if algorithm is None or not algorithm.needs_token_scores or not whole:
        return None
    return (
        f'algorithm.rewards.type = "{algorithm.rewards.type}": reads a score for each token, and '
        f'the reward {whole[0].called} gives one per response. Use "last_token", or a reward of '
        'type "model", "steps", "function".'
    )


@rule
def critic_is_created_or_starts_from_weights(config: Config) -> str | None:
    critic = config.critic
    if not isinstance(critic, SeparateCritic) or critic.create is None or critic.init is None:
        return None
    return f'critic.create: a new critic has no weights of "{critic.init}". Leave critic.init out.'


@rule
def trust_region_needs_a_critic(config: Config) -> str | None:
    algorithm = config.algorithm
    if algorithm is None or not isinstance(algorithm.update, TrustRegion) or algorithm.needs_critic:
        return None
    return (
        'algorithm.update.type = "trust_region": is written for algorithms with a critic, and '
        f'advantage.type = "{algorithm.advantage.type}" has none. Use advantage = '
        '{ type = "gae" }.'
    )


@rule
def trust_region_excludes_ptx(config: Config) -> str | None:
    algorithm = config.algorithm
    if (
        algorithm is None
        or not isinstance(algorithm.update, TrustRegion)
        or algorithm.ptx.coef <= 0
    ):
        return None
    return 'algorithm.ptx: is not mixed into update.type = "trust_region". Use "first_order".'


@rule
def trust_region_excludes_masked_responses(config: Config) -> str | None:
    algorithm = config.algorithm
    if algorithm is None or not algorithm.mask_truncated or not _has_trust_region(config):
        return None
    return (
        'algorithm.mask_truncated: update.type = "trust_region" takes its step on all responses. '
        'Use "first_order".'
    )


@rule
def trust_region_needs_fp32(config: Config) -> str | None:
    if not _has_trust_region(config) or config.run.precision_of("policy") != "bf16":
        return None
    return (
        'run.precision = "bf16": a trust region solves for its step with products of second '
        'derivatives, which bfloat16 is too coarse for. Use "fp32" or "auto".'
    )


@rule
def reference_on_the_trunk_has_its_precision(config: Config) -> str | None:
    precision, policy = config.run.precision_of("reference"), config.run.precision_of("policy")
    on_the_trunk = config.policy.adapter is not None and config.reference.model is None
    if not on_the_trunk or precision in {"auto", policy}:
        return None
    return (
        f'run.precision.reference = "{precision}": with policy.adapter the reference is the '
        f'policy\'s trunk, which computes in "{policy}". Set run.precision.policy, or leave it out.'
    )


@rule
def reference_is_compared_with(config: Config) -> str | None:
    algorithm, stage = config.algorithm, config.rl_stage or config.preference_stage
    if config.reference.model is None or stage is None:
        return None
    by_algorithm = config.rl_stage and algorithm is not None and algorithm.needs_reference
    by_loss = config.preference_stage and config.preference.loss.needs_reference
    if by_algorithm or by_loss:
        return None
    return f"reference.model: {stage} compares the policy with no reference. Take it out."


@rule
def served_adapter_needs_an_adapter(config: Config) -> str | None:
    generator = config.generator
    if config.rl_stage is None or not isinstance(generator, Servers):
        return None
    if not generator.adapter or config.policy.adapter is not None:
        return None
    return "generator.adapter = true: the policy is none. Set policy.adapter, or take it out."


@rule
def sglang_excludes_filters(config: Config) -> str | None:
    generator = config.generator
    if config.rl_stage is None or not isinstance(generator, Servers):
        return None
    if generator.type != "sglang" or not config.rollout.filters:
        return None
    return (
        'generator.type = "sglang": tells log-probs of the distribution before rollout.top_k and '
        "rollout.top_p, from which nothing was drawn. Leave those at 0 and 1."
    )


@rule
def kept_mask_needs_a_filter(config: Config) -> str | None:
    rollout = config.rollout
    if config.rl_stage is None or not rollout.keep_mask or rollout.filters:
        return None
    return (
        "rollout.keep_mask = true: nothing is filtered. Set rollout.top_k or rollout.top_p, or "
        "take it out."
    )


@rule
def smallest_length_is_below_the_largest(config: Config) -> str | None:
    least, most = config.rollout.min_new_tokens, config.rollout.max_new_tokens
    if least <= most:
        return None
    return (
        f"rollout.min_new_tokens = {least}: responses have at most {most} tokens "
        "(rollout.max_new_tokens). Lower it, or raise that."
    )


@rule
def servers_keep_no_mask(config: Config) -> str | None:
    if config.rl_stage is None or not config.rollout.keep_mask:
        return None
    if not isinstance(config.generator, Servers):
        return None
    return (
        f'rollout.keep_mask = true: generator.type = "{config.generator.type}" does not tell which '
        "tokens top_k and top_p kept. Sample without these filters, or without servers."
    )


@rule
def sleeping_servers_sample_in_turn(config: Config) -> str | None:
    generator = config.generator
    if config.rl_stage is None or not isinstance(generator, Servers):
        return None
    if not generator.sleeps or config.staleness == 0:
        return None
    return (
        f"rollout.staleness = {config.staleness}: with generator.sleep = true the servers sleep "
        "while the run trains, so they cannot sample ahead. Set it to 0, or leave out one of them."
    )


@rule
def critic_warmup_needs_a_critic(config: Config) -> str | None:
    algorithm, steps = config.algorithm, config.optim.critic_warmup_steps
    if algorithm is None or algorithm.needs_critic or not steps:
        return None
    return f"optim.critic_warmup_steps = {steps}: {config.rl_stage} has no critic."


@rule
def minibatches_have_responses(config: Config) -> str | None:
    responses = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    if config.rl_stage is None or config.optim.minibatches <= responses:
        return None
    return f"optim.minibatches = {config.optim.minibatches}: a step has only {responses} responses."


@rule
def new_model_is_long_enough(config: Config) -> str | None:
    shape, prompt = config.policy.create, config.data.max_prompt_tokens
    response = config.rollout.max_new_tokens
    if config.rl_stage is None or shape is None or prompt + response <= shape.max_length:
        return None
    return (
        f"policy.create.max_length = {shape.max_length}: too short for data.max_prompt_tokens = "
        f"{prompt} and rollout.max_new_tokens = {response} together."
    )


# --- the length of stages, their evaluations and optimizers


@rule
def length_is_given_once(config: Config) -> str | None:
    for table, settings in config.stage_trainings():
        if settings.steps is not None and settings.epochs is not None:
            return (
                f"{table}.epochs = {settings.epochs:g}: {table}.steps = {settings.steps} is there "
                "already. Take one of the two out."
            )
    return None


@rule
def choosing_needs_evaluations(config: Config) -> str | None:
    for table, settings in config.stage_trainings():
        if settings.eval_every:
            continue
        if settings.keep == "best":
            return f'{table}.keep = "best": chooses among evaluations. Set {table}.eval_every.'
        if settings.patience:
            return (
                f"{table}.patience = {settings.patience}: counts evaluations. Set "
                f"{table}.eval_every."
            )
    return None


@rule
def evaluations_need_held_out_rows(config: Config) -> str | None:
    every = config.preference.eval_every
    if config.preference_stage != "online_dpo" or not every:
        return None
    return (
        f"preference.eval_every = {every}: online_dpo compares its own answers, and has no "
        "held-out comparisons. Take it out."
    )


@rule
def warmup_is_given_once(config: Config) -> str | None:
    for table, settings in config.optimizers():
        if settings.warmup_steps and settings.warmup_ratio:
            return (
                f"{table}.warmup_ratio = {settings.warmup_ratio:g}: {table}.warmup_steps = "
                f"{settings.warmup_steps} is there already. Set one of the two to 0."
            )
    return None


@rule
def constant_rate_falls_to_nothing(config: Config) -> str | None:
    for table, settings in config.optimizers():
        if settings.schedule == "constant" and settings.min_lr_ratio:
            return (
                f"{table}.min_lr_ratio = {settings.min_lr_ratio:g}: is where a falling rate ends, "
                f'and {table}.schedule = "constant". Use "linear" or "cosine", or take it out.'
            )
    return None


@rule
def moments_in_parts_need_a_type_that_takes_them(config: Config) -> str | None:
    whole = [
        (table, settings.optimizer)
        for table, settings in config.optimizers()
        if not TYPES[settings.optimizer].takes_sharded
    ]
    if not config.launch.shard or not whole:
        return None
    table, name = whole[0]
    return (
        f'{table}.optimizer = "{name}": does not step weights that launch.shard holds in parts. '
        'Use "adamw" or "muon", or launch.shard = false.'
    )


@rule
def adapters_need_a_type_that_takes_them(config: Config) -> str | None:
    for table, settings in config.optimizers():
        if config.policy.adapter is not None and not TYPES[settings.optimizer].takes_adapters:
            return (
                f'{table}.optimizer = "{settings.optimizer}": the thin matrices of policy.adapter '
                'learn more slowly under it. Use "adamw" or "adamw_8bit".'
            )
    return None


# --- processes


@rule
def address_needs_ray(config: Config) -> str | None:
    launch = config.launch
    if launch.address is None or launch.type == "ray":
        return None
    return (
        f'launch.address: is a Ray cluster\'s, and launch.type = "{launch.type}". Use type = "ray".'
    )


@rule
def torchrun_restarts_itself(config: Config) -> str | None:
    if not config.launch.restarts or config.launch.type != "torchrun":
        return None
    return (
        "launch.restarts: torchrun starts its ranks again itself, with --max-restarts; run.name "
        "and --resume make the same words go on."
    )


@rule
def every_rank_has_a_part(config: Config) -> str | None:
    launch = config.launch
    if launch.type == "torchrun" or isinstance(launch.shard, bool):
        return None
    if launch.processes % launch.parts(launch.processes) == 0:
        return None
    return (
        f"launch.shard = {launch.shard}: launch.processes = {launch.processes} is no multiple of "
        "it, so some rank would have no part."
    )


@rule
def trust_region_excludes_compile(config: Config) -> str | None:
    if not config.policy.compile or not _has_trust_region(config):
        return None
    return (
        'policy.compile: algorithm.update.type = "trust_region" takes second derivatives, and what '
        "torch.compile writes has none. Use false."
    )


@rule
def trust_region_excludes_sharding(config: Config) -> str | None:
    if not config.launch.shard or not _has_trust_region(config):
        return None
    return (
        'launch.shard: second derivatives, for algorithm.update.type = "trust_region", need all '
        "weights on every rank. Use false."
    )


@rule
def labelled_texts_have_a_file(config: Config) -> str | None:
    needs = config.data.world == "labelled_texts"
    if needs == (config.data.texts is not None):
        return None
    if needs:
        return (
            "data.texts: the world labelled_texts needs a file with columns text and label. Use "
            'data.texts = "reviews.jsonl".'
        )
    return 'data.texts: only data.world = "labelled_texts" reads it.'


@rule
def quantize_needs_an_adapter(config: Config) -> str | None:
    if config.policy.quantize is None or config.policy.adapter is not None:
        return None
    return (
        f'policy.quantize = "{config.policy.quantize}": weights in 4 bits are not trained, so '
        'policy.adapter = { type = "lora" } is needed too.'
    )


@rule
def quantize_holds_one_trunk_whole(config: Config) -> str | None:
    if config.policy.quantize is None:
        return None
    excluded = {
        "launch.shard": bool(config.launch.shard),
        "staleness, which samples with a copy": bool(config.staleness),
        "policy.compile": config.policy.compile,
        'algorithm.update.type = "trust_region"': _has_trust_region(config),
    }
    name = next((name for name, is_set in excluded.items() if is_set), None)
    if name is None:
        return None
    return (
        f'policy.quantize = "{config.policy.quantize}": does not go with {name}. Leave one of them '
        "out."
    )


@rule
def quantize_needs_linear_layers(config: Config) -> str | None:
    """A folder is looked at here so that a plan refuses it, too; of a name on the hub, loading
    tells."""
    policy = config.policy
    if policy.quantize is None:
        return None
    kind = None if policy.create is None else policy.create.type
    file = Path(str(policy.model)) / "config.json"
    if kind is None and file.is_file():
        try:
            kind = json.loads(file.read_text(encoding="utf-8")).get("model_type")
        except (OSError, ValueError, AttributeError):
            return None  # loading the model says what is wrong with it
    if kind not in WITHOUT_LINEAR_LAYERS:
        return None
    return (
        f'policy.quantize = "{policy.quantize}": {kind} has no linear layers in its blocks that '
        "could be held in 4 bits. Leave it out, or use another model."
    )


def _has_trust_region(config: Config) -> bool:
    return config.algorithm is not None and isinstance(config.algorithm.update, TrustRegion)
