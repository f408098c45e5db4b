"""What a model must have to be the reference of a policy (`reference.model`)."""

from quartet.config.tables import Config
from quartet.models.language_model import ModelError, load_tokenizer, longest_of, read_config
from quartet.models.protocols import Tokenizer


def check_reference(config: Config, folder: str, tokenizer: Tokenizer, longest: int) -> None:
    """Raise `ModelError` unless the model of a folder or hub id reads the policy's token ids, all
    of them, and texts as long as the policy's. `tokenizer` is the policy's, `longest` the most
    tokens that it reads."""
    try:
        config_of_reference = read_config(folder)
        vocabulary = load_tokenizer(folder).get_vocab()
    except ModelError as error:
        raise ModelError(f"reference.model: {error}") from error
    if vocabulary != tokenizer.get_vocab():
        raise ModelError(
            f"reference.model: {folder} has another tokenizer than the policy, so their log-probs "
            "are not of the same tokens. Use a model with the policy's tokenizer."
        )
    tokens = 1 + max(tokenizer.get_vocab().values())
    size = config_of_reference.get_text_config().vocab_size
    if tokens > size and not config.policy.resize_embeddings:
        raise ModelError(
            f"reference.model: {folder} knows only {size:,} tokens, and the policy's tokenizer has "
            f"{tokens:,}. Use a model that knows all of them."
        )
    limit = longest_of(config_of_reference)
    key, response = "rollout.max_new_tokens", config.rollout.max_new_tokens
    if config.rewarded_stage is None:
        key, response = "data.max_response_tokens", config.data.max_response_tokens
    needed = min(config.data.max_prompt_tokens + response, longest)
    if config.has_episodes and limit < longest:
        raise ModelError(
            f"reference.model: {folder} reads at most {limit:,} tokens, and a conversation can "
            f"have the {longest:,} that the policy reads. Use a reference that reads as many."
        )
    if limit < needed:
        raise ModelError(
            f"reference.model: {folder} reads at most {limit:,} tokens, and a prompt and a "
            f"response can have {needed:,}. Lower data.max_prompt_tokens or {key}."
        )
