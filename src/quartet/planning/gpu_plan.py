"""What a run will take on the device that it would use: on this machine's GPU its memory there in
each phase, and its time where the GPU's rates are known. None of it was measured on a GPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from quartet.config.rules.base import has_trust_region
from quartet.config.tables import Config
from quartet.planning.cluster import splits
from quartet.planning.device import CPU, Device
from quartet.planning.gpu_memory import (
    Workload,
    decoder_weights,
    load_peak,
    memory_between_updates,
    micro_batch_tokens,
    native_generation,
    reward_model_workload,
    stage_workload,
    training_memory,
    workload,
)
from quartet.planning.hardware import COMPUTE, CannotFit, Cluster, Gpu, Span
from quartet.planning.memory import (
    FLOAT,
    reference_share,
    reward_model_parameters,
)
from quartet.planning.phases import has_reward_model, minibatch_tokens
from quartet.planning.plan import Plan, plan, row_tokens
from quartet.planning.seconds import START_SECONDS
from quartet.runs.rounds import round_of
from quartet.stages.kinds import BEST_OF_RESPONSES


def plan_on(config: Config, device: Device | None) -> Plan:
    """Return the plan of a run on a device; None is one that this machine does not have, of which
    neither memory nor time are known."""
    on_cpu = plan(config)
    if device == CPU:
        return on_cpu
    if device is None or device.kind != "cuda":
        return replace(on_cpu, device=device, memory=None, seconds=None)
    config = _as_computed(config, device)
    limit = micro_batch_tokens(config, device.memory, config.launch.processes)
    span = None if device.gpu is None else _time(config, device.gpu, on_cpu.tokens, limit)
    return replace(
        on_cpu,
        device=device,
        memory=_phases(config, device, on_cpu.models, limit),
        seconds=None if span is None else span.middle,
        span=span,
    )


def _as_computed(config: Config, device: Device) -> Config:
    """Return the config with the precision that "auto" gives its policy on a GPU."""
    needs_fp32 = has_trust_region(config) or not device.has_bf16
    if config.run.precision_of("policy") == "auto" and needs_fp32:
        return replace(config, run=replace(config.run, precision="fp32"))
    return config


def _ranks(config: Config) -> int:
    """Return how many GPUs a model is divided over."""
    launch = config.launch
    return launch.parts(launch.processes) if launch.shard else 1


def _rl_workload(config: Config, limit: int) -> Workload:
    """Return what the RL stage computes with micro-batches of at most so many tokens."""
    return replace(workload(config), micro_tokens=limit, config=None)


@dataclass
class _Held:
    """The bytes on each GPU at the peak of each phase."""

    device: Device
    ranks: int
    limit: int
    """Tokens of a micro-batch."""
    by_phase: dict[str, float] = field(default_factory=dict)

    def training(
        self, stage: str, work: Workload, tokens: float, keeps_best: bool, sampled: int = 0
    ) -> None:
        """Add a stage that trains on so many tokens at once, those of so many responses of its own
        if it samples any."""
        computed = replace(work, micro_tokens=int(min(self.limit, tokens)), config=None)
        best = FLOAT * work.trained / self.ranks if keeps_best else 0.0
        self.by_phase[stage] = best + sum(training_memory(computed, self.ranks).values())
        if sampled:
            self.sampling(stage, work, sampled)

    def sampling(self, stage: str, work: Workload, rows: int) -> None:
        """Add the phase of a stage that samples so many responses, unless servers do."""
        if not work.served:
            between = memory_between_updates(training_memory(work, self.ranks), work)
            taken = _sampling(replace(work, rows=rows), self.device, self.ranks, between)
            self.by_phase[f"{stage} sampling"] = taken


def _phases(
    config: Config, device: Device, models: Mapping[str, int | None], limit: int
) -> dict[str, float] | None:
    """Return the bytes on each GPU at the peak of each phase; None where the size of the policy is
    not known. `limit` are the tokens of a micro-batch."""
    base, row, ranks = stage_workload(config), row_tokens(config), _ranks(config)
    if base is None:
        return None
    held = _Held(device, ranks, limit)
    scorer = reward_model_parameters(config, base.parameters) or base.parameters
    scorers = max(len(config.reward_models), 1) * has_reward_model(models)
    read = scorers * scorer / base.parameters
    reference = reference_share(config, base.parameters) if "reference" in models else 0.0
    if "sft" in config.recipe:
        work = stage_workload(config, config.sft.optimizer) or base
        held.training("sft", work, config.sft.batch_size * sum(row), config.sft.keep == "best")
    if "reward_model" in config.recipe:
        tokens = 2 * config.reward_model.batch_size * sum(row)
        work = reward_model_workload(config, base, scorer)
        held.training("reward model", work, tokens, config.reward_model.keep == "best")
    if config.preference_stage:
        work = stage_workload(config, config.preference.optimizer) or base
        tokens = config.preference.batch_size * (row[0] + 2 * row[1])
        work = replace(work, frozen=reference + read * config.has_online_pairs)
        rows = 2 * config.preference.batch_size * config.has_online_pairs
        best = config.preference.keep == "best"
        held.training(config.preference_stage, work, tokens, best, rows)
    if "ilql" in config.recipe:
        work = stage_workload(config, config.ilql.optimizer) or base
        held.training("ilql", work, config.ilql.batch_size * sum(row), config.ilql.keep == "best")
        heads = (4 + 1) * FLOAT * base.vocabulary * base.model.hidden
        held.by_phase["ilql"] += heads
    if (custom := config.stage_source) is not None:
        work = stage_workload(config, custom.optimizer) or base
        samples = custom.reads == "prompts"
        work = replace(work, frozen=reference + read * samples)
        tokens = custom.batch_size * sum(row)
        held.training("custom", work, tokens, False, custom.batch_size * samples)
    if config.rl_stage:
        work = _rl_workload(config, min(limit, int(minibatch_tokens(config, row[0]))))
        held.by_phase[f"{config.rl_stage} update"] = sum(training_memory(work, ranks).values())
        held.by_phase[f"{config.rl_stage} loading"] = load_peak(work, ranks)
        held.sampling(config.rl_stage, work, work.rows)
    if "evaluation" in config.recipe:
        answers = BEST_OF_RESPONSES if config.evaluation.best_of >= 2 else config.evaluation.prompts
        own = base.number * base.parameters if base.adapter is None else base.trunk
        taken = own + float(base.number * scorer * scorers)
        held.by_phase["evaluation"] = _sampling(replace(base, rows=answers), device, 1, taken)
    return held.by_phase


def _sampling(work: Workload, device: Device, ranks: int, taken: float) -> float:
    """Return the bytes on a GPU while it samples, beside the `taken` ones; where there is no room,
    those of one response."""
    gpu = Gpu(device.memory, flops=0.0, bandwidth=0.0)
    try:
        return taken + sum(native_generation(work, gpu, ranks, taken).memory.values())
    except CannotFit:
        whole = work.number * work.parameters if ranks > 1 else 0
        return taken + decoder_weights(work) + whole + work.row_bytes(work.prompt + work.longest)


def _time(config: Config, gpu: Gpu, tokens: Mapping[str, float], limit: int) -> Span | None:
    """Return the time of a run; None where the size of the policy is not known, or the RL stage
    does not fit. Generation outside of the RL stage is left out."""
    base = stage_workload(config)
    if base is None:
        return None
    scorer = reward_model_parameters(config, base.parameters) or base.parameters
    operations = 0.0
    for name, count in tokens.items():
        stage, _ = round_of(name)
        if stage != config.rl_stage and not stage.endswith("generated"):
            size = scorer if stage in config.reward_models else base.parameters
            operations += 6.0 * (size - base.model.idle_parameters) * count
    rate = gpu.rate(base.number) * config.launch.processes
    span = Span(*(START_SECONDS + operations / (rate * part) for part in reversed(COMPUTE)))
    if config.rl_stage is None:
        return span
    cluster = Cluster(gpu, config.launch.processes, "")
    in_turn = next(iter(splits(_rl_workload(config, limit), cluster)), None)
    if in_turn is None or in_turn.generators:
        return None
    steps = config.run.steps * config.num_rounds
    return span + Span(steps * in_turn.step.best, steps * in_turn.step.worst)
