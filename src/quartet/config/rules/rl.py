"""Rules about the RL stage."""

from quartet.algorithms.update import TrustRegion
from quartet.config.rules.base import has_trust_region, rule
from quartet.config.tables import Config, SeparateCritic
from quartet.generation.source import Servers


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
def own_loop_samples_and_learns_in_turn(config: Config) -> str | None:
    if config.run.loop is None or config.staleness == 0:
        return None
    return (
        f"run.loop: takes the place of a loop that samples and learns in turn, and "
        f"rollout.staleness is {config.staleness}. Set it to 0."
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
    if algorithm is None or not algorithm.mask_truncated or not has_trust_region(config):
        return None
    return (
        'algorithm.mask_truncated: update.type = "trust_region" takes its step on all responses. '
        'Use "first_order".'
    )


@rule
def trust_region_needs_fp32(config: Config) -> str | None:
    if not has_trust_region(config) or config.run.precision_of("policy") != "bf16":
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
def sent_weights_are_whole(config: Config) -> str | None:
    generator = config.generator
    if config.rl_stage is None or not isinstance(generator, Servers):
        return None
    if not generator.sends_weights or not generator.adapter:
        return None
    return (
        'generator.adapter = true: generator.transfer = "nccl" sends the whole model, adapters '
        "merged. Leave out one of them."
    )


@rule
def sent_weights_need_gpus_of_the_servers(config: Config) -> str | None:
    generator = config.generator
    if config.rl_stage is None or not isinstance(generator, Servers):
        return None
    if not generator.sends_weights or not generator.sleeps:
        return None
    return (
        "generator.sleep = true: the servers share the GPUs of this run, and "
        'generator.transfer = "nccl" sends weights to other GPUs only. Leave out one of them.'
    )


@rule
def sglang_excludes_filters(config: Config) -> str | None:
    generator = config.generator
    if config.rl_stage is None or not isinstance(generator, Servers):
        return None
    if generator.type != "sglang" or not config.rollout.filters:
        return None
    return (
        'generator.type = "sglang": tells log-probs of the distribution before the filter, from '
        f"which nothing was drawn. Take out rollout.{config.rollout.filter_setting}."
    )


@rule
def kept_mask_needs_a_filter(config: Config) -> str | None:
    rollout = config.rollout
    if config.rl_stage is None or not rollout.keep_mask or rollout.filters:
        return None
    return (
        "rollout.keep_mask = true: nothing is filtered. Set rollout.top_k, rollout.top_p or "
        "rollout.min_new_tokens, or take it out."
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
