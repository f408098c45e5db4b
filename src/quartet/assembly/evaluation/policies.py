"""The policies of an evaluation: runs, their checkpoints, model folders, hub ids and servers."""

import contextlib
import dataclasses
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quartet.assembly.checkpoint_models import checkpoint_path, with_weights, write_models
from quartet.assembly.device import device
from quartet.assembly.evaluation.answers import Answer
from quartet.assembly.named import resolved_model
from quartet.config.tables import Config
from quartet.config.toml import read_settings
from quartet.data.encoding import Encoder
from quartet.data.examples import Example
from quartet.errors import QuartetError
from quartet.experience import Prompt, Rollout
from quartet.files import fingerprint
from quartet.generation.native import NativeGenerator
from quartet.generation.sampling import Sampling
from quartet.models.actor_critic import freeze
from quartet.models.forward import policy_logprobs
from quartet.models.hub import commit_on_hub
from quartet.models.language_model import load_model, load_tokenizer, longest_of, stop_ids
from quartet.models.precision import compute_in, dtype_of
from quartet.models.support import limit_support
from quartet.rewards.protocol import RewardError
from quartet.rewards.remote import Endpoint
from quartet.training.batch import collate

LABEL = re.compile(r"([\w.+-]+)=(.+)", re.DOTALL)
"""A policy or set with a name before it: `big=runs/latest`."""
CONFIG = "config.resolved.toml"
MICRO_BATCH_TOKENS = 8192
"""Tokens of one forward pass that scores texts."""


class EvaluationError(QuartetError, ValueError):
    """An evaluation that cannot be made. The message is a sentence for the user."""


def labelled(words: str) -> tuple[str | None, str]:
    """Return the name before "=" and what follows; None where there is no name."""
    match = LABEL.fullmatch(words)
    return (match[1], match[2]) if match else (None, words)


def is_run(path: Path) -> bool:
    """Return whether a folder is that of a run. An exported model has the run's settings, too."""
    return (path / CONFIG).is_file() and not (path / "config.json").is_file()


def run_config(run: Path) -> Config:
    """Return the settings of a run folder. Raises ConfigError."""
    return read_settings(run / CONFIG).config


@dataclass(frozen=True)
class LocalPolicy:
    """A policy whose weights this process reads."""

    name: str
    source: str
    """A folder or hub id; where there is a `checkpoint`, the run's folder."""
    checkpoint: Path | None = None
    has_weights = True

    @property
    def identity(self) -> Any:
        """What tells this policy from others: its weights' files, or its hub id and commit."""
        if self.checkpoint is not None:
            return [str(self.checkpoint), _files_of(self.checkpoint)]
        is_folder = Path(self.source).is_dir()
        return [
            self.source,
            _files_of(Path(self.source)) if is_folder else commit_on_hub(self.source),
        ]

    @property
    def tokenizer_folder(self) -> str | None:
        """The folder or hub id with the policy's tokenizer; None where only its checkpoint tells
        it."""
        if self.checkpoint is None:
            return self.source
        run = Path(self.source)
        written = (run / name for name in ("policy", "sft"))
        return next((str(p) for p in written if (p / "config.json").is_file()), None)

    @contextlib.contextmanager
    def opened(self) -> Iterator["LoadedPolicy"]:
        """Load the policy; it is given up at the end."""
        if self.checkpoint is None:
            yield LoadedPolicy(self.source)
            return
        with tempfile.TemporaryDirectory() as scratch:
            write_models(Path(self.source), self.checkpoint, Path(scratch))
            loaded = LoadedPolicy(str(_policy_folder(Path(scratch), self.name)))
        yield loaded


class LoadedPolicy:
    """A language model with its tokenizer, to be sampled from and to score texts."""

    def __init__(self, folder: str) -> None:
        self.folder, place = folder, device("auto")
        self.tokenizer = load_tokenizer(folder)
        model = limit_support(load_model(folder, place), self.tokenizer)
        self.model = compute_in(freeze(model), dtype_of("auto", place))
        self.longest = longest_of(self.model.config)

    def answers(
        self, examples: Sequence[Example], sampling: Sampling, samples: int, seed: int
    ) -> list[Answer]:
        """Return the answers to each prompt, those to one prompt next to each other."""
        room = self.longest - sampling.max_new_tokens
        if room < 1:
            raise EvaluationError(
                f"{self.folder}: reads at most {self.longest:,} tokens, which leaves none for a "
                f"prompt. Lower --max-new-tokens from {sampling.max_new_tokens:,}."
            )
        encoder = Encoder(self.tokenizer, room, room, max_tokens=self.longest)
        prompts = encoder.prompts(examples)
        stops = stop_ids(self.model, self.tokenizer)
        generator = NativeGenerator(self.model, self.tokenizer, stops, seed)
        rollouts = generator.generate(prompts, sampling, samples)
        return [
            Answer(
                rollout.response,
                rollout.finish_reason == "stop",
                len(rollout.response_ids),
                rollout.prompt.ids,
                rollout.response_ids,
            )
            for rollout in rollouts
        ]

    def logprobs(self, answers: Sequence[Answer], temperature: float) -> list[float]:
        """Return the log-probability of each answer's tokens, in nats."""
        rollouts = [_as_rollout(i, a.prompt_ids, a.ids) for i, a in enumerate(answers)]
        return self._sums(rollouts, temperature)

    def losses(self, examples: Sequence[Example]) -> list[tuple[float, int]]:
        """Return the negative log-probability of each text, in nats, and its tokens; of a prompt
        with a completion, that of the completion."""
        encoder = Encoder(self.tokenizer, self.longest, self.longest, max_tokens=self.longest)
        # A conversation whose template rewrites earlier answers becomes a record for each answer.
        records = [(row, r) for row, e in enumerate(examples) for r in encoder.demonstrations([e])]
        rollouts = [
            dataclasses.replace(
                _as_rollout(i, r.prompt_ids, r.response_ids), policy_mask=r.loss_mask
            )
            for i, (_, r) in enumerate(records)
        ]
        losses, counts = [0.0] * len(examples), [0] * len(examples)
        for (row, r), total in zip(records, self._sums(rollouts, 1.0), strict=True):
            losses[row] -= total
            counts[row] += len(r.response_ids) if r.loss_mask is None else sum(r.loss_mask)
        return list(zip(losses, counts, strict=True))

    def _sums(self, rollouts: Sequence[Rollout], temperature: float) -> list[float]:
        batch = collate(rollouts)
        logprobs = policy_logprobs(
            self.model,
            batch.tokens,
            batch.lengths,
            batch.response_mask,
            temperature,
            MICRO_BATCH_TOKENS,
        )
        sums: list[float] = logprobs.double().sum(dim=1).tolist()
        return sums


@dataclass(frozen=True)
class ServedPolicy:
    """A policy behind an OpenAI-compatible endpoint, as vLLM, SGLang and llama.cpp have it."""

    name: str
    url: str
    model: str
    token_env: str | None = None
    timeout: float = 600.0
    parallel: int = 16
    has_weights = False

    @property
    def identity(self) -> Any:
        """The server and the model's name; they do not tell when the weights change."""
        return [self.url, self.model]

    @contextlib.contextmanager
    def opened(self) -> Iterator["ServedPolicy"]:
        yield self

    def answers(
        self, examples: Sequence[Example], sampling: Sampling, samples: int, seed: int
    ) -> list[Answer]:
        """Return the answers to each prompt. A plain prompt is a message of the user, unless the
        endpoint is `/completions`. Raises RewardError where the server gives no answer."""
        requests = [
            self._request(example, sampling, seed + row * samples + sample)
            for row, example in enumerate(examples)
            for sample in range(samples)
        ]
        endpoint = Endpoint("policy", self.url, self.timeout, 3, self.token_env)
        answers: list[Answer | None] = [None] * len(requests)
        try:
            with contextlib.closing(endpoint.ask_each(requests, self.parallel)) as replies:
                for i, reply in replies:
                    answers[i] = self._answer(reply)
        finally:
            endpoint.close()
        return [answer for answer in answers if answer is not None]

    def _request(self, example: Example, sampling: Sampling, seed: int) -> dict[str, Any]:
        prompt = example.prompt
        question: dict[str, Any] = {"messages": prompt}
        if self.url.endswith("/chat/completions"):
            if isinstance(prompt, str):
                question = {"messages": [{"role": "user", "content": prompt}]}
        elif isinstance(prompt, str):
            question = {"prompt": prompt}
        else:
            raise EvaluationError(
                f"{self.url}: takes texts, and {example.id} is a conversation. Name the endpoint "
                "/chat/completions."
            )
        filters = {"top_p": sampling.top_p} if sampling.top_p < 1 else {}
        filters |= {"top_k": sampling.top_k} if sampling.top_k else {}
        ends: dict[str, Any] = {"stop": list(sampling.stop)} if sampling.stop else {}
        ends |= {"min_tokens": sampling.min_new_tokens} if sampling.min_new_tokens else {}
        return {
            "model": self.model,
            **question,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "seed": seed % 2**31,
            **filters,
            **ends,
        }

    def _answer(self, reply: Any) -> Answer:
        if isinstance(reply, RewardError):
            raise reply
        try:
            choice = reply["choices"][0]
            text = choice["message"]["content"] if "message" in choice else choice["text"]
            ended = choice.get("finish_reason") != "length"
        except (KeyError, IndexError, TypeError, AttributeError):
            text, ended = None, False
        if not isinstance(text, str):
            raise RewardError(f"policy {self.url} answered without a text in choices[0].")
        usage = reply.get("usage")
        tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
        return Answer(text, ended, tokens if isinstance(tokens, int) else len(text.split()))


Policy = LocalPolicy | ServedPolicy


def check_one_vocabulary(first: LocalPolicy, others: Sequence[LocalPolicy]) -> None:
    """Raise EvaluationError where a policy's tokenizer has other tokens than that of `first`, whose
    log-probs of the policy's answers would be of other texts."""
    folders: dict[str, str] = {}
    for policy in (first, *others):
        if policy.tokenizer_folder is not None:
            folders.setdefault(policy.tokenizer_folder, policy.name)
    known = [(name, load_tokenizer(folder).get_vocab()) for folder, name in folders.items()]
    for name, vocabulary in known[1:]:
        if vocabulary != known[0][1]:
            raise EvaluationError(
                f"--measure kl: {name} and {known[0][0]} have tokenizers with different tokens, so "
                "they cannot score each other's answers. Leave kl out, or compare two policies "
                "with one tokenizer."
            )


def policies_of(words: str, token_env: str | None = None) -> list[Policy]:
    """Return the policies that a word of the command names: RUN, RUN@STEP, RUN@NAME (a checkpoint,
    or a model of the run such as sft), RUN@start, RUN@all (each checkpoint, then the last policy),
    FOLDER, a hub id, or URL#MODEL. `name=` before it gives the policy a name. Raises a
    QuartetError for one that does not exist."""
    name, spec = labelled(words)
    if spec.startswith(("http://", "https://")):
        return [_served(name, spec, token_env)]
    place, _, version = (
        spec.rpartition("@") if "@" in spec and not Path(spec).exists() else (spec, "", "")
    )
    path = Path(place)
    if not is_run(path):
        if version:
            raise EvaluationError(f"{spec}: {place} is no run folder, so it has no {version}.")
        return [LocalPolicy(name or _short(spec), str(resolved_model("policy", spec)))]
    run = path.resolve()
    if version == "all":
        paths = [p for p in reversed(with_weights(run)) if _writes_policy(run, p)]
        steps = [_at_checkpoint(f"{name or run.name}@{_step_of(p)}", run, p) for p in paths]
        return [*steps, LocalPolicy(name or run.name, str(_policy_folder(run, spec)))]
    if not version:
        return [LocalPolicy(name or run.name, str(_policy_folder(run, spec)))]
    if version == "start":
        return [LocalPolicy(name or f"{run.name}@start", start_of(run))]
    if (run / version / "config.json").is_file():
        return [LocalPolicy(name or f"{run.name}@{version}", str(run / version))]
    return [_at_checkpoint(name or f"{run.name}@{version}", run, checkpoint_path(run, version))]


def start_of(run: Path) -> str:
    """Return the folder or hub id of what the policy of a run was trained from."""
    config = run_config(run)
    if (run / "sft").is_dir() and config.recipe[-1:] != ("sft",):
        return str(run / "sft")
    if config.policy.model is None:
        raise EvaluationError(
            f"{run.name}: its policy was created with random weights, so it has no start to "
            "compare with. Name another policy with --against."
        )
    return str(resolved_model("policy.model", config.policy.model))


def _writes_policy(run: Path, checkpoint: Path) -> bool:
    """Return whether a checkpoint is of the stage that wrote the run's last policy."""
    stages = [s for s in run_config(run).stages if s != "evaluation" and "reward_model" not in s]
    return bool(stages) and checkpoint.name.rpartition("-")[0] == stages[-1]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _at_checkpoint(name: str, run: Path, checkpoint: Path) -> LocalPolicy:
    return LocalPolicy(name, str(run), checkpoint)


def _policy_folder(run: Path, words: str) -> Path:
    """Return the folder of a run's last policy. Raises EvaluationError if it has none yet."""
    folder = next((run / n for n in ("policy", "sft") if (run / n / "config.json").is_file()), None)
    if folder is None:
        raise EvaluationError(
            f"{words}: the run has written no policy yet. Name one of its checkpoints, "
            "RUN@STEP, or wait for the end of its first stage."
        )
    return folder


def _served(name: str | None, spec: str, token_env: str | None) -> ServedPolicy:
    url, _, model = spec.partition("#")
    if not model:
        raise EvaluationError(
            f"{spec}: name the model that the server should answer with: {spec}#MODEL."
        )
    if not url.endswith("/completions"):
        url = url.rstrip("/") + "/chat/completions"
    return ServedPolicy(name or _short(model), url, model, token_env)


def _short(spec: str) -> str:
    return Path(spec).name or spec


def _files_of(folder: Path) -> list[Any]:
    """Return the name, size and contents of each file of weights; of large ones, the first MB and
    the time of the last change."""
    found = []
    for path in sorted(folder.rglob("*.safetensors")):
        facts = path.stat()
        head = fingerprint(path, 1 << 20)["sha256"]
        found.append([path.name, facts.st_size, facts.st_mtime_ns, head])
    return found


def _as_rollout(row: int, prompt_ids: Sequence[int], ids: Sequence[int]) -> Rollout:
    """Return token ids as a rollout, without a text."""
    return Rollout(
        id=str(row),
        prompt=Prompt(str(row), tuple(prompt_ids), ""),
        group=row,
        response_ids=tuple(ids),
        response="",
        logprobs=(0.0,) * len(ids),
        finish_reason="stop",
        policy_version=0,
    )
