"""What a run will take, estimated before torch is loaded."""

import math
from dataclasses import dataclass
from pathlib import Path

from quartet.algorithms.state_values import MonteCarloValues
from quartet.config.tables import Config, SharedCritic, StageTraining, TrainTokenizer
from quartet.loops.source import StageSource
from quartet.planning.device import CPU, Device
from quartet.planning.hardware import GB, LEGEND, RESERVED, Span, marked
from quartet.planning.memory import (
    FLOAT,
    adapter_parameters,
    policy_parameters,
    reference_parameters,
    reward_model_parameters,
    sizes,
    trained_bytes,
)
from quartet.planning.phases import has_reward_model, phases
from quartet.planning.seconds import seconds
from quartet.runs.rounds import round_of
from quartet.worlds import make_world


@dataclass(frozen=True)
class Plan:
    """What a run takes. A value that the config does not determine, such as the size of a model on
    the hub, is None."""

    models: dict[str, int | None]
    """Parameters of each model that the run needs, by role."""
    row_tokens: tuple[float, float]
    """Expected tokens of a prompt and of a response."""
    optimizer_steps: dict[str, int]
    tokens: dict[str, float]
    """Tokens that each stage trains on, once per epoch, and tokens that RL generates."""
    memory: dict[str, float] | None
    """Expected bytes in each phase: resident ones, or those on each GPU."""
    disk: float | None
    """Bytes."""
    seconds: float | None
    """On a GPU the middle of `span`."""
    device: Device | None = CPU
    """What memory and time are of: the memory is that of the GPU if it is one. None is a device
    that this machine does not have."""
    span: Span | None = None
    """The time on a GPU, from the best to the worst case to expect."""

    @property
    def peak(self) -> float | None:
        """The bytes of the phase that needs most."""
        return max(self.memory.values()) if self.memory else None


def plan(config: Config) -> Plan:
    """Return the models, tokens, memory, disk space and time of a run on this machine's CPUs."""
    policy = policy_parameters(config, vocabulary(config))
    models = _models(config, policy)
    row = row_tokens(config)
    steps, tokens = _work(config, row)
    return Plan(
        models=models,
        row_tokens=row,
        optimizer_steps=steps,
        tokens=tokens,
        memory=phases(config, models, policy, row) if policy else None,
        disk=_disk(config, models) if policy else None,
        seconds=seconds(config, policy, row, tokens) if policy else None,
    )


def _models(config: Config, policy: int | None) -> dict[str, int | None]:
    algorithm = config.algorithm
    models = {"policy": policy}
    is_compared = (
        (algorithm and algorithm.needs_reference)
        or (config.preference_stage and config.preference.loss.needs_reference)
        or (config.stage_source and config.stage_source.needs_reference)
    )
    reference = {"reference": reference_parameters(config, policy)} if is_compared else {}
    if (adapter := adapter_parameters(config)) is not None:
        on_the_trunk = config.reference.model is None
        return models | _adapters(config, adapter, policy) | ({} if on_the_trunk else reference)
    if algorithm and algorithm.needs_critic:
        models[
            "critic (head on the policy's trunk)"
            if isinstance(config.critic, SharedCritic)
            else "critic"
        ] = policy
    if config.reward_model_source or "reward_model" in config.recipe:
        models[_reward_role(config)] = reward_model_parameters(config, policy)
    return models | reference


def _adapters(config: Config, adapter: int, policy: int | None) -> dict[str, int | None]:
    """Return the models beside the policy in a run with an adapter, where the trunk is the
    reference unless that has a folder of its own: adapters on it, and reward models that were
    trained elsewhere."""
    model = sizes(config)
    leaves_experts_out = model is not None and model.idle_parameters > 0
    name = "adapter (attention only, no experts)" if leaves_experts_out else "adapter"
    roles: dict[str, int | None] = {name: adapter}
    if (
        config.algorithm
        and config.algorithm.needs_critic
        and not isinstance(config.critic, SharedCritic)
    ):
        roles["critic (adapter)"] = adapter
    if "reward_model" in config.recipe and config.reward_model.model is not None:
        roles[_reward_role(config)] = reward_model_parameters(config, policy)
    elif "reward_model" in config.recipe:
        roles[_reward_role(config, "adapter")] = adapter
    elif config.reward_model_source:
        roles["reward model"] = policy
    return roles


def _reward_role(config: Config, kind: str = "") -> str:
    """Return what a plan calls the run's reward models: how many there are, and of what kind."""
    members = len(config.reward_models)
    notes = [f"each of {members}"] * (members > 1) + [kind] * bool(kind)
    return f"reward model ({', '.join(notes)})" if notes else "reward model"


def vocabulary(config: Config) -> int | None:
    """Return the size of the policy's vocabulary, None where only loading the tokenizer tells."""
    if isinstance(config.policy.tokenizer, TrainTokenizer):
        return config.policy.tokenizer.vocab_size
    if config.policy.create is not None and config.data.world is not None:
        return make_world(config.data.world, config.seed, config.data.texts).vocabulary
    return None


def row_tokens(config: Config) -> tuple[float, float]:
    """Return the expected tokens of a prompt and of a response. A world states them; with files,
    both are taken to be a third of the longest that is allowed."""
    if config.data.world is not None:
        world = make_world(config.data.world, config.seed, config.data.texts)
        prompt, response = world.typical_tokens
        return float(prompt), float(response)
    return config.data.max_prompt_tokens / 3, config.rollout.max_new_tokens / 3


def _responses(config: Config) -> int:
    """Return the number of responses that the RL stage samples."""
    return config.run.steps * config.rollout.prompts_per_step * config.rollout.samples_per_prompt


def num_steps(config: Config, table: str) -> int:
    """Return the optimizer steps of the stage that a table such as "sft" describes. For epochs the
    rows of its files are counted, also those that a run will not use."""
    settings: StageTraining | StageSource = getattr(config, table)
    if isinstance(settings, StageSource):
        return settings.steps * settings.updates
    return settings.num_steps(
        0 if settings.epochs is None else _num_rows(config, table, settings.data)
    )


def _num_rows(config: Config, table: str, file: str | None) -> int:
    """Return how many rows the stage of a table trains on: those of its own file, or else of the
    world, which may have fewer than data.rows, or of data.train."""
    from quartet.data.files import rows

    data = config.data
    if file is None and data.world is not None:
        world = make_world(data.world, config.seed, data.texts)
        if table in {"sft", "ilql"}:
            return len(world.demonstrations(data.rows))
        online = table == "preference" and config.has_online_pairs
        return len(world.prompts(data.rows) if online else world.comparisons(data.rows))
    count = sum(1 for name in ((file,) if file else data.files) for _ in rows(Path(name)))
    return count - (0 if data.eval is not None else round(count * data.held_out))


def _work(config: Config, row: tuple[float, float]) -> tuple[dict[str, int], dict[str, float]]:
    steps: dict[str, int] = {}
    tokens: dict[str, float] = {}
    for stage in config.stages:
        name, _ = round_of(stage)
        if stage == "sft":
            steps[stage] = num_steps(config, "sft")
            tokens[stage] = steps[stage] * config.sft.batch_size * sum(row)
        elif name in config.reward_models:
            steps[stage] = num_steps(config, "reward_model")
            tokens[stage] = steps[stage] * config.reward_model.batch_size * 2 * sum(row)
        elif stage == config.preference_stage:
            steps[stage] = num_steps(config, "preference")
            pairs = steps[stage] * config.preference.batch_size
            if config.has_online_pairs:
                tokens[f"{stage}, generated"] = pairs * 2 * row[1]
            tokens[stage] = pairs * 2 * sum(row)
        elif stage == "ilql":
            steps[stage] = num_steps(config, "ilql")
            tokens[stage] = steps[stage] * config.ilql.batch_size * sum(row)
        elif stage == "custom":  # how many responses it samples is its own business
            steps[stage] = num_steps(config, "custom")
            assert config.stage_source is not None
            tokens[stage] = steps[stage] * config.stage_source.batch_size * sum(row)
        elif name == config.rl_stage:
            steps[stage] = config.run.steps * config.optim.epochs * config.optim.minibatches
            tokens[f"{stage}, generated"] = _responses(config) * row[1]
            tokens[stage] = _responses(config) * sum(row) * config.optim.epochs
            if continued := _continuation_tokens(config, row[1]):
                tokens[f"{stage}, continuations generated"] = continued
    return steps, tokens


def _continuation_tokens(config: Config, length: float) -> float:
    """Return the tokens that are sampled for Monte Carlo values from the states of responses of
    this length. Responses to one prompt share the first state. A separator is taken to be as
    frequent as `every` says."""
    advantage = config.algorithm and config.algorithm.advantage
    if not isinstance(advantage, MonteCarloValues):
        return 0.0
    later = math.fsum(
        length - t for t in range(advantage.every, math.ceil(length), advantage.every)
    )
    prompts = _responses(config) / config.rollout.samples_per_prompt
    return advantage.continuations * (prompts * length + _responses(config) * later)


def _disk(config: Config, models: dict[str, int | None]) -> float:
    """Return the bytes of model folders; of rollouts, about 25 bytes per token; and of checkpoints,
    the trained parameters and their moments for each that is kept and for one that is being
    written."""
    folders = ("sft" in config.recipe) + sum(
        role.partition(" (")[0] in {"policy", "critic"} for role in models
    )
    scorers = max(len(config.reward_models), 1) * has_reward_model(models)
    scorer = reward_model_parameters(config, models["policy"]) or models["policy"] or 0
    written = (
        _responses(config) * sum(row_tokens(config)) / config.run.keep_every
        if config.rl_stage
        else 0
    )
    learners = (
        2
        if config.algorithm
        and config.algorithm.needs_critic
        and not isinstance(config.critic, SharedCritic)
        else 1
    )
    kept = (
        0
        if config.policy.adapter
        else config.run.keep_last + (config.run.keep_best is not None) + 1
    )
    weights = FLOAT * (models["policy"] or 0)
    gradients = weights
    saved = trained_bytes(config.optim.optimizer, sizes(config), models["policy"] or 0) - gradients
    # A checkpoint of a stage that keeps its best weights has them, too.
    best = weights * any(settings.keep == "best" for _, settings in config.stage_trainings())
    checkpoint = max(saved * learners, saved + best)
    results = (weights * folders + FLOAT * scorer * scorers + 25 * written) * config.num_rounds
    return results + checkpoint * kept


def _size_in_words(count: int) -> str:
    """Return a number of parameters, in thousands where it is less than 0.1 M."""
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count / 1e3:.0f} k"


def in_words(plan: Plan) -> str:
    """Return the plan in one line: the models, the peak memory, the time."""
    words = [
        f"{role} {_size_in_words(count)}" if count else f"{role} ?"
        for role, count in plan.models.items()
    ]
    if plan.peak and plan.device == CPU:
        words.append(f"peak ≈ {plan.peak / 1e6:,.0f} MB")
    elif plan.peak and plan.device is not None:
        size = f"{plan.peak / GB:,.2f} of {plan.device.memory / GB:,.0f} GB"
        words.append(f"{marked('memory', f'peak {size}')} on {plan.device.name}")
    if plan.span is not None:
        ends = dict.fromkeys(map(duration, (plan.span.best, plan.span.worst)))
        words.append(marked("seconds", " to ".join(ends)))
    elif plan.seconds:
        words.append(f"≈ {duration(plan.seconds)}")
    return " · ".join(words)


def remarks(plan: Plan) -> list[str]:
    """Return sentences about the device of a plan: what is not known of it, whether the run fits,
    and what the marks of its figures mean. None for a CPU."""
    device = plan.device
    if device == CPU:
        return []
    if device is None:
        return [
            "run.device is a GPU that this machine does not have, so memory and time are not "
            "known. --on 1xh200 plans for a GPU that you name."
        ]
    if device.kind != "cuda":
        return [f"memory and time on {device.kind} are not known."]
    sentences = []
    if plan.peak and plan.memory and plan.peak > (room := device.memory * (1 - RESERVED)):
        phase = max(plan.memory, key=plan.memory.__getitem__)
        sentences.append(
            f"{phase} needs {plan.peak / GB:,.1f} GB, and {room / GB:,.1f} GB of {device.name} are "
            "usable. An adapter (policy.adapter.type=lora), policy.gradient_checkpointing, "
            "run.offload or fewer optim.micro_batch_tokens take less."
        )
    if device.gpu is None:
        sentences.append(f"the rates of {device.name} are not known here, so the time is not.")
    elif plan.span is not None:
        sentences.append(
            "The time leaves out what the host takes to ask for kernels, which is most of the time "
            "of small models."
        )
    return [*sentences, LEGEND]


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it: "45 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
