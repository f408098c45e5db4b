"""What writes a run's answers: the model itself, or servers; in one turn or several."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from quartet.config.tables import Config
from quartet.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from quartet.distributed.sharding import GatheredWeights
from quartet.generation.dialects import DIALECTS
from quartet.generation.episodes import Environment, Episodes
from quartet.generation.protocol import Generator, Weights
from quartet.generation.rank_zero import RankZeroGenerator
from quartet.generation.servers import ServedGenerator
from quartet.generation.source import GeneratorContext, Native, Servers
from quartet.models.adapters import (
    POLICY,
    adapter_active,
    adapters_of,
    in_adapter,
    merged_state,
    save_adapter,
)
from quartet.models.language_model import stop_ids
from quartet.models.protocols import CausalModel, Tokenizer
from quartet.rewards.functions import check_reference
from quartet.rewards.protocol import RewardError
from quartet.rewards.worker import load
from quartet.worlds import World


class Generators:
    """Makes the generators of a run."""

    def __init__(
        self, config: Config, tokenizer: Tokenizer, max_tokens: int, world: World | None
    ) -> None:
        """`max_tokens` is the length limit of a whole conversation."""
        self.config, self.tokenizer, self.max_tokens = config, tokenizer, max_tokens
        self.environment = _environment(config, world)

    def in_process(
        self, model: Any, process_group: ProcessGroup = SINGLE_PROCESS, copied: bool = False
    ) -> Generator:
        """Return the config's generator for a model of this process; the native one where the
        config names servers. A user's own is called on rank 0 alone. `copied`: the model is a copy
        of the one that learns."""
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
            return self.in_turns(Native().make(context), process_group)
        own = source.make(replace(context, process_group=SINGLE_PROCESS))
        if process_group is not SINGLE_PROCESS:
            own = RankZeroGenerator(own, process_group)
        return self.in_turns(own, process_group)

    def in_turns(self, turns: Generator, process_group: ProcessGroup) -> Generator:
        """Answers of one turn, or of several where there is an environment."""
        if self.environment is None:
            return turns
        make, max_turns = self.environment
        return Episodes(turns, self.tokenizer, make, max_turns, self.max_tokens, process_group)

    def asked(self, servers: ServedGenerator, process_group: ProcessGroup) -> Generator:
        """By one rank, where there are several. Adapters that go alone are all that is put together
        for a push."""
        only = partial(in_adapter, POLICY) if servers.save_base is not None else None
        return self.in_turns(
            servers
            if process_group is SINGLE_PROCESS
            else RankZeroGenerator(servers, process_group, only),
            process_group,
        )

    def examined(self, model: Any, folder: Path) -> Generator:
        """Answers of a model that learns no more; one rank asks."""
        servers = self.servers(model, folder, SINGLE_PROCESS)
        return self.in_process(model) if servers is None else self.asked(servers, SINGLE_PROCESS)

    def servers(
        self, actor: CausalModel, folder: Path, process_group: ProcessGroup
    ) -> ServedGenerator | None:
        """Those of other processes, where the config names them; they are given the model's weights
        at once. Where it has an adapter, that may be all they are given later."""
        settings = self.config.generator
        if not isinstance(settings, Servers):
            return None
        adapter = settings.adapter and bool(adapters_of(actor))

        def write(place: Path, tensors: Mapping[str, Any]) -> None:
            if adapter:
                save_adapter(actor, POLICY, place, tensors)
            else:
                actor.save_pretrained(
                    place,
                    state_dict=merged_state(actor, tensors)
                    if adapters_of(actor)
                    else dict(tensors),
                )
                self.tokenizer.save_pretrained(place)

        def write_base(place: Path, tensors: Mapping[str, Any]) -> None:
            with adapter_active(actor, None):
                actor.save_pretrained(place, state_dict=merged_state(actor, tensors))
            self.tokenizer.save_pretrained(place)

        made = ServedGenerator(
            DIALECTS[settings.type],
            settings.urls,
            write,
            Path(settings.shared) if settings.shared else folder / "weights",
            self.tokenizer,
            stop_ids(actor, self.tokenizer),
            self.config.seed,
            settings.timeout,
            save_base=write_base if adapter else None,
            vocab_size=actor.config.get_text_config().vocab_size,
        )
        RankZeroGenerator(made, process_group).load_weights(Weights(0, GatheredWeights(actor)))
        return made


def _environment(
    config: Config, world: World | None
) -> tuple[Callable[[], Environment], int] | None:
    """What makes one, and how many turns the policy has."""
    table, own = config.environment, getattr(world, "environment", None)
    if table is not None:
        check_reference(table.function, "environment.function")
        make = load(table.function)
        if missing := [
            name for name in ("reset", "step") if not callable(getattr(make, name, None))
        ]:
            raise RewardError(
                f'environment.function = "{table.function}": has no method {missing[0]}.'
            )
        return make, table.max_turns
    return None if own is None else (own, getattr(world, "max_turns", 8))
