"""The generators of a run: a model in this process or servers, with or without an environment."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from quartet.config.tables import Config
from quartet.distributed.offload import MAIN_MEMORY
from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.distributed.sharding import GatheredWeights
from quartet.generation.dialects import DIALECTS
from quartet.generation.episodes import Environment, Episodes
from quartet.generation.protocol import Generator, Weights
from quartet.generation.rank_zero import RankZeroGenerator
from quartet.generation.servers import ServedGenerator
from quartet.generation.source import GeneratorContext, Native, Servers
from quartet.generation.transfer import WeightTransfer
from quartet.models.adapters import (
    POLICY,
    adapter_active,
    adapters_of,
    in_adapter,
    merged_state,
    save_adapter,
)
from quartet.models.language_model import ModelError, save_weights, stop_ids
from quartet.models.precision import compute_dtype
from quartet.models.protocols import CausalModel, Tokenizer
from quartet.models.support import ids_outside
from quartet.models.text import quoted_control
from quartet.rewards.functions import check_reference
from quartet.rewards.protocol import RewardError
from quartet.rewards.worker import load
from quartet.worlds import World


class Generators:
    """Creates the generators of a run."""

    def __init__(
        self, config: Config, tokenizer: Tokenizer, max_tokens: int, world: World | None
    ) -> None:
        """`max_tokens` is the length limit of a whole conversation."""
        self.config, self.tokenizer, self.max_tokens = config, tokenizer, max_tokens
        self.environment = _environment(config, world)
        for string in config.rollout.stop if config.reads("rollout") else ():
            if (control := quoted_control(tokenizer, string)) is not None:
                raise ModelError(
                    f'rollout.stop: "{string}" contains the control token {control}, and the text '
                    "of a response has none. Tokens that end a turn or a sequence end responses "
                    "already; take it out."
                )

    def in_process(
        self, model: Any, process_group: ProcessGroup = SINGLE_PROCESS, copied: bool = False
    ) -> Generator:
        """Return the config's generator for a model in this process; the native generator if the
        config names servers. A user-defined generator runs on rank 0 alone. `copied` says that the
        model is a copy of the one that is trained."""
        source = self.config.generator
        context = GeneratorContext(
            model,
            self.tokenizer,
            stop_ids(model, self.tokenizer),
            self.config.seed,
            copied,
            process_group,
        )
        if isinstance(source, Native | Servers):
            return self._with_environment(Native().make(context), process_group)
        custom = source.make(replace(context, process_group=SINGLE_PROCESS))
        if process_group is not SINGLE_PROCESS:
            custom = RankZeroGenerator(custom, process_group)
        return self._with_environment(custom, process_group)

    def from_servers(self, servers: ServedGenerator, process_group: ProcessGroup) -> Generator:
        """Return the generator that samples with servers. Of several ranks, rank 0 sends the
        requests."""
        if process_group is SINGLE_PROCESS:
            return self._with_environment(servers, process_group)
        # Servers that receive only the adapter need only its weights gathered from the ranks.
        only = partial(in_adapter, POLICY) if servers.save_base is not None else None
        generator = RankZeroGenerator(servers, process_group, only)
        return self._with_environment(generator, process_group)

    def for_evaluation(self, model: Any, folder: Path) -> Generator:
        """Return a generator for a model that is no longer trained, for use by a single rank."""
        servers = self.servers(model, folder, SINGLE_PROCESS)
        if servers is None:
            return self.in_process(model)
        return self.from_servers(servers, SINGLE_PROCESS)

    def _with_environment(self, turns: Generator, process_group: ProcessGroup) -> Generator:
        """Return a generator of whole episodes if there is an environment; else `turns`, which
        samples single turns."""
        if self.environment is None:
            return turns
        environment, max_turns = self.environment
        return Episodes(
            turns, self.tokenizer, environment, max_turns, self.max_tokens, process_group
        )

    def servers(
        self, actor: CausalModel, folder: Path, process_group: ProcessGroup
    ) -> ServedGenerator | None:
        """Return the generator for the servers that the config names, which receive the actor's
        weights at once; None if it names none.

        With `generator.adapter` the servers receive the base model once, and then adapters only.
        """
        settings = self.config.generator
        if not isinstance(settings, Servers):
            return None
        sends_adapter = settings.adapter and bool(adapters_of(actor))
        generator = ServedGenerator(
            DIALECTS[settings.type],
            settings.urls,
            partial(self._save_adapter if sends_adapter else self._save_model, actor),
            Path(settings.shared) if settings.shared else folder / "weights",
            self.tokenizer,
            stop_ids(actor, self.tokenizer),
            self.config.seed,
            settings.timeout,
            save_base=partial(self._save_base, actor) if sends_adapter else None,
            sleeps=settings.sleeps,
            vocab_size=actor.config.get_text_config().vocab_size,
            excluded=ids_outside(actor),
            transfer=self._transfer(actor) if settings.sends_weights else None,
        )
        weights = Weights(0, GatheredWeights(actor))
        RankZeroGenerator(generator, process_group).load_weights(weights)
        return generator

    def _transfer(self, actor: CausalModel) -> WeightTransfer:
        """Return what sends the actor's weights to servers. Raises ModelError without a GPU."""
        device = next(actor.parameters()).device
        if device.type != "cuda":
            raise ModelError(
                f'generator.transfer = "nccl": sends weights from GPU to GPU, and this run is on '
                f'{device.type}. Take it out; "folder" works everywhere.'
            )
        return WeightTransfer(partial(_in_a_folder, actor), compute_dtype(actor), device)

    def _save_model(self, actor: CausalModel, folder: Path, tensors: Mapping[str, Any]) -> None:
        """Write the actor with its tokenizer, adapters merged, in the dtype that it computes in: a
        server rounds to that anyway, and half the bytes travel."""
        adapted = adapters_of(actor)
        state = merged_state(actor, tensors, MAIN_MEMORY) if adapted else dict(tensors)
        save_weights(actor, folder, state, compute_dtype(actor))
        self.tokenizer.save_pretrained(folder)

    def _save_adapter(self, actor: CausalModel, folder: Path, tensors: Mapping[str, Any]) -> None:
        """Write the actor's adapter alone."""
        save_adapter(actor, POLICY, folder, tensors)

    def _save_base(self, actor: CausalModel, folder: Path, tensors: Mapping[str, Any]) -> None:
        """Write the base model without the adapter, with the tokenizer."""
        with adapter_active(actor, None):
            state = merged_state(actor, tensors, MAIN_MEMORY)
        save_weights(actor, folder, state, compute_dtype(actor))
        self.tokenizer.save_pretrained(folder)


def _in_a_folder(actor: CausalModel, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors that a model folder of the actor has, by their names there: adapters
    merged, and a tensor with two names once. What was merged is rounded to what the actor computes
    in: all of it is on the actor's device until it was sent."""
    dtype = compute_dtype(actor)
    state = merged_state(actor, tensors, dtype=dtype) if adapters_of(actor) else dict(tensors)
    first_names: dict[tuple[int, torch.Size], str] = {}
    once = {
        name: tensor
        for name, tensor in state.items()
        if first_names.setdefault((tensor.data_ptr(), tensor.shape), name) == name
    }
    return dict(revert_weight_conversion(actor, once))


def _environment(
    config: Config, world: World | None
) -> tuple[Callable[[], Environment], int] | None:
    """Return what creates an environment, and the number of turns of an episode; None if neither
    the config nor the world has an environment."""
    table = config.environment
    if table is None:
        of_world = getattr(world, "environment", None)
        return None if of_world is None else (of_world, getattr(world, "max_turns", 8))
    check_reference(table.function, "environment.function")
    environment = load(table.function)
    for method in ("reset", "step"):
        if not callable(getattr(environment, method, None)):
            raise RewardError(f'environment.function = "{table.function}": has no method {method}.')
    return environment, table.max_turns
