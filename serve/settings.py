"""Settings of serving."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineSettings:
    """How much one model copy takes on at a time."""

    max_rows: int = 64
    """Answers that are generated at the same time."""

    max_waiting: int = 256
    """Requests beyond those; more are refused."""

    kv_tokens: int = 0
    """Room for keys and values, in tokens, padding included; 0 takes a share of the free memory."""

    max_context: int = 0
    """Tokens of prompt and answer; 0 is what the model was made for."""

    prefill_tokens: int = 2048
    """Prompt tokens, padding included, that are read between two steps of the running answers."""
