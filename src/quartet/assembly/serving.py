"""A trained reward model that scores texts, for `quartet serve-reward`."""

from pathlib import Path
from typing import Any

import torch

from quartet.data.encoding import Encoder
from quartet.distributed.offload import MAIN_MEMORY
from quartet.experience import Prompt, Rollout
from quartet.io.texts import excerpt
from quartet.models.actor_critic import freeze
from quartet.models.chat import turn_end
from quartet.models.heads import ScalarModel, scores_last_token
from quartet.models.language_model import ModelError, load_tokenizer, longest_of, read_config
from quartet.models.precision import dtype_of
from quartet.models.text import response_ids
from quartet.rewards.protocol import Reward, RewardError, Score
from quartet.rewards.reward_model import ModelReward
from quartet.rewards.serve import BadRequest, ScoringRequest
from quartet.rewards.text_models import TextModelReward, the_label


class TextScorer:
    """Scores prompts and responses as a run does: the two are tokenized separately, and the
    token that ends a turn or a sequence follows a response that ended."""

    def __init__(
        self, folder: Path, device: torch.device | None, micro_batch_tokens: int = 4096
    ) -> None:
        """`folder` is a run folder or a reward model's folder. The model is held in the precision
        that "auto" gives a frozen one on the device; None is the CPU."""
        path = folder / "reward_model" if (folder / "reward_model").is_dir() else folder
        if not path.is_dir():
            raise ModelError(f"{folder}: no such folder.")
        if members := sorted(folder.glob("reward_model-*")):
            raise ModelError(
                f"{folder}: the run trained {len(members)} reward models. Name the folder of one, "
                f"such as {members[0]}."
            )
        config = read_config(path)
        the_label(str(path), config.num_labels, None)
        self.path, self.encoder = path, None
        self.limit, dtype = longest_of(config), dtype_of("auto", device or MAIN_MEMORY)
        self.reward: Reward
        if not scores_last_token(config):
            self.reward = TextModelReward.load(
                "model", path, None, micro_batch_tokens, device, dtype
            )
            return
        self.encoder = Encoder(
            load_tokenizer(path), max_prompt_tokens=self.limit, max_response_tokens=self.limit
        )
        scalar = freeze(ScalarModel.load(path, device)).compute_in(dtype)
        self.reward = ModelReward(scalar, micro_batch_tokens)

    def __call__(self, request: ScoringRequest) -> list[Score]:
        """Return the score of each response. Raises `BadRequest` if a text cannot be scored."""
        if not request.responses:
            return []
        rows = zip(request.prompts, request.responses, request.ended, strict=True)
        rollouts = [self._rollout(i, *row) for i, row in enumerate(rows)]
        try:
            return self.reward.score(rollouts)
        except RewardError as error:
            if self.encoder is None:  # a text is longer than the model reads
                raise BadRequest(str(error)) from None
            raise

    def _rollout(self, number: int, prompt: Any, response: str, ended: bool) -> Rollout:
        try:
            prompt_ids, ids = self._ids(prompt, response, ended)
        except Exception as error:  # whatever a tokenizer or a chat template raises
            raise BadRequest(
                f"response {number}: cannot be tokenized: {excerpt(str(error))}"
            ) from None
        if self.encoder is not None and not prompt_ids and not ids:
            raise BadRequest(
                f"response {number} and its prompt are empty: there is no token to score."
            )
        if len(prompt_ids) + len(ids) > self.limit:
            raise BadRequest(
                f"response {number} and its prompt have more than {self.limit:,} tokens, the most "
                "that the model reads."
            )
        text = prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)
        return Rollout(
            id=str(number),
            prompt=Prompt(
                str(number), prompt_ids, text, messages=None if isinstance(prompt, str) else prompt
            ),
            group=number,
            response_ids=ids,
            response=response,
            logprobs=(0.0,) * len(ids),
            finish_reason="stop" if ended else "length",
            policy_version=0,
        )

    def _ids(
        self, prompt: Any, response: str, ended: bool
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the tokens of the prompt and of the response; none for a model that reads text."""
        if self.encoder is None:
            return (), ()
        tokenizer = self.encoder.tokenizer
        end = tokenizer.eos_token_id if isinstance(prompt, str) else turn_end(tokenizer)
        ids = response_ids(tokenizer, response, end if ended else None)
        return tuple(self.encoder.prompt_ids(prompt)), tuple(ids)
