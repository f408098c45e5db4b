"""The models and objects of an RL stage, loaded when the stage begins."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quartet.algorithms.algorithm import Algorithm
from quartet.algorithms.update import TrustRegion
from quartet.assembly.assembler import Assembler
from quartet.config.tables import SeparateCritic, SharedCritic
from quartet.data.records import Demonstration
from quartet.data.sampler import Sampler
from quartet.distributed.offload import Placement
from quartet.distributed.process_group import ProcessGroup
from quartet.experience import Rollout
from quartet.generation.protocol import Generator
from quartet.generation.source import Servers
from quartet.loops.collect import Collector
from quartet.models.actor_critic import ActorCritic, Separate, Shared
from quartet.models.adapters import CRITIC, REWARD, copy_adapter
from quartet.models.heads import AdaptedScalar, ScalarModel, ValueHead, attach, starting_at_zero
from quartet.models.precision import compute_in
from quartet.models.protocols import CausalModel
from quartet.models.shape import Shape
from quartet.rewards.protocol import Weighted, rewarded
from quartet.rewards.sources import is_trained_here
from quartet.runtime.faults import FAULTS
from quartet.stages.kinds import member_of
from quartet.stages.probes import WinRateProbe
from quartet.stages.rl import RLComponents
from quartet.training.learner import Learner
from quartet.training.trust_region import TrustRegionLearner

PROBES = 8
"""The number of responses that are scored again and again during an RL stage."""
WIN_RATE_PROMPTS = 32
"""The number of held-out prompts that the win rate is measured on during an RL stage."""
PERPLEXITY_TEXTS = 32
"""The number of held-out demonstrations that the policy's perplexity is measured on."""


def load_components(assembler: Assembler, folder: Path) -> RLComponents:
    """Load the models of the RL stage and connect them. `folder` is the run's."""
    config, models, group = assembler.config, assembler.models, assembler.process_group
    algorithm = config.algorithm
    assert algorithm is not None
    attached = _attaches_reward_models(assembler, folder)
    adapters = [CRITIC] if _critic_is_an_adapter(assembler, attached) else []
    actor = models.trainable_policy(folder, *adapters)
    reference = models.reference_of(actor, folder) if algorithm.needs_reference else None
    # Servers sample with their own copy of the weights. Only a reward model on the policy's trunk
    # then still needs a model that is not trained meanwhile.
    served = isinstance(config.generator, Servers) and not attached
    sampled = actor if served else models.sampled_policy(actor, folder)
    reward_models = _attached(assembler, sampled, folder) if attached else []
    actor_critic: ActorCritic = Separate(actor, None)
    if algorithm.needs_critic:
        actor_critic = _actor_critic(assembler, actor, reward_models, folder)
    sampling_group = group.clone() if config.staleness else group
    placement = assembler.placement
    learner = _learner(assembler, algorithm, actor_critic, reference, placement)
    rewards = assembler.weighted_rewards(folder, reward_models, sampling_group, placement)
    generator, probe_generator = _generators(assembler, actor, sampled, folder, sampling_group)
    components = RLComponents(
        learner,
        generator,
        rewards,
        lambda: _probes(assembler, algorithm, probe_generator, rewards),
        _perplexity_texts(assembler),
        _win_rate_probe(assembler, probe_generator, rewards),
    )
    if assembler.fault is not None:
        FAULTS[assembler.fault](components)
    return components


def _learner(
    assembler: Assembler,
    algorithm: Algorithm,
    actor_critic: ActorCritic,
    reference: CausalModel | None,
    placement: Placement,
) -> Learner:
    config = assembler.config
    kind = TrustRegionLearner if isinstance(algorithm.update, TrustRegion) else Learner
    return kind(
        actor_critic,
        reference,
        config.optim,
        config.rollout,
        config.run.steps,
        config.seed,
        _pretraining(assembler, algorithm),
        assembler.micro_batch_tokens,
        assembler.process_group,
        placement,
        config.policy.router_aux_loss_coef,
        assembler.scoring_tokens,
    )


def _generators(
    assembler: Assembler,
    actor: CausalModel,
    sampled: Any,
    folder: Path,
    sampling_group: ProcessGroup,
) -> tuple[Generator, Callable[[], Generator]]:
    """Return the generator of the stage, and a function that returns a new generator for probes,
    which has random numbers of its own."""
    generators, group = assembler.generators, assembler.process_group
    if servers := generators.servers(actor, folder, sampling_group):
        return (
            generators.from_servers(servers, sampling_group),
            lambda: generators.from_servers(servers.for_probes(), group),
        )
    return (
        generators.in_process(sampled, sampling_group, copied=sampled is not actor),
        lambda: generators.in_process(sampled, group),
    )


def _probes(
    assembler: Assembler,
    algorithm: Algorithm,
    generator: Callable[[], Generator],
    rewards: Sequence[Weighted],
) -> list[Rollout]:
    """Return responses to held-out prompts. They are sampled by a generator of their own, so that
    training draws the same random numbers with and without them."""
    rollout, (train, held_out) = assembler.config.rollout, assembler.prompts
    prompts = list(held_out[: max(1, PROBES // rollout.samples_per_prompt)])
    sampler = Sampler(train, 1, assembler.config.seed)
    collector = Collector(sampler, generator(), rewards, rollout.samples_per_prompt)
    return [r for r in collector.respond(prompts, algorithm, rollout) if r.score is not None]


def _win_rate_probe(
    assembler: Assembler, generator: Callable[[], Generator], rewards: Sequence[Weighted]
) -> WinRateProbe | None:
    """Return the probe of the win rate; None where an LLM judge would have to be paid for it."""
    if assembler.has_llm_judge:
        return None
    prompts = list(assembler.prompts[1][:WIN_RATE_PROMPTS])

    def respond() -> Sequence[Rollout]:
        return rewarded(generator().generate(prompts, assembler.config.rollout), rewards)

    return WinRateProbe(respond, assembler.rewards.context.gold)


def _perplexity_texts(assembler: Assembler) -> Sequence[Demonstration]:
    """Return demonstrations that the run's SFT stage did not see; none if it has no such stage."""
    config = assembler.config
    if "sft" not in config.recipe:
        return []
    _, held_out = assembler.rows.read("demonstrations", config.sft.data)
    return assembler.encoder.demonstrations(held_out)[:PERPLEXITY_TEXTS]


def _attaches_reward_models(assembler: Assembler, folder: Path) -> bool:
    """Return whether the reward models that the run trained are adapters: they are then attached to
    the trunk of the sampled model."""
    is_used = any(map(is_trained_here, assembler.sources))
    place = assembler.round.folder(folder)
    has_adapter = any(
        (place / name / "adapter").is_dir() for name in assembler.config.reward_models
    )
    return assembler.config.policy.adapter is not None and is_used and has_adapter


def _attached(assembler: Assembler, sampled: Any, folder: Path) -> list[AdaptedScalar]:
    """Attach the reward models that the run trained to the trunk of the sampled model."""
    attached, place = [], assembler.round.folder(folder)
    for name in assembler.config.reward_models:
        _, number = member_of(name)
        adapter = REWARD if number is None else f"{REWARD}-{number}"
        attached.append(attach(sampled, adapter, place / name / "adapter"))
    compute_in(sampled, assembler.models.dtype("policy"))  # the adapters that have been added
    return attached


def _critic_is_an_adapter(assembler: Assembler, attached: bool) -> bool:
    """Return whether the critic is an adapter on the actor's trunk. `attached` says that the reward
    model is one."""
    config, init = assembler.config, assembler.critic_init
    if config.algorithm is None or not config.algorithm.needs_critic:
        return False
    if not isinstance(config.critic, SeparateCritic) or config.critic.create is not None:
        return False
    return config.policy.adapter is not None and (init == "policy" or (attached and init is None))


def _pretraining(assembler: Assembler, algorithm: Algorithm) -> Sampler[Demonstration] | None:
    """Return the texts that PTX mixes in: data.pretraining, or the demonstrations of the run."""
    if algorithm.ptx.coef == 0:
        return None
    config = assembler.config
    file = config.data.pretraining or config.sft.data
    texts, _ = assembler.rows.read("demonstrations", file)
    demonstrations = assembler.encoder.demonstrations(texts)
    return Sampler(demonstrations, algorithm.ptx.batch_size, config.seed)


def _actor_critic(
    assembler: Assembler,
    actor: CausalModel,
    reward_models: Sequence[AdaptedScalar],
    folder: Path,
) -> ActorCritic:
    """Return the actor with the critic that the config asks for. `reward_models` are those that are
    adapters."""
    models, init = assembler.models, assembler.critic_init
    match assembler.config.critic:
        case SharedCritic():
            size = actor.config.get_text_config().hidden_size
            return Shared(actor, ValueHead(size).to(assembler.device))
        case SeparateCritic(create=Shape() as shape):
            return Separate(actor, starting_at_zero(models.created_critic(shape)))
        case SeparateCritic():
            if reward_models and init is None:
                critic = _critic_like(assembler, reward_models[0], actor, folder)
            elif init == "policy":
                critic = starting_at_zero(models.new_scalar(actor, CRITIC, folder))
            else:
                place = assembler.round.folder(folder)
                trained = place / (assembler.config.reward_models or ("reward_model",))[0]
                critic = models.load_scalar(init or trained, "critic")
            return Separate(actor, critic)


def _critic_like(
    assembler: Assembler, reward_model: AdaptedScalar, actor: CausalModel, folder: Path
) -> ScalarModel:
    """Return a critic on the actor's trunk that starts as the reward model."""
    critic = assembler.models.new_scalar(actor, CRITIC, folder)
    copy_adapter(reward_model.view.model, str(reward_model.view.adapter), actor, CRITIC)
    critic.head.load_state_dict(reward_model.head.state_dict())
    critic.centre = reward_model.centre
    return critic
