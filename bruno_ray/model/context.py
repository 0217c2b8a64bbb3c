"""How many tokens a model can look at."""

from transformers import PreTrainedConfig

UNLIMITED_CONTEXT = 32768
"""Tokens; of models that name no limit, such as those without position embeddings."""


def context_length(config: PreTrainedConfig) -> int:
    """Tokens of prompt and answer together, by the (text) model's config."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or UNLIMITED_CONTEXT
