"""How much fits: the room for keys and values, the longest context, and how fast the engine is."""

import logging
import threading
import time
from collections import deque

import psutil
import torch
from transformers import DynamicCache, PreTrainedConfig

from bruno_ray.generation.decoding import BufferedLayer
from bruno_ray.model.context import context_length
from serve.engine.kv_cache import RESERVE

logger = logging.getLogger(__name__)

GPU_SHARE = 0.45  # of the free memory, for keys and values; a long prompt is read into as much again
CPU_SHARE = 0.1  # of the available memory: other processes live there too
SECONDS = 5.0  # over which rates are taken


def kv_tokens_that_fit(filled: DynamicCache) -> int:
    """Tokens whose keys and values fit into a share of the free memory; ``filled`` is a cache of one token."""
    per_token: dict[torch.device, int] = {}
    for layer in filled.layers:
        if isinstance(layer, BufferedLayer):
            for states in (layer.keys, layer.values):
                size = states.shape[1] * states.shape[-1] * states.element_size()
                per_token[states.device] = per_token.get(states.device, 0) + size
    return min(_memory(device) // size for device, size in per_token.items())


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(GPU_SHARE * torch.cuda.mem_get_info(device)[0])
    return int(CPU_SHARE * psutil.virtual_memory().available)


def memory_bytes(device: torch.device) -> int:
    """What the process has: allocated on the device, or resident."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def context_of(config: PreTrainedConfig, wanted: int) -> int:
    """Tokens of prompt and answer that the model can hold; ``wanted`` 0 is as many as possible.

    Rotary embeddings whose frequencies change for *all* rows once one row is long (longrope) are kept below that
    length: a row's answer must not depend on its neighbours.
    """
    text = config.get_text_config()
    limit = context_length(config)
    ropes = getattr(text, "rope_parameters", None) or {}
    for rope in [ropes, *(value for value in ropes.values() if isinstance(value, dict))]:
        if rope.get("rope_type") in ("longrope", "dynamic"):
            original = rope.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", limit
            )
            if original < limit:
                logger.warning(
                    "context limited to %d: %s changes all rows of a batch beyond it", original, rope["rope_type"]
                )
                limit = original
    return min(limit, wanted) if wanted > 0 else limit


def fitting_context(context: int, kv_tokens: int) -> int:
    """One row alone must fit."""
    return max(1, min(context, kv_tokens - RESERVE - 1))


class Rates:
    """Tokens per second and finished answers per second, over the last seconds. Safe to read from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._steps: deque[tuple[float, int, int, int]] = deque()
        self.tokens = 0
        self.prompt_tokens = 0

    def add(self, tokens: int, prompt_tokens: int, finished: int) -> None:
        now = time.monotonic()
        with self._lock:
            self.tokens += tokens
            self.prompt_tokens += prompt_tokens
            self._steps.append((now, tokens, prompt_tokens, finished))
            self._forget(now)

    def per_second(self) -> tuple[float, float, float]:
        """Generated tokens, prompt tokens, finished answers."""
        now = time.monotonic()
        with self._lock:
            self._forget(now)
            sums = [sum(column) for column in list(zip(*self._steps))[1:]] or [0, 0, 0]
        tokens, prompt_tokens, finished = (total / SECONDS for total in sums)
        return tokens, prompt_tokens, finished

    def _forget(self, now: float) -> None:
        while self._steps and self._steps[0][0] < now - SECONDS:
            self._steps.popleft()
